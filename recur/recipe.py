"""Part, Flow, Recipe: the one joint. A recipe is a frozen sequence of parts; parts meet only in the flow."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recur.axes import LETTERS, RecipeError, Spec, evaluate, letters, shown, size, spec
from recur.fields import read_keys, read_part
from recur.primitives.forms import document_of, mirror
from recur.weights import Param, Weights, call

State = Any  # None, a tensor, or a dict of states


class Common:
    """What the layers of one forward have in common, computed by the first of them that asks: see `Flow.once`.

    No dict, which hooks that move arguments between devices would copy.
    """

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, ...]] = {}


@dataclass(frozen=True)
class Flow:
    """What parts read and write: named tensors [B T ...] (T may be 1 for what does not change in time).

    Args:
        tensors: "x" is the input and stays; "y" is the result at the end.
        position: [B] tokens each sequence has seen before these ([n] if packed).
        form: of the scans.
        cu_seqlens: [n+1] borders of packed documents, or None.
        layer: which layer of the model this is, from 0; a tensor [] where layers share one compiled graph.
        grid: (rows, columns) of the tokens, where a call names one.
        past: what each shallower layer published, oldest first, of as many as some part of the recipe reads
            (`Part.layers_below`).
        in_place: whether this is the one token of a step, which overwrites the states it is given.
        evaluate: whether there is no dropout, even in a module in training mode.
        published: what this layer hands down so far; `publish` adds to it.
        common: what `once` has computed for the layers before.

    >>> flow = recur.Flow({"x": torch.ones(1, 2, 3)}, position=torch.zeros(1, dtype=torch.long))
    >>> flow.set(u=2 * flow["x"])["u"].sum().item(), flow.positions()
    (12.0, tensor([[0, 1]]))
    """

    tensors: Mapping[str, Tensor]
    position: Tensor
    form: str = "auto"
    cu_seqlens: Tensor | None = None
    layer: int | Tensor = 0
    grid: tuple[int, ...] | None = None
    past: tuple[Mapping[str, Tensor], ...] = ()
    in_place: bool = False
    evaluate: bool = False
    common: Common | None = None
    published: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def set(self, **tensors: Tensor) -> Flow:
        joined = {**self.tensors, **tensors}
        if torch.compiler.is_compiling():
            place = (self.position, self.form, self.cu_seqlens, self.layer, self.grid, self.past)
            return Flow(joined, *place, self.in_place, self.evaluate, self.common, self.published)
        new = object.__new__(Flow)  # a tenth of the time of dataclasses.replace, in every part of every step
        new.__dict__.update(self.__dict__, tensors=joined)
        return new

    def publish(self, **tensors: Tensor) -> Flow:
        return dataclasses.replace(self, published={**self.published, **tensors})

    def once(self, name: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """compute(), which all layers of a model share: it follows from `name`, the positions and the type of x alone.

        It may not require a gradient. In a graph every layer computes it, and the compiler merges what is the same.
        """
        if self.common is None or torch.compiler.is_compiling():
            return compute()
        x, found = self["x"], self.common.found
        key = (name, id(self.position), id(self.cu_seqlens), x.shape[1], x.dtype, x.device)
        if key not in found:
            found[key] = (compute(), self.position, self.cu_seqlens)  # held, so that no others take their addresses
        return found[key][0]

    def positions(self) -> Tensor:
        """[B T] the position of every token in its own sequence."""
        return self.once(("positions",), self._positions)

    def _positions(self) -> Tensor:
        token = torch.arange(self["x"].shape[1], device=self["x"].device)
        if self.cu_seqlens is None:
            return self.position[:, None] + token
        document = document_of(self.cu_seqlens, len(token))
        return (self.position[document] + token - self.cu_seqlens[document])[None]


@dataclass(frozen=True)
class Axes:
    """The axes of every tensor written so far, as one part sees them.

    Args:
        written: name -> axes after B T.
        reader: the part that asks, for messages.

    >>> axes = recur.Axes({"x": ("D",), "q": ("H", "K"), "k": ("H", "K")}, reader="part 2 MyPart")
    >>> axes.same("q", "k")
    ('H', 'K')
    """

    written: Mapping[str, Spec]
    reader: str = ""

    def __getitem__(self, name: str) -> Spec:
        if name not in self.written:
            raise RecipeError(f"{self.reader} reads {name!r}, which nobody wrote; available: {', '.join(self.written)}")
        return self.written[name]

    def named(self, source: str) -> list[str]:
        """The names in "u B C".   Raises: RecipeError if there are none, or one was never written."""
        names = source.split()
        if not names:
            raise RecipeError(f"{self.reader} must name the tensors that it reads, got {source!r}")
        for name in names:
            self[name]
        return names

    def same(self, *names: str) -> Spec:
        """The axes these tensors share. Raises: RecipeError naming two that differ."""
        self.named(" ".join(names))
        first = self[names[0]]
        for name in names[1:]:
            if self[name] != first:
                raise RecipeError(
                    f"{self.reader} needs {names[0]!r} and {name!r} of equal axes, "
                    f"got {names[0]} [{' '.join(first)}] and {name} [{' '.join(self[name])}]"
                )
        return first

    def must(self, name: str, wanted: Spec) -> None:
        """Raise RecipeError unless a tensor has these axes."""
        if self[name] != wanted:
            raise RecipeError(f"{self.reader} needs {name} [{' '.join(wanted)}], got [{' '.join(self[name])}]")

    def rank(self, name: str, *ranks: int) -> Spec:
        """The axes of a tensor that must have one of these many."""
        if len(self[name]) not in ranks:
            wanted = " or ".join(map(str, ranks))
            raise RecipeError(
                f"{self.reader} needs {name!r} with {wanted} axes after B T, got [{' '.join(self[name])}]"
            )
        return self[name]


@dataclass(frozen=True)
class Site:
    """Where a part is built: sizes of the axes, what has been written before it, and its place in the model.

    Args:
        sizes: letter -> size, or an expression over other letters.
        axes: of every tensor written before.
        depth: layers of the model.
        layer: which of them this is, from 0.
        dtype: of weights and states.
        device: of weights and states.
        named: modules of the named parts around and before it, for parts inside a combinator that share them.

    >>> site = recur.Site({"D": 64, "H": 4, "K": "D/H"}, recur.Axes({"q": ("H", "K")}))
    >>> site.of("q"), site.size("D")
    ((4, 16), (64,))
    """

    sizes: Mapping[str, str | int]
    axes: Axes
    depth: int = 1
    layer: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    named: Mapping[str, nn.Module] = field(default_factory=dict)

    def size(self, axes: str | Spec) -> tuple[int, ...]:
        """The sizes of "H K"."""
        return tuple(size(axis, self.sizes) for axis in (spec(axes) if isinstance(axes, str) else axes))

    def only(self, axis: str) -> int:
        """The size of the one axis that a part's field must name.   Raises: RecipeError if it names more or none."""
        if len(spec(axis)) != 1:
            raise RecipeError(f"{self.axes.reader} must name one axis, got {axis!r}")
        return size(axis, self.sizes)

    def of(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor's axes after B T."""
        return self.size(self.axes[name])

    def number(self, expression: str | float) -> float:
        return float(evaluate(expression, self.sizes))

    def zeros(self, *shape: int) -> Tensor:
        """A fresh activation-like state."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def memory(self, *shape: int) -> Tensor:
        """A fresh recurrent state: float32, or float64 in a float64 model."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=wide, device=self.device)


@dataclass(frozen=True)
class Part:
    """A frozen record that says what it reads and writes; its weights live in the module a Mixer builds from it.

    A part of your own is a frozen dataclass with `shapes` and `__call__`, and `params` or `init_state` if it has
    weights or state.

    Args:
        name: keys its weights; two parts of one name share them.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Twice(recur.Part):
    ...     def shapes(self, axes):
    ...         return {"y": axes["x"]}
    ...
    ...     def __call__(self, flow, weights, state):
    ...         return flow.set(y=2 * flow["x"]), None
    >>> recur.Mixer(recur.Recipe(Twice()), dim=1)(torch.ones(1, 1, 1)).y.item()
    2.0
    """

    name: str | None = field(default=None, kw_only=True)
    scope: ClassVar[str] = "layer"  # "model": built once, shared by all layers

    @property
    def causal(self) -> bool:
        return True

    @property
    def exact_gradients(self) -> bool:
        """Whether its gradients are the derivatives of its values."""
        return True

    @property
    def layers_below(self) -> int:
        """How many shallower layers it reads in `flow.past`."""
        return 0

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        """Axes of what it writes, from the axes of what it reads."""
        raise NotImplementedError(f"{type(self).__name__}: a part must say what it writes: define shapes(axes)")

    def params(self, site: Site) -> Mapping[str, Param]:
        """Its weights."""
        return {}

    def facts(self, site: Site) -> Mapping[str, Any]:
        """Numbers that its sizes fix, found beside the weights when it is called."""
        return {}

    def build(self, site: Site) -> nn.Module:
        """The module that holds its weights and facts.

        This one is called with the part's `__call__`. A part that builds another module calls that by itself.
        """
        return Weights(self.params(site), self.facts(site))

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        """The state before the first token; None if it has none."""
        return None

    def formula(self) -> str:
        """Its equation, in the names of the flow."""
        return ""

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        raise NotImplementedError(f"{type(self).__name__}: a part must act: define __call__(flow, weights, state)")

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {key: _plain(value) for key, value in values.items() if key != "name" or value is not None}
        return {"part": type(self).__name__, **kept}


@dataclass(frozen=True)
class Chain(Part):
    """Parts one after another: the body of every recipe and of every combinator.

    Args:
        parts: in the order in which they run.

    >>> from recur.blocks import Chain, Project
    >>> Chain((Project("x", u="D"), Project("u", y="D"))).keys()
    ['project', 'project_2']
    """

    parts: tuple[Part, ...] = ()

    @property
    def causal(self) -> bool:
        return all(part.causal for part in self.parts)

    def keys(self) -> list[str]:
        """The name of each part's weights and state: its own, else class and ordinal."""
        counts: dict[str, int] = {}
        keys = []
        for part in self.parts:
            kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(part).__name__).lower()
            counts[kind] = counts.get(kind, 0) + (part.name is None)
            keys.append(part.name or (kind if counts[kind] == 1 else f"{kind}_{counts[kind]}"))
        return keys

    def walk(self, axes: Axes) -> Iterable[tuple[Part, Axes, Mapping[str, Spec]]]:
        """Each part with what it finds and what it writes."""
        for number, part in enumerate(self.parts, 1):
            axes = dataclasses.replace(axes, reader=f"part {number} {type(part).__name__}")
            wrote = dict(part.shapes(axes))
            if "x" in wrote:
                raise RecipeError(f"{axes.reader} writes 'x', which every part may read and none may change")
            yield part, axes, wrote
            axes = Axes({**axes.written, **wrote})

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {name: spec for _, _, wrote in self.walk(axes) for name, spec in wrote.items()}

    def sites(self, site: Site) -> Iterable[tuple[str, Part, Site]]:
        """Each part with its key and its place."""
        for key, (part, axes, _) in zip(self.keys(), self.walk(site.axes), strict=True):
            yield key, part, dataclasses.replace(site, axes=axes)

    def build(self, site: Site, shared: nn.ModuleDict | None = None) -> nn.ModuleDict:
        modules, named = nn.ModuleDict(), dict(site.named)
        for key, part, place in self.sites(site):
            if hasattr(nn.ModuleDict, key):
                raise RecipeError(
                    f"{place.axes.reader} is called {key!r}, as is a method of torch; give it another name="
                )
            home = shared if part.scope == "model" and shared is not None else modules
            if key not in home:
                known = part.name is not None and key in named
                home[key] = named[key] if known else part.build(dataclasses.replace(place, named=named))
            if part.name is not None:
                named[key] = home[key]
        return modules

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        states = {key: part.init_state(place, batch, max_len) for key, part, place in self.sites(site)}
        return {key: state for key, state in states.items() if state is not None}

    @cached_property
    def stages(self) -> tuple[tuple[tuple[str, ...], Part], ...]:
        """The parts as they run, with their keys: those that one kernel may compute are one stage."""
        keys, stages, at = self.keys(), [], 0
        while at < len(keys):
            count, part = above.join(self.parts[at:])
            stages.append((tuple(keys[at : at + count]), part))
            at += count
        return tuple(stages)

    def prepare(self) -> None:
        """Find the stages of this chain and of those inside it: Dynamo cannot trace the lock of a cached_property."""
        _ = self.stages
        for part in self.parts:
            if isinstance(part, Around):
                part.body.prepare()

    def __call__(self, flow: Flow, weights: Mapping[str, nn.Module], state: State) -> tuple[Flow, State]:
        before, after = state or {}, {}
        for (key, *more), part in self.stages:
            module, old = weights[key], before.get(key)
            if more:
                flow, new = part(flow, (module, *(weights[other] for other in more)), old)
            elif type(part).build is Part.build:  # its module is called, so that its hooks run
                flow, new = call(module, part.__call__, flow, old)
            else:  # which calls its module by itself
                flow, new = part(flow, module, old)
            if new is not None:
                after[key] = new
        return flow, after


