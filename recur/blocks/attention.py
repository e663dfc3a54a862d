"""Softmax attention and rotary positions, for hybrids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.axes import RecipeError, Spec
from recur.primitives.forms import document_of
from recur.primitives.rotary import rotary_frequencies, rotate
from recur.recipe import Axes, Flow, Part, Site, State


@dataclass(frozen=True)
class Rotary(Part):
    """Turn pairs of channels of each head by position times frequency: Rotary("q k").

    Args:
        names:     tensors [H K], K even.
        base:      slowest frequency 1/base (exactly, if inclusive).
        inclusive: frequencies base^(-j/(K/2 - 1)), as RetNet; otherwise base^(-2j/K).
        layout:    pairs (2j, 2j+1) "interleaved", or (j, j + K/2) "half".
    """

    names: str
    base: float = 10000.0
    inclusive: bool = False
    layout: str = "interleaved"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: axes.rank(name, 2) for name in self.names.split()}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        turned, positions = {}, flow.positions()
        options: dict[str, Any] = {"base": self.base, "inclusive": self.inclusive, "device": flow.position.device}
        for name in self.names.split():
            frequencies = rotary_frequencies(flow[name].shape[-1], **options)
            turned[name] = rotate(flow[name], positions, frequencies, layout=self.layout)
        return flow.set(**turned), None

    def formula(self) -> str:
        return ", ".join(f"{name} <- rotate({name}, t * {self.base:g}^(-j..))" for name in self.names.split())


@dataclass(frozen=True)
class Attention(Part):
    """Causal softmax attention: y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s, keys and values kept as a cache.

    q [H K]; k [G K] and v [G V] (G divides H). The cache grows with the text, or is `init_state(max_len=...)` long and
    then never reallocated.
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        (H, K), (G, K2), (G2, V) = axes.rank(self.q, 2), axes.rank(self.k, 2), axes.rank(self.v, 2)
        if (G, K) != (G2, K2):
            raise RecipeError(
                f"{axes.reader} needs {self.q} [H K], {self.k} [G K], {self.v} [G V], "
                f"got [{H} {K}], [{G} {K2}], [{G2} {V}]"
            )
        return {self.out: (H, V)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return {
            "k": site.zeros(batch, max_len or 0, *site.of(self.k)),
            "v": site.zeros(batch, max_len or 0, *site.of(self.v)),
            "grows": max_len is None,
        }

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v = flow[self.q], flow[self.k], flow[self.v]
        seen = flow.position
        if state is None and flow.cu_seqlens is None:
            return flow.set(**{self.out: _attend(q, k, v, None)}), {"k": k, "v": v, "grows": True}
        if state is None:
            empty = (len(seen), 0)
            state = {"k": k.new_zeros(*empty, *k.shape[2:]), "v": v.new_zeros(*empty, *v.shape[2:]), "grows": True}
        if flow.cu_seqlens is not None:
            new, keys, values, mask = _packed(flow, k, v, state)
        else:
            in_place = flow.form == "step" and not state["grows"]
            new, mask = _append(seen, k, v, state, Tensor.scatter_ if in_place else Tensor.scatter)
            keys, values = new["k"], new["v"]
        return flow.set(**{self.out: _attend(q, keys, values, mask)}), new

    def formula(self) -> str:
        return f"{self.out}_t = sum_{{s<=t}} softmax({self.q}_t . {self.k}_s / sqrt(K)) {self.v}_s"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q [B T H K] over k, v [B L G *], through the mask [B T L] or causally if there is none."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k.to(q.dtype), v.to(q.dtype)))
    mask = None if mask is None else mask[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def _append(
    seen: Tensor, k: Tensor, v: Tensor, state: dict[str, Any], scatter: Callable[..., Tensor]
) -> tuple[dict[str, Any], Tensor]:
    """The cache with the new tokens at their positions, and which slot each query may see [B T L]."""
    T = k.shape[1]
    room = state["k"].shape[1] + (T if state["grows"] else 0)
    slots = seen[:, None] + torch.arange(T, device=seen.device)  # [B T]
    if seen.device.type == "cpu" and not torch.compiler.is_compiling() and slots.numel() and int(slots.max()) >= room:
        raise ValueError(f"Attention: init_state(max_len={room}) is too short for {int(slots.max()) + 1} tokens")
    new: dict[str, Any] = {"grows": state["grows"]}
    for name, tensor in (("k", k), ("v", v)):
        cache = state[name]
        if room > cache.shape[1]:
            cache = F.pad(cache.to(tensor.dtype), (0, 0, 0, 0, 0, room - cache.shape[1]))
        index = slots[..., None, None].expand(-1, -1, *tensor.shape[2:])
        new[name] = scatter(cache, 1, index, tensor.to(cache.dtype))
    return new, torch.arange(room, device=seen.device) <= slots[..., None]


def _packed(flow: Flow, k: Tensor, v: Tensor, state: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Packed documents: the cache after them, keys and values of caches and row in one, the mask [1 T n*L + T]."""
    borders, seen = flow.cu_seqlens, flow.position
    assert borders is not None
    T, n, L = k.shape[1], len(seen), state["k"].shape[1]
    document, token = document_of(borders, T), torch.arange(T, device=seen.device)
    slot = torch.arange(L, device=seen.device)
    cached = (document[:, None, None] == torch.arange(n, device=seen.device)[:, None]) & (
        slot < seen[:, None]
    )  # [T n L]
    fresh = (document[:, None] == document) & (token[:, None] >= token)
    mask = torch.cat([cached.flatten(1), fresh], dim=1)[None]
    length = borders.diff()
    room = L + int(length.max()) if state["grows"] and n else L
    at = torch.arange(room, device=seen.device)
    source = (borders[:-1, None] + at - seen[:, None]).clamp(0, max(T - 1, 0))  # [n room]
    is_new = (at >= seen[:, None]) & (at < (seen + length)[:, None])
    new: dict[str, Any] = {"grows": state["grows"]}
    joined = []
    for name, tensor in (("k", k), ("v", v)):
        cache = state[name].to(tensor.dtype)
        joined.append(torch.cat([cache.flatten(0, 1), tensor[0]])[None])
        old = F.pad(cache, (0, 0, 0, 0, 0, room - L))
        new[name] = torch.where(is_new[..., None, None], tensor[0][source], old) if T else old
    return new, joined[0], joined[1], mask
