"""Checkpoint files, official ones and our own, and the command that converts between them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from recur.convert.keys import renamed
from recur.convert.load import arguments, build, from_official, names, state_dict_in, to_official
from recur.reading import InputError, one_line, read_json
from recur.weights import parameter_count, unwrapped

PICKLED = (".pt", ".pth", ".bin")
ENDINGS = (".safetensors", *PICKLED)
INDEX = ".index.json"
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")
WHOLE = ("model.safetensors", "pytorch_model.bin")  # what transformers calls a checkpoint in a folder
MARK = "recur"  # the metadata entry that makes a safetensors file one of ours


class CheckpointError(OSError):
    """A file that does not hold, or cannot hold, the checkpoint that it should."""


def read_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint (weights only), and the metadata of a .safetensors file.

    Args:
        path: a .safetensors, .pt, .pth or .bin file; the .index.json of one that lies in shards, all of which are read;
            or a folder with one checkpoint, in which the names that transformers gives go before others.

    Raises: CheckpointError for anything else; for a file that holds no state_dict, or several; for an index that names
        files elsewhere; and naming all shards that are missing, and all keys of the index that no shard has.

    >>> from pathlib import Path
    >>> place = Path("doctest.safetensors")
    >>> recur.convert.write_checkpoint(place, {"weight": torch.ones(2)}, {"format": "pt"})
    >>> recur.convert.read_checkpoint(place)
    ({'weight': tensor([1., 1.])}, {'format': 'pt'})
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(INDEX):
        return _read_index(path), {}
    return _read_file(path)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path} must end in {', '.join(ENDINGS)} or {INDEX}")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: _aligned(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        held = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} must hold tensors and nothing that runs: {one_line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # on other bytes the unpickler fails in any way
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {one_line(error)}") from error
    try:
        return dict(state_dict_in(str(path), held)), {}
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at a multiple of 16 bytes, as torch's arithmetic of complex128 needs of it and of pairs viewed so.

    torch is given the memory of the safetensors file itself, in which a tensor begins at any byte.
    """
    if tensor.data_ptr() % 16 == 0:
        return tensor
    moved = torch.empty_like(tensor)
    moved.flatten().view(torch.uint8).copy_(tensor.flatten().view(torch.uint8))
    return moved


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    there = sorted(path.name for path in folder.iterdir())
    usual = [name for whole in WHOLE for name in (whole, whole + INDEX) if name in there]
    indices = [name for name in there if name.endswith(INDEX)]
    found = {_shards(name): name for name in usual[:1] or indices or there if name.endswith((*ENDINGS, INDEX))}
    if len(found) != 1:
        raise CheckpointError(f"{folder} must hold one checkpoint, got {_some([*found.values()] or there)}")
    ((shards, name),) = found.items()
    return read_checkpoint(folder / name) if len(shards) == 1 else (_read_shards(folder, shards, {}), {})


def _shards(name: str) -> tuple[str, ...]:
    """The names of all shards of the checkpoint of which this is one, or of the file itself."""
    if not (shard := SHARD.fullmatch(name)):
        return (name,)
    stem, _, count, ending = shard.groups()
    return tuple(f"{stem}-{i:0{len(count)}}-of-{count}{ending}" for i in range(1, int(count) + 1))


def _read_index(path: Path) -> dict[str, Tensor]:
    shard_of = _read_object(path).get("weight_map")
    if not (isinstance(shard_of, dict) and shard_of and all(isinstance(name, str) for name in shard_of.values())):
        raise CheckpointError(f"{path} must hold a weight_map from keys to files")
    names = sorted(set(shard_of.values()))
    # an index may come from anywhere, and reads nothing outside its folder
    if outside := [name for name in names if name in ("", ".", "..") or re.search(r"[/\\\0]", name)]:
        raise CheckpointError(f"{path}: weight_map must name files of the same folder, got {_some(outside)}")
    return _read_shards(path.parent, names, shard_of)


