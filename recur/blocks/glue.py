"""Parts that prepare, mix and combine tensors of the flow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.axes import Spec, spec
from recur.blocks.cache import extend, fresh, row_of
from recur.primitives.conv import causal_convs, token_shift
from recur.primitives.fixed import tap_conv
from recur.primitives.gates import activation, output_gate, scale_gradient, weigh
from recur.primitives.norms import KINDS, normalise
from recur.recipe import Around, Axes, Flow, Part, Recipe, RecipeError, Reverse, Site, State
from recur.shapes import readable
from recur.weights import Init, Param, Weights, bias_init, by_index, matrix_init, normal, ones, uniform, zeros


def flat(x: Tensor) -> Tensor:
    """[B T ...] -> [B T F]."""
    return x if x.ndim == 3 else x.flatten(2)


@dataclass(frozen=True)
class LowRank:
    """An output of Project that passes through `rank` channels: W2 W1 x (+ b), an activation between them if wanted.

    Args:
        axes: of the output.
        rank: the number of channels between the two maps, an axis or an expression.
        bias: whether the output has one.
        act: activation between the two maps.
        init: law of W2 (recur.weights.matrix_init).
        first: first values of b, an expression over the index i of its channels (see `Learned`).

    >>> from recur.blocks import LowRank, Project
    >>> recur.Recipe(Project("x", y=LowRank("D", rank="R")), axes={"R": 4})
    R = 4
    project  y [D]  y = W2 W1 x
    """

    axes: str
    rank: str
    bias: bool = False
    act: str = "identity"
    init: str = "linear"
    first: str | None = None


class Projection(Weights):
    """The matrices of a Project: x [B T F] to all its outputs, in their order."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(self.outputs(F.linear(x, self.weight, self.declared_or_none("bias"))).values())

    def outputs(self, joined: Tensor, narrow: Collection[str] = ()) -> dict[str, Tensor]:
        """All outputs, from the product with `weight`; of those that are `narrow` W1 x, before the last map."""
        pieces = torch.split_with_sizes(joined, self.splits, -1) if len(self.splits) > 1 else (joined,)
        made = {}
        for (name, out), piece, shape in zip(self.outs, pieces, self.shapes, strict=True):
            if name in narrow:
                shape = piece.shape[-1:]
            elif isinstance(out, LowRank):
                bias = getattr(self, f"{name}_bias") if out.bias else None
                piece = F.linear(activation(out.act)(piece), getattr(self, f"{name}_up"), bias)
            made[name] = piece if len(shape) == 1 else piece.view(*piece.shape[:-1], *shape)
        return made


def _fill_rows(weight: Tensor, rows: list[int], laws: list[Init]) -> None:
    for law, piece in zip(laws, weight.split(rows), strict=True):
        law(piece)


