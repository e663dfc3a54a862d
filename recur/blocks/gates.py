"""Parts with gates: how much of the state is kept, its rotation, how much of the output leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.axes import RecipeError, Spec, spec
from recur.primitives.gates import (
    BOUND_LAWS,
    activation,
    biased,
    complex_gate,
    decayed_mean,
    lower_bounded_decay,
    lower_bounds,
    output_gate,
    polar_gate,
    power_decay,
    sigmoid_decay,
    signed_gate,
    softplus,
)
from recur.primitives.retention import chunkwise_scale, parallel_scale, retention_decay
from recur.recipe import Axes, Flow, Part, Site, State
from recur.shapes import accumulation_dtype
from recur.weights import Param, by_index, normal, ones, spread_time_constants


@dataclass(frozen=True)
class Decay(Part):
    """Log decay of a sigmoid gate: log_a = log(sigmoid(z)) / tau.

    Args:
        source: z, the logits of the gate.
        tau: divides the log: the larger, the slower the gate forgets.
        out: tensor written.

    >>> recur.blocks.Decay("z", tau=16).formula()
    'log_a = log sigmoid(z) / 16'
    """

    source: str = "z"
    tau: float = 1.0
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.out: sigmoid_decay(flow[self.source], tau=self.tau, form=flow.form)}), None

    def formula(self) -> str:
        return f"{self.out} = log sigmoid({self.source}){f' / {self.tau:g}' if self.tau != 1 else ''}"


@dataclass(frozen=True)
class FlooredDecay(Part):
    """RWKV-7's log decay, at least -rate: log_a = -rate sigmoid(z).

    >>> recur.blocks.FlooredDecay().formula()
    'log_a = -0.606531 sigmoid(z)'

    Args:
        source: z, real.
        rate: the greatest -log_a, 1/sqrt(e) by default as in RWKV-7.
        out: name of the log decay, of z's axes.
    """

    source: str = "z"
    rate: float = math.exp(-0.5)
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        z = flow[self.source]
        return flow.set(**{self.out: -self.rate * torch.sigmoid(z.to(accumulation_dtype(z)))}), None

    def formula(self) -> str:
        return f"{self.out} = -{self.rate:g} sigmoid({self.source})"


@dataclass(frozen=True)
class LowerBounds(Part):
    """Lower bounds of forget gates, which rise with depth from 0: sums of softmax(logits over the layers).

    One table for the whole model; every layer takes its row.

    Args:
        axes: of the bound.
        law: which entries of the softmax layer l sums, "skip_first" (1 .. l) or "skip_last" (0 .. l - 1); at first both
            are l / layers.
        out: tensor written.

    >>> recur.blocks.LowerBounds("H K").formula()
    'bound = sum_{1<=j<=layer} softmax(logits)_j'
    """

    axes: str
    law: str = "skip_first"
    out: str = "bound"
    scope = "model"

    def __post_init__(self) -> None:
        if self.law not in BOUND_LAWS:
            raise RecipeError(f"LowerBounds: law must be one of {', '.join(BOUND_LAWS)}, got {self.law!r}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: spec(self.axes)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"logits": Param((site.depth, *site.size(self.axes)), ones, decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        bound = lower_bounds(weights.logits, law=self.law, layer=flow.layer)
        return flow.set(**{self.out: bound[None, None]}), None

    def formula(self) -> str:
        shares = "1<=j<=layer" if self.law == "skip_first" else "0<=j<layer"
        return f"{self.out} = sum_{{{shares}}} softmax(logits)_j"


@dataclass(frozen=True)
class BoundedDecay(Part):
    """A forget gate above its lower bound, and its complement: a = g + (1 - g) sigmoid(z); log_a and keep = 1 - a.

    Args:
        source: z, the logits of the gate.
        bound: g, the least it keeps; None is a bound of 0.
        out: log_a, the log of the gate.
        keep: 1 - a.

    >>> recur.blocks.BoundedDecay("z", bound=None).formula()
    'a = sigmoid(z), log_a = log a, k = 1 - a'
    """

    source: str = "z"
    bound: str | None = "bound"
    out: str = "log_a"
    keep: str = "k"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes.same(self.source, self.bound or self.source)
        return {self.out: found, self.keep: found}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        z = flow[self.source]
        bound = None if self.bound is None else flow[self.bound]
        log_a, keep = lower_bounded_decay(z, bound, form=flow.form)
        return flow.set(**{self.out: log_a, self.keep: keep}), None

    def formula(self) -> str:
        g, z = self.bound, self.source
        floor = f"{g} + (1 - {g}) " if g else ""
        return f"a = {floor}sigmoid({z}), {self.out} = log a, {self.keep} = 1 - a"


@dataclass(frozen=True)
class FixedDecay(Part):
    """RetNet's constant decay per head, a_h = 1 - 2^(-5-h), and the eps that makes its head norm independent of scale.

    A plain state grows like n_t = sum_{s<=t} a^(t-s); dividing by sqrt(n_t) before a norm of eps is the same as the
    norm of the plain read with eps n_t, which follows from the position alone.

    Args:
        heads: the axis of the heads.
        eps: of the head norm.
        out: the log decay [H].
        eps_out: the eps [B T H] for that norm.

    >>> recur.blocks.FixedDecay().formula()
    'log_a = log(1 - 2^(-5-h)), eps = 1e-06 sum_{s<=t} a^(t-s)'
    """

    heads: str = "H"
    eps: float = 1e-6
    out: str = "log_a"
    eps_out: str = "eps"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: spec(self.heads), self.eps_out: spec(self.heads)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"heads": site.size(self.heads)[0]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        heads: int = weights.heads
        log_a, eps = flow.once(("FixedDecay", heads, self.eps), partial(self._found, flow, heads))
        return flow.set(**{self.out: log_a, self.eps_out: eps}), None

    def _found(self, flow: Flow, heads: int) -> tuple[Tensor, Tensor]:
        """log_a [1 1 H] and eps [B T H]."""
        position = flow.positions()
        log_a = retention_decay(heads, position.device)
        grown = torch.expm1(log_a * (position[..., None] + 1)) / torch.expm1(log_a)  # [B T H]
        wide = torch.float64 if flow["x"].dtype == torch.float64 else torch.float32
        return log_a.to(wide)[None, None], (self.eps * grown).to(wide)

    def formula(self) -> str:
        return f"{self.out} = log(1 - 2^(-5-h)), {self.eps_out} = {self.eps:g} sum_{{s<=t}} a^(t-s)"


GATES: dict[str, tuple[Callable[..., Tensor], str]] = {  # law -> the primitive, its formula
    "polar": (polar_gate, "sigmoid(|c|) c/|c|"),
    "amplitude_phase": (complex_gate, "sigmoid(c_0) exp(i c_1)"),
    "signed": (signed_gate, "sigmoid(|c_0|) sign(c_0)"),
}


@dataclass(frozen=True)
class RetentionScale(Part):
    """What RetNet's parallel or, with `chunk`, chunkwise form divides y by before its head norm, as that norm's eps.

    Dividing by n before a norm of eps is that norm with eps n^2; no gradient flows through n. It needs all scores, so
    it does not stream, although no token sees a later one.

    Args:
        chunk: tokens in a chunk; None is the parallel form.
        eps: of the norm.
        q: queries [H K].
        k: keys [H K].
        v: values [H V].
        decay: log decay [H], constant in time.
        out: the eps [B T H] for the norm.

    >>> recur.blocks.RetentionScale(chunk=512).formula()
    'eps = 1e-06 n^2, n from the scores of chunks of 512'
    """

    chunk: int | None = None
    eps: float = 1e-6
    q: str = "q"
    k: str = "k"
    v: str = "v"
    decay: str = "log_a"
    out: str = "eps"

    @property
    def exact_gradients(self) -> bool:
        return False

    @property
    def causal(self) -> bool:
        return False

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        H, _ = axes.same(self.q, self.k)
        return {self.out: (H,)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        log_a = flow[self.decay][0, 0]
        q, k, v = (flow[name].to(log_a.dtype) for name in (self.q, self.k, self.v))
        if self.chunk is None:
            scale = parallel_scale(q, k, log_a, cu_seqlens=flow.cu_seqlens)
        else:
            T = q.shape[1]
            borders = pairwise([0, T] if flow.cu_seqlens is None else flow.cu_seqlens.tolist())
            pieces = ((x[:, slice(*border)] for x in (q, k, v)) for border in borders)
            scale = torch.cat([chunkwise_scale(q, k, v, log_a, chunk=self.chunk) for q, k, v in pieces], 1)
        return flow.set(**{self.out: self.eps * scale**2}), None

    def formula(self) -> str:
        form = "all scores" if self.chunk is None else f"the scores of chunks of {self.chunk}"
        return f"{self.out} = {self.eps:g} n^2, n from {form}"


@dataclass(frozen=True)
class ComplexGate(Part):
    """Complex log decay from pairs c [... 2] or [2 ...].

    Args:
        source: c.
        law: "polar", a = sigmoid(|c|) c/|c|; "amplitude_phase", a = sigmoid(c_0) e^{i c_1}; or "signed", the polar law
            of the real part alone, a = sigmoid(|c_0|) sign(c_0).
        out: tensor written.

    >>> recur.blocks.ComplexGate("c", law="amplitude_phase").formula()
    'c = c, a = sigmoid(c_0) exp(i c_1), log_a = log a'
    """

    source: str = "c"
    law: str = "polar"
    out: str = "log_a"

    def __post_init__(self) -> None:
        if self.law not in GATES:
            raise RecipeError(f"ComplexGate: law must be one of {', '.join(GATES)}, got {self.law!r}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes[self.source]
        if "2" not in found[:1] + found[-1:]:
            raise RecipeError(
                f"{axes.reader} reads pairs: {self.source} must begin or end with an axis of 2, got [{' '.join(found)}]"
            )
        return {self.out: found[:-1] if found[-1] == "2" else found[1:]}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"pairs": -1 if site.axes[self.source][-1] == "2" else 2}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        gate, options = GATES[self.law][0], {"form": flow.form} if self.law == "polar" else {}
        return flow.set(**{self.out: gate(*flow[self.source].unbind(weights.pairs), **options)}), None

    def formula(self) -> str:
        return f"c = {self.source}, a = {GATES[self.law][1]}, {self.out} = log a"


@dataclass(frozen=True)
class Smoothing(Part):
    """Dampened exponential smoothing, constant per head: log_a = log((1 - alpha) damp), b = alpha u; u [V].

    alpha and damp are sigmoids of what is learned.

    Args:
        source: u [V].
        heads: the axis of the heads, which are equal groups of channels.
        to: b, what is written to the state.
        out: the log decay.

    >>> recur.blocks.Smoothing("u").formula()
    'log_a = log((1 - alpha) damp), b = alpha u'
    """

    source: str
    heads: str = "H"
    to: str = "b"
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes.rank(self.source, 1)
        return {self.to: found, self.out: found}

    def params(self, site: Site) -> Mapping[str, Param]:
        share = Param(site.size(self.heads), normal(), decay=False, float32=True)
        return {"alpha": share, "damp": share}

    def facts(self, site: Site) -> Mapping[str, Any]:
        H, (V,) = site.only(self.heads), site.of(self.source)
        if V % H:
            raise RecipeError(f"Smoothing: heads must divide the channels of {self.source}, got H={H} and V={V}")
        return {"width": V // H}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        alpha, damp = (raw.repeat_interleave(weights.width) for raw in (weights.alpha, weights.damp))
        u, log_a = flow[self.source], F.logsigmoid(-alpha) + F.logsigmoid(damp)
        return flow.set(**{self.to: (alpha.sigmoid() * u).to(u.dtype), self.out: log_a[None, None]}), None

    def formula(self) -> str:
        return f"{self.out} = log((1 - alpha) damp), {self.to} = alpha {self.source}"


@dataclass(frozen=True)
class Phase(Part):
    """Rotate a decay by a learned angle per channel, the same at every token: log_a = log_f + i theta.

    theta starts as base^(-2j/n) over the n channels.

    Args:
        source: the log decay.
        base: of the first angles.
        out: tensor written.

    >>> recur.blocks.Phase().formula()
    'log_a = log_f + i theta'
    """

    source: str = "log_f"
    base: float = 10000.0
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes.rank(self.source, 1)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"theta": Param(site.of(self.source), partial(_angles, base=self.base), decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        log_f = flow[self.source]
        return flow.set(**{self.out: torch.complex(log_f, weights.theta.to(log_f.dtype).expand_as(log_f))}), None

    def formula(self) -> str:
        return f"{self.out} = {self.source} + i theta"


def _angles(weight: Tensor, base: float) -> None:
    n = len(weight)
    weight.copy_(base ** (-2 / n * torch.arange(n, dtype=torch.float64, device=weight.device)))


@dataclass(frozen=True)
class Complex(Part):
    """Pairs [... 2] as complex numbers [...], in float32 or wider.

    Args:
        source: the tensor.

    >>> recur.blocks.Complex("c").formula()
    'c <- c_0 + i c_1'
    """

    source: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes[self.source]
        if found[-1:] != ("2",):
            raise RecipeError(
                f"{axes.reader} reads pairs: {self.source} must end in an axis of 2, got [{' '.join(found)}]"
            )
        return {self.source: found[:-1]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        c = flow[self.source]
        return flow.set(**{self.source: torch.complex(*c.to(accumulation_dtype(c)).unbind(-1))}), None

    def formula(self) -> str:
        return f"{self.source} <- {self.source}_0 + i {self.source}_1"


@dataclass(frozen=True)
class RealImag(Part):
    """Complex numbers [*] as their real parts above their imaginary parts [2 *], in the dtype of x.

    Args:
        source: the tensor.

    >>> recur.blocks.RealImag("y").formula()
    'y <- [Re y, Im y]'
    """

    source: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: ("2", *axes[self.source])}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y = flow[self.source]
        return flow.set(**{self.source: torch.stack([y.real, y.imag], 2).to(flow["x"].dtype)}), None

    def formula(self) -> str:
        return f"{self.source} <- [Re {self.source}, Im {self.source}]"


@dataclass(frozen=True)
class PowerDecay(Part):
    """A power of a learned constant: log_a = -power softplus(Lambda) sigmoid(r), keep = sqrt(1 - a^2).

    Lambda starts so that the gate, fully open, is uniform between `low` and `high`.

    Args:
        source: r, the logits of the power.
        power: c, the greatest power.
        low: least first value of the fully open gate.
        high: greatest first value of the fully open gate.
        out: log_a.
        keep: sqrt(1 - a^2).

    >>> recur.blocks.PowerDecay().formula()
    'log_a = -8 softplus(Lambda) sigmoid(r), k = sqrt(1 - a^2)'
    """

    source: str = "r"
    power: float = 8.0
    low: float = 0.9
    high: float = 0.999
    out: str = "log_a"
    keep: str = "k"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes[self.source], self.keep: axes[self.source]}

    def params(self, site: Site) -> Mapping[str, Param]:
        spread = partial(_spread_powers, low=self.low, high=self.high, power=self.power)
        return {"Lambda": Param(site.of(self.source), spread, decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        r = flow[self.source]
        log_a, keep = power_decay(r, softplus(weights.Lambda), power=self.power)
        return flow.set(**{self.out: log_a, self.keep: keep.to(r.dtype)}), None

    def formula(self) -> str:
        return f"{self.out} = -{self.power:g} softplus(Lambda) sigmoid({self.source}), {self.keep} = sqrt(1 - a^2)"


def _spread_powers(weight: Tensor, low: float, high: float, power: float) -> None:
    weight.copy_(torch.expm1(-weight.uniform_(low, high).log() / power).log())


@dataclass(frozen=True)
class OutputGate(Part):
    """Multiply the result by a gate from a second branch: y <- y * act(z).

    Args:
        gate: z, the other branch, of the axes of y.
        act: its activation.

    >>> recur.blocks.OutputGate("g", act="sigmoid").formula()
    'y <- y * sigmoid(g)'
    """

    gate: str = "z"
    act: str = "silu"

    def __post_init__(self) -> None:
        activation(self.act)

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {"y": axes.same("y", self.gate)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(y=output_gate(flow["y"], flow[self.gate], act=self.act, form=flow.form)), None

    def formula(self) -> str:
        return f"y <- y * {self.gate if self.act == 'identity' else f'{self.act}({self.gate})'}"


RATES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {  # law -> of beta and |k|^2; its formula
    "exponential": (lambda beta, n: beta * decayed_mean(beta * n), "(1 - exp(-beta |k|^2)) / |k|^2"),
    "projection": (lambda beta, n: beta / (n + 1e-6), "beta / (|k|^2 + 1e-6)"),
    "implicit": (lambda beta, n: beta / (1 + beta * n), "beta / (1 + beta |k|^2)"),
}


@dataclass(frozen=True)
class KeyedRate(Part):
    """The write strength of a delta rule for keys of any length: beta <- law(beta, |k|^2).

    >>> recur.blocks.KeyedRate().formula()
    'beta <- (1 - exp(-beta |k|^2)) / |k|^2'

    Args:
        beta: write strength [H]; replaced.
        k: keys [H K], of any length.
        law: "exponential", (1 - exp(-beta |k|^2)) / |k|^2, the exact decay of the error over a time beta; "projection",
            beta / |k|^2, a Kaczmarz step; "implicit", beta / (1 + beta |k|^2), the minimiser of a proximal loss.
    """

    beta: str = "beta"
    k: str = "k"
    law: str = "exponential"

    def __post_init__(self) -> None:
        if self.law not in RATES:
            raise RecipeError(f"KeyedRate: law must be one of {', '.join(RATES)}, got {self.law!r}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.must(self.beta, axes[self.k][:-1])
        return {self.beta: axes[self.beta]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        beta, k = flow[self.beta], flow[self.k]
        wide = accumulation_dtype(beta, k)
        rate = RATES[self.law][0](beta.to(wide), k.to(wide).square().sum(-1))
        return flow.set(**{self.beta: rate.to(beta.dtype)}), None

    def formula(self) -> str:
        return f"{self.beta} <- {RATES[self.law][1].replace('beta', self.beta).replace('k', self.k)}"


@dataclass(frozen=True)
class StepDecay(Part):
    """A positive step of each token and the decay that follows: delta = softplus(dt + b), log_a = -exp(A) delta.

    dt, b [H] or [H K]; A [H].

    Args:
        source: dt [H] or [H K].
        limit: the least and the greatest delta.
        rates: exp(A) starts uniform between these; softplus(b) starts spread over 0.001 to 0.1.
        step: delta.
        out: log_a.

    >>> recur.blocks.StepDecay().formula()
    'delta = softplus(dt + b), log_a = -exp(A) delta'
    """

    source: str = "dt"
    limit: tuple[float, float] | None = None
    rates: tuple[float, float] = (1.0, 16.0)
    step: str = "delta"
    out: str = "log_a"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found = axes.rank(self.source, 1, 2)
        return {self.step: found, self.out: found}

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = site.of(self.source)
        return {
            "A_log": Param(shape[:1], partial(_log_uniform, rates=self.rates), decay=False, float32=True),
            "dt_bias": Param(shape, spread_time_constants, decay=False, float32=True),
        }

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        delta = biased("softplus", flow[self.source], weights.dt_bias, form=flow.form)
        delta = delta if self.limit is None else delta.clamp(*self.limit)
        rate = weights.A_log.exp().unflatten(0, (-1,) + (1,) * (weights.dt_bias.ndim - 1))
        return flow.set(**{self.step: delta, self.out: -rate * delta}), None

    def formula(self) -> str:
        step = f"softplus({self.source} + b)"
        step = step if self.limit is None else f"clamp({step}, {self.limit[0]:g}, {self.limit[1]:g})"
        return f"{self.step} = {step}, {self.out} = -exp(A) {self.step}"


def _log_uniform(weight: Tensor, rates: tuple[float, float]) -> None:
    weight.uniform_(*rates).log_()


@dataclass(frozen=True)
class Learned(Part):
    """A learned tensor that is the same at every token: out [*].

    Args:
        out: tensor written.
        axes: its axes.
        init: its first values, an expression over the index i along the last axis, the axes, `layer` and `depth`.

    >>> recur.blocks.Learned("w", "H", init="i/H").formula()
    'w learned, at first i/H'
    """

    out: str
    axes: str
    init: str = "0"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: spec(self.axes)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"value": Param(site.size(self.axes), by_index(self.init, site), decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.out: weights.value[None, None]}), None

    def formula(self) -> str:
        return f"{self.out} learned, at first {self.init}"
