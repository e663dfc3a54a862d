"""Official state_dicts to our modules and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from recur.convert.official import Official
from recur.convert.table import OFFICIAL
from recur.weights import unwrapped

WRAPPED = ("state_dict", "model_state_dict", "model", "module")  # where training scripts put a state_dict


def names() -> list[str]:
    """Every official module that can be read.

    >>> "mamba_lm" in recur.convert.names()
    True
    """
    return sorted(OFFICIAL)


def build(name: str, config: Mapping[str, Any]) -> Any:
    """Our module for the arguments of the original's constructor, with its first values.

    Args:
        name: one of `names()`.
        config: the arguments of the original's constructor.

    Warns: UserWarning, one, that names all entries of a configuration file which the original ignores.
    Raises: ValueError for an unknown name or argument, NotImplementedError for options not there yet.

    >>> type(recur.convert.build("longhorn", {"d_model": 16})).__name__
    'Mixer'
    """
    return _official(name).make(name, config)


def arguments(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under the names of today, without what the original ignores.   Raises: ValueError, as `build` does."""
    return _official(name).settle(name, config)[0]


def from_official(name: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """Our module with the weights of an official one: a LanguageModel, or a Mixer in our layout [B T D].

    Args:
        name:       one of `names()`.
        state_dict: as the original saves it, or as a wrapper of it does (torch.compile, DDP, FSDP, activation
            checkpointing), or what a training script saved around it. Tied aliases may be there or not, derived
            buffers are ignored.
        config:     the arguments of the original's constructor; what is left out has the original's default. What
            transformers writes into a config.json besides is ignored.

    Returns: a module of the state_dict's device and dtype (the widest, if it has several), sharing no memory with it.
    Warns: UserWarning, one, that names all entries of a configuration file which the original ignores.
    Raises: ValueError for an unknown name or argument; for no state_dict or several; for two keys that are one without
        their wrappers; or listing all keys that are missing, unexpected, misshapen, or differ from what they are tied
        to, before anything is loaded. NotImplementedError for options not there yet.

    >>> official = recur.convert.to_official("longhorn", recur.Mixer("longhorn", dim=16))
    >>> layer = recur.convert.from_official("longhorn", official, {"d_model": 16})
    >>> layer(torch.randn(1, 3, 16)).y.shape
    torch.Size([1, 3, 16])
    """
    official, state_dict = _official(name), state_dict_in("from_official: state_dict", state_dict)
    plain = official.strip(state_dict)
    state = {key: state_dict[full] for key, full in plain.items()}
    with torch.device("meta"):
        module = official.make(name, {**official.infer(state), **config})
    module.to(reduce(torch.promote_types, [tensor.dtype for tensor in state.values()] or [torch.float32]))
    _check(name, official.views(module), state)
    module.to_empty(device=next(iter(state.values())).device)
    for key, view in official.views(module).items():
        if key in state:
            view.copy_(state[key])
    return module


def state_dict_in(where: str, held: Any) -> Mapping[str, Tensor]:
    """The state_dict in what a training script saved: `held` itself, or the one in it. Errors call it `where`.

    Raises: ValueError, naming what is there instead, for none, or for several of which none is surely the model's.
    """
    if isinstance(held, Mapping) and all(_is_weight(*entry) for entry in held.items()):
        return held
    found = dict(_state_dicts(held)) if isinstance(held, Mapping) else {}
    if not found:
        kind = f"entries {', '.join(map(str, held))}" if isinstance(held, Mapping) else type(held).__name__
        raise ValueError(f"{where} must hold a state_dict, or one under {', '.join(WRAPPED)}, got {kind}")
    chosen = [place for place in found if place.rpartition(".")[2] in WRAPPED] or list(found)
    keys = {place: set(map(unwrapped, state)) for place, state in found.items()}
    same = [place for place in found if keys[place] == keys[chosen[0]]]  # averaged weights, for instance
    if len({*chosen, *same}) > 1:
        several = ", ".join(place for place in found if place in {*chosen, *same})
        raise ValueError(f"{where} must hold one state_dict, got {several}; give the one that is meant by itself")
    return found[chosen[0]]


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _state_dicts(held: Mapping[Any, Any], outer: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every state_dict that a mapping has as an entry, or inside one of the known names, by its dotted place."""
    for key, value in held.items():
        if isinstance(value, Mapping) and value and all(_is_weight(*entry) for entry in value.items()):
            yield f"{outer}{key}", value
        elif isinstance(value, Mapping) and key in WRAPPED:
            yield from _state_dicts(value, f"{outer}{key}.")


def to_official(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the official module, copied, with every tied alias, without buffers that the original computes.

    Args:
        name: one of `names()`.
        module: ours, as `build` or `from_official` makes it.

    Raises: ValueError for an unknown name, or for a module with parameters that the official one has no place for.

    >>> sorted(recur.convert.to_official("longhorn", recur.Mixer("longhorn", dim=16)))[:3]
    ['D', 'conv1d.bias', 'conv1d.weight']
    """
    return {
        key: view.clone(memory_format=torch.contiguous_format) for key, view in _official(name).views(module).items()
    }


def _official(name: str) -> Official:
    if name not in OFFICIAL:
        near = difflib.get_close_matches(name, OFFICIAL, 1, 0.0)
        raise ValueError(f"convert: name must be one of {', '.join(names())}, got {name!r}; the nearest is {near[0]!r}")
    return OFFICIAL[name]


def _check(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise one ValueError that lists everything that does not fit."""
    aliases: dict[int, list[str]] = {}
    for key, view in expected.items():
        aliases.setdefault(id(view), []).append(key)
    complaints = []
    for group in aliases.values():
        present = [key for key in group if key in state]
        if not present:
            complaints.append(f"missing: {group[0]}")
        for key in present:
            wanted, got = list(expected[key].shape), list(state[key].shape)
            if wanted != got:
                complaints.append(f"misshapen: {key} must be {wanted}, got {got}")
            elif not torch.equal(state[key], state[present[0]]):
                complaints.append(f"different: {key} must equal {present[0]}, to which it is tied")
    complaints += [f"unexpected: {key}" for key in state if key not in expected]
    if complaints:
        raise ValueError("\n  ".join([f"from_official: state_dict must fit {name} with this config, got", *complaints]))