@dataclass(frozen=True, init=False)
class Project(Part):
    """Linear maps of one tensor, in one matrix product: u = W_u x (+ b_u), z = W_z x (+ b_z), ...

    Project("x", u="E", k="N", rate=LowRank("E", rank="R")). Outputs may have several axes ("H K": head h holds the
    channels h K .. h K + K - 1). Rows of the weight lie in the order written here.

    Args:
        source: the tensor read, all its axes flattened; several names are joined.
        outs: the outputs as pairs of name and axes, which is how a recipe stores them.
        bias: whether all outputs have one.
        init: law of the first weights (recur.weights.matrix_init).
        named: the outputs: name="axes", or name=LowRank(...).

    >>> from recur.blocks import Project
    >>> recur.Recipe(Project("x", u="E", z="E"), Project("u z", y="D"), axes={"E": "2*D"})
    E = 2*D
    project    u [E], z [E]  u = W x, z = W x
    project_2  y [D]         y = W [u, z]
    """

    source: str
    outs: tuple[tuple[str, str | LowRank], ...]
    bias: bool
    init: str

    def __init__(
        self,
        source: str,
        outs: tuple[tuple[str, Any], ...] = (),
        *,
        bias: bool = False,
        init: str = "linear",
        name: str | None = None,
        **named: str | LowRank,
    ) -> None:
        values = {"source": source, "outs": tuple((n, a) for n, a in outs) + tuple(named.items())}
        for key, value in {**values, "bias": bias, "init": init, "name": name}.items():
            object.__setattr__(self, key, value)

    def _first(self) -> list[str]:
        """Axes each output has after the shared product."""
        return [out.rank if isinstance(out, LowRank) else out for _, out in self.outs]

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.named(self.source)
        return {name: spec(out.axes if isinstance(out, LowRank) else out) for name, out in self.outs}

    def params(self, site: Site) -> Mapping[str, Param]:
        fan_in = sum(math.prod(site.of(name)) for name in self.source.split())
        rows = [math.prod(site.size(first)) for first in self._first()]
        made = {"weight": Param((sum(rows), fan_in), self._fill(rows, fan_in, site.depth))}
        if self.bias:
            made["bias"] = Param((sum(rows),), bias_init(self.init, fan_in), decay=False)
        for (name, out), rank in zip(self.outs, rows, strict=True):
            if isinstance(out, LowRank):
                width = math.prod(site.size(out.axes))
                made[f"{name}_up"] = Param((width, rank), matrix_init(out.init, rank, width, site.depth))
                if out.bias:
                    law = bias_init(out.init, rank) if out.first is None else by_index(out.first, site)
                    made[f"{name}_bias"] = Param((width,), law, decay=False)
        return made

    def _fill(self, rows: list[int], fan_in: int, depth: int) -> Init:
        """Every output's rows drawn as the matrix of its own that they are."""
        return partial(_fill_rows, rows=rows, laws=[matrix_init(self.init, fan_in, fan_out, depth) for fan_out in rows])

    def build(self, site: Site) -> Projection:
        sizes = {
            "splits": [math.prod(site.size(first)) for first in self._first()],
            "shapes": [site.size(out.axes if isinstance(out, LowRank) else out) for _, out in self.outs],
        }
        return Projection(self.params(site), {"outs": self.outs, **sizes})

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        read = [flat(flow[name]) for name in self.source.split()]
        made = weights(read[0] if len(read) == 1 else torch.cat(read, -1))
        return flow.set(**{name: y for (name, _), y in zip(self.outs, made, strict=True)}), None

    def formula(self) -> str:
        bias, names = " + b" if self.bias else "", self.source.split()
        x = f"[{', '.join(names)}]" if len(names) > 1 else self.source
        return ", ".join(
            f"{name} = W2 {'' if out.act == 'identity' else out.act + ' '}W1 {x}{' + b' if out.bias else ''}"
            if isinstance(out, LowRank)
            else f"{name} = W {x}{bias}"
            for name, out in self.outs
        )


@dataclass(frozen=True)
class ShortConv(Part):
    """Depthwise causal convolution over the last `width` tokens, then an activation: u <- act(conv(u)).

    Args:
        source: the tensor, or several names, "u B C", that share one convolution over all their channels.
        width: taps: the token itself and those before it.
        bias: whether every channel has one.
        act: the activation.

    >>> recur.blocks.ShortConv("u", width=2).formula()
    'u <- silu(sum_w c_w u_{t-w} + b), w < 2'
    """

    source: str
    width: int = 4
    bias: bool = True
    act: str = "silu"

    def __post_init__(self) -> None:
        if not 1 <= self.width < 2**31:
            raise RecipeError(f"ShortConv: width must be at least 1 and below 2^31, got {self.width}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: axes[name] for name in axes.named(self.source)}

    def _widths(self, site: Site) -> list[int]:
        return [math.prod(site.of(name)) for name in self.source.split()]

    def params(self, site: Site) -> Mapping[str, Param]:
        channels, law = sum(self._widths(site)), uniform(self.width**-0.5)
        made = {"weight": Param((channels, self.width), law)}
        return made | ({"bias": Param((channels,), law, decay=False)} if self.bias else {})

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"widths": self._widths(site)}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.zeros(batch, self.width - 1, sum(self._widths(site)))

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        names, bias = self.source.split(), weights.bias if self.bias else None
        xs = tuple(flat(flow[name]) for name in names)
        options: dict[str, Any] = {"cu_seqlens": flow.cu_seqlens, "act": self.act, "form": flow.form}
        ys, state = causal_convs(xs, weights.weight, bias, initial_state=state, **options)
        made = {
            name: y if y.ndim == flow[name].ndim else y.view_as(flow[name]) for name, y in zip(names, ys, strict=True)
        }
        return flow.set(**made), state

    def formula(self) -> str:
        bias = " + b" if self.bias else ""
        mixed = (f"{u} <- {self.act}(sum_w c_w {u}_{{t-w}}{bias})" for u in self.source.split())
        return f"{', '.join(mixed)}, w < {self.width}"


