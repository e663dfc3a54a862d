"""Softmax attention and rotary positions, for hybrids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.attention import SDPBackend, sdpa_kernel

from recur.axes import RecipeError, Spec
from recur.blocks.cache import empty, extend, fresh, row_of
from recur.primitives.attention import forgetting_softmax, visible
from recur.primitives.forms import document_of
from recur.primitives.operators import transformed
from recur.primitives.rotary import rotary_frequencies, rotate
from recur.recipe import Axes, Flow, Part, Site, State
from recur.shapes import accumulation_dtype, all_finite
from recur.weights import Param


@dataclass(frozen=True)
class Rotary(Part):
    """Rotate pairs of channels of each head by position times frequency: Rotary("q k").

    Args:
        names:     tensors [H K], K even, or odd if stored: then the last channel stays as it is.
        base:      slowest frequency 1/base (exactly, if inclusive).
        inclusive: frequencies base^(-j/(K/2 - 1)), as RetNet; otherwise base^(-2j/K).
        layout:    pairs (2j, 2j+1) "interleaved", or (j, j + K/2) "half".
        stored:    the frequencies are frozen float32 weights, as checkpoints have them, instead of float64 numbers.

    >>> recur.blocks.Rotary("q k").formula()
    'q <- rotate(q, t * 10000^(-j..)), k <- rotate(k, t * 10000^(-j..))'
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
        return {"frequencies": Param((K // 2,), self._fill, decay=False, float32=True, trainable=False)}

    def _fill(self, weight: Tensor) -> None:
        weight.copy_(self._frequencies(2 * len(weight), weight.device))

    def _frequencies(self, K: int, device: torch.device) -> Tensor:
        return rotary_frequencies(K, base=self.base, inclusive=self.inclusive, device=device)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        rotated, positions = {}, flow.positions()
        frequencies: dict[int, Tensor] = {}  # found once for all tensors of one width
        for name in self.names.split():
            K, device = flow[name].shape[-1], flow.position.device
            if K not in frequencies:
                found = partial(self._frequencies, K, device)
                shared = ("Rotary", K, self.base, self.inclusive)
                frequencies[K] = weights.frequencies if self.stored else flow.once(shared, found)
            rotated[name] = rotate(flow[name], positions, frequencies[K], layout=self.layout, form=flow.form)
        return flow.set(**rotated), None

    def formula(self) -> str:
        return ", ".join(f"{name} <- rotate({name}, t * {self.base:g}^(-j..))" for name in self.names.split())


@dataclass(frozen=True)
class RelPos(Part):
    """Relative positions that the data decide, from complex gates a [H J], one for each pair of channels 2j, 2j+1.

    Args:
        q: queries [H K].
        k: keys [H K].
        decay: log a [H J], which becomes [H K].
        law: "intended": both channels of a pair decay and rotate by prod_{s<r<=t} a_r[j] between tokens s and t, which
            an OuterScan or a GatedAttention does with the decay [H K] written here. "literal": as released, q <- q R_t
            and k <- k / R_t with R_t[j] = max(Re prod_{i<=j} a_t[i], 1e-10): a product over channels and not over time,
            so no positions, and 1/R is huge wherever the real part is not positive.

    >>> recur.blocks.RelPos().formula()
    'log_a for both channels of a pair'
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
        decay = log_a.cumsum(-1).exp().real.clamp(min=1e-10).repeat_interleave(2, -1)
        q, k = flow[self.q], flow[self.k]
        return flow.set(**{self.q: (q * decay).to(q.dtype), self.k: (k / decay).to(k.dtype)}), None

    def formula(self) -> str:
        if self.law == "intended":
            return f"{self.decay} for both channels of a pair"
        return f"R = max(Re prod_{{i<=j}} a[i], 1e-10), {self.q} <- {self.q} R, {self.k} <- {self.k} / R"


@dataclass(frozen=True)
class Attention(Part):
    """Causal softmax attention: y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s, keys and values kept as a cache.

    The cache grows with the sequence, or is `init_state(max_len=...)` long and then never reallocated.

    Args:
        q: queries [H K].
        k: keys [G K]; G divides H.
        v: values [G V].
        out: y [H V].
        fused: False forms the matrix of all scores, whose gradient stays exact where a softmax of huge scores is
            saturated.

    >>> recur.blocks.Attention().formula()
    'y_t = sum_{s<=t} softmax(q_t . k_s / sqrt(K)) v_s'
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    out: str = "y"
    fused: bool = True

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        (H, K), (G, K2), (G2, V) = axes.rank(self.q, 2), axes.rank(self.k, 2), axes.rank(self.v, 2)
        if (G, K) != (G2, K2):
            raise RecipeError(
                f"{axes.reader} needs {self.q} [H K], {self.k} [G K], {self.v} [G V], "
                f"got [{H} {K}], [{G} {K2}], [{G2} {V}]"
            )
        return {self.out: (H, V)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return fresh(site, batch, max_len, k=self.k, v=self.v)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v = flow[self.q], flow[self.k], flow[self.v]
        new = extend("Attention", flow, state, k=k, v=v)
        mask = None
        if flow.cu_seqlens is not None:
            (k, v), mask = _packed(flow, state or empty(len(flow.position), k=k, v=v), k=k, v=v)
        elif state is not None:
            k, v, mask = new["k"], new["v"], _visible(flow, new["k"].shape[1])
        (q, k, v), lost = _finite(flow, q, k, v, mask)
        return flow.set(**{self.out: self._attend(q, k, v, mask).masked_fill(lost, math.nan)}), new

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B T H K] over k, v [B L G *], through the mask [B T L] or causally if there is none."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k.to(q.dtype), v.to(q.dtype)))
        mask = None if mask is None else mask[:, None]
        # fused attention has first derivatives in reverse mode alone
        with nullcontext() if self.fused and not transformed() else sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2)

    def formula(self) -> str:
        return f"{self.out}_t = sum_{{s<=t}} softmax({self.q}_t . {self.k}_s / sqrt(K)) {self.v}_s"


@dataclass(frozen=True)
class GatedAttention(Attention):
    """Softmax attention with gated scores: q_t . Re(k_s prod_{s<r<=t} a_r) / sqrt(K), as many heads of k and v as of q.

    Differences of running sums are taken for every pair of tokens and every channel, so nothing overflows and memory is
    O(B T^2 H K).

    Args:
        q: queries [H K].
        k: keys [H K].
        v: values [H V].
        out: y [H V].
        fused: False forms the matrix of all scores, whose gradient stays exact where a softmax of huge scores is
            saturated.
        decay: log a [H K], complex.

    >>> recur.blocks.GatedAttention().formula()
    'y_t = sum_{s<=t} softmax(q_t . Re(k_s prod_{s<r<=t} exp(log_a_r)) / sqrt(K)) v_s'
    """

    decay: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = super().shapes(axes)
        axes.same(self.q, self.k, self.decay)
        return written

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        none = site.memory(batch, *site.of(self.q))
        total = torch.complex(none, none)
        since = total[:, None].expand(-1, max_len or 0, -1, -1).clone()
        return super().init_state(site, batch, max_len) | {"since": since, "total": total}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, log_a = (flow[name] for name in (self.q, self.k, self.v, self.decay))
        good = log_a.isfinite() & log_a.real.exp().isfinite()  # running sums would hand on what is not
        log_a, k = torch.where(good, log_a, 0), k.masked_fill(~good, math.nan)
        since, total = _summed(flow, log_a, None if state is None else state["total"])
        tokens = {"k": k, "v": v, "since": since}
        new = extend("GatedAttention", flow, state, **tokens)
        if flow.cu_seqlens is not None:
            (k, v, since_key), mask = _packed(flow, state or empty(len(flow.position), **tokens), **tokens)
        else:
            k, v, since_key, mask = new["k"], new["v"], new["since"], _visible(flow, new["k"].shape[1])
        gap = since[:, :, None] - since_key[:, None]  # [B T L H K]
        (q, k, v), lost = _finite(flow, q, k, v, mask)
        rotation = torch.where(mask[..., None, None], gap.imag, 0).cos()
        kept = torch.where(mask[..., None, None], gap.real, -math.inf).exp() * rotation
        scores = torch.einsum("bthk,blhk,btlhk->bthl", q.to(kept.dtype), k.to(kept.dtype), kept)
        share = (scores / math.sqrt(q.shape[-1])).masked_fill(~mask[:, :, None], -math.inf).softmax(-1)
        y = torch.einsum("bthl,blhv->bthv", share, v.to(kept.dtype)).to(v.dtype)
        return flow.set(**{self.out: y.masked_fill(lost, math.nan)}), new | {"total": total}

    def formula(self) -> str:
        seen = f"Re({self.k}_s prod_{{s<r<=t}} exp({self.decay}_r))"
        return f"{self.out}_t = sum_{{s<=t}} softmax({self.q}_t . {seen} / sqrt(K)) {self.v}_s"


def _summed(flow: Flow, log_a: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Running sums of log decays [B T *] in every document, from `before` [B *] on, and the last ones."""
    before = log_a.new_zeros(len(flow.position), *log_a.shape[2:]) if before is None else before
    reached = log_a.cumsum(1)
    if flow.cu_seqlens is None:
        since = before[:, None] + reached
        return since, since[:, -1] if since.shape[1] else before
    reached = torch.cat([torch.zeros_like(before[:1]), reached[0]])
    start, end = reached[flow.cu_seqlens[:-1]], reached[flow.cu_seqlens[1:]]
    return reached[None, 1:] + (before - start)[row_of(flow)], before + end - start


@dataclass(frozen=True)
class ForgettingAttention(Attention):
    """Softmax attention with a forget gate: y_t = sum_s softmax_s(q_t . k_s / sqrt(K) + sum_{s<r<=t} log_f_r) v_s.

    Args:
        q: queries [H K].
        k: keys [G K], G divides H.
        v: values [G V].
        out: y [H V].
        fused: of `Attention`; without effect here, the matrix of all scores is always formed.
        decay: log f [H], real.
        window: how many tokens a query sees, its own included; None sees all before it.

    >>> recur.blocks.ForgettingAttention().formula()
    'y_t = sum_{s<=t} softmax(q_t . k_s / sqrt(K) + sum_{s<r<=t} log_f_r) v_s'
    """

    decay: str = "log_f"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise RecipeError(f"ForgettingAttention: window must be at least 1, got {self.window}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = super().shapes(axes)
        axes.must(self.decay, axes[self.q][:1])
        return written

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        none = site.memory(batch, *site.of(self.decay))
        since = none[:, None].expand(-1, max_len or 0, -1).clone()
        return super().init_state(site, batch, max_len) | {"since": since, "total": none}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, log_f = (flow[name] for name in (self.q, self.k, self.v, self.decay))
        log_f = log_f.to(accumulation_dtype(log_f))
        good = log_f.isfinite() & log_f.exp().isfinite()
        shared = good.unflatten(2, (k.shape[2], -1)).all(-1)  # [B T G]
        log_f, k = torch.where(good, log_f, 0), k.masked_fill(~shared[..., None], math.nan)
        since, total = _summed(flow, log_f, None if state is None else state["total"])
        tokens, at = {"k": k, "v": v, "since": since}, flow.positions()
        new = extend("ForgettingAttention", flow, state, **tokens)
        if flow.cu_seqlens is not None:
            old = state or empty(len(flow.position), **tokens)
            (k, v, since_key), mask = _packed(flow, old, **tokens)
            slots = torch.arange(old["k"].shape[1], device=at.device).expand(len(flow.position), -1)
            mask = mask & visible(at, torch.cat([slots.flatten(), at[0]])[None], self.window)
        else:
            k, v, since_key = new["k"], new["v"], new["since"]
            mask = visible(at, torch.arange(k.shape[1], device=at.device), self.window)
        (q, k, v), lost = _finite(flow, q, k, v, mask)
        y = forgetting_softmax(q, k, v, since, since_key, mask.expand(len(q), -1, -1))
        return flow.set(**{self.out: y.masked_fill(lost, math.nan)}), new | {"total": total}

    def formula(self) -> str:
        scores = f"{self.q}_t . {self.k}_s / sqrt(K) + sum_{{s<r<=t}} {self.decay}_r"
        within = "" if self.window is None else f", s > t - {self.window}"
        return f"{self.out}_t = sum_{{s<=t{within}}} softmax({scores}) {self.v}_s"


def _finite(
    flow: Flow, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries [B T H K], keys and values [B L G *] with zeros for what is not finite, and where y is lost [B T H 1].

    A softmax gives tokens that are masked a weight of 0, and 0 times NaN is NaN: a later token would change an earlier
    one, or another document. y is lost instead where a query is not finite or sees a key or value that is not; the
    square of a query or key has to be, for then no score overflows.
    A single token of each row sees all there is, so nothing need be done for it.
    """
    T = q.shape[1]
    if T <= 1 and flow.cu_seqlens is None:
        return (q, k, v), q.new_zeros((), dtype=torch.bool)
    heads, given = q.shape[2], (q, k, v)
    norms = [vector_norm(x.detach(), dim=-1, dtype=accumulation_dtype(x)) for x in given]
    if all(map(all_finite, norms)):
        return given, q.new_zeros((), dtype=torch.bool)
    norm_q, norm_k, norm_v = norms
    bad_q, bad = ~(norm_q < math.inf), ~(norm_k + norm_v < math.inf)  # NaN is not less either
    if mask is None:  # from the first one on, that with the most tokens left
        left = torch.arange(T, 0, -1, device=q.device)[:, None]
        seen = left <= (bad * left).amax(1, keepdim=True)  # [B T G]
    else:
        seen = mask.float() @ bad.float() > 0
    lost = bad_q | seen.repeat_interleave(heads // bad.shape[2], 2)
    q, k, v = (x.masked_fill(rows[..., None], 0) for x, rows in zip(given, (bad_q, bad, bad), strict=True))
    return (q, k, v), lost[..., None]


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
    new = (document[:, None] == document) & (token[:, None] >= token)
    joined = [torch.cat([state[name].to(t.dtype).flatten(0, 1), t[0]])[None] for name, t in tokens.items()]
    return joined, torch.cat([cached.flatten(1), new], dim=1)[None]
