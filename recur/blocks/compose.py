"""The source of one kernel for several parts of a recipe, one token at a time.

Every stock part that can join says here what it computes for a token, as code over the values it reads. A value is code
that loads or computes a tensor [B *] for the channels that a view asks for: all K rows of one head's state, BLOCK_V of
its columns, all channels of a row of the batch. So a part is written once, and may be asked for by a scan, by a norm,
and again for a skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from recur import kernel
from recur.axes import Spec
from recur.blocks.attention import Attention, Rotary
from recur.blocks.gates import (
    BoundedDecay,
    Decay,
    FixedDecay,
    FlooredDecay,
    Learned,
    LowerBounds,
    OutputGate,
    StepDecay,
)
from recur.blocks.glue import Act, LowRank, Multiply, Norm, Rename, Reshape, Scale, ShortConv, Skip
from recur.blocks.scans import DeltaScan, GatedScan, OnlineScan, OuterScan, SelectiveScan
from recur.primitives.retention import retention_decay
from recur.recipe import Flow, Part, Site, State

WIDEST = 16384  # entries of a tile
TOGETHER = 1024  # channels of a convolution that are shifted at once
ACTS = ("identity", "silu", "sigmoid", "gelu", "relu", "relu2", "tanh", "exp", "-exp", "softplus")


class Cannot(Exception):
    """Why a part cannot join a kernel; part: its key."""

    part = ""


class Partial(Cannot):
    """A value needs all channels of a row, of one that is known for some of them."""

    def __init__(self, value: Value, entries: int) -> None:
        super().__init__("a norm of channels that several programs have")
        self.value, self.entries = value, entries


@dataclass(frozen=True)
class View:
    """Channels that are asked for.

    at:    a variable, their indices in the last axes of a tensor, a number or a tile of two axes.
    here:  a variable, which of the tile are there; None for all.
    kind:  "rows" and "cols" of a state, "head", or "row" for all channels of a row.
    full:  how many neighbouring entries a norm may take together.
    group: for such entries, a variable: the indices of the groups they make.
    """

    at: str
    here: str | None
    kind: str
    full: int = 0
    group: str = ""


@dataclass(frozen=True)
class Value:
    """A tensor [B *sizes] of one token as code; wide: outside of kernels in float32, whatever the model's dtype."""

    sizes: tuple[int, ...]
    code: Callable[[Kernel, View], str]
    wide: bool = False


Argument = tuple[Any, ...]  # ("flow", name), ("weight", key, name), ("state", key, name), ("table", key, name), ...