@dataclass(frozen=True)
class PositionTaps(Part):
    """Taps learned for every position, in the place of taps that tokens bring: tap_t = table[length - 1 - t].

    Args:
        axes: of a tap.
        length: positions in the table.
        out: tensor written.

    >>> recur.blocks.PositionTaps("H", 2048).formula()
    'tap_t = table[2048 - 1 - t]'
    """

    axes: str
    length: int
    out: str = "tap"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: spec(self.axes)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"table": Param((self.length, *site.size(self.axes)), normal())}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        at = flow.positions()
        if readable(at) and int(at.max()) >= self.length:
            raise ValueError(f"PositionTaps: length={self.length} is too short for {int(at.max()) + 1} tokens")
        return flow.set(**{self.out: weights.table[self.length - 1 - at].to(flow["x"].dtype)}), None

    def formula(self) -> str:
        return f"{self.out}_t = table[{self.length} - 1 - t]"


@dataclass(frozen=True)
class TapConv(Part):
    """Causal convolution whose taps the tokens bring: y_t = sum_{s<=t} tap_s u_{t-s}; u [V], tap [H].

    The weight of lag s is read from token s, so nothing of fixed size remembers the past: the state is a cache of u
    and taps, and the cost of a step grows with the sequence. Heads are equal stretches of channels.

    Args:
        source: u [V].
        tap: [H], one per token and head.
        out: tensor written.

    >>> recur.blocks.TapConv("u").formula()
    'y_t = sum_{s<=t} tap_s u_{t-s}'
    """

    source: str
    tap: str = "tap"
    out: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.rank(self.tap, 1)
        return {self.out: axes.rank(self.source, 1)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        (V,), (H,) = site.of(self.source), site.of(self.tap)
        if V % H:
            raise RecipeError(f"TapConv: taps must divide the channels of {self.source}, got H={H} and V={V}")
        return {"width": V // H}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return fresh(site, batch, max_len, u=self.source, tap=self.tap)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        new = extend("TapConv", flow, state, u=flow[self.source], tap=flow[self.tap])
        y = tap_conv(new["u"], new["tap"].repeat_interleave(weights.width, -1))
        return flow.set(**{self.out: y[row_of(flow), flow.positions()]}), new

    def formula(self) -> str:
        return f"{self.out}_t = sum_{{s<=t}} {self.tap}_s {self.source}_{{t-s}}"


@dataclass(frozen=True)
class TokenShift(Part):
    """Mix every token with the one before it, in a learned proportion per channel: to = x_t + mu (x_{t-1} - x_t).

    Args:
        source: the tensor read.
        to: what is written; several names have a mu each.
        init: first values of mu, one expression per name (see `Learned`), or one for all.

    >>> recur.blocks.TokenShift("x", "k v").formula()
    'k = x_t + mu (x_{t-1} - x_t), v = x_t + mu (x_{t-1} - x_t)'
    """

    source: str
    to: str
    init: tuple[str, ...] = ("0.5",)

    def __post_init__(self) -> None:
        if len(self.init) not in (1, len(self.to.split())):
            raise RecipeError(
                f"TokenShift: init must have one expression, or one for each of {self.to}, got {len(self.init)}"
            )

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return dict.fromkeys(self.to.split(), axes.rank(self.source, 1))

    def params(self, site: Site) -> Mapping[str, Param]:
        names = self.to.split()
        laws = self.init * len(names) if len(self.init) == 1 else self.init
        laws_of = {name: by_index(law, site) for name, law in zip(names, laws, strict=True)}
        return {f"mu_{name}": Param(site.of(self.source), law, decay=False) for name, law in laws_of.items()}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.zeros(batch, 1, *site.of(self.source))

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        x = flow[self.source]
        before, state = token_shift(x, initial_state=state, cu_seqlens=flow.cu_seqlens)
        shares = {name: getattr(weights, f"mu_{name}").to(x.dtype) for name in self.to.split()}
        return flow.set(**{name: torch.lerp(x, before, mu) for name, mu in shares.items()}), state

    def formula(self) -> str:
        return ", ".join(
            f"{to} = {self.source}_t + mu ({self.source}_{{t-1}} - {self.source}_t)" for to in self.to.split()
        )


@dataclass(frozen=True)
class Norm(Part):
    """Normalise a tensor over some of its trailing axes (recur.primitives.norms.normalise has the formulas).

    Args:
        source: the tensor; the result goes to `to`, or takes its place.
        kind: "rms", "layer", "l2", "unit" or "smooth_unit".
        over: the trailing axes normalised together, such as "V" for each head alone; all of them when omitted.
        eps: a number, or the name of a tensor [B T H] that holds one value per head.
        affine: "full" (a weight, and a bias if kind is "layer"), "weight", or "none".
        groups: how many equal groups of these entries are normalised, each by itself.
        first: first value of the weight, an expression over axes, `layer` and `depth`.
        to: where the result goes.

    >>> recur.blocks.Norm("y", kind="layer", over="V", affine="none").formula()
    'y <- layer norm(y) over V, eps 1e-05'
    """

    source: str
    kind: str = "rms"
    over: str | None = None
    eps: float | str = 1e-5
    affine: str = "full"
    groups: str | int = 1
    to: str | None = None
    first: str = "1"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"Norm: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.affine not in ("full", "weight", "none"):
            raise RecipeError(f'Norm: affine must be "full", "weight" or "none", got {self.affine!r}')

    def _axes(self, axes: Axes) -> Spec:
        found = axes[self.source]
        over = found if self.over is None else spec(self.over)
        if found[len(found) - len(over) :] != over:
            raise RecipeError(
                f"{axes.reader}: over must be the last axes of {self.source} [{' '.join(found)}], got {self.over!r}"
            )
        return over

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        over = self._axes(axes)
        if isinstance(self.eps, str) and axes[self.eps] != axes[self.source][: -len(over)]:
            raise RecipeError(
                f"{axes.reader}: eps {self.eps!r} must have the axes of {self.source} that are not normalised"
            )
        return {self.to or self.source: axes[self.source]}

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = site.size(self._axes(site.axes))
        law = ones if self.first == "1" else by_index(self.first, site)
        weight = {"weight": Param(shape, law, decay=False)} if self.affine != "none" else {}
        bias = {"bias": Param(shape, zeros, decay=False)} if self.affine == "full" and self.kind == "layer" else {}
        return weight | bias

    def facts(self, site: Site) -> Mapping[str, Any]:
        over, groups = self._axes(site.axes), int(site.number(self.groups))
        if groups < 1 or math.prod(site.size(over)) % groups:
            raise RecipeError(f"Norm: groups must divide the {math.prod(site.size(over))} entries, got {groups}")
        return {"rank": len(over), "groups": groups}

    def eps_of(self, flow: Flow, weights: Any) -> float | Tensor:
        """A number, or a tensor that broadcasts against what is normalised."""
        return flow[self.eps][(...,) + (None,) * weights.rank] if isinstance(self.eps, str) else self.eps

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        scale, shift = weights.declared_or_none("weight"), weights.declared_or_none("bias")
        eps = self.eps_of(flow, weights)
        options: dict[str, Any] = {"axes": weights.rank, "groups": weights.groups, "eps": eps, "form": flow.form}
        y = normalise(flow[self.source], self.kind, weight=scale, bias=shift, **options)
        return flow.set(**{self.to or self.source: y}), None

    def formula(self) -> str:
        over = (f" over {self.over}" if self.over else "") + (f" in {self.groups} groups" if self.groups != 1 else "")
        return (
            f"{self.to or self.source} {'=' if self.to else '<-'} {self.kind} norm({self.source}){over}, eps {self.eps}"
        )


@dataclass(frozen=True)
class Act(Part):
    """A pointwise function of some tensors: Act("q k", "silu").

    Args:
        names: the tensors, "q k".
        fn: name of the function: "silu", "gelu", "sigmoid", "tanh", "relu", "1+elu" and others of
            `recur.primitives.gates`.

    >>> recur.blocks.Act("q k", "silu").formula()
    'q <- silu(q), k <- silu(k)'
    """

    names: str
    fn: str = "silu"

    def __post_init__(self) -> None:
        activation(self.fn)

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: axes[name] for name in self.names.split()}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{name: activation(self.fn)(flow[name]) for name in self.names.split()}), None

    def formula(self) -> str:
        return ", ".join(f"{name} <- {self.fn}({name})" for name in self.names.split())


