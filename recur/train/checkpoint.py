"""Checkpoints: tensors as safetensors, the rest as JSON, one folder a step, complete or absent.

    OUT/step-00000200/record.json          task, settings, recipes, data, step, curve, digests of all three files
    OUT/step-00000200/model.safetensors    weights
    OUT/step-00000200/trainer.safetensors  moments of the optimiser, state of the random generators
    OUT/config.json                        the resolved configuration, as --config reads it

A folder is written under another name and renamed when it is whole; only then the ones before it go. Tensors are
whole, whatever the run was spread over: a run may go on with another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recur.train.config import InputError
from recur.weights import unwrapped

MODEL, TRAINER, RECORD, CONFIG = "model.safetensors", "trainer.safetensors", "record.json", "config.json"
VERSION = 2  # of the layout of a checkpoint; the first had no "version" and no Record.data
STEP = re.compile(r"step-(\d{8,})(?:-(\d+))?")
Say = Callable[[str], object]


@dataclass(frozen=True)
class Record:
    """What a run is, apart from its tensors."""

    config: dict[str, Any]
    recipes: list[dict[str, Any]]
    task: dict[str, Any]
    step: int
    curve: list[dict[str, Any]]
    data: dict[str, dict[str, str]] | None = None  # by option, digests of the files it names; None: not recorded


def save(
    out: Path,
    record: Record,
    weights: Mapping[str, Tensor],
    trainer: Mapping[str, Tensor],
    keep: int = 1,
    spare: Collection[Path] = (),
) -> Path:
    """Write the checkpoint of `record.step` into `out`; returns its folder.

    Of the older ones the newest `keep - 1` stay, the one with the lowest validation loss, and those in `spare`. Newer
    ones stay. If the name is taken, by a damaged checkpoint or something else, that stays too: "-2" is appended.

    Raises: InputError if it cannot be written; the others are whole then.
    """
    name = f"step-{record.step:08d}"
    final = next(path for i in count(1) if not (path := out / (name if i == 1 else f"{name}-{i}")).exists())
    partial = out / f".{name}.partial"
    sweep(out)
    try:
        partial.mkdir(parents=True)
        save_file(dict(weights), partial / MODEL)
        save_file(dict(trainer), partial / TRAINER)
        written = asdict(record)
        content = {"version": VERSION, "sha256": _digests(partial, written), "record": written}
        (partial / RECORD).write_text(json.dumps(content), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        os.replace(partial, final)
        _flush(out)
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"cannot save step {record.step} in {out}: {reason}") from error
    finally:
        sweep(out)
    older = [path for path in checkpoints(out) if number(path) < record.step and path not in spare]
    best = lowest_loss([*older, final], record.curve)
    for path in older[: max(0, len(older) - keep + 1)]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is tried again at the next save
    return final


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders in `out`, oldest first."""
    found = {path: STEP.fullmatch(path.name) for path in out.glob("step-*") if path.is_dir()}
    order = {path: (int(match[1]), int(match[2] or 1)) for path, match in found.items() if match}
    return sorted(order, key=lambda path: order[path])


def number(folder: Path) -> int:
    """The step of a checkpoint folder, by its name."""
    match = STEP.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def lowest_loss(folders: list[Path], curve: list[dict[str, Any]]) -> Path | None:
    """The folder of the step at which the curve has its lowest validation loss; None if none was evaluated."""
    losses = {point["step"]: point["valid_loss"] for point in curve if "valid_loss" in point}
    return min(
        (path for path in folders if number(path) in losses), key=lambda path: losses[number(path)], default=None
    )


def sweep(out: Path) -> None:
    """Remove what an interrupted `save` left behind."""
    for path in out.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def read_record(out: Path, which: str = "newest", say: Say = warnings.warn) -> tuple[Path, Record]:
    """The folder and the record of a checkpoint in `out` that is whole.

    Args:
        out:   the folder of a run, or of one checkpoint.
        which: "newest"; "best", of the lowest validation loss; or a step.
        say:   called with a line that names what was passed over, and why.

    Raises: InputError if there is none, none is whole, or a newer version of recur wrote it.
    """
    found = [out] if (out / RECORD).is_file() else checkpoints(out)
    damages = []
    for folder in _in_order(found, which, out):
        try:
            record = _read(folder)
        except _Damaged as damage:
            damages.append(f"{folder.name} is damaged: {damage}")
            continue
        if damages:
            say(f"using {folder.name}; {'; '.join(damages)}")
        return folder, record
    if found != [out] and checkpoints(out) != found:  # a run under way has saved, and removed what was listed
        return read_record(out, which, say)
    if not damages:
        raise InputError(f"no checkpoint in {out}")
    raise InputError(f"no complete checkpoint in {out}: {'; '.join(damages)}")


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


def _in_order(found: list[Path], which: str, out: Path) -> list[Path]:
    """The checkpoints to try, in order."""
    if which == "newest":
        return found[::-1]
    if which == "best":
        losses = {path: _valid_loss(path) for path in found[::-1]}
        return sorted(losses, key=lambda path: losses[path])
    chosen = [path for path in found[::-1] if path == out or str(number(path)) == which]
    if found and not chosen:
        there = ", ".join(dict.fromkeys(str(number(path)) for path in found))
        raise InputError(f"no checkpoint of step {which} in {out}; there are: {there}")
    return chosen


