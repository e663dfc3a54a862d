"""How a layer takes one token: the parts of its recipe in fewer launches than one by one.

Projections of one tensor are one product, the last projection adds the residual stream, and on a GPU what stands
between two projections is one kernel (recur.blocks.compose).
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recur import kernel
from recur.blocks.compose import ACTS, SCANS, Cannot, Composed, Own, Unit, Value, compose, low_rank, narrowed
from recur.blocks.glue import LowRank, Project, Projection, ShortConv
from recur.blocks.leave import join
from recur.primitives.forms import Choice, Refusal, listener
from recur.recipe import Around, Chain, Flow, Part, Site, State, above
from recur.weights import watched

if TYPE_CHECKING:
    from recur.blocks.mixer import Mixer

Modules = Mapping[str, nn.Module]
NARROW = 32  # ranks up to this are multiplied in a kernel


def ordinary(weight: Tensor) -> bool:
    """Whether a weight is a plain tensor: not quantised, not spread over devices."""
    return type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__")


def owned(module: nn.Module) -> bool:
    """Whether the weights of a part are parameters of its own, none of them computed from others, and ordinary; those
    that F.linear alone multiplies may be quantised."""
    linear = isinstance(module, Projection)
    for name in module.declared:  # type: ignore[union-attr]
        weight = module._parameters.get(name)
        if weight is None or not (ordinary(weight) or (linear and name == "weight")):
            return False
    return True


class Stage:
    """Some parts of a chain, as they run in a step."""

    def __call__(self, flow: Flow, modules: Modules, before: Mapping[str, State], after: dict[str, State]) -> Flow:
        """The flow after them; `before` holds states by key, and `after` is given the new ones."""
        raise NotImplementedError


class AsTheyAre(Stage):
    """Parts as they run in any call: one, or those that one kernel computes there.

    reason: why they are not in a kernel with others; "" where none was sought.
    """

    def __init__(self, keys: tuple[str, ...], part: Part, reason: str = "") -> None:
        self.keys, self.part, self.reason = keys, part, reason

    def __call__(self, flow: Flow, modules: Modules, before: Mapping[str, State], after: dict[str, State]) -> Flow:
        if self.reason and (note := listener.get()) is not None:
            refused = Refusal(f"in a step its kernel ends here: {self.reason}", "its parts run one by one", "")
            note(Choice(f"step of {', '.join(self.keys)}", "torch", refused))
        key, *more = self.keys
        own = (modules[key], *(modules[other] for other in more)) if more else modules[key]
        flow, new = self.part(flow, own, before.get(key))  # not through its module, which nothing watches
        if new is not None:
            after[key] = new
        return flow


class Products(Stage):
    """Projects of one tensor as one product.

    narrow: low-rank projections whose last map is left to a kernel.

    Their weights are moved into one matrix, of which they are views from then on: so there is one copy of each, and one
    that is changed in place is changed in the matrix. They are moved again if one was replaced.
    """

    def __init__(self, keys: tuple[str, ...], parts: tuple[Project, ...]) -> None:
        self.keys, self.parts, self.narrow = keys, parts, frozenset[str]()
        self.names: dict[str, str] = {}
        self.joined: dict[str, Tensor] = {}  # "weight" and "bias"
        self.lock = threading.Lock()

    def __call__(self, flow: Flow, modules: Modules, before: Mapping[str, State], after: dict[str, State]) -> Flow:
        own, x, made = self._own(modules), _read(flow, self.parts[0]), dict[str, Tensor]()
        matrix = self.prepare(modules)
        if matrix is None:
            pieces = [F.linear(x, module.weight, module.declared_or_none("bias")) for module in own]
        else:
            pieces = list(F.linear(x, *matrix).split_with_sizes([len(module.weight) for module in own], -1))
        for module, piece in zip(own, pieces, strict=True):
            made |= module.outputs(piece, self.narrow)
        return flow.set(**({self.names.get(name, name): x for name, x in made.items()} if self.names else made))

    def leaving(self, narrow: Collection[str]) -> Products:
        """The same products, of the same matrix, without the last maps of these outputs."""
        other = copy.copy(self)
        other.narrow = frozenset(narrow)
        other.names = {name: narrowed(name) for name in narrow}
        return other

    def _own(self, modules: Modules) -> list[Projection]:
        return [modules[key] for key in self.keys]  # type: ignore[misc]

    def prepare(self, modules: Modules) -> tuple[Tensor, Tensor | None] | None:
        """The matrix of all weights, and the vector of all biases; None for one Project, or if one is quantised."""
        own = self._own(modules)
        if len(own) == 1 or not all(ordinary(module.weight) for module in own):
            return None
        with self.lock, torch.inference_mode(False):
            weight, bias = (self._matrix(name, own) for name in ("weight", "bias"))
        assert weight is not None
        return weight, bias

    def added(self, flow: Flow, modules: Modules, residual: Tensor) -> Tensor:
        """The output of one Project with `residual` [B 1 D] added."""
        own = self._own(modules)[0]
        x, bias = _read(flow, self.parts[0]), own.declared_or_none("bias")
        if x.dtype != residual.dtype or not ordinary(own.weight):
            return residual + F.linear(x, own.weight, bias).to(residual.dtype)
        y = torch.addmm(residual[:, 0], x[:, 0], own.weight.mT)[:, None]
        return y if bias is None else y + bias

    def _matrix(self, name: str, own: list[Projection]) -> Tensor | None:
        """What the weights, or the biases, of these make together: zeros where one has none."""
        pieces, rows = [module.declared_or_none(name) for module in own], [len(module.weight) for module in own]
        given = [piece for piece in pieces if piece is not None]
        if not given:
            return None
        whole = self.joined.get(name)
        if whole is None or not _is_made_of(whole, pieces, rows):
            whole = self.joined[name] = given[0].new_zeros(sum(rows), *given[0].shape[1:], requires_grad=False)
            for piece, place in zip(pieces, whole.split_with_sizes(rows), strict=True):
                if piece is not None:
                    place.copy_(piece.detach())
                    piece.data = place
        return whole


def _is_made_of(whole: Tensor, pieces: list[Tensor | None], rows: list[int]) -> bool:
    """Whether every piece is a view of its rows."""
    at, width, storage = 0, whole.shape[1:].numel(), whole.untyped_storage()._cdata
    for piece, count in zip(pieces, rows, strict=True):
        if piece is not None and (piece.untyped_storage()._cdata, piece.storage_offset()) != (storage, at):
            return False
        at += count * width
    return True


def _read(flow: Flow, part: Project) -> Tensor:
    read = [flow[name].flatten(2) for name in part.source.split()]
    return read[0] if len(read) == 1 else torch.cat(read, -1)


class Fused(Stage):
    """Parts that one kernel computes."""

    def __init__(self, units: list[Unit], composed: Composed) -> None:
        self.keys, self.composed, self.own = tuple(key for key, _, _ in units), composed, Own()

    def takes(self, before: Mapping[str, State]) -> bool:
        """Whether the states are such as the kernel overwrites: of a fixed length, in float32 or less."""
        states = [before[key] for key in self.keys if key in before]
        if any(isinstance(state, dict) and state.get("grows") for state in states):
            return False
        return all(leaf.dtype in kernel.FUSED for leaf in tree_leaves(states) if isinstance(leaf, Tensor))

    def __call__(self, flow: Flow, modules: Modules, before: Mapping[str, State], after: dict[str, State]) -> Flow:
        if (note := listener.get()) is not None:
            note(Choice(f"step of {', '.join(self.keys)}", "triton", None))
        after.update({key: before[key] for key in self.keys if key in before})
        return self.composed(flow, modules, before, self.own)


class StepPlan:
    """The stages of one layer in a step, which compute what its parts do one by one.

    A layer has none if something wants one of its parts to be called, or if a weight is not its own.
    """

    _plans: ClassVar[WeakKeyDictionary[nn.Module, StepPlan]] = WeakKeyDictionary()
    _lock = threading.Lock()

    def __init__(self, body: Chain, site: Site) -> None:
        groups = _grouped(body, site)
        self.plain = _one_by_one(groups)
        self.fused = _fused(groups, {stage.keys: stage for stage in self.plain if isinstance(stage, Products)})
        last = self.plain[-1]
        self.adds = isinstance(last, Products) and last.parts[0].outs == (("y", "D"),)

    @classmethod
    def of(cls, mixer: Mixer, modules: Modules) -> StepPlan | None:
        if any(watched(module) or not owned(module) for module in modules.values()):
            return None
        with cls._lock:  # two plans of one layer would move its weights to and fro
            plan = cls._plans.get(mixer)
            if plan is None:
                site = mixer.recipe.site(mixer.dim, depth=mixer.depth, layer=mixer.layer)
                plan = cls._plans[mixer] = cls(mixer.recipe.body, site)
            return plan

    def prepare(self, modules: Modules) -> None:
        """Move weights to where a step wants them."""
        for stage in self.plain:
            if isinstance(stage, Products):
                stage.prepare(modules)

    def __call__(
        self, flow: Flow, modules: Modules, state: Mapping[str, State] | None, residual: Tensor | None
    ) -> tuple[Flow, State]:
        """The flow after the last part, "y" with `residual` [B 1 D] added, and the new states."""
        before, after = state or {}, dict[str, State]()
        *stages, last = self.fused if self._fuses(flow, before) else self.plain
        for stage in stages:
            flow = stage(flow, modules, before, after)
        if isinstance(last, Products) and self.adds and residual is not None:
            return flow.set(y=last.added(flow, modules, residual)), after
        flow = last(flow, modules, before, after)
        return (flow if residual is None else flow.set(y=residual + flow["y"].to(residual.dtype))), after

    def _fuses(self, flow: Flow, before: Mapping[str, State]) -> bool:
        fused = [stage for stage in self.fused if isinstance(stage, Fused)]
        return bool(fused) and kernel.steps_fused(flow["x"]) and all(stage.takes(before) for stage in fused)


def _grouped(body: Chain, site: Site) -> list[list[Unit]]:
    """The parts in order, and with a Project all later ones that may run in its place."""
    groups: list[list[Unit]] = []
    keys, known = body.keys(), set(site.axes.written)
    for key, part, place in body.sites(site):
        home = _home(groups, part, known) if keys.count(key) == 1 else None
        if home is None:
            groups.append([(key, part, place)])
        else:
            home.append((key, part, place))
        known |= set(part.shapes(place.axes))
    return groups


def _home(groups: list[list[Unit]], part: Part, known: set[str]) -> list[Unit] | None:
    """The Project with which this one may run: of the same tensors, which nothing changed since, if nothing it writes
    was there before, so that no part in between has read it."""
    if isinstance(part, Project) and not known & {name for name, _ in part.outs}:
        for group in reversed(groups):
            _, first, _ = group[0]
            if isinstance(first, Project) and first.source == part.source:
                return group
            if part.source != "x":  # which no part may change
                return None
    return None


def _one_by_one(groups: list[list[Unit]]) -> list[Stage]:
    found: list[Stage] = []
    while groups:
        _, part, _ = groups[0][0]
        if isinstance(part, Project):
            keys, parts, _ = zip(*groups[0], strict=True)
            count = 1
            found.append(Products(keys, parts))
        else:
            count, part = join([group[0][1] for group in groups])
            found.append(AsTheyAre(tuple(group[0][0] for group in groups[:count]), part))
        groups = groups[count:]
    return found


def _fused(groups: list[list[Unit]], products: Mapping[tuple[str, ...], Products]) -> list[Stage]:
    """As many parts as possible in every kernel."""
    found: list[Stage] = []
    at, real = 0, {"x"}  # what surely is no complex tensor: projections, and results of kernels
    while at < len(groups):
        if isinstance(groups[at][0][1], Project):
            found.append(products[tuple(key for key, _, _ in groups[at])])
            real |= {name for _, part, site in groups[at] for name in part.shapes(site.axes)}
            at += 1
            continue
        end = next((i for i in range(at, len(groups)) if isinstance(groups[i][0][1], Project)), len(groups))
        units = [group[0] for group in groups[at:end]]
        rest = [unit for group in groups[end:] for unit in group]
        low = _narrow(found[-1], groups[at - 1]) if found and isinstance(found[-1], Products) else {}
        count, composed, reason = _longest(units, rest, low, real)
        if composed is None:
            count, part = join([part for _, part, _ in units])
            found.append(AsTheyAre(tuple(key for key, _, _ in units[:count]), part, reason))
            real -= {name for _, part, site in units[:count] for name in part.shapes(site.axes)}
        else:
            found.append(Fused(units[:count], composed))
            real |= set(composed.outs)
            if narrow := [name for name in low if ("flow", narrowed(name)) in composed.kernel.given]:
                found[-2] = found[-2].leaving(narrow)  # type: ignore[attr-defined]
        at += count
    return found


def _longest(
    units: list[Unit], rest: list[Unit], low: Mapping[str, Value], real: set[str]
) -> tuple[int, Composed | None, str]:
    """How many of the first of these parts are one kernel, which, and why no more are."""
    reason = ""
    least = 1 if type(units[0][1]) in {ShortConv, *SCANS} else 2  # any other part is one launch by itself
    for count in range(len(units), least - 1, -1):
        later = [*units[count:], *rest]
        needed = {"y"}.union(*(_read_by(part, site) for _, part, site in later))
        known = {name: value for name, value in low.items() if name not in needed}
        try:
            composed = compose(units[:count], known, needed)
            read = {argument[1] for argument in composed.kernel.given if argument[0] == "flow"}
            if odd := read - real - {narrowed(name) for name in low}:
                raise Cannot(f"it reads {', '.join(sorted(odd))}, which may be complex")
            return count, composed, reason
        except Cannot as error:
            reason = f"{error.part or units[count - 1][0]}: {error}"
    return 0, None, reason


def _read_by(part: Part, site: Site) -> set[str]:
    """What a part may read: names that stand in its fields, or anything, if it is not one of ours."""
    if type(part) not in above.parts.values() or isinstance(part, Around):
        return set(site.axes.written)
    words = " ".join(value for value in vars(part).values() if isinstance(value, str)).split()
    return set(words) | {"y"}


def _narrow(stage: Stage, group: list[Unit]) -> dict[str, Value]:
    """The low-rank projections of these Projects whose last map a kernel may do, being of a low rank."""
    found = {}
    for key, part, site in group:
        for name, out in part.outs:  # type: ignore[attr-defined]
            if isinstance(out, LowRank) and (rank := math.prod(site.size(out.rank))) <= NARROW and out.act in ACTS:
                found[name] = low_rank(key, name, out, site.size(out.axes), rank)
    return found