@dataclass(frozen=True)
class Scale(Part):
    """Multiply a tensor by a number, given as an expression over axes: Scale("k", "1/sqrt(K)").

    Args:
        source: the tensor.
        by: the number, as an expression over axes.

    >>> recur.blocks.Scale("k", "1/sqrt(K)").formula()
    'k <- k * 1/sqrt(K)'
    """

    source: str
    by: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: axes[self.source]}

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"factor": site.number(self.by)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.source: flow[self.source] * weights.factor}), None

    def formula(self) -> str:
        return f"{self.source} <- {self.source} * {self.by}"


@dataclass(frozen=True)
class Multiply(Part):
    """Multiply a tensor by another one, of the same or of its first axes: x <- x * act(w).

    Args:
        source: x, such as u [H P].
        by: w, of the axes of x or of the first of them, such as delta [H].
        act: a function of w first, as in `Act`.
        to: where the result goes; in place when omitted.

    >>> from recur.blocks import Multiply
    >>> Multiply("u", by="i", act="sigmoid").formula(), Multiply("u", by="delta", to="v").formula()
    ('u <- u * sigmoid(i)', 'v = u * delta')
    """

    source: str
    by: str
    act: str = "identity"
    to: str | None = None

    def __post_init__(self) -> None:
        activation(self.act)

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        _leading(axes, self.source, axes[self.by])
        return {self.to or self.source: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        x, w = flow[self.source], flow[self.by]
        if x.ndim == w.ndim:
            y = output_gate(x, w, act=self.act, form=flow.form)
        else:
            y = weigh(x, activation(self.act)(w), form=flow.form)
        return flow.set(**{self.to or self.source: y}), None

    def formula(self) -> str:
        factor = self.by if self.act == "identity" else f"{self.act}({self.by})"
        return f"{self.to or self.source} {'=' if self.to else '<-'} {self.source} * {factor}"


@dataclass(frozen=True)
class ScaleGrad(Part):
    """The same value with a fraction of its gradient.

    Args:
        source: the tensor.
        fraction: of its gradient that passes.

    >>> recur.blocks.ScaleGrad("c", 0.9).formula()
    'gradient of c times 0.9'
    """

    source: str
    fraction: float

    @property
    def exact_gradients(self) -> bool:
        return self.fraction == 1

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.source: scale_gradient(flow[self.source], self.fraction)}), None

    def formula(self) -> str:
        return f"gradient of {self.source} times {self.fraction}"


