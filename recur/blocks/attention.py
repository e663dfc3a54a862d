"""Softmax attention and rotary positions, for hybrids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.axes import RecipeError, Spec
from recur.blocks.cache import empty, extend
from recur.primitives.forms import document_of
from recur.primitives.rotary import rotary_frequencies, rotate
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param


@dataclass(frozen=True)
class Rotary(Part):
    """Turn pairs of channels of each head by position times frequency: Rotary("q k").

    Args:
        names:     tensors [H K], K even.
        base:      slowest frequency 1/base (exactly, if inclusive).
        inclusive: frequencies base^(-j/(K/2 - 1)), as RetNet; otherwise base^(-2j/K).
        layout:    pairs (2j, 2j+1) "interleaved", or (j, j + K/2) "half".
        stored:    the frequencies are frozen float32 weights, as checkpoints have them, instead of float64 numbers.
    """

    names: str
    base: float = 10000.0
    inclusive: bool = False
    layout: str = "interleaved"
    stored: bool = False

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: axes.rank(name, 2) for name in self.names.split()}

    def params(self, site: Site) -> Mapping[str, Param]:
        if not self.stored:
            return {}
        K = site.of(self.names.split()[0])[-1]

        def fill(weight: Tensor) -> None:
            weight.copy_(self._frequencies(K, weight.device))

        return {"frequencies": Param((K // 2,), fill, decay=False, float32=True, trainable=False)}

    def _frequencies(self, K: int, device: torch.device) -> Tensor:
        return rotary_frequencies(K, base=self.base, inclusive=self.inclusive, device=device)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        turned = {}
        for name in self.names.split():
            K, device = flow[name].shape[-1], flow.position.device
            frequencies = weights.frequencies if self.stored else self._frequencies(K, device)
            turned[name] = rotate(flow[name], flow.positions(), frequencies, layout=self.layout)
        return flow.set(**turned), None

    def formula(self) -> str:
        return ", ".join(f"{name} <- rotate({name}, t * {self.base:g}^(-j..))" for name in self.names.split())


@dataclass(frozen=True)
class RelPos(Part):
    """Relative positions that the data decide, from complex gates a [H J], one for a pair of channels 2j, 2j+1.

    law: "intended": both channels of a pair decay and turn by prod_{s<r<=t} a_r[j] between tokens s and t, which an
             OuterScan or a GatedAttention does with the decay [H K] written here;
         "literal": as released. q <- q R_t, k <- k / R_t with R_t[j] = max(Re prod_{i<=j} a_t[i], 1e-10): a product
             over channels and not over time, so no positions, and 1/R is huge wherever the real part is not positive.
    """

    q: str = "q"
    k: str = "k"
    decay: str = "log_a"
    law: str = "intended"

    def __post_init__(self) -> None:
        if self.law not in ("intended", "literal"):
            raise RecipeError(f'RelPos: law must be "intended" or "literal", got {self.law!r}')

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes.same(self.q, self.k)
        axes.rank(self.decay, len(found))
        return {self.decay: found} if self.law == "intended" else {self.q: found, self.k: found}

    def facts(self, site: Site) -> Mapping[str, Any]:
        gates, channels = site.of(self.decay), site.of(self.q)
        if (*gates[:-1], 2 * gates[-1]) != channels:
            raise RecipeError(
                f"RelPos: {self.decay} must hold a gate for 2 channels of {self.q} {list(channels)}, got {list(gates)}"
            )
        return {}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        log_a = flow[self.decay]
        if self.law == "intended":
            return flow.set(**{self.decay: log_a.repeat_interleave(2, -1)}), None
        reach = log_a.cumsum(-1).exp().real.clamp(min=1e-10).repeat_interleave(2, -1)
        q, k = flow[self.q], flow[self.k]
        return flow.set(**{self.q: (q * reach).to(q.dtype), self.k: (k / reach).to(k.dtype)}), None

    def formula(self) -> str:
        if self.law == "intended":
            return f"{self.decay} for both channels of a pair"
        return f"R = max(Re prod_{{i<=j}} a[i], 1e-10), {self.q} <- {self.q} R, {self.k} <- {self.k} / R"


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
        new = extend("Attention", flow, state, k=k, v=v)
        if state is None and flow.cu_seqlens is None:
            return flow.set(**{self.out: _attend(q, k, v, None)}), new
        if flow.cu_seqlens is not None:
            (k, v), mask = _packed(flow, state or empty(len(flow.position), k=k, v=v), k=k, v=v)
        else:
            k, v, mask = new["k"], new["v"], _visible(flow, new["k"].shape[1])
        return flow.set(**{self.out: _attend(q, k, v, mask)}), new

    def formula(self) -> str:
        return f"{self.out}_t = sum_{{s<=t}} softmax({self.q}_t . {self.k}_s / sqrt(K)) {self.v}_s"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q [B T H K] over k, v [B L G *], through the mask [B T L] or causally if there is none."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k.to(q.dtype), v.to(q.dtype)))
    mask = None if mask is None else mask[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return y.transpose(1, 2)


def _visible(flow: Flow, room: int) -> Tensor:
    """[B T L] which slot of the cache each query may see."""
    return torch.arange(room, device=flow.position.device) <= flow.positions()[..., None]


def _packed(flow: Flow, state: dict[str, Any], **tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Packed documents: caches and row in one, each tensor [1 n*L + T *]; who may see what [1 T n*L + T]."""
    borders, seen = flow.cu_seqlens, flow.position
    assert borders is not None
    T, n, L = flow["x"].shape[1], len(seen), state[next(iter(tokens))].shape[1]
    document, token = document_of(borders, T), torch.arange(T, device=seen.device)
    slot = torch.arange(L, device=seen.device)
    mine = document[:, None, None] == torch.arange(n, device=seen.device)[:, None]
    cached = mine & (slot < seen[:, None])  # [T n L]
    fresh = (document[:, None] == document) & (token[:, None] >= token)
    joined = [torch.cat([state[name].to(t.dtype).flatten(0, 1), t[0]])[None] for name, t in tokens.items()]
    return joined, torch.cat([cached.flatten(1), fresh], dim=1)[None]
