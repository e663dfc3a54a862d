"""Caches of all tokens read: they grow with the sequence unless `init_state(max_len=...)` fixes their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.forms import document_of
from recur.recipe import Flow, Site, State
from recur.shapes import readable


def extend(part: str, flow: Flow, state: State, **tokens: Tensor) -> dict[str, Any]:
    """The cache after these tokens [B T *]: every name [B L *], each sequence's tokens from slot 0 on.

    A step writes into a cache of fixed length, where it is.

    Packed, it has one row [n L *] a document. Slots that are still free hold what does not matter.
    Raises: ValueError if a cache of fixed length is full (on a CPU).
    """
    if state is None and flow.cu_seqlens is None:
        return {**tokens, "grows": True}
    if state is None:
        state = empty(len(flow.position), **tokens)
    if flow.cu_seqlens is not None:
        return _packed(flow.position, flow.cu_seqlens, tokens, state)
    in_place = flow.in_place and not state["grows"]
    return _appended(part, flow.position, tokens, state, Tensor.scatter_ if in_place else Tensor.scatter)


def fresh(site: Site, batch: int, max_len: int | None, **names: str) -> dict[str, Any]:
    """The cache before the first token of what lies in the flow under these names; of fixed length if that is given."""
    slots = {key: site.zeros(batch, max_len or 0, *site.of(name)) for key, name in names.items()}
    return {**slots, "grows": max_len is None}


def empty(rows: int, **tokens: Tensor) -> dict[str, Any]:
    """A cache of no slots for tokens like these."""
    return {name: tensor.new_zeros(rows, 0, *tensor.shape[2:]) for name, tensor in tokens.items()} | {"grows": True}


def _appended(
    part: str, seen: Tensor, tokens: dict[str, Tensor], state: dict[str, Any], scatter: Callable[..., Tensor]
) -> dict[str, Any]:
    first = next(iter(tokens))
    T = tokens[first].shape[1]
    room = state[first].shape[1] + (T if state["grows"] else 0)
    slots = seen[:, None] + torch.arange(T, device=seen.device)  # [B T]
    if readable(slots) and int(slots.max()) >= room:
        raise ValueError(f"{part}: init_state(max_len={room}) is too short for {int(slots.max()) + 1} tokens")
    new: dict[str, Any] = {"grows": state["grows"]}
    for name, tensor in tokens.items():
        cache = state[name]
        if room > cache.shape[1]:
            cache = _lengthened(cache.to(tensor.dtype), room)
        index = slots[(...,) + (None,) * (tensor.ndim - 2)].expand(-1, -1, *tensor.shape[2:])
        new[name] = scatter(cache, 1, index, tensor.to(cache.dtype))
    return new


def _packed(seen: Tensor, borders: Tensor, tokens: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(tokens))
    T, L, length = tokens[first].shape[1], state[first].shape[1], borders.diff()
    room = L
    if state["grows"] and len(
        seen
    ):  # no shape in a graph depends on borders: there every document may be the whole row
        room += T if torch.compiler.is_compiling() else int(length.max())
    at = torch.arange(room, device=seen.device)
    source = (borders[:-1, None] + at - seen[:, None]).clamp(0, max(T - 1, 0))  # [n room]
    is_new = (at >= seen[:, None]) & (at < (seen + length)[:, None])
    new: dict[str, Any] = {"grows": state["grows"]}
    for name, tensor in tokens.items():
        old = _lengthened(state[name].to(tensor.dtype), room)
        new[name] = torch.where(is_new[(...,) + (None,) * (tensor.ndim - 2)], tensor[0][source], old) if T else old
    return new


def _lengthened(cache: Tensor, room: int) -> Tensor:
    """[B L *] -> [B room *]."""
    return F.pad(cache, (0, 0) * (cache.ndim - 2) + (0, room - cache.shape[1]))


def row_of(flow: Flow) -> Tensor:
    """[B T] the row of the cache that each token belongs to."""
    B, T = flow["x"].shape[:2]
    if flow.cu_seqlens is not None:
        return document_of(flow.cu_seqlens, T)[None]
    return torch.arange(B, device=flow["x"].device)[:, None].expand(B, T)