@dataclass(frozen=True)
class Skip(Part):
    """Add a tensor to the result of the scan, weighted per channel: y <- y + D * u.  D starts as N(mean, std^2).

    Args:
        source: u, what goes around the scan.
        out: y, what it is added to.
        mean: of the first values of D.
        std: of the first values of D.
        over: the axes of D, such as "H" for one per head; all those of u when omitted.

    >>> recur.blocks.Skip("u").formula()
    'y <- y + D * u'
    """

    source: str
    out: str = "y"
    mean: float = 1.0
    std: float = 0.0
    over: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise RecipeError(f"Skip: std must be a number of at least 0, got {self.std}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        self._after(axes)
        return {self.out: axes.same(self.out, self.source)}

    def _after(self, axes: Axes) -> int:
        """How many axes of u follow those of D."""
        found = axes[self.source]
        over = found if self.over is None else spec(self.over)
        starts = [at for at in range(len(found)) if over and found[at : at + len(over)] == over]
        if not starts:
            raise RecipeError(
                f"{axes.reader} needs {self.source} with the axes [{' '.join(over)}], got [{' '.join(found)}]"
            )
        return len(found) - starts[0] - len(over)

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"after": self._after(site.axes)}

    def params(self, site: Site) -> Mapping[str, Param]:
        shape = site.of(self.source) if self.over is None else site.size(self.over)
        return {"D": Param(shape, normal(self.std, self.mean), decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y, u = flow[self.out], flow[self.source]
        D = weights.D[(...,) + (None,) * weights.after]
        return flow.set(**{self.out: (y + D * u).to(y.dtype)}), None

    def formula(self) -> str:
        return f"{self.out} <- {self.out} + D * {self.source}"


@dataclass(frozen=True)
class Dropout(Part):
    """Zero entries with probability p while training.

    Args:
        source: the tensor.
        p: the probability.

    >>> recur.blocks.Dropout("y", 0.1).formula()
    'y <- dropout(y, 0.1)'
    """

    source: str
    p: float

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        on = weights.training and not flow.evaluate
        return flow.set(**{self.source: F.dropout(flow[self.source], self.p, on)}), None

    def formula(self) -> str:
        return f"{self.source} <- dropout({self.source}, {self.p})"


@dataclass(frozen=True)
class Sum(Part):
    """Add tensors of equal axes: Sum("f b", out="y").

    Args:
        names: two tensors or more, "f b".
        out: tensor written.

    Raises: RecipeError for fewer than two names; `Rename` copies one.

    >>> recur.blocks.Sum("f b").formula()
    'y = f + b'
    """

    names: str
    out: str = "y"

    def __post_init__(self) -> None:
        if len(self.names.split()) < 2:
            raise RecipeError(f"Sum: names must be two tensors or more, got {self.names!r}; Rename copies one")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.out: axes.same(*self.names.split())}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.out: sum(flow[name] for name in self.names.split())}), None  # type: ignore[arg-type]

    def formula(self) -> str:
        return f"{self.out} = {' + '.join(self.names.split())}"


