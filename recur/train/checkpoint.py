"""Checkpoints: tensors as safetensors, the rest as JSON, one folder a step, complete or absent.

    OUT/step-00000200/record.json          task, settings, recipes, step, curve, digests of all three files
    OUT/step-00000200/model.safetensors    weights
    OUT/step-00000200/trainer.safetensors  moments of the optimiser, state of the random generators
    OUT/config.json                        the resolved configuration, as --config reads it

A folder is written under another name and renamed when it is whole; only then the ones before it go. Tensors are
whole, whatever the run was spread over: a run may go on with another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recur.train.config import InputError

MODEL, TRAINER, RECORD, CONFIG = "model.safetensors", "trainer.safetensors", "record.json", "config.json"


@dataclass(frozen=True)
class Record:
    """What a run is, apart from its tensors."""

    config: dict[str, Any]
    recipes: list[dict[str, Any]]
    task: dict[str, Any]
    step: int
    curve: list[dict[str, Any]]


def save(
    out: Path, record: Record, weights: Mapping[str, Tensor], trainer: Mapping[str, Tensor], keep: int = 1
) -> Path:
    """Write the checkpoint of `record.step` into `out`, then remove all but the newest `keep`; returns its folder."""
    final = out / f"step-{record.step:08d}"
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(weights), partial / MODEL)
    save_file(dict(trainer), partial / TRAINER)
    content = {"sha256": _digests(partial, record), "record": asdict(record)}
    (partial / RECORD).write_text(json.dumps(content), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    os.replace(partial, final)
    _flush(out)
    for older in [path for path in checkpoints(out) if path != final][: -keep + 1 or None]:
        shutil.rmtree(older)
    return final


def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders in `out`, oldest first."""
    return sorted(path for path in out.glob("step-*") if path.is_dir())


def read_record(out: Path) -> tuple[Path, Record]:
    """The newest checkpoint folder of `out`, and its record.   Raises: InputError if there is none or it is damaged."""
    found = checkpoints(out)
    if not found:
        raise InputError(f"no checkpoint in {out}")
    folder = found[-1]
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = Record(**content["record"])
        digests = _digests(folder, record)
        changed = [name for name, digest in digests.items() if digest != content["sha256"][name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the checkpoint {folder} is damaged: {_reason(error)}") from error
    if changed:
        raise InputError(f"the checkpoint {folder} is damaged: {' and '.join(changed)} changed after it was written")
    return folder, record


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill `model` from the checkpoint in `folder`, sharded as the model is."""
    try:
        tensors = load_file(folder / MODEL)
    except SafetensorError as error:
        raise InputError(f"the checkpoint {folder} is damaged: {error}") from error
    own = named(model)
    if tensors.keys() != own.keys() or any(tensors[name].shape != own[name].shape for name in own):
        raise InputError(f"the checkpoint {folder} is damaged: its weights do not fit its recipe")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(like(tensors[name], weight))


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
            parameter = own[weight]
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
    """Every weight once, by the name it has in the model."""
    return dict(model.named_parameters())


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


def _digests(folder: Path, record: Record) -> dict[str, str]:
    """SHA-256 of each file; of the record, the content without the digests."""
    contents = {name: (folder / name).read_bytes() for name in (MODEL, TRAINER)}
    contents[RECORD] = json.dumps(asdict(record)).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot read {Path(str(error.filename)).name}"
    return f"{RECORD} is not what this version of recur writes"


def _flush(path: Path) -> None:
    """Have the disk hold `path` before a rename says that it is complete."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