class Around(Part):
    """Runs the parts of its field `parts` in a way of its own, on what `inside` says is there for them to read."""

    parts: tuple[Part, ...]

    @property
    def causal(self) -> bool:
        return False

    @cached_property
    def body(self) -> Chain:
        return Chain(tuple(self.parts))

    def inside(self, axes: Axes) -> Axes:
        return axes

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return self.body.shapes(self.inside(axes))

    def build(self, site: Site) -> Any:
        return self.body.build(dataclasses.replace(site, axes=self.inside(site.axes)))


@dataclass(frozen=True)
class Reverse(Around):
    """Run parts from the last token to the first: the anti-causal half of a bidirectional recipe.

    Args:
        parts: what is run.

    >>> from recur.blocks import Decay, GatedScan, Project, Reverse
    >>> recur.Recipe(Project("x", u="D", z="D"), Decay("z"), Reverse((GatedScan("u"),))).causal
    False
    """

    parts: tuple[Part, ...] = ()

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        mirrored = {name: tensor.flip(1) for name, tensor in flow.tensors.items()}
        borders = mirror(flow.cu_seqlens, flow["x"].shape[1])
        seen = flow.position if borders is None else flow.position.flip(0)
        inner = dataclasses.replace(flow, tensors=mirrored, cu_seqlens=borders, position=seen)
        inner, state = self.body(inner, weights, None)
        made = {name: tensor.flip(1) for name, tensor in inner.tensors.items() if tensor is not mirrored.get(name)}
        if borders is not None:
            state = tree_map(lambda leaf: leaf.flip(0), state)
        return flow.set(**made), state

    def formula(self) -> str:
        return "right to left: " + "; ".join(part.formula() for part in self.parts)


