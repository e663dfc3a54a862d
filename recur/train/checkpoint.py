"""Checkpoints: tensors as safetensors, the rest as JSON, one folder a step, complete or absent.

    OUT/step-00000200/record.json          recipe, vocabulary, settings, step, curve, digests of all three files
    OUT/step-00000200/model.safetensors    weights
    OUT/step-00000200/trainer.safetensors  moments of the optimiser, state of the random generator

A folder is written under another name and renamed when it is whole; only then the one before it goes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from recur.train.data import InputError
from recur.train.settings import Point, Settings

MODEL, TRAINER, RECORD = "model.safetensors", "trainer.safetensors", "record.json"


@dataclass(frozen=True)
class Record:
    """What a run is, apart from its tensors. The digest of its text tells whether a resumed run reads the same one."""

    settings: Settings
    recipe: dict[str, Any]
    vocabulary: str
    text_sha256: str
    step: int
    curve: list[Point]


def save(out: Path, record: Record, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write the checkpoint of `record.step` into `out`, then remove older ones; returns its folder."""
    final = out / f"step-{record.step:08d}"
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / MODEL))
    save_file(_trainer_tensors(optimizer), partial / TRAINER)
    content = {"sha256": _digests(partial, record), "record": asdict(record)}
    (partial / RECORD).write_text(json.dumps(content), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    os.replace(partial, final)
    _flush(out)
    for older in checkpoints(out):
        if older != final:
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
        known = content["record"]
        settings, curve = Settings(**known["settings"]), [Point(**point) for point in known["curve"]]
        record = Record(**{**known, "settings": settings, "curve": curve})
        digests = _digests(folder, record)
        changed = [name for name, digest in digests.items() if digest != content["sha256"][name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the checkpoint {folder} is damaged: {_reason(error)}") from error
    if changed:
        raise InputError(f"the checkpoint {folder} is damaged: {' and '.join(changed)} changed after it was written")
    return folder, record


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill `model` from the checkpoint in `folder`."""
    try:
        load_model(model, folder / MODEL)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"the checkpoint {folder} is damaged: its weights do not fit its recipe") from error


def load_trainer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimiser and torch's random generator back to where the checkpoint in `folder` left them."""
    tensors = load_file(folder / TRAINER)
    torch.set_rng_state(tensors.pop("rng"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _trainer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    moments = {f"{index}.{key}": tensor.contiguous() for index, slot in state.items() for key, tensor in slot.items()}
    return {**moments, "rng": torch.get_rng_state()}


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