@dataclass(frozen=True)
class Rename(Part):
    """The same tensor under a further name: Rename("h", "y").

    Args:
        source: the tensor.
        to: its further name.

    >>> recur.blocks.Rename("h", "y").formula()
    'y = h'
    """

    source: str
    to: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.to: axes[self.source]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.to: flow[self.source]}), None

    def formula(self) -> str:
        return f"{self.to} = {self.source}"


@dataclass(frozen=True)
class Reshape(Part):
    """The same channels under other axes, as many: Reshape("y", "D") puts heads side by side.

    Args:
        source: the tensor.
        axes: the new axes.
        to: where the result goes; in place when omitted.

    >>> recur.blocks.Reshape("y", "D").formula()
    'y = y as [D]'
    """

    source: str
    axes: str
    to: str | None = None

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes[self.source]
        return {self.to or self.source: spec(self.axes)}

    def facts(self, site: Site) -> Mapping[str, Any]:
        old, new = site.of(self.source), site.size(self.axes)
        if math.prod(old) != math.prod(new):
            raise RecipeError(f"Reshape: {self.source} {list(old)} must have as many channels as {list(new)}")
        return {"shape": new}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.to or self.source: flow[self.source].flatten(2).unflatten(-1, weights.shape)}), None

    def formula(self) -> str:
        return f"{self.to or self.source} = {self.source} as [{self.axes}]"


