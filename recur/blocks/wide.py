"""Parts of the recurrences of 2025 and 2026: keys that erase, values of other layers and tokens, self terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from recur.axes import RecipeError, Spec, spec
from recur.primitives.conv import token_shift
from recur.primitives.norms import normalise
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param, by_index, constant, matrix_init, zeros


@dataclass(frozen=True)
class ValueResidual(Part):
    """Mix values with those of the first layer: v <- v + (v_0 - v) sigmoid(W2 W1 x + b), v_0 as layer 0 wrote them.

    The first layer hands its values down and leaves them as they are.

    Args:
        source:       v [*].
        gate:         x, the tensor that the gate reads.
        rank:         axis between its two matrices; W1 starts as 0, W2 orthogonal.
        first:        first values of b, an expression (see `Learned`).
        weights_from: the first layer with weights; 0 gives layer 0 weights that nothing reads, as some trainers do.
    """

    source: str = "v"
    gate: str = "x"
    rank: str = "R"
    first: str = "0"
    weights_from: int = 1

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.named(self.gate)
        return {self.source: axes[self.source]}

    def params(self, site: Site) -> Mapping[str, Param]:
        if site.layer < self.weights_from:
            return {}
        fan_in, width, rank = math.prod(site.of(self.gate)), math.prod(site.of(self.source)), site.only(self.rank)
        return {
            "down": Param((rank, fan_in), zeros),
            "up": Param((width, rank), matrix_init("orthogonal_tenth", rank, width, site.depth)),
            "bias": Param((width,), by_index(self.first, site), decay=False),
        }

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        v, name = flow[self.source], f"ValueResidual.{self.source}"
        first = next((layer[name] for layer in flow.past if name in layer), None)
        if first is None:
            return flow.publish(**{name: v}), None
        z = F.linear(F.linear(flow[self.gate].flatten(2), weights.down), weights.up, weights.bias)
        return flow.set(**{self.source: v + (first - v) * torch.sigmoid(z).unflatten(-1, v.shape[2:])}), None

    def formula(self) -> str:
        v = self.source
        return f"{v} <- {v} + ({v} of layer 0 - {v}) sigmoid(W2 W1 {self.gate} + b)"


@dataclass(frozen=True)
class RemovalKeys(Part):
    """RWKV-7's keys, of a key k and an in-context rate a in (0, 1): one is erased, one removed, one written.

    e = norm(k * k_k), b = a e, k <- k + k (a - 1) k_a; k, a [H K], k_k and k_a learned per channel.

    Args: norm, eps: of e in each head, "unit" or "smooth_unit" (see `Norm`); erase, remove: names of e and b.
    """

    k: str = "k"
    rate: str = "a"
    norm: str = "unit"
    eps: float = 1e-12
    erase: str = "e"
    remove: str = "b"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes.same(self.k, self.rate)
        return dict.fromkeys((self.k, self.erase, self.remove), found)

    def params(self, site: Site) -> Mapping[str, Param]:
        width = math.prod(site.of(self.k))
        slope = by_index(f"0.76-0.1*i/{max(width - 1, 1)}", site)
        return {"k_k": Param((width,), slope, decay=False), "k_a": Param((width,), constant(1.02), decay=False)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        k, a = flow[self.k], flow[self.rate]
        k_k, k_a = (weight.view(k.shape[2:]).to(k.dtype) for weight in (weights.k_k, weights.k_a))
        e = normalise(k * k_k, self.norm, eps=self.eps, form=flow.form)
        return flow.set(**{self.erase: e, self.remove: a * e, self.k: k + k * (a - 1) * k_a}), None

    def formula(self) -> str:
        k, a, e = self.k, self.rate, self.erase
        return f"{e} = {self.norm} norm({k} * k_k), {self.remove} = {a} {e}, {k} <- {k} + {k} ({a} - 1) k_a"


@dataclass(frozen=True)
class FeedbackKey(Part):
    """Comba's closed loop: the state is corrected by what p reads in it, and so is the query. p = c k, q <- q - D p.

    Args:
        p:       the name of p [H K].
        decay:   "learned", c = sigmoid(d_h) with d = 1 at first, or "none", c = 1.
        correct: first value of D_h; None leaves the query as it is.
    """

    q: str = "q"
    k: str = "k"
    p: str = "p"
    decay: str = "learned"
    correct: float | None = 1.0

    def __post_init__(self) -> None:
        if self.decay not in ("learned", "none"):
            raise RecipeError(f'FeedbackKey: decay must be "learned" or "none", got {self.decay!r}')

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return dict.fromkeys((self.q, self.p), axes.same(self.q, self.k))

    def params(self, site: Site) -> Mapping[str, Param]:
        heads = site.of(self.k)[:1]
        made = {} if self.decay == "none" else {"decay": Param(heads, constant(1.0), decay=False)}
        if self.correct is not None:
            made["D"] = Param(heads, constant(self.correct), decay=False)
        return made

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, p = flow[self.q], flow[self.k]
        if self.decay == "learned":
            p = p * torch.sigmoid(weights.decay)[:, None].to(p.dtype)
        if self.correct is not None:
            q = q - weights.D[:, None].to(q.dtype) * p
        return flow.set(**{self.q: q, self.p: p}), None

    def formula(self) -> str:
        p = f"{self.p} = {'' if self.decay == 'none' else 'sigmoid(d) '}{self.k}"
        return p if self.correct is None else f"{p}, {self.q} <- {self.q} - D {self.p}"


@dataclass(frozen=True)
class SelfTerm(Part):
    """What a token reads of its own write, besides what the scan has read: y <- y + (sum_K q w k) v, w [H K] learned.

    Args: q, k: [H K]; v: of the axes of `out` [H V]; first: first values of w, an expression (see `Learned`).
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    out: str = "y"
    first: str = "1"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        heads = axes.same(self.q, self.k)[:1]
        axes.must(self.v, (*heads, *axes.rank(self.v, 2)[1:]))
        return {self.out: axes.same(self.out, self.v)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"weight": Param(site.of(self.q), by_index(self.first, site), decay=False)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, y = (flow[name] for name in (self.q, self.k, self.v, self.out))
        share = (q * k * weights.weight.to(q.dtype)).sum(-1, keepdim=True)
        return flow.set(**{self.out: (y + share * v).to(y.dtype)}), None

    def formula(self) -> str:
        return f"{self.out} <- {self.out} + (sum_K {self.q} w {self.k}) {self.v}"


@dataclass(frozen=True)
class Repeat(Part):
    """Repeat each head of some tensors for the heads that share it: [G *] -> [H *], head h reads h // (H/G)."""

    names: str
    heads: str = "H"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: (*spec(self.heads), *axes[name][1:]) for name in axes.named(self.names)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        H, names = site.only(self.heads), self.names.split()
        for name in names:
            if H % site.of(name)[0]:
                raise RecipeError(f"Repeat: heads of {name} must divide {self.heads}={H}, got {site.of(name)[0]}")
        return {"times": [H // site.of(name)[0] for name in names]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        pairs = zip(self.names.split(), weights.times, strict=True)
        return flow.set(**{name: flow[name].repeat_interleave(times, 2) for name, times in pairs if times > 1}), None

    def formula(self) -> str:
        return ", ".join(f"{name} for every one of {self.heads} heads" for name in self.names.split())


@dataclass(frozen=True)
class Previous(Part):
    """Tensors of the token before, zeros before the first: Previous("k v", to="k_before v_before")."""

    names: str
    to: str

    def __post_init__(self) -> None:
        if len(self.names.split()) != len(self.to.split()):
            raise RecipeError(f"Previous: to must have a name for each of {self.names}, got {self.to!r}")

    def _pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.names.split(), self.to.split(), strict=True))

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {to: axes[name] for name, to in self._pairs()}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return {name: site.zeros(batch, 1, *site.of(name)) for name in self.names.split()}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        written, after = {}, {}
        for name, to in self._pairs():
            x = flow[name].expand(*flow["x"].shape[:2], *flow[name].shape[2:])
            before = None if state is None else state[name].flatten(2)
            shifted, last = token_shift(x.flatten(2), initial_state=before, cu_seqlens=flow.cu_seqlens)
            written[to], after[name] = shifted.view(x.shape), last.unflatten(-1, x.shape[2:])
        return flow.set(**written), after

    def formula(self) -> str:
        return ", ".join(f"{to} = {name}_{{t-1}}" for name, to in self._pairs())