@dataclass(frozen=True)
class Frame:
    """What surrounds a layer in its publication; `LanguageModel` uses it for arguments that are "paper".

    Args:
        ffn: feed-forward of every layer, by a name that LanguageModel knows; None for none.
        norm: of the residual stream, "rms", "layer" or "l2"; None for a recipe that normalises its own input.
        positions: None, "sinusoidal", or the number of learned positions.
        embed_norm: of the embedded tokens, as `norm`; None for none.

    >>> recur.presets.rwkv7().frame
    Frame(ffn='key_mix', norm='layer', positions=None, embed_norm='layer')
    """

    ffn: str | None = None
    norm: str | None = "rms"
    positions: str | int | None = None
    embed_norm: str | None = None


class Recipe:
    """A frozen sequence of parts from "x" [B T D] to "y" [B T D] (or another width `out`), checked when built.

    Args:
        parts:  in the order in which they run.
        axes:   letters and their sizes: integers, or expressions over D and each other.
        inputs: further tensors that a call must pass, name -> axes ("H K").
        source: where the architecture was published.
        out:    axes of y; only a layer that stands alone may have others than "D".
        frame:  feed-forward, norm and positions around it, as published.

    Raises: RecipeError naming the part, the name or axis that does not fit, and what was available.

    >>> from recur.blocks import Decay, GatedScan, Project
    >>> recur.Recipe(Project("x", u="D", z="D"), Decay("z"), GatedScan("u"))
    project     u [D], z [D]  u = W x, z = W x
    decay       log_a [D]     log_a = log sigmoid(z)
    gated_scan  y [D]         h_t = exp(log_a) * h_{t-1} + u, y = h_t
    """

    def __init__(
        self,
        *parts: Part,
        axes: Mapping[str, str | int] | None = None,
        inputs: Mapping[str, str] | None = None,
        source: str = "",
        out: str = "D",
        frame: Frame = Frame(),
    ) -> None:
        if not isinstance(frame, Frame):
            raise TypeError(f"Recipe: frame must be a Frame, got {type(frame).__name__}")
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(f"Recipe: parts must be of class Part, got {type(part).__name__}")
        values = {"body": Chain(tuple(parts)), "_axes": tuple((axes or {}).items()), "source": source, "out": out}
        for name, value in {**values, "_inputs": tuple((inputs or {}).items()), "frame": frame}.items():
            object.__setattr__(self, name, value)
        if len(self.axes) > LETTERS:
            raise RecipeError(f"Recipe: axes must name at most {LETTERS} letters, got {len(self.axes)}")
        known = {"D", *self.axes}
        for name, expression in self.axes.items():
            if unknown := letters(expression) - known:
                raise RecipeError(
                    f"Recipe: axis {name}={expression} mentions {', '.join(sorted(unknown))}, no axis of it"
                )
        given = Axes({"x": ("D",), **{name: spec(axes) for name, axes in self.inputs.items()}})
        written: dict[str, Spec] = dict(given.written)
        owners: dict[str, str] = {}
        for key, (part, found, wrote) in zip(self.body.keys(), self.body.walk(given), strict=True):
            for name, axes_of in wrote.items():
                for axis in axes_of:
                    if unknown := letters(axis) - known:
                        axes_here = ", ".join(["D", *self.axes])
                        raise RecipeError(
                            f"{found.reader} writes {name} [{' '.join(axes_of)}], "
                            f"but {', '.join(sorted(unknown))} is not an axis; axes are {axes_here}"
                        )
            if owners.setdefault(key, type(part).__name__) != type(part).__name__:
                raise RecipeError(
                    f"{found.reader} is called {key!r}, as is a {owners[key]}; weights cannot be shared across classes"
                )
            written |= wrote
            for inner in inside(part):
                kind = type(inner).__name__
                if inner.name is not None and owners.setdefault(inner.name, kind) != kind:
                    raise RecipeError(
                        f"{found.reader} has a {kind} called {inner.name!r}, as is a {owners[inner.name]}; "
                        "weights cannot be shared across classes"
                    )
        if written.get("y") != spec(out):
            got = f"y [{' '.join(written['y'])}]" if "y" in written else "no y"
            raise RecipeError(f"Recipe: the last parts must write y [{out}], got {got}; written: {', '.join(written)}")

    body: Chain
    source: str
    out: str
    frame: Frame
    _axes: tuple[tuple[str, str | int], ...]
    _inputs: tuple[tuple[str, str], ...]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Recipe: a recipe is frozen; replace, insert_before and remove return another ({name})")

    def __deepcopy__(self, memo: Any) -> Recipe:
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.body.parts

    @property
    def axes(self) -> dict[str, str | int]:
        """Letters and their sizes."""
        return dict(self._axes)

    @property
    def inputs(self) -> dict[str, str]:
        """Further tensors that a call must pass, and their axes."""
        return dict(self._inputs)

    @property
    def causal(self) -> bool:
        return self.body.causal

    @property
    def layers_below(self) -> int:
        """How many shallower layers hand something to one of this recipe."""
        return max((part.layers_below for part in inside(self.body)), default=0)

    def site(self, dim: int, **place: Any) -> Site:
        """The place of this recipe's parts at width D = dim."""
        axes = Axes({"x": ("D",), **{name: spec(axes) for name, axes in self.inputs.items()}})
        return Site({"D": dim, **self.axes}, axes, **place)

    # ------------------------------------------------------------------ edits: each returns a new recipe

    def replace(self, which: type[Part] | str, *new: Part) -> Recipe:
        """The recipe with one part replaced by others.

        Args:
            which: the class of the part, or its name.
            new:   one part or several.

        Returns: a new recipe.   Raises: RecipeError unless exactly one part is meant, and as `Recipe`.

        >>> from recur.blocks import OnlineScan
        >>> exact = recur.presets.longhorn().replace(OnlineScan, OnlineScan("u", diagonal=False))
        >>> exact == recur.presets.longhorn()
        False
        """
        at = self._find("replace", which)
        return self.like(*self.parts[:at], *new, *self.parts[at + 1 :])

    def insert_before(self, which: type[Part] | str, *new: Part) -> Recipe:
        """The recipe with further parts before one.

        Args:
            which: the class of the part, or its name.
            new:   one part or several.

        Returns: a new recipe.   Raises: RecipeError unless exactly one part is meant, and as `Recipe`.

        >>> from recur.blocks import Norm
        >>> list(recur.presets.longhorn().insert_before("skip", Norm("y")).body.keys())[3:6]
        ['online_scan', 'norm', 'skip']
        """
        at = self._find("insert_before", which)
        return self.like(*self.parts[:at], *new, *self.parts[at:])

    def insert_after(self, which: type[Part] | str, *new: Part) -> Recipe:
        """The recipe with further parts after one.

        Args:
            which: the class of the part, or its name.
            new:   one part or several.

        Returns: a new recipe.   Raises: RecipeError unless exactly one part is meant, and as `Recipe`.

        >>> from recur.blocks import Norm
        >>> list(recur.presets.longhorn().insert_after("skip", Norm("y")).body.keys())[3:6]
        ['online_scan', 'skip', 'norm']
        """
        at = self._find("insert_after", which) + 1
        return self.like(*self.parts[:at], *new, *self.parts[at:])

    def remove(self, which: type[Part] | str) -> Recipe:
        """The recipe without one of its parts.

        Args:
            which: the class of the part, or its name.

        Returns: a new recipe.   Raises: RecipeError unless exactly one part is meant, and as `Recipe`.

        >>> list(recur.presets.longhorn().remove("short_conv").body.keys())[:2]
        ['project', 'project_2']
        """
        at = self._find("remove", which)
        return self.like(*self.parts[:at], *self.parts[at + 1 :])

    def reverse(self) -> Recipe:
        """The same parts from the last token to the first.

        Returns: a new recipe, which is not causal: it has no step.

        >>> recur.presets.longhorn().reverse().causal
        False
        """
        return self.like(Reverse(self.parts))

    def like(self, *parts: Part, **changes: Any) -> Recipe:
        """These parts with this recipe's axes, inputs, source, width and frame, but for what `changes` says."""
        kept = {"axes": self.axes, "inputs": self.inputs, "source": self.source, "out": self.out, "frame": self.frame}
        return Recipe(*parts, **{**kept, **changes})

    def _find(self, verb: str, which: type[Part] | str) -> int:
        def fits(key: str, part: Part) -> bool:
            return key == which if isinstance(which, str) else isinstance(part, which)

        keys = self.body.keys()
        hits = [i for i, (key, part) in enumerate(zip(keys, self.parts, strict=True)) if fits(key, part)]
        if len(hits) != 1:
            label = repr(which) if isinstance(which, str) else which.__name__
            raise RecipeError(f"{verb}: exactly one part must be {label}, got {len(hits)} among {', '.join(keys)}")
        return hits[0]

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """A JSON value from which `from_dict` builds this recipe again.

        Returns: a dict of strings, numbers, lists and dicts.   Raises: RecipeError if a part holds a function.

        >>> recipe = recur.presets.longhorn()
        >>> recur.Recipe.from_dict(recipe.to_dict()) == recipe
        True
        """
        parts = [part.to_dict() for part in self.parts]
        values = {"axes": dict(self.axes), "inputs": dict(self.inputs), "source": self.source, "out": self.out}
        return {**values, "frame": dataclasses.asdict(self.frame), "parts": parts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], parts: Iterable[type] = ()) -> Recipe:
        """The recipe that `to_dict` described. Names are never imported.

        Args:
            data:  what `to_dict` returned.
            parts: your own classes of parts.

        Returns: the recipe.
        Raises: RecipeError naming the key that is missing, unknown or of another type than its part declares.

        >>> recur.Recipe.from_dict(recur.presets.retnet().to_dict()) == recur.presets.retnet()
        True
        """
        known = {**above.parts, **{kind.__name__: kind for kind in parts}}
        keys = {"axes": Mapping, "inputs": Mapping, "source": str, "out": str, "frame": Mapping, "parts": list}
        read = read_keys(data, keys, optional=("out", "frame"))
        if "frame" in read:
            read["frame"] = read_part({**read["frame"], "part": "Frame"}, {"Frame": Frame}, "frame")
        built = [read_part(entry, known, f"parts[{i}]") for i, entry in enumerate(read.pop("parts"))]
        return cls(*built, **read)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.parts, frozenset(self._axes), frozenset(self._inputs), self.source, self.out, self.frame))

    def _values(self) -> tuple[Any, ...]:
        return self.parts, self.axes, self.inputs, self.source, self.out, self.frame

    def __repr__(self) -> str:
        """Stages, what each writes, and its equation."""
        rows = []
        for key, (part, _, wrote) in zip(self.body.keys(), self.body.walk(self.site(1).axes), strict=True):
            writes = ", ".join(f"{name} [{' '.join(axes)}]" for name, axes in wrote.items())
            rows.append((key, writes, part.formula()))
        wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [f"{key:<{wide[0]}}  {writes:<{wide[1]}}  {formula}".rstrip() for key, writes, formula in rows]
        axes = ", ".join(f"{letter} = {value}" for letter, value in self.axes.items())
        head = "  ".join(text for text in (self.source, axes) if text)
        return "\n".join(([head] if head else []) + lines)


