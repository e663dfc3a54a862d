"""Scans made of several: slots, Oja's rule, the mesa layer, momentum, levels of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from recur.axes import RecipeError, Spec
from recur.blocks.scans import scan_options
from recur.primitives.columns import oja_scan, slot_scan
from recur.primitives.gates import softplus
from recur.primitives.log_linear import log_linear_scan
from recur.primitives.mesa import mesa_scan
from recur.primitives.momentum import momentum_scan
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param, constant

SOLVERS = ("exact", "conjugate", "conjugate_diagonal")


@dataclass(frozen=True)
class SlotScan(Part):
    """Attention over M slots that tokens fill: P = P diag(a) + k s^T, R = diag(a) R + s v^T, y = R^T p.

    p = softmax(scale P^T q). Defined by `recur.primitives.columns.slot_scan`.

    Args:
        q: queries [H K].
        k: keys [G K], G divides H.
        v: values [G V].
        write: s [G M], how much of the token each slot takes; None is 1 - a.
        decay: log decay log a [G M].
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        out: y [H V].

    >>> layer = recur.Mixer(recur.presets.gsa(heads=2, slots=3), dim=8)
    >>> {name: tuple(x.shape) for name, x in layer.init_state(batch=1)["parts"]["slot_scan"].items()}
    {'keys': (1, 2, 4, 3), 'values': (1, 2, 3, 4)}
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    write: str | None = "s"
    decay: str = "log_a"
    scale: float | str = 1.0
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        (H, K), (G, _), (_, V) = (
            axes.rank(self.q, 2),
            axes.same(self.write or self.decay, self.decay),
            axes.rank(self.v, 2),
        )
        axes.must(self.k, (G, K))
        axes.must(self.v, (G, V))
        return {self.out: (H, V)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"scale": site.number(self.scale)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        (G, M), (_, K), (_, V) = site.of(self.decay), site.of(self.k), site.of(self.v)
        return {"keys": site.memory(batch, G, K, M), "values": site.memory(batch, G, M, V)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, log_a = (flow[name] for name in (self.q, self.k, self.v, self.decay))
        s = -torch.expm1(log_a) if self.write is None else flow[self.write]
        before = None if state is None else (state["keys"], state["values"])
        y, (keys, values) = slot_scan(q, k, v, s, log_a, scale=weights.scale, **scan_options(flow, before))
        return flow.set(**{self.out: y}), {"keys": keys, "values": values}

    def formula(self) -> str:
        k, v, s, a = self.k, self.v, self.write or "(1 - a)", f"exp({self.decay})"
        slots = f"P_t = P_{{t-1}} diag({a}) + {k} {s}^T, R_t = diag({a}) R_{{t-1}} + {s} {v}^T"
        return f"{slots}, {self.out} = R_t^T softmax({self.scale} P_t^T {self.q})"


@dataclass(frozen=True)
class OjaScan(Part):
    """Oja's rule, a delta rule of transposed roles: S = S_{t-1} diag(a), S_t = S + beta (k - S v) v^T, y = scale S^T q.

    Defined by `recur.primitives.columns.oja_scan`.

    >>> recur.blocks.OjaScan().formula()
    'S = S_{t-1} diag(exp(log_a)), S_t = S + beta (k - S v) v^T, y = 1.0 S_t^T q'

    Args:
        q: queries [H K].
        k: keys [H K].
        v: values [H V], of length 1 or less.
        decay: log decay log a [H V].
        beta: write strength [H].
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        out: y [H V].
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    decay: str = "log_a"
    beta: str = "beta"
    scale: float | str = 1.0
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.must(self.beta, axes.same(self.q, self.k)[:1])
        return {self.out: axes.same(self.v, self.decay)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"scale": site.number(self.scale)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.memory(batch, *site.of(self.k), site.of(self.v)[-1])

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        read = [flow[name] for name in (self.q, self.k, self.v, self.decay, self.beta)]
        y, state = oja_scan(*read, scale=weights.scale, **scan_options(flow, state))
        return flow.set(**{self.out: y}), state

    def formula(self) -> str:
        k, v, read = self.k, self.v, f"{self.out} = {self.scale} S_t^T {self.q}"
        return f"S = S_{{t-1}} diag(exp({self.decay})), S_t = S + {self.beta} ({k} - S {v}) {v}^T, {read}"


@dataclass(frozen=True)
class MesaScan(Part):
    """Least-squares read: H_t = a H + beta k k^T, S_t = a S + beta k v^T, y = S_t^T (H_t + diag(ridge))^-1 q.

    ridge = softplus(r) + floor, r [H K] learned; ridge is 1 at first.

    Args:
        q: queries [H K].
        k: keys [H K].
        v: values [H V].
        decay: log decay log a [H].
        beta: write strength [H].
        solver: "exact", "conjugate" or "conjugate_diagonal", of `recur.primitives.mesa.mesa_scan`.
        iterations: of conjugate gradients.
        floor: the least ridge.
        out: y [H V].

    >>> layer = recur.Mixer(recur.presets.mesa_net(heads=2), dim=8)
    >>> {name: tuple(x.shape) for name, x in layer.init_state(batch=1)["parts"]["mesa_scan"].items()}
    {'kk': (1, 2, 4, 4), 'kv': (1, 2, 4, 4)}
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    decay: str = "log_a"
    beta: str = "beta"
    solver: str = "exact"
    iterations: int = 30
    floor: float = 0.25
    out: str = "y"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise RecipeError(f"MesaScan: solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if not 0 <= self.floor < 1:
            raise RecipeError(f"MesaScan: floor must be at least 0 and below 1, got {self.floor}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        (H, _), (heads, V) = axes.same(self.q, self.k), axes.rank(self.v, 2)
        axes.must(self.v, (H, V))
        axes.must(self.decay, (H,))
        axes.must(self.beta, (H,))
        return {self.out: (heads, V)}

    def params(self, site: Site) -> Mapping[str, Param]:
        first = math.log(math.expm1(1 - self.floor))  # softplus of it is 1 - floor
        return {"ridge": Param(site.of(self.k), constant(first), decay=False, float32=True)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        (H, K), (_, V) = site.of(self.k), site.of(self.v)
        return {"kk": site.memory(batch, H, K, K), "kv": site.memory(batch, H, K, V)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, log_a, beta = (flow[name] for name in (self.q, self.k, self.v, self.decay, self.beta))
        before = None if state is None else (state["kk"], state["kv"])
        options: dict[str, Any] = {"solver": self.solver, "iterations": self.iterations, **scan_options(flow, before)}
        y, (kk, kv) = mesa_scan(q, k, v, log_a, beta, softplus(weights.ridge) + self.floor, **options)
        return flow.set(**{self.out: y}), {"kk": kk, "kv": kv}

    def formula(self) -> str:
        k, v, a, beta = self.k, self.v, f"exp({self.decay})", self.beta
        states = f"H_t = {a} H_{{t-1}} + {beta} {k} {k}^T, S_t = {a} S_{{t-1}} + {beta} {k} {v}^T"
        return f"{states}, {self.out} = S_t^T (H_t + diag(softplus(r) + {self.floor:g}))^-1 {self.q} ({self.solver})"


@dataclass(frozen=True)
class MomentumScan(Part):
    """A delta rule with momentum: M_t = m M_{t-1} - eta k (v - S_{t-1}^T p)^T, S_t = a S_{t-1} - beta M_t.

    y = scale S_t^T q. A token loop in every form.

    >>> recur.blocks.MomentumScan().formula()
    'M_t = exp(log_m) M_{t-1} - eta k (v - S_{t-1}^T p)^T, S_t = exp(log_a) S_{t-1} - beta M_t, y = 1.0 S_t^T q'

    Args:
        q: queries [H K].
        k: keys [H K] under which the error is written.
        p: keys [H K] that read what the error is of.
        v: values [H V].
        decay: log decay log a [H].
        momentum: log momentum log m [H].
        beta: step size of S [H].
        eta: step size of M [H].
        scale: a number, or an expression over axes such as "1/sqrt(K)".
        out: y [H V].
    """

    q: str = "q"
    k: str = "k"
    p: str = "p"
    v: str = "v"
    decay: str = "log_a"
    momentum: str = "log_m"
    beta: str = "beta"
    eta: str = "eta"
    scale: float | str = 1.0
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        H, _ = axes.same(self.q, self.k, self.p)
        axes.must(self.beta, (H,))
        axes.same(self.decay, self.momentum, self.beta, self.eta)
        _, V = axes.rank(self.v, 2)
        axes.must(self.v, (H, V))
        return {self.out: (H, V)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"scale": site.number(self.scale)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        (H, K), (_, V) = site.of(self.k), site.of(self.v)
        return site.memory(batch, 2, H, K, V)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        names = (self.q, self.k, self.p, self.v, self.decay, self.momentum, self.beta, self.eta)
        read = [flow[name] for name in names]
        y, state = momentum_scan(*read, scale=weights.scale, **scan_options(flow, state))
        return flow.set(**{self.out: y}), state

    def formula(self) -> str:
        error = f"{self.eta} {self.k} ({self.v} - S_{{t-1}}^T {self.p})^T"
        S = f"S_t = exp({self.decay}) S_{{t-1}} - {self.beta} M_t"
        return f"M_t = exp({self.momentum}) M_{{t-1}} - {error}, {S}, {self.out} = {self.scale} S_t^T {self.q}"


@dataclass(frozen=True)
class LogLinearScan(Part):
    """Linear attention with a state and a weight per level of a binary tree over the past.

    y_t = sum_{s<=t} w_t[l(t, s)] exp(sum_{s<r<=t} log_a_r) (q_t . k_s) v_s, l(t, s) the bit length of (t xor s).

    Args:
        q: queries [G K], G divides H.
        k: keys [G K].
        v: values [H V].
        decay: log decay log a [H].
        weights: w [H L]; L levels reach 2^(L - 1) tokens.
        out: y [H V].

    >>> recur.blocks.LogLinearScan().formula()
    'y_t = sum_{s<=t} w_t[bits(t xor s)] exp(sum_{s<r<=t} log_a_r) (q_t . k_s) v_s'
    """

    q: str = "q"
    k: str = "k"
    v: str = "v"
    decay: str = "log_a"
    weights: str = "w"
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.rank(self.q, 2)
        axes.same(self.q, self.k)
        heads, levels = axes.rank(self.v, 2)[:1], axes.rank(self.weights, 2)[1:]
        axes.must(self.decay, heads)
        axes.must(self.weights, (*heads, *levels))
        return {self.out: axes[self.v]}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        (H, V), K, L = site.of(self.v), site.of(self.k)[-1], site.of(self.weights)[-1]
        return site.memory(batch, L, H, K, V)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        q, k, v, log_a, w = (flow[name] for name in (self.q, self.k, self.v, self.decay, self.weights))
        seen = None if state is None else flow.position
        y, state = log_linear_scan(q, k, v, log_a, w, position=seen, **scan_options(flow, state))
        return flow.set(**{self.out: y}), state

    def formula(self) -> str:
        term = f"exp(sum_{{s<r<=t}} {self.decay}_r) ({self.q}_t . {self.k}_s) {self.v}_s"
        return f"{self.out}_t = sum_{{s<=t}} {self.weights}_t[bits(t xor s)] {term}"