def _valid_loss(folder: Path) -> float:
    """Of this step; infinite if it was not evaluated; -inf if there is no such number, so that `_read` says why."""
    try:
        loss = float(_content(folder)["record"]["curve"][-1].get("valid_loss", math.inf))
    except (_Damaged, LookupError, TypeError, AttributeError):
        return -math.inf
    return -math.inf if math.isnan(loss) else loss


def _content(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise _Damaged(f"cannot read {RECORD}") from error
    except ValueError as error:
        raise _Damaged(f"{RECORD} is not what this version of recur writes") from error


def _read(folder: Path) -> Record:
    """The record of a checkpoint, once all three files are known to be what was written."""
    content = _content(folder)
    try:
        version, written, expected = content.get("version", 1), content["record"], content["sha256"]
        unknown = sorted(written.keys() - {field.name for field in fields(Record)})
        if version not in (1, VERSION) or unknown:
            has = f"layout {version!r}" + (f" with {', '.join(unknown)}" if unknown else "")
            raise InputError(
                f"{folder} was written by another version of recur ({has}; this one reads layouts 1 and {VERSION}): "
                "update recur"
            )
        record = Record(**written)
        changed = [name for name, digest in _digests(folder, written).items() if digest != expected[name]]
        renamed = STEP.fullmatch(folder.name) is not None and number(folder) != record.step
        last = record.curve[-1] if record.curve else {}
        bad = [f"{RECORD} is of step {record.step}"] if renamed else []
        bad += [f"{name} is {last[name]}" for name in ("loss", "valid_loss") if not math.isfinite(last.get(name, 0.0))]
    except OSError as error:
        raise _Damaged(f"cannot read {Path(str(error.filename)).name}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise _Damaged(f"{RECORD} is not what this version of recur writes") from error
    if changed:
        raise _Damaged(f"{' and '.join(changed)} changed after it was written")
    if bad:
        raise _Damaged(" and ".join(bad))
    return record


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by their names in the model."""
    try:
        return load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint {folder} is damaged: {error}") from error


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill `model` from the checkpoint in `folder`, sharded as the model is."""
    fill(model, load_tensors(folder), f"the checkpoint {folder}: its weights do not fit its recipe")


def fill(model: nn.Module, tensors: Mapping[str, Tensor], mistake: str) -> None:
    """Fill every weight of `model` from whole tensors of the same names, without regard to wrappers' prefixes.

    Raises: InputError that begins with `mistake` and lists names missing, unexpected and misshapen; nothing is filled.
    """
    given, own = {unwrapped(name): tensor for name, tensor in tensors.items()}, named(model)
    both = [name for name in own if name in given and own[name].shape != given[name].shape]
    complaints = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "misshapen": [f"{name} {list(own[name].shape)}, got {list(given[name].shape)}" for name in both],
    }
    if listed := "; ".join(f"{kind}: {', '.join(names)}" for kind, names in complaints.items() if names):
        raise InputError(f"{mistake}: {listed}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(like(given[name], weight))


def load_trainer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Put the optimiser and this process's random generators back to where the checkpoint in `folder` left them."""
    tensors, own = load_file(folder / TRAINER), named(model)
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("|")
        if kind == f"rng{rank}":
            restore = torch.set_rng_state if rest == "cpu" else torch.cuda.set_rng_state
            restore(tensor)
        elif kind == "optimizer":
            key, weight = rest.split("|")
            parameter = own[unwrapped(weight)]
            slot = like(tensor, parameter) if tensor.shape == parameter.shape else tensor
            if key != "step":
                slot = slot.to(parameter.device)
            optimizer.state[parameter][key] = slot
    for group in optimizer.param_groups:  # a fused optimiser counts its steps on the device
        for parameter in group["params"]:
            if group.get("fused") and "step" in optimizer.state.get(parameter, {}):
                optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to(parameter.device)


def trainer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of every weight that has some, whole; all processes must ask together."""
    return {
        f"optimizer|{key}|{name}": whole(tensor)
        for name, weight in named(model).items()
        for key, tensor in optimizer.state.get(weight, {}).items()
    }


def rng_tensors() -> dict[str, Tensor]:
    """The state of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight once, by the name it has in the model without wrappers."""
    return {unwrapped(name): weight for name, weight in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if it is a shard."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().cpu().contiguous()


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor placed, and cut, as `weight` is."""
    if not hasattr(weight, "device_mesh"):
        return tensor.to(weight.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements)  # type: ignore[attr-defined]


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it.   Raises: InputError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def _digests(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file; of the record, the content without the digests."""
    found = {}
    for name in (MODEL, TRAINER):
        with (folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found | {RECORD: hashlib.sha256(json.dumps(record).encode()).hexdigest()}


def _flush(path: Path) -> None:
    """Have the disk hold `path` before a rename says that it is complete."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