@dataclass(frozen=True)
class Unbind(Part):
    """Take a tensor apart along the axis that has one entry per name: Unbind("qkv", "q k v"), qkv [H 3 K], q [H K].

    Args:
        source: the tensor.
        names: what is written, one name per entry of that axis.

    >>> recur.blocks.Unbind("qkv", "q k v").formula()
    'q, k, v = qkv'
    """

    source: str
    names: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found, count = axes[self.source], str(len(self.names.split()))
        if count not in found:
            raise RecipeError(f"{axes.reader} needs an axis of {count} in {self.source}, got [{' '.join(found)}]")
        at = found.index(count)
        return dict.fromkeys(self.names.split(), found[:at] + found[at + 1 :])

    def facts(self, site: Site) -> Mapping[str, Any]:
        return {"axis": 2 + site.axes[self.source].index(str(len(self.names.split())))}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        pieces = flow[self.source].unbind(weights.axis)
        return flow.set(**dict(zip(self.names.split(), pieces, strict=True))), None

    def formula(self) -> str:
        return f"{', '.join(self.names.split())} = {self.source}"


@dataclass(frozen=True)
class Map(Part):
    """Any function of tensors of the flow, token by token: Map(fn, reads="q k", out="s", axes="H"); not for JSON.

    Args:
        fn: the function, of tensors [B T ...].
        reads: names of its arguments, in order.
        out: tensor written.
        axes: of what it writes.

    >>> from recur.blocks import Map
    >>> square = recur.Mixer(recur.Recipe(Map(torch.square, reads="x", out="y", axes="D")), dim=1)
    >>> square(torch.full((1, 1, 1), 3.0)).y.item()
    9.0
    """

    fn: Callable[..., Tensor]
    reads: str
    out: str
    axes: str

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        for name in self.reads.split():
            axes[name]
        return {self.out: spec(self.axes)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.out: self.fn(*(flow[name] for name in self.reads.split()))}), None

    def formula(self) -> str:
        return f"{self.out} = {getattr(self.fn, '__name__', 'fn')}({', '.join(self.reads.split())})"


@dataclass(frozen=True)
class Along(Around):
    """Run parts along one axis of a grid, every line of it as a sequence of its own.

    The tokens are the cells of the grid that the call names, grid=(rows, columns), row by row. Axis 0 runs down the
    columns, axis 1 along the rows. Inside, "x" is the tensor `reads`. States are [B lines ...]. Grids cannot be packed.

    Args:
        axis: of the grid: 0 down the columns, 1 along the rows.
        parts: what is run.
        reads: the tensor that the parts see as "x".

    >>> from recur.blocks import Along, Reshape
    >>> layer = recur.Mixer(recur.Recipe(Along(1, (Reshape("x", "D", to="y"),))), dim=8)
    >>> layer(torch.randn(1, 6, 8), grid=(2, 3)).y.shape  # 2 rows of 3 cells
    torch.Size([1, 6, 8])
    """

    axis: int
    parts: tuple[Part, ...] = ()
    reads: str = "x"

    def inside(self, axes: Axes) -> Axes:
        return dataclasses.replace(axes, written={**axes.written, "x": axes[self.reads]})

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        (B, T), grid, axis = flow["x"].shape[:2], flow.grid, self.axis + 1
        if flow.cu_seqlens is not None:
            raise NotImplementedError("Along: a grid cannot be packed; give images as rows of a batch")
        if grid is None or not 0 <= self.axis < len(grid) or math.prod(grid) != T:
            raise ValueError(f"Along: grid must have an axis {self.axis} and T={T} cells, got {grid}")
        n, others = len(grid), (*grid[: self.axis], *grid[axis:])

        def laid(tensor: Tensor) -> Tensor:
            if tensor.shape[1] != T:  # the same for all tokens
                return tensor if len(tensor) == 1 else tensor.repeat_interleave(math.prod(others), 0)
            cells = tensor.expand(B, *tensor.shape[1:]).unflatten(1, grid)
            return cells.movedim(axis, n).flatten(0, n - 1)

        def back(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape[:2]) != (len(position), grid[self.axis]):
                return tensor
            return tensor.unflatten(0, (B, *others)).movedim(n, axis).flatten(1, n)

        lines = {name: laid(tensor) for name, tensor in {**flow.tensors, "x": flow[self.reads]}.items()}
        position = flow.position.new_zeros(B * math.prod(others))
        inner = dataclasses.replace(flow, tensors=lines, position=position, grid=None)
        inner, state = self.body(inner, weights, None)
        made = {name: back(tensor) for name, tensor in inner.tensors.items() if tensor is not lines.get(name)}
        states = torch.utils._pytree.tree_map(lambda leaf: leaf.unflatten(0, (B, math.prod(others))), state)
        return flow.set(**made), states

    def formula(self) -> str:
        return f"along axis {self.axis}: " + "; ".join(part.formula() for part in self.parts)


