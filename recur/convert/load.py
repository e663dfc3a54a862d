"""Official state_dicts to our modules and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from recur.convert.official import Official
from recur.convert.table import OFFICIAL


def names() -> list[str]:
    """Every official module that can be read."""
    return sorted(OFFICIAL)


def build(name: str, config: Mapping[str, Any]) -> Any:
    """Our module for the arguments of the original's constructor, with its first values.

    Raises: ValueError for an unknown name or argument, NotImplementedError for options not there yet.
    """
    return _official(name).make(name, config)


def from_official(name: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """Our module with the weights of an official one: a LanguageModel, or a Mixer in our layout [B T D].

    Args:
        name:       one of `names()`.
        state_dict: as the original saves it. Tied aliases may be there or not, derived buffers are ignored.
        config:     the arguments of the original's constructor; what is left out has the original's default.

    Returns: a module of the state_dict's device and dtype (the widest, if it has several), sharing no memory with it.
    Raises: ValueError for an unknown name or argument; or listing all keys that are missing, unexpected, misshapen, or
        differ from what they are tied to, before anything is loaded. NotImplementedError for options not there yet.
    """
    official = _official(name)
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


def to_official(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the official module, copied, with every tied alias, without buffers that the original computes.

    Raises: ValueError for an unknown name, or for a module with parameters that the official one has no place for.
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
