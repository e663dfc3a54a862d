"""Parts of the recurrences of 2025 and 2026: keys that erase, values of other layers and tokens, self terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from recur.axes import RecipeError, Spec
from recur.primitives.conv import token_shift
from recur.primitives.gates import biased
from recur.primitives.norms import normalise
from recur.primitives.trapezoid import accumulated_angle, data_decay, rotate_by, trapezoid
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param, by_index, constant, matrix_init, spread_time_constants, zeros


@dataclass(frozen=True)
class ValueResidual(Part):
    """Mix values with those of the first layer: v <- v + (v_0 - v) sigmoid(W2 W1 x + b), v_0 as layer 0 wrote them.

    Layer 0 publishes its values and does not change them; each deeper layer hands them on.

    Args:
        source: v [*].
        gate: x, the tensor that the gate reads.
        rank: axis between its two matrices; W1 starts as 0, W2 orthogonal.
        first: first values of b, an expression (see `Learned`).
        weights_from: the first layer with weights; 0 gives layer 0 weights that nothing reads, as some trainers do.

    >>> recur.blocks.ValueResidual().formula()
    'v <- v + (v of layer 0 - v) sigmoid(W2 W1 x + b)'
    """

    source: str = "v"
    gate: str = "x"
    rank: str = "R"
    first: str = "0"
    weights_from: int = 1

    @property
    def layers_below(self) -> int:
        return 1

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
        first = next((layer[name] for layer in reversed(flow.past) if name in layer), None)
        flow = flow.publish(**{name: v if first is None else first})  # handed on, so that one layer below is enough
        if first is None:
            return flow, None
        z = F.linear(F.linear(flow[self.gate].flatten(2), weights.down), weights.up, weights.bias)
        return flow.set(**{self.source: v + (first - v) * torch.sigmoid(z).unflatten(-1, v.shape[2:])}), None

    def formula(self) -> str:
        v = self.source
        return f"{v} <- {v} + ({v} of layer 0 - {v}) sigmoid(W2 W1 {self.gate} + b)"


@dataclass(frozen=True)
class RemovalKeys(Part):
    """RWKV-7's erase, removal and write keys, from a key k and an in-context learning rate a in (0, 1).

    e = norm(k * k_k), b = a e, k <- k + k (a - 1) k_a; k_k and k_a [H K] are learned.

    Args:
        k: keys [H K]; what is written replaces them.
        rate: a [H K].
        norm: of e in each head, "unit" or "smooth_unit" (see `Norm`).
        eps: of that norm.
        erase: name of e, the erase key [H K].
        remove: name of b, the removal key [H K].

    >>> recur.blocks.RemovalKeys().formula()
    'e = unit norm(k * k_k), b = a e, k <- k + k (a - 1) k_a'
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
    """Comba's feedback: the state is corrected by what p reads in it, the query by p. p = c k, q <- q - D p.

    Args:
        q: queries [H K].
        k: keys [H K].
        p: name of p [H K].
        decay: "learned", c = sigmoid(d_h) with d = 1 at first, or "none", c = 1.
        correct: first value of D_h; None leaves the query as it is.

    >>> recur.blocks.FeedbackKey().formula()
    'p = sigmoid(d) k, q <- q - D p'
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
    """Add what a token reads of its own write: y <- y + (sum_K q w k) v, w [H K] learned.

    Args:
        q: queries [H K].
        k: keys [H K].
        v: values [H V].
        out: y [H V].
        first: first values of w, an expression (see `Learned`).

    >>> recur.blocks.SelfTerm().formula()
    'y <- y + (sum_K q w k) v'
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
    """Repeat each group for the heads that share it: [... G *] -> [... H *], head h reads group h // (H/G).

    >>> recur.blocks.Repeat("u").formula()
    'u of every group for its heads'

    Args:
        names: tensors [... G *].
        heads: H.
        groups: G, divides H.
    """

    names: str
    heads: str = "H"
    groups: str = "G"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = {}
        for name in axes.named(self.names):
            if self.groups not in axes[name]:
                got = " ".join(axes[name])
                raise RecipeError(f"{axes.reader} needs an axis {self.groups} in {name}, got [{got}]")
            written[name] = tuple(self.heads if axis == self.groups else axis for axis in axes[name])
        return written

    def facts(self, site: Site) -> Mapping[str, Any]:
        H, G = site.only(self.heads), site.only(self.groups)
        if H % G:
            raise RecipeError(f"Repeat: {self.groups} must divide {self.heads}, got {G} and {H}")
        return {"times": H // G, "at": [2 + site.axes[name].index(self.groups) for name in self.names.split()]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        if weights.times == 1:
            return flow, None
        found = zip(self.names.split(), weights.at, strict=True)
        return flow.set(**{name: flow[name].repeat_interleave(weights.times, at) for name, at in found}), None

    def formula(self) -> str:
        return ", ".join(f"{name} of every group for its heads" for name in self.names.split())


@dataclass(frozen=True)
class Previous(Part):
    """Tensors of the token before, zeros before the first: `Previous("k v", to="k_before v_before")`.

    >>> recur.blocks.Previous("u", "v").formula()
    'v = u_{t-1}'

    Args:
        names: tensors to read.
        to: one new name for each.
    """

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


@dataclass(frozen=True)
class DataDecay(Part):
    """Mamba-3's decay, from a step and a rate per token: log_a = -max(f(r), floor) delta.

    delta = softplus(dt + b), b [H] learned; f(r) = 1 + r, or 1 / (1 - r) where r is negative. At first softplus(b) is
    spread over 0.001 to 0.1.

    >>> recur.blocks.DataDecay().formula()
    'delta = softplus(dt + b), f = 1 + rate, or 1 / (1 - rate) if rate < 0, log_a = -max(f, 0.0001) delta'

    Args:
        source: dt [H].
        rate: r [H].
        floor: the least rate.
        step: name of delta [H].
        out: name of the log decay [H].
    """

    source: str = "dt"
    rate: str = "rate"
    floor: float = 1e-4
    step: str = "delta"
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return dict.fromkeys((self.step, self.out), axes.same(self.source, self.rate))

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"dt_bias": Param(site.of(self.source), spread_time_constants, decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        delta = biased("softplus", flow[self.source], weights.dt_bias, form=flow.form)
        return flow.set(**{self.step: delta, self.out: data_decay(flow[self.rate], delta, floor=self.floor)}), None

    def formula(self) -> str:
        r, delta = self.rate, self.step
        rate = f"f = 1 + {r}, or 1 / (1 - {r}) if {r} < 0"
        return f"{delta} = softplus({self.source} + b), {rate}, {self.out} = -max(f, {self.floor:g}) {delta}"


@dataclass(frozen=True)
class DataRotary(Part):
    """Rotate pairs of channels by accumulated angles: theta_t = theta_{t-1} + pi tanh(angle_t) delta_t.

    Args:
        names: tensors [... H K].
        angle: [A] shared by heads, or [H A]; A <= K/2, pairs beyond A are not rotated.
        step: delta [H].
        layout: pairs (2j, 2j+1) "interleaved", or (j, j + K/2) "half".

    >>> recur.blocks.DataRotary("u").formula()
    'theta_t = theta_{t-1} + pi tanh(angle) delta, u <- rotate(u, theta_t)'
    """

    names: str
    angle: str = "angle"
    step: str = "delta"
    layout: str = "interleaved"

    def __post_init__(self) -> None:
        if self.layout not in ("interleaved", "half"):
            raise RecipeError(f'DataRotary: layout must be "interleaved" or "half", got {self.layout!r}')

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        heads = axes.rank(self.step, 1)
        if axes.rank(self.angle, 1, 2)[:-1] not in ((), heads):
            raise RecipeError(f"{axes.reader} needs {self.angle} [A] or [{heads[0]} A], got {list(axes[self.angle])}")
        for name in axes.named(self.names):
            if axes.rank(name, 2, 3)[-2:-1] != heads:
                raise RecipeError(f"{axes.reader} needs {name} [... {heads[0]} K], got [{' '.join(axes[name])}]")
        return {name: axes[name] for name in self.names.split()}

    def facts(self, site: Site) -> Mapping[str, Any]:
        A = site.of(self.angle)[-1]
        for name in self.names.split():
            if site.of(name)[-1] < 2 * A or (self.layout == "half" and site.of(name)[-1] % 2):
                got = f"{site.of(name)[-1]} channels and A={A}"
                raise RecipeError(f"DataRotary: {name} must have a pair of channels per angle, got {got}")
        return {}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.memory(batch, *site.of(self.step), site.of(self.angle)[-1])

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        options: dict[str, Any] = {"initial_state": state, "cu_seqlens": flow.cu_seqlens}
        theta, state = accumulated_angle(flow[self.angle], flow[self.step], **options)
        names, dtype = self.names.split(), flow["x"].dtype
        return flow.set(**{name: rotate_by(flow[name], theta, layout=self.layout).to(dtype) for name in names}), state

    def formula(self) -> str:
        theta = f"theta_t = theta_{{t-1}} + pi tanh({self.angle}) {self.step}"
        return ", ".join([theta, *(f"{name} <- rotate({name}, theta_t)" for name in self.names.split())])


@dataclass(frozen=True)
class Trapezoid(Part):
    """Mamba-3's trapezoidal rule as two writes per token: that of the token before, weighted anew, and its own.

    keys = [(1 - l) delta a k_{t-1}, l delta k_t], values = [v_{t-1}, v_t], l = sigmoid(trap); zeros before
    the first token.

    Args:
        k: keys [H K], or [R H K] for R writes.
        v: values [H V], or [R H V].
        trap: l before its sigmoid [H].
        step: delta [H].
        decay: log decay log a [H].
        keys: name of the keys that are written, [2 H K] or [2*R H K].
        values: name of the values that are written, [2 H V] or [2*R H V].

    >>> recur.blocks.Trapezoid().formula()
    'l = sigmoid(trap), keys = [(1 - l) delta exp(log_a) k_{t-1}, l delta k], values = [v_{t-1}, v]'
    """

    k: str = "k"
    v: str = "v"
    trap: str = "trap"
    step: str = "delta"
    decay: str = "log_a"
    keys: str = "keys"
    values: str = "values"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        k, v = axes.rank(self.k, 2, 3), axes.rank(self.v, 2, 3)
        axes.must(self.v, (*k[:-1], *v[-1:]))
        axes.must(self.trap, k[-2:-1])
        axes.same(self.trap, self.step, self.decay)
        writes = "2" if len(k) == 2 else f"2*{k[0]}"
        return {self.keys: (writes, *k[-2:]), self.values: (writes, *v[-2:])}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return {name: site.zeros(batch, *site.of(getattr(self, name))) for name in ("k", "v")}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        k, v, trap, step, decay = (flow[n] for n in (self.k, self.v, self.trap, self.step, self.decay))
        before = None if state is None else (state["k"], state["v"])
        keys, values, (k, v) = trapezoid(k, v, trap, step, decay, initial_state=before, cu_seqlens=flow.cu_seqlens)
        return flow.set(**{self.keys: keys, self.values: values}), {"k": k, "v": v}

    def formula(self) -> str:
        k, v, delta = self.k, self.v, self.step
        keys = f"{self.keys} = [(1 - l) {delta} exp({self.decay}) {k}_{{t-1}}, l {delta} {k}]"
        return f"l = sigmoid({self.trap}), {keys}, {self.values} = [{v}_{{t-1}}, {v}]"


@dataclass(frozen=True)
class Spread(Part):
    """R copies of a tensor, each weighted per channel: v_r = w_r * u, w [R *] learned.

    >>> recur.blocks.Spread("u").formula()
    'u_r <- w_r * u'

    Args:
        source: u [*].
        axis: R.
        to: name of v [R *]; None replaces u.
        first: first values of w, an expression (see `Learned`).
    """

    source: str
    axis: str = "R"
    to: str | None = None
    first: str = "1"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.to or self.source: (self.axis, *axes[self.source])}

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = (site.only(self.axis), *site.of(self.source))
        return {"weight": Param(shape, by_index(self.first, site), decay=False)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        u = flow[self.source]
        return flow.set(**{self.to or self.source: u[:, :, None] * weights.weight.to(u.dtype)}), None

    def formula(self) -> str:
        return f"{self.to or self.source}_r {'=' if self.to else '<-'} w_r * {self.source}"


@dataclass(frozen=True)
class Gather(Part):
    """The sum of R tensors, each weighted per channel: y <- sum_r w_r * y_r, w [R *] learned.

    >>> recur.blocks.Gather().formula()
    'y <- sum_r w_r * y_r'

    Args:
        source: y [R *]; replaced by [*].
        first: first values of w, an expression (see `Learned`).
    """

    source: str = "y"
    first: str = "1"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: axes[self.source][1:]}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"weight": Param(site.of(self.source), by_index(self.first, site), decay=False)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y = flow[self.source]
        return flow.set(**{self.source: (y * weights.weight.to(y.dtype)).sum(2)}), None

    def formula(self) -> str:
        return f"{self.source} <- sum_r w_r * {self.source}_r"