# ---------------------------------------------------------------------- which way scans read: parts made of a scan,
# and of another one for the way back if that differs


def one_way(scan: Any, back: Any = None) -> tuple[Part, ...]:
    """Left to right.

    Args:
        scan: the scan, a part.
        back: not used: there is one direction.

    >>> from recur.blocks import OuterScan, one_way
    >>> [type(part).__name__ for part in one_way(OuterScan())]
    ['OuterScan']
    """
    return (scan,)


def both_ways(scan: Any, back: Any = None) -> tuple[Part, ...]:
    """Left to right and right to left, added: each token counts itself twice.

    Args:
        scan: the scan, a part.
        back: the scan of the other direction, where it has weights or names of its own; `scan` when omitted.

    >>> from recur.blocks import OuterScan, both_ways
    >>> [type(part).__name__ for part in both_ways(OuterScan())]
    ['OuterScan', 'Reverse', 'Sum']
    """
    return (*_there_and_back(scan, back, "ahead", "behind"), Sum("ahead behind", out=scan.out))


def in_grid(scan: Any, back: Any = None) -> tuple[Part, ...]:
    """Down, up, right and left in a grid, added.

    Args:
        scan: the scan, a part.
        back: the scan of the other direction, where it has weights or names of its own; `scan` when omitted.

    >>> from recur.blocks import OuterScan, in_grid
    >>> [type(part).__name__ for part in in_grid(OuterScan())]
    ['Along', 'Along', 'Sum']
    """
    down, across = _there_and_back(scan, back, "down", "up"), _there_and_back(scan, back, "right", "left")
    return Along(0, down), Along(1, across), Sum("down up right left", out=scan.out)


def down_and_right(scan: Any, back: Any = None) -> tuple[Part, ...]:
    """Down and right in a grid, added: a cell sees what is straight above it and what is left of it.

    Args:
        scan: the scan, a part.
        back: the scan of the other direction, where it has weights or names of its own; `scan` when omitted.

    >>> from recur.blocks import OuterScan, down_and_right
    >>> [type(part).__name__ for part in down_and_right(OuterScan())]
    ['Along', 'Along', 'Sum']
    """
    down, right = (dataclasses.replace(scan, out=name) for name in ("down", "right"))
    return Along(0, (down,)), Along(1, (right,)), Sum("down right", out=scan.out)


def in_series(recipe: Recipe) -> Recipe:
    """The recipe along the columns of a grid and then, with the same weights, along the rows of what that gave.

    Args:
        recipe: of one direction of a grid, such as `hgrn2(scan=both_ways)`.

    >>> from recur.blocks import both_ways, in_series
    >>> layer = recur.Mixer(in_series(recur.presets.hgrn2(heads=2, scan=both_ways)), dim=8)
    >>> layer(torch.randn(1, 6, 8), grid=(2, 3)).y.shape
    torch.Size([1, 6, 8])
    """
    shared = tuple(part for part in recipe.parts if part.scope == "model")
    body = tuple(part for part in recipe.parts if part.scope == "layer")
    lines = Along(0, body, name="body"), Along(1, body, reads="y", name="body")
    return recipe.like(*shared, *lines)


def _there_and_back(scan: Any, back: Any, there: str, home: str) -> tuple[Part, Part]:
    return dataclasses.replace(scan, out=there), Reverse((dataclasses.replace(back or scan, out=home),))


def _leading(axes: Axes, name: str, first: Spec) -> None:
    """Raise RecipeError unless these are the first axes of a tensor."""
    if axes[name][: len(first)] != first:
        raise RecipeError(
            f"{axes.reader} needs {name} with first axes [{' '.join(first)}], got [{' '.join(axes[name])}]"
        )