@dataclass
class Kernel:
    """Source as it is written: lines, and arguments with the names they have in it."""

    lines: list[str] = field(default_factory=list)
    indent: str = "    "
    given: dict[Argument, str] = field(default_factory=dict)
    written: dict[Argument, str] = field(default_factory=dict)
    numbers: dict[Argument, str] = field(default_factory=dict)
    known: dict[tuple[int, View], str] = field(default_factory=dict)
    leads: dict[tuple[View, int], View] = field(default_factory=dict)
    held: list[Value] = field(default_factory=list)  # whose ids stand in `known`
    geometry: Geometry | None = None
    owner: tuple[str, str] = ("", "")  # key and name of the state whose steps follow one another
    shifts: dict[Value, Callable[[], None]] = field(default_factory=dict)  # of states, after all that reads them
    tables: dict[Argument, Callable[[torch.device], Tensor]] = field(default_factory=dict)

    def line(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def let(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.line(f"{name} = {expression}")
        return name

    def of(self, value: Value, view: View) -> str:
        """The variable that holds a value."""
        key = (id(value), view)
        if key not in self.known:
            self.held.append(value)
            self.known[key] = value.code(self, view)
        return self.known[key]

    def leading(self, view: View, inner: int) -> View:
        """The same channels of a tensor without its last axes, of `inner` channels."""
        if inner == 1:
            return view
        if (view, inner) not in self.leads:
            self.leads[view, inner] = replace(view, at=self.let(f"{view.at} // {inner}"), full=0)
        return self.leads[view, inner]

    def pointer(self, argument: Argument) -> str:
        return self.given.setdefault(argument, f"g{len(self.given)}")

    def table(self, key: str, name: str, make: Callable[[torch.device], Tensor]) -> str:
        """Numbers that the recipe fixes."""
        self.tables["table", key, name] = make
        return self.pointer(("table", key, name))

    def state(self, argument: Argument) -> str:
        return self.written.setdefault(argument, f"w{len(self.written)}")

    def number(self, argument: Argument) -> str:
        return self.numbers.setdefault(argument, "layer_index" if argument == ("layer",) else f"n{len(self.numbers)}")

    def load(self, place: str, view: View) -> str:
        mask = "" if view.here is None else f", mask={view.here}, other=0.0"
        return self.let(f"tl.load({place}{mask}).to(tl.float32)")

    def weight(self, key: str, name: str, view: View, entries: int) -> str:
        """A weight of this many entries, which the channels share if there are more."""
        return self.load(f"{self.pointer(('weight', key, name))} + {view.at} % {entries}", view)


@dataclass(frozen=True)
class Geometry:
    """Heads, heads that share keys, and the sizes of a state; whether its columns may be cut into tiles."""

    H: int
    group: int
    K: int
    V: int
    tiled: bool = True


@dataclass(frozen=True)
class At:
    """A part where it stands: its key, its site, and the values of what was written before it."""

    key: str
    site: Site
    values: Mapping[str, Value]

    def __getitem__(self, name: str) -> Value:
        if name not in self.values:  # of the flow
            return given(name, self.site.of(name))
        return self.values[name]

    def size(self, axes: Spec | str) -> tuple[int, ...]:
        return self.site.size(axes)


def given(name: str, sizes: tuple[int, ...]) -> Value:
    """A tensor of the flow."""

    def code(k: Kernel, view: View) -> str:
        pointer, stride = k.pointer(("flow", name)), k.number(("stride", name))
        return k.load(f"{pointer} + b * {stride} + {view.at}", view)

    return Value(sizes, code)


def pointwise(form: str, *values: Value, wide: bool = False) -> Value:
    """A formula of values with {0}, {1}, ...: of the axes of the first, or of the first of these axes."""
    sizes = values[0].sizes

    def code(k: Kernel, view: View) -> str:
        found = []
        for value in values:
            inner = math.prod(sizes[len(value.sizes) :]) if value.sizes != sizes else 1
            found.append(k.of(value, k.leading(view, inner)))
        return k.let(form.format(*found))

    return Value(sizes, code, wide)


def acted(act: str, value: Value) -> Value:
    if act not in ACTS:
        raise Cannot(f"act={act!r}")
    return value if act == "identity" else pointwise(f"activate({{0}}, {act!r})", value, wide=value.wide)


def weight_of(at: At, name: str, sizes: tuple[int, ...]) -> Value:
    return Value(sizes, lambda k, view: k.weight(at.key, name, view, math.prod(sizes)), True)


# ---------------------------------------------------------------------- what each part computes

Written = dict[str, Value]


def _act(part: Act, at: At) -> Written:
    return {name: acted(part.fn, at[name]) for name in part.names.split()}


def _scale(part: Scale, at: At) -> Written:
    return {part.source: pointwise(f"{{0}} * {at.site.number(part.by)!r}", at[part.source])}


def _multiply(part: Multiply, at: At) -> Written:
    return {part.to or part.source: pointwise("{0} * {1}", at[part.source], acted(part.act, at[part.by]))}


def _output_gate(part: OutputGate, at: At) -> Written:
    return {"y": pointwise("{0} * {1}", at["y"], acted(part.act, at[part.gate]))}


def _skip(part: Skip, at: At) -> Written:
    sizes, after = at.site.of(part.source), part._after(at.site.axes)
    own = sizes if part.over is None else at.size(part.over)
    if sizes[: len(sizes) - after] != own:
        raise Cannot("a weight over axes that are not the first")
    return {part.out: pointwise("{0} + {2} * {1}", at[part.out], at[part.source], weight_of(at, "D", own))}


def _rename(part: Rename, at: At) -> Written:
    return {part.to: at[part.source]}


def _reshape(part: Reshape, at: At) -> Written:
    return {part.to or part.source: replace(at[part.source], sizes=at.size(part.axes))}


def _learned(part: Learned, at: At) -> Written:
    return {part.out: weight_of(at, "value", at.size(part.axes))}


def _decay(part: Decay, at: At) -> Written:
    return {part.out: pointwise(f"log_sigmoid({{0}}) * {1 / part.tau!r}", at[part.source], wide=True)}


def _floored_decay(part: FlooredDecay, at: At) -> Written:
    return {part.out: pointwise(f"tl.sigmoid({{0}}) * {-part.rate!r}", at[part.source], wide=True)}


def _step_decay(part: StepDecay, at: At) -> Written:
    dt = at[part.source]
    delta = pointwise("-log_sigmoid(-({0} + {1}))", dt, weight_of(at, "dt_bias", dt.sizes), wide=True)
    if part.limit is not None:
        low, high = part.limit
        delta = pointwise(f"tl.minimum(tl.maximum({{0}}, {float(low)!r}), {float(high)!r})", delta, wide=True)
    rate = weight_of(at, "A_log", dt.sizes[:1])
    return {part.step: delta, part.out: pointwise("-tl.exp2({1} * LOG2E) * {0}", delta, rate, wide=True)}


def _lower_bounds(part: LowerBounds, at: At) -> Written:
    sizes = at.size(part.axes)
    width, first = math.prod(sizes), int(part.law == "skip_first")
    if at.site.depth > 64:
        raise Cannot(f"bounds of {at.site.depth} layers, more than 64")

    def code(k: Kernel, view: View) -> str:
        pointer, layer = k.pointer(("weight", at.key, "logits")), k.number(("layer",))
        shape = f"{view.at}, {view.here or 'True'}, {layer}, {at.site.depth}, {width}, {first}"
        return k.let(f"lower_bound({pointer}, {shape})")

    return {part.out: Value(sizes, code, True)}


def _bounded_decay(part: BoundedDecay, at: At) -> Written:
    z = at[part.source]
    if part.bound is None:
        log_a, keep = pointwise("log_sigmoid({0})", z, wide=True), pointwise("tl.sigmoid(-{0})", z)
    else:
        both = pointwise("bounded_gate({0}, {1})", z, at[part.bound])
        log_a, keep = pointwise("{0}[0]", both, wide=True), pointwise("{0}[1]", both)
    return {part.out: log_a, part.keep: keep}


def _fixed_decay(part: FixedDecay, at: At) -> Written:
    sizes = at.size(part.heads)

    def log_a(k: Kernel, view: View) -> str:
        mask = "" if view.here is None else f", mask={view.here}, other=-1.0"
        table = k.table(at.key, "log_a", partial(retention_decay, sizes[0]))
        return k.let(f"tl.load({table} + {view.at}{mask})")

    exact = Value(sizes, log_a)
    place = Value(sizes, lambda k, view: k.let(f"tl.load({k.pointer(('position',))} + b).to(tl.float64)"))
    eps = pointwise(f"grown({{0}}, {{1}}) * {part.eps!r}", exact, place, wide=True)
    return {part.out: pointwise("{0}.to(tl.float32)", exact, wide=True), part.eps_out: eps}


def _norm(part: Norm, at: At) -> Written:
    source, over = at[part.source], at.size(part._axes(at.site.axes))
    entries = math.prod(over)
    n, rows = entries // int(at.site.number(part.groups)), source.sizes[: len(source.sizes) - len(over)]
    kind, factor = part.kind, 1.0
    eps: Value | float = at[part.eps] if isinstance(part.eps, str) else part.eps
    if kind == "smooth_unit":
        if isinstance(eps, Value):
            raise Cannot("smooth_unit with an eps per head")
        kind, eps, factor = "rms", eps / n, n**-0.5
    if isinstance(eps, Value) and (eps.sizes != rows or n != entries):
        raise Cannot("an eps that is not one per row")

    def code(k: Kernel, view: View) -> str:
        if view.kind == "cols":
            raise Partial(source, n)
        if view.full != n:
            raise Cannot(f"a norm over {n} of {view.full or 'single'} entries")
        x, e = k.of(source, view), repr(eps)
        if isinstance(eps, Value):
            if view.kind == "rows":
                e = k.of(eps, View(view.group, None, "head"))
            else:
                e = k.of(eps, View(view.group, k.let(f"{view.group} < {math.prod(rows)}"), "groups"))
        across = "tl.trans({})" if view.kind == "rows" else "{}"  # whose entries lie along the first axis
        x = k.let(across.format(f"normed({across.format(x)}, {e}, {across.format(view.here)}, {n}, {kind!r})"))
        if factor != 1:
            x = k.let(f"{x} * {factor!r}")
        if part.affine != "none":
            x = k.let(f"{x} * {k.weight(at.key, 'weight', view, entries)}")
        if part.affine == "full" and part.kind == "layer":
            x = k.let(f"{x} + {k.weight(at.key, 'bias', view, entries)}")
        return x

    return {part.to or part.source: Value(source.sizes, code)}


def _rotary(part: Rotary, at: At) -> Written:
    return {name: _rotated(part, at, at[name]) for name in part.names.split()}


def _rotated(part: Rotary, at: At, source: Value) -> Value:
    K = source.sizes[-1]
    if K % 2:
        raise Cannot(f"an odd K={K}")

    def code(k: Kernel, view: View) -> str:
        stored = ("weight", at.key, "frequencies")
        found = partial(part._frequencies, K)
        table = k.pointer(stored) if part.stored else k.table(at.key, f"frequencies {K}", found)
        j, here = k.let(f"{view.at} % {K}"), "" if view.here is None else f", mask={view.here}, other=0.0"
        if part.layout == "half":
            first, pair = k.let(f"{j} < {K // 2}"), k.let(f"{j} % {K // 2}")
            other = k.let(f"tl.where({first}, {view.at} + {K // 2}, {view.at} - {K // 2})")
        else:
            first, pair = k.let(f"{j} % 2 == 0"), k.let(f"{j} // 2")
            other = k.let(f"{view.at} + 1 - 2 * ({j} % 2)")
        place = k.let(f"tl.load({k.pointer(('position',))} + b).to(tl.float64)")
        frequency = k.let(f"tl.load({table} + {pair}{here}).to(tl.float64)")
        both = k.let(f"rotation({place}, {frequency})")
        x, partner = k.of(source, view), k.of(source, replace(view, at=other))
        return k.let(f"{x} * {both}[0] + {partner} * tl.where({first}, -{both}[1], {both}[1])")

    return Value(source.sizes, code)


def _short_conv(part: ShortConv, at: At) -> Written:
    """The convolution, whose state is shifted after all has been read."""
    names, W = part.source.split(), part.width
    if W > 8:
        raise Cannot(f"{W} taps, more than 8")
    widths = [math.prod(at.site.of(name)) for name in names]
    made, first, channels = {}, 0, sum(widths)
    for name, width in zip(names, widths, strict=True):
        if name in at.values:
            raise Cannot("an input that is computed in the same kernel")
        made[name] = acted(part.act, _convolved(part, at, at[name], first, width))
        first += width
    assert first == channels
    return made


def _convolved(part: ShortConv, at: At, source: Value, first: int, width: int) -> Value:
    W, state = part.width, ("state", at.key, "")

    def place(k: Kernel, w: int, channel: str) -> str:
        b, s, c = (k.number(("state stride", *state[1:], axis)) for axis in range(3))
        return f"{k.state(state)} + b * {b} + {w} * {s} + ({first} + {channel}) * {c}"

    def shift(k: Kernel, view: View) -> None:
        old = [k.load(place(k, w, view.at), view) for w in range(1, W - 1)]
        for w, x in enumerate([*old, k.of(source, view)]):
            k.line(f"tl.store({place(k, w, view.at)}, {x}, mask={view.here})")

    def shift_all(k: Kernel) -> None:
        """By one program, for all channels of the row."""
        block = min(TOGETHER, 1 << (width - 1).bit_length())
        k.line(f"for c0 in range(0, {width}, {block}):")
        k.indent += "    "
        at = k.let(f"(c0 + tl.arange(0, {block}))[None, :]")
        shift(k, View(at, k.let(f"{at} < {width}"), "row"))
        k.indent = k.indent[:-4]

    def code(k: Kernel, view: View) -> str:
        weight = k.pointer(("weight", at.key, "weight"))
        total = k.of(source, view)
        total = k.let(f"{total} * {k.load(f'{weight} + ({first} + {view.at}) * {W} + {W - 1}', view)}")
        for w in range(W - 1):
            tap = k.load(f"{weight} + ({first} + {view.at}) * {W} + {w}", view)
            total = k.let(f"{total} + {tap} * {k.load(place(k, w, view.at), view)}")
        if part.bias:
            bias = k.load(f"{k.pointer(('weight', at.key, 'bias'))} + {first} + {view.at}", view)
            total = k.let(f"{total} + {bias}")
        if W > 1:
            k.shifts[value] = partial(shift, k, view) if k.geometry is None else partial(shift_all, k)
        return total

    value = Value(source.sizes, code)
    return value


def _gated_scan(part: GatedScan, at: At) -> Written:
    sizes = at.site.of(part.source)
    if part.rotates or len(sizes) != 1:
        raise Cannot("a complex state, or one of several axes")

    def code(k: Kernel, view: View) -> str:
        b, channel = (k.number(("state stride", at.key, "", axis)) for axis in range(2))
        place = f"{k.state(('state', at.key, ''))} + b * {b} + {view.at} * {channel}"
        u, log_a = k.of(at[part.source], view), k.of(at[part.decay], view)
        new = k.let(f"{k.load(place, view)} * tl.exp2({log_a} * LOG2E) + {u}")
        if value in k.shifts or k.geometry is not None:
            raise Cannot("a state of channels beside another state")
        k.shifts[value] = lambda: k.line(f"tl.store({place}, {new}, mask={view.here})")
        return new

    value = Value(sizes, code)
    return {part.out: value}


def low_rank(key: str, name: str, out: LowRank, sizes: tuple[int, ...], rank: int) -> Value:
    """W2 act(W1 x) (+ b), from W1 x, which stands in the flow under a name of its own."""
    width = math.prod(sizes)

    def code(k: Kernel, view: View) -> str:
        if view.kind == "head":
            raise Cannot("a low-rank projection to one channel per head")
        pointer, low = k.pointer(("weight", key, f"{name}_up")), narrowed(name)
        x = f"{k.pointer(('flow', low))} + b * {k.number(('stride', low))}"
        y = k.let(f"low_rank({pointer}, {x}, {view.at}, {view.here}, {rank}, {out.act!r})")
        return k.let(f"{y} + {k.weight(key, f'{name}_bias', view, width)}") if out.bias else y

    return Value(sizes, code)


def narrowed(name: str) -> str:
    """What W1 x of a LowRank output is called in the flow."""
    return f"{name} before its last map"


# ---------------------------------------------------------------------- scans: q, k [K 1] and v, y [1 V] of one head


def _state(k: Kernel, key: str, order: str = "bhkv") -> str:
    """A variable of pointers to the tile [K V] of a state [B H K V], or [B V K]."""
    strides = [k.number(("state stride", key, "", axis)) for axis in range(len(order))]
    index = {"b": "b", "h": "h", "k": "rows", "v": "cols"}
    places = " + ".join(f"{index[axis]} * {stride}" for axis, stride in zip(order, strides, strict=True))
    return k.let(f"{k.state(('state', key, ''))} + {places}")


def _advanced(k: Kernel, key: str, order: str, kept: Callable[[str], str], u: Callable[[str], str], key_: str) -> str:
    """Overwrite a state S by kept + key u, and return the variable that holds it."""
    pointers = _state(k, key, order)
    S = k.let(f"tl.load({pointers}, mask=in_k & in_v, other=0.0).to(tl.float32)")
    left = k.let(kept(S))
    new = k.let(f"{left} + {key_} * {u(left)}")
    k.line(f"tl.store({pointers}, {new}, mask=in_k & in_v)")
    return new


def _whole(view: View) -> None:
    if view.kind != "cols":
        raise Cannot("a read-out of a state that is read where it was written")


KEYS, OWN = View("k_at", "in_k", "rows"), View("a_at", "in_k", "rows")  # of the shared keys, and of the head's own
COLS, HEAD = View("v_at", "in_v", "cols"), View("h", None, "head")


def _outer_scan(part: OuterScan, at: At) -> Written:
    sizes, out = at.site.of(part.v), {name: at.site.of(name) for name in (part.q, part.v)}
    if part.rotates or len(out[part.q]) != 2 or len(sizes) != 2:
        raise Cannot("a complex state, or several writes or reads per token")
    K, scale = out[part.q][1], at.site.number(part.scale)

    def one(k: Kernel, name: str) -> str:
        """Of a head, or of its keys."""
        value = at[name]
        return k.of(value, HEAD if len(value.sizes) == 1 else replace(OWN, full=K, group="h"))

    def code(k: Kernel, view: View) -> str:
        _whole(view)
        q = k.of(at[part.q], replace(KEYS, full=K, group="g"))
        log_a = None if part.decay is None else one(k, part.decay)
        key = f"tied_key({log_a})" if part.k is None else k.of(at[part.k], replace(KEYS, full=K, group="g"))
        key, v = k.let(key), k.of(at[part.v], COLS)
        beta = one(k, part.beta) if isinstance(part, DeltaScan) else None
        before: list[str] = []

        def kept(S: str) -> str:
            before.append(S)
            return S if log_a is None else f"{S} * tl.exp2({log_a} * LOG2E)"

        def u(left: str) -> str:
            return v if beta is None else f"({beta} * ({v} - tl.sum({left} * {key}, 0)[None, :]))"

        new = _advanced(k, at.key, "bhkv", kept, u, key)
        read = new if part.bonus is None else k.let(f"{before[0]} + {one(k, part.bonus)} * {key} * {v}")
        return k.let(f"tl.sum({q} * {read}, 0)[None, :] * {scale!r}")

    return {part.out: Value(sizes, code)}


def _selective_scan(part: SelectiveScan, at: At) -> Written:
    (E,), (N,) = at.site.of(part.source), at.site.of(part.B)

    def code(k: Kernel, view: View) -> str:
        _whole(view)
        bias = k.weight(at.key, "dt_bias", COLS, E)
        delta = k.let(f"-log_sigmoid(-({k.of(at[part.dt], COLS)} + {bias}))")
        u = k.let(f"{delta} * {k.of(at[part.source], COLS)}")
        B, C = (k.of(at[name], replace(KEYS, full=N, group="g")) for name in (part.B, part.C))
        A = f"{k.pointer(('weight', at.key, 'A_log'))} + cols * {N} + rows"
        A = k.let(f"tl.exp2(tl.load({A}, mask=in_k & in_v, other=0.0).to(tl.float32) * LOG2E)")
        new = _advanced(k, at.key, "bvk", lambda S: f"{S} * tl.exp2(-{delta} * {A} * LOG2E)", lambda left: u, B)
        return k.let(f"tl.sum({C} * {new}, 0)[None, :]")

    return {part.out: Value((E,), code)}


def _online_scan(part: OnlineScan, at: At) -> Written:
    (E,), (N,) = at.site.of(part.source), at.site.of(part.k)
    if N > 64:
        raise Cannot(f"N={N}, more than 64")

    def code(k: Kernel, view: View) -> str:
        _whole(view)
        bias = k.weight(at.key, "rate_bias", COLS, E)
        rate = k.let(f"tl.sigmoid({k.of(at[part.rate], COLS)} + {bias})")
        x = k.of(at[part.source], COLS)
        key, q = (k.of(at[name], replace(KEYS, full=N, group="g")) for name in (part.k, part.q))
        kept_rate = k.let(f"1 / (1 + {rate} * tl.sum({key} * {key}, 0)[None, :])")
        eps = k.let(f"{rate} * {kept_rate}")
        if part.diagonal:
            others = k.let(f"other_squares({key})")
            new = _advanced(
                k,
                at.key,
                "bvk",
                lambda S: f"({kept_rate} + {eps} * {others}) * {S}",
                lambda left: f"({eps} * {x})",
                key,
            )
        else:
            error = lambda left: f"({eps} * ({x} - tl.sum({left} * {key}, 0)[None, :]))"  # noqa: E731
            new = _advanced(k, at.key, "bvk", lambda S: S, error, key)
        return k.let(f"tl.sum({q} * {new}, 0)[None, :]")

    return {part.out: Value((E,), code)}


def _attention(part: Attention, at: At) -> Written:
    (H, K), (G, V) = at.site.of(part.q), at.site.of(part.v)
    if K > 256 or V > 256:
        raise Cannot(f"heads of {K} and {V} channels, more than 256")

    def code(k: Kernel, view: View) -> str:
        _whole(view)
        q = k.of(at[part.q], replace(OWN, full=K, group="h"))
        key, v = k.of(at[part.k], replace(KEYS, full=K, group="g")), k.of(at[part.v], View("c_at", "in_v", "cols"))
        seen = k.let(f"tl.load({k.pointer(('position',))} + b)")
        caches, slots = [], []
        for name, tile in (("k", "rows"), ("v", "cols")):
            b, slot, head, channel = (k.number(("state stride", at.key, name, axis)) for axis in range(4))
            cache = k.let(f"{k.state(('state', at.key, name))} + b * {b} + g * {head}")
            caches.append(f"({cache}, {slot}, {channel})")
            slots.append(f"{cache} + {seen} * {slot} + {tile} * {channel}")
        room = k.let(f"{seen} < {k.number(('state size', at.key, 'k', 1))}")
        rounded = []
        for x, cache in zip((key, v), caches, strict=True):
            name = cache[1 : cache.index(",")]
            rounded.append(k.let(f"{x}.to({name}.dtype.element_ty).to(tl.float32)"))
        y = k.let(
            f"attend({', '.join(caches)}, {seen}, {q}, {', '.join(rounded)}, rows, cols, in_k, in_v, {K**-0.5!r}, 32)"
        )
        k.line(f"if (h % {H // G} == 0) & {room}:")
        for slot, x, here in zip(slots, rounded, ("in_k", "in_v"), strict=True):
            k.line(f"    tl.store({slot}, {x}, mask={here})")
        return y

    return {part.out: Value((H, V), code)}


PARTS: dict[type[Part], Callable[[Any, At], Written]] = {
    Act: _act,
    BoundedDecay: _bounded_decay,
    Decay: _decay,
    FixedDecay: _fixed_decay,
    FlooredDecay: _floored_decay,
    GatedScan: _gated_scan,
    Learned: _learned,
    LowerBounds: _lower_bounds,
    Multiply: _multiply,
    Norm: _norm,
    OutputGate: _output_gate,
    Rename: _rename,
    Reshape: _reshape,
    Rotary: _rotary,
    Scale: _scale,
    ShortConv: _short_conv,
    Skip: _skip,
    StepDecay: _step_decay,
}
SCANS: dict[type[Part], Callable[[Any, At], Written]] = {
    Attention: _attention,
    DeltaScan: _outer_scan,
    OnlineScan: _online_scan,
    OuterScan: _outer_scan,
    SelectiveScan: _selective_scan,
}


# ---------------------------------------------------------------------- the kernel of several parts


@dataclass(frozen=True)
class Composed:
    """A kernel and how it is launched: its source, what it writes, and the sizes of a state and of what ends a row."""

    source: str
    kernel: Kernel
    outs: Mapping[str, Value]
    geometry: Geometry
    row: int
    layer: int = 0

    def __call__(self, flow: Flow, modules: Mapping[str, nn.Module], states: Mapping[str, State], own: Own) -> Flow:
        """The flow with what the kernel writes; states are overwritten."""
        x, k, g = flow["x"], self.kernel, self.geometry
        made = {
            name: x.new_empty((len(x), 1, *value.sizes), dtype=torch.float32 if value.wide else None)
            for name, value in self.outs.items()
        }
        read = {argument[1]: _channels(flow[argument[1]]) for argument in k.given if argument[0] == "flow"}

        def tensor(argument: Argument) -> Tensor:
            kind, *names = argument
            if kind == "flow":
                return read[names[0]]
            if kind == "weight":
                weight: Tensor = getattr(modules[names[0]], names[1])
                return weight if weight.is_contiguous() else weight.contiguous()
            if kind == "state":
                return _entry(states, *names)
            if kind == "out":
                return made[names[0]]
            if kind == "table":
                return own.table(argument, k.tables[argument], x.device)
            return flow.position if kind == "position" else own.tickets(_entry(states, *k.owner), len(x))

        def number(argument: Argument) -> int:
            kind, *names = argument
            if kind == "layer":
                return self.layer
            if kind == "stride":
                tensor = read[names[0]]
                return tensor.stride(0) if len(tensor) > 1 else 0
            state, axis = _entry(states, *names[:2]), names[2]
            return (tuple(state.shape) if kind == "state size" else state.stride())[axis]

        arguments = ([tensor(a) for a in k.given], [tensor(a) for a in k.written], [number(a) for a in k.numbers])
        kernel.fused_step(x, *arguments, self.source, len(x) * g.H, g.K if g.tiled else 0, g.V, self.row)
        return flow.set(**made)


class Own:
    """What a kernel has besides weights and states: numbers of its recipe, and a counter of tickets per row."""

    def __init__(self) -> None:
        self.tables: dict[tuple[Argument, torch.device], Tensor] = {}
        self.counters = WeakIdKeyDictionary()

    def table(self, argument: Argument, make: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
        if (argument, device) not in self.tables:
            with torch.inference_mode(False):
                self.tables[argument, device] = make(device)
        return self.tables[argument, device]

    def tickets(self, state: Tensor, rows: int) -> Tensor:
        """[rows] zeros between launches: one counter for each state, whose steps follow one another."""
        if state not in self.counters:
            with torch.inference_mode(False):
                self.counters[state] = torch.zeros(rows, dtype=torch.int32, device=state.device)
        found: Tensor = self.counters[state]
        return found


def _entry(states: Mapping[str, State], key: str, name: str) -> Tensor:
    """A tensor of a part's state."""
    found: Tensor = states[key][name] if name else states[key]
    return found


def _channels(x: Tensor) -> Tensor:
    """[B 1 *] as [B C], channels next to each other."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


Unit = tuple[str, Part, Site]


def compose(units: Sequence[Unit], known: Mapping[str, Value], needed: set[str]) -> Composed:
    """The kernel of these parts.

    Args:
        units: the parts, each with its key and its site.
        known: values that are not in the flow: low-rank projections.
        needed: names that later parts read.

    Raises: Cannot, saying why.
    """
    values, made, states = dict(known), dict[str, Value](), 0
    scans = [unit for unit in units if type(unit[1]) in SCANS]
    if len(scans) > 1:
        raise Cannot("a second state")
    for key, part, site in units:
        describe = PARTS.get(type(part)) or SCANS.get(type(part)) or _no_code
        found = _blaming(key, describe, part, At(key, site, values))
        found = {name: replace(value, code=partial(_blaming, key, _inner, value)) for name, value in found.items()}
        states += len(found) if isinstance(part, GatedScan) or (isinstance(part, ShortConv) and part.width > 1) else 0
        made |= found
        values |= found
    outs = {name: value for name, value in made.items() if name in needed}
    composed = _with_scan(scans[0], outs) if scans else _pointwise(outs)
    if len(composed.kernel.shifts) != states:
        raise Cannot("a state that nothing reads")
    return replace(composed, layer=units[0][2].layer)


def _no_code(part: Part, at: At) -> Written:
    raise Cannot(f"{type(part).__name__} gives no code")


def _inner(value: Value, k: Kernel, view: View) -> str:
    return k.of(value, view)


def _blaming(key: str, call: Callable[..., Any], *args: Any) -> Any:
    """The call, whose error names this part, if it names none."""
    try:
        return call(*args)
    except Cannot as error:
        error.part = error.part or key
        raise


def _pointwise(outs: Mapping[str, Value]) -> Composed:
    """Every channel by itself."""
    sizes = {math.prod(value.sizes) for value in outs.values()}
    if len(sizes) != 1:
        raise Cannot("results of several widths")
    (C,) = sizes
    k = Kernel()
    for name in outs:
        k.state(("out", name))
    k.line(f"TILES: tl.constexpr = ({C} + BLOCK_V - 1) // BLOCK_V")
    k.line("pid = tl.program_id(0).to(tl.int64)")
    k.line("tile, b = pid % TILES, pid // TILES")
    k.line("cols = (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]")
    k.line(f"in_v = cols < {C}")
    view = View("cols", "in_v", "row")
    found = [(k.of(value, view), k.state(("out", name))) for name, value in outs.items()]
    for x, out in found:
        k.line(f"tl.store({out} + b * {C} + cols, {x}, mask=in_v)")
    for shift in k.shifts.values():
        shift()
    return Composed(_source(k), k, outs, Geometry(1, 1, 0, C), 0)


def _with_scan(scan: Unit, outs: Mapping[str, Value]) -> Composed:
    """Heads of a state and tiles of their columns; then, by the last program of a row, what wants all of them."""
    if len(outs) != 1:
        raise Cannot(f"{len(outs)} results of one state")
    ((name, y),) = outs.items()
    g = _geometry(*scan)
    if math.prod(y.sizes) != g.H * g.V:
        raise Cannot("a result of another width than that of the state")
    owner = (scan[0], "k" if isinstance(scan[1], Attention) else "")
    k, C, block = Kernel(geometry=g, owner=owner), g.H * g.V, 1 << (g.K - 1).bit_length()
    out = k.state(("out", name))
    for line in (
        f"TILES: tl.constexpr = ({g.V} + BLOCK_V - 1) // BLOCK_V",
        "pid = tl.program_id(0).to(tl.int64)",
        f"tile, b, h = pid % TILES, pid // TILES // {g.H}, pid // TILES % {g.H}",
        f"g = h // {g.group}",
        f"rows, cols = tl.arange(0, {block})[:, None], (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]",
        f"in_k, in_v = rows < {g.K}, cols < {g.V}",
        f"k_at, a_at, v_at, c_at = g * {g.K} + rows, h * {g.K} + rows, h * {g.V} + cols, g * {g.V} + cols",
    ):
        k.line(line)
    stored, entries = y, 0
    while True:
        try:
            x = k.of(stored, COLS)
            break
        except Partial as partial_:
            stored, entries = partial_.value, partial_.entries
    k.line(f"tl.store({out} + b * {C} + v_at, {x}, mask=in_v)")
    row = 0 if g.tiled else 2048  # for four warps
    if stored is not y or k.shifts:
        row = max(row, _end_of_row(k, g, out, stored, y, entries))
    return Composed(_source(k), k, outs, g, row)


def _end_of_row(k: Kernel, g: Geometry, out: str, stored: Value, y: Value, entries: int) -> int:
    """What the program of a row does that comes last; returns the entries of its widest tile."""
    C, widest = g.H * g.V, TOGETHER
    k.line("tl.debug_barrier()  # all of this program's loads and stores come before its ticket")
    k.line(f"if tl.atomic_add({k.state(('tickets',))} + b, 1) == {g.H} * TILES - 1:")
    k.indent += "    "
    k.line(f"tl.store({k.state(('tickets',))} + b, 0)")
    if stored is not y:
        if not entries or C % entries:
            raise Cannot(f"a norm over {entries} of {C} entries")
        R, N = (1 << (size - 1).bit_length() for size in (C // entries, entries))
        widest = max(widest, R * N)
        if R * N > WIDEST:
            raise Cannot(f"a norm of {R} rows of {N} entries, more than {WIDEST}")
        k.line(f"r_at, n_at = tl.arange(0, {R}), tl.arange(0, {N})[None, :]")
        k.line(f"in_row = (r_at < {C // entries})[:, None] & (n_at < {entries})")
        k.line(f"row_at = r_at[:, None] * {entries} + n_at")
        view = View("row_at", "in_row", "row", entries, "r_at")
        place = f"{out} + b * {C} + row_at"
        k.held.append(stored)
        k.known[id(stored), view] = k.let(
            f'tl.load({place}, mask=in_row, other=0.0, cache_modifier=".cg").to(tl.float32)'
        )
        x = k.of(y, view)
        k.line("tl.debug_barrier()")
        k.line(f"tl.store({place}, {x}, mask=in_row)")
    if k.shifts:
        k.line("tl.debug_barrier()  # what is shifted has been read by all threads")
    for shift in k.shifts.values():
        shift()
    k.indent = k.indent[:-4]
    return widest


def _geometry(key: str, part: Any, site: Site) -> Geometry:
    if isinstance(part, Attention):
        (H, K), (G, V) = site.of(part.q), site.of(part.v)
        return Geometry(H, H // G, K, V, tiled=False)
    if isinstance(part, OuterScan):
        (G, K), (H, V) = site.of(part.q), site.of(part.v)
        return Geometry(H, H // G, K, V)
    (N,), (E,) = site.of(part.B if isinstance(part, SelectiveScan) else part.k), site.of(part.source)
    return Geometry(1, 1, N, E)


def _source(k: Kernel) -> str:
    """The source of the kernel, whose arguments are all that was named."""
    names = ", ".join((*k.given.values(), *k.written.values(), *k.numbers.values()))
    return "\n".join((f"def layer({names}, BLOCK_V: tl.constexpr):", *k.lines, ""))
