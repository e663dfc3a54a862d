"""Checkpoint files, official ones and our own, and the command that turns one into the other."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from recur.convert.load import build, from_official, names, to_official
from recur.reading import one_line, read_json

PICKLED = (".pt", ".pth", ".bin")
WRAPPED = ("state_dict", "model_state_dict", "model")  # where training scripts put a state_dict
MARK = "recur"  # the metadata entry that makes a safetensors file one of ours


class CheckpointError(OSError):
    """A file that does not hold, or cannot hold, the checkpoint that it should."""


def read_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors, .pt, .pth or .bin file (weights only), and the metadata of the first kind.

    Raises: CheckpointError for anything else.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLED):
        raise CheckpointError(f"{path} must end in .safetensors, {', '.join(PICKLED)}")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        held = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} must hold tensors and nothing that runs: {one_line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # bytes that are no pickle have the unpickler stumble anywhere
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {one_line(error)}") from error
    wrapped = (held[key] for key in WRAPPED if isinstance(held, Mapping) and isinstance(held.get(key), Mapping))
    inside = next(wrapped, held)
    if not (isinstance(inside, Mapping) and inside and all(isinstance(value, Tensor) for value in inside.values())):
        raise CheckpointError(f"{path} must hold a state_dict, or one under {', '.join(WRAPPED)}")
    return dict(inside), {}


def write_checkpoint(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors, .pt, .pth or .bin file under another name and rename it: whole, or not there.

    Raises: CheckpointError for another ending.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLED):
        raise CheckpointError(f"{path} must end in .safetensors, {', '.join(PICKLED)}")
    apart = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            partial.write_bytes(save(apart, {"format": "pt", **(metadata or {})}))
        else:
            torch.save(apart, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_module(path: Path | str, name: str, config: Mapping[str, Any], module: nn.Module) -> None:
    """Write a module that is the official `name` of this config: our tensors, the name and the config as metadata.

    Raises: CheckpointError unless the file ends in .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors to hold a module of recur")
    write_checkpoint(path, dict(module.named_parameters()), {MARK: json.dumps([name, dict(config)])})


def load_module(path: Path | str) -> tuple[str, dict[str, Any], Any]:
    """The official name, the config and the module in a file of `save_module`.   Raises: CheckpointError."""
    tensors, metadata = read_checkpoint(path)
    if MARK not in metadata:
        raise CheckpointError(f"{path} is no module of recur; say what it is with --from")
    name, config = json.loads(metadata[MARK])
    module = build(name, config)
    weights = dict(module.named_parameters())
    wrong = sorted(set(weights) ^ set(tensors)) or [key for key in weights if weights[key].shape != tensors[key].shape]
    if wrong:
        raise CheckpointError(f"{path} does not fit {name}: {', '.join(wrong)}")
    for key, weight in weights.items():
        weight.data = tensors[key]
    return name, config, module


def add(command: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add `recur convert` to a command line."""
    examples = (
        "recur convert pytorch_model.bin mamba.safetensors --from mamba_lm --config config.json; "
        "recur convert mamba.safetensors model.safetensors --to mamba_hf; "
        "recur convert pytorch_model.bin model.safetensors --from mamba_lm --to mamba_hf --config config.json"
    )
    parser = command("convert", _convert, "Turn an official checkpoint into one of ours, or ours into one.", examples)
    parser.add_argument("source", metavar="IN", type=Path, help=".safetensors, .pt, .pth or .bin (weights only)")
    parser.add_argument("target", metavar="OUT", type=Path, help="the same; a module of ours is .safetensors")
    parser.add_argument("--from", dest="origin", metavar="NAME", choices=names(), help="what IN is, unless it is ours")
    parser.add_argument("--to", dest="goal", metavar="NAME", choices=names(), help="what OUT shall be, unless ours")
    parser.add_argument("--config", metavar="FILE", type=Path, help="constructor arguments (config.json beside IN)")
    parser.epilog = f"{parser.epilog}\n\nNAME is one of {', '.join(names())}."


def _convert(arguments: argparse.Namespace) -> int:
    source, target, name = arguments.source, arguments.target, arguments.origin
    try:
        if name is None:
            name, config, module = load_module(source)
        else:
            config = _config(arguments.config or source.with_name("config.json"))
            module = from_official(name, read_checkpoint(source)[0], config)
        if arguments.goal is None:
            save_module(target, name, config, module)
        else:
            write_checkpoint(target, to_official(arguments.goal, module))
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(str(error)) from error
    parameters = sum(weight.numel() for weight in module.parameters())
    print(f"{target}: {arguments.goal or f'{name} as a module of recur'}, {parameters:,} parameters")
    return 0


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no file {path}; name the constructor's arguments with --config")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(config).__name__}")
    return config