def _read_shards(folder: Path, names: Sequence[str], shard_of: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of all shards; of a key in several of them the tensor in the shard that the index names."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} must hold all {len(names)} shards of the checkpoint, missing: {_some(missing)}"
        )
    shards = {name: _read_file(folder / name)[0] for name in names}
    holders: dict[str, list[str]] = {}
    for name, tensors in shards.items():
        for key in tensors:
            holders.setdefault(key, []).append(name)
    if lost := [key for key in shard_of if key not in holders]:
        raise CheckpointError(f"{folder} must hold every key of its index, in no shard: {_some(lost)}")
    if twice := [key for key, held in holders.items() if len(held) > 1 and shard_of.get(key) not in held]:
        raise CheckpointError(f"{folder} must hold every key once, in several shards: {_some(twice)}")
    return {key: shards[shard_of[key] if len(held) > 1 else held[0]][key] for key, held in holders.items()}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "nothing") + more


def write_checkpoint(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a .safetensors, .pt, .pth or .bin file under another name and rename it: whole, or not there.

    Args:
        path: of the file; its ending is the format.
        tensors: name -> tensor.
        metadata: name -> text, for .safetensors.

    Raises: CheckpointError for another ending.

    >>> from pathlib import Path
    >>> place = Path("doctest.safetensors")
    >>> recur.convert.write_checkpoint(place, {"weight": torch.ones(2)})
    >>> list(recur.convert.read_checkpoint(place)[0])
    ['weight']
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path} must end in {', '.join(ENDINGS)}")
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

    What a configuration file holds besides is not written, nor are the names of wrappers.

    Args:
        path: of the file, which ends in .safetensors.
        name: the official name.
        config: the arguments of the original's constructor.
        module: ours.

    Raises: CheckpointError unless the file ends in .safetensors.

    >>> from pathlib import Path
    >>> place = Path("doctest.safetensors")
    >>> recur.convert.save_module(place, "mamba", {"d_model": 16}, recur.Mixer("mamba", dim=16))
    >>> place.exists()
    True
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path} must end in .safetensors to hold a module of recur")
    weights = {unwrapped(key): weight for key, weight in module.named_parameters()}
    write_checkpoint(path, weights, {MARK: json.dumps([name, arguments(name, config)])})


def load_module(path: Path | str) -> tuple[str, dict[str, Any], Any]:
    """The official name, the config and the module in a file of `save_module`.   Raises: CheckpointError.

    Args:
        path: of the file.

    >>> from pathlib import Path
    >>> place = Path("doctest.safetensors")
    >>> recur.convert.save_module(place, "mamba", {"d_model": 16}, recur.Mixer("mamba", dim=16))
    >>> name, config, layer = recur.convert.load_module(place)
    >>> name, config, type(layer).__name__
    ('mamba', {'d_model': 16}, 'Mixer')
    """
    tensors, metadata = read_checkpoint(path)
    if MARK not in metadata:
        raise CheckpointError(f"{path} is not a module of recur; say what it is with --from")
    try:
        tensors = {plain: tensors[key] for plain, key in renamed(str(path), tensors, unwrapped).items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
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
    formats = ", ".join(ENDINGS)
    parser = command("convert", _convert, "Convert an official checkpoint to one of recur, or back.", examples)
    parser.add_argument("source", metavar="IN", type=Path, help=f"{formats} (weights only), {INDEX}, or a folder")
    parser.add_argument("target", metavar="OUT", type=Path, help=f"{formats}; a module of ours is .safetensors")
    parser.add_argument("--from", dest="origin", metavar="NAME", choices=names(), help="what IN is, unless it is ours")
    parser.add_argument("--to", dest="goal", metavar="NAME", choices=names(), help="what OUT shall be, unless ours")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="constructor arguments (config.json beside or in IN)"
    )
    parser.epilog = f"{parser.epilog}\n\nNAME is one of {', '.join(names())}."


def _convert(arguments: argparse.Namespace) -> int:
    source, target, name = arguments.source, arguments.target, arguments.origin
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if name is None:
                name, config, module = load_module(source)
            else:
                beside = source / "config.json" if source.is_dir() else source.with_name("config.json")
                config = _config(arguments.config or beside)
                module = from_official(name, read_checkpoint(source)[0], config)
        for warning in warned:
            print(f"recur: {warning.message}", file=sys.stderr)
        if arguments.goal is None:
            save_module(target, name, config, module)
        else:
            write_checkpoint(target, to_official(arguments.goal, module))
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(str(error)) from error
    print(f"{target}: {arguments.goal or f'{name} as a module of recur'}, {parameter_count(module):,} parameters")
    return 0


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no file {path}; name the constructor's arguments with --config")
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    try:
        found = read_json(path)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(found).__name__}")
    return found