@dataclass
class Above:
    """What the packages above recipes hand in when they are imported, so that imports point one way.

    Args:
        parts: the classes that `Recipe.from_dict` knows, by name, from recur.blocks.
        join: how many of the first of some parts run as one, and what runs, from recur.blocks.
        read: recipes by words such as "hgrn2:heads=4", from recur.presets.
    """

    parts: dict[str, type[Any]] = field(default_factory=dict)
    join: Callable[[Sequence[Part]], tuple[int, Part]] = lambda parts: (1, parts[0])
    read: Callable[[str], list[Recipe]] = lambda words: []


above = Above()


def named(recipes: str | Sequence[Recipe | str]) -> list[Recipe]:
    """Recipes, those that are words read.   Raises: RecipeError as `recur.presets.words.read`."""
    if isinstance(recipes, str):
        return above.read(recipes)
    return [read_one(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]


def read_one(words: str) -> Recipe:
    """The recipe that words name.   Raises: RecipeError as `recur.presets.words.read`, or if there are several."""
    recipes = above.read(words)
    if len(recipes) != 1:
        raise RecipeError(f"a layer has one recipe, got {len(recipes)} in {shown(words)}")
    return recipes[0]


def inside(part: Part) -> Iterable[Part]:
    """All parts inside a combinator."""
    for inner in getattr(part, "parts", ()):
        yield inner
        yield from inside(inner)


def _plain(value: Any) -> Any:
    """A field as JSON."""
    if isinstance(value, Part):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"part": type(value).__name__} | {
            f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(
        f"to_dict: a part's fields must be numbers, strings or parts, got {value!r}, which JSON cannot hold"
    )
