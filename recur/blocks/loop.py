"""A nonlinear recurrence: parts run token by token, because what they read depends on what they wrote."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from recur import kernel
from recur.axes import RecipeError, Spec, spec
from recur.blocks.glue import Dropout
from recur.blocks.state import Leaf, layout
from recur.fields import read_part
from recur.primitives.operators import in_graph, one_node, schema_of
from recur.recipe import Around, Axes, Flow, Part, Site, State, above, inside
from recur.weights import Weights, watched


@dataclass(frozen=True)
class Loop(Around):
    """Run parts on one token after another, each reading what the token before wrote: last_t = feed_{t-1}.

    Args:
        parts: the body; it writes `feed` and may read `last`.
        feed: the tensor handed on.
        axes: its axes, such as "H K".
        last: the name under which the body reads it; zeros before the first token.

    Every form is this loop, so T tokens cost T steps. In a compiled or exported graph it is one node for all lengths,
    with first derivatives, whose backward runs the tokens again. It is unrolled into the graph, which then fits one
    length, for form="recurrent", and where a node cannot hold the body: one with a Dropout, a Map, a part of your own,
    a cache that grows, or a hook.

    >>> from recur.blocks import Loop, Project
    >>> body = Project("x last", h="D"), Project("h", y="D")
    >>> recur.Mixer(recur.Recipe(Loop(body, feed="h", axes="D")), dim=4)(torch.randn(1, 3, 4)).y.shape
    torch.Size([1, 3, 4])
    """

    parts: tuple[Part, ...]
    feed: str
    axes: str
    last: str = "last"

    @property
    def causal(self) -> bool:
        return self.body.causal

    def inside(self, axes: Axes) -> Axes:
        return dataclasses.replace(axes, written={**axes.written, self.last: spec(self.axes)})

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = super().shapes(axes)
        if written.get(self.feed) != spec(self.axes):
            got = f"[{' '.join(written[self.feed])}]" if self.feed in written else "nothing"
            raise RecipeError(f"{axes.reader} must write {self.feed} [{self.axes}] to feed it back, got {got}")
        return written

    def build(self, site: Site) -> Any:
        modules = self.build_body(site)
        modules.description = self._describe(site)
        return modules

    def build_body(self, site: Site) -> Any:
        """The modules of the body, and what its sizes fix."""
        modules = super().build(site)
        modules.sizes, modules.writes = site.size(self.axes), tuple(self.shapes(site.axes))
        modules.layer, modules.leaves = site.layer, layout(self, site)
        return modules

    def _describe(self, site: Site) -> str | None:
        """All that builds this loop again, as JSON; None for a body that JSON or a node of a graph cannot hold."""
        fixed = all(isinstance(leaf, Leaf) and None not in leaf.sizes for leaf in tree_leaves(layout(self, site)))
        if not fixed or any(isinstance(part, Dropout) for part in inside(self)):
            return None
        place = {"sizes": dict(site.sizes), "written": dict(site.axes.written), "depth": site.depth}
        try:
            text = json.dumps({"loop": self.to_dict(), **place, "layer": site.layer})
            return text if _read(text)[0] == self else None
        except RecipeError:
            return None

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        inner = dataclasses.replace(site, axes=self.inside(site.axes))
        parts = self.body.init_state(inner, batch, max_len)
        return {self.last: site.zeros(batch, *site.size(self.axes)), "parts": parts}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        node = weights.description is not None and flow.form != "recurrent" and not flow.in_place and in_graph()
        if not node or any(map(watched, _owners(weights))):
            return self.unrolled(flow, weights, state)
        kind = flow["x"].device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        made = _loop(
            weights.description, " ".join(flow.tensors), flow.form, cast, flow.position, flow.cu_seqlens,
            list(flow.tensors.values()),
            [getattr(owner, name) for owner in _owners(weights) for name in owner.declared],
            [] if state is None else _flat(weights.leaves, state),
        )  # fmt: skip
        count = len(weights.writes)
        return flow.set(**dict(zip(weights.writes, made[:count], strict=True))), _tree(
            weights.leaves, iter(made[count:])
        )

    def unrolled(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        """One token after another: the definition, and what the node of a graph runs."""
        if flow.cu_seqlens is not None:
            return self._documents(flow, weights, state)
        x = flow["x"]
        if x.shape[1] > 1 and flow.form == "auto":
            why = "no kernel computes what a loop feeds back, so that each token is launched by itself"
            kernel.without("Loop", "recurrent", x, why, "gates that do not read the state, in a scan")
        # in the dtype of x, whatever autocast or a cast of the model made of it where the state comes from
        last = x.new_zeros(x.shape[0], *weights.sizes) if state is None else state[self.last].to(x.dtype)
        parts = None if state is None else state["parts"]
        pieces: dict[str, list[Tensor]] = {name: [] for name in weights.writes}
        for t in range(max(x.shape[1], 1)):  # without tokens, the body still says which tensors it writes
            token = dataclasses.replace(_between(flow, t, t + 1), position=flow.position + t)
            inner, parts = self.body(token.set(**{self.last: last[:, None][:, : token["x"].shape[1]]}), weights, parts)
            last = inner[self.feed][:, -1].to(x.dtype) if x.shape[1] else last
            for name, row in pieces.items():
                row.append(inner[name])
        made = {name: torch.cat(row, 1) if row[0].shape[1] == 1 else row[0] for name, row in pieces.items()}
        return flow.set(**made), {self.last: last, "parts": parts}

    def _documents(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        """One after another, each from its own row of the state."""
        assert flow.cu_seqlens is not None
        runs = []
        for row, (begin, end) in enumerate(pairwise(flow.cu_seqlens.tolist())):
            mine = slice(row, row + 1)
            own = None if state is None else tree_map(lambda leaf, mine=mine: leaf[mine], state)
            alone = dataclasses.replace(_between(flow, begin, end), cu_seqlens=None, position=flow.position[mine])
            runs.append(self.unrolled(alone, weights, own))
        flows, states = zip(*runs, strict=True)
        made = {name: torch.cat([inner[name] for inner in flows], 1) for name in weights.writes}
        return flow.set(**made), tree_map(lambda *leaves: torch.cat(leaves), *states)

    def formula(self) -> str:
        return f"token by token, {self.last} = {self.feed}_{{t-1}}: " + "; ".join(part.formula() for part in self.parts)


def _between(flow: Flow, begin: int, end: int) -> Flow:
    """The flow of some tokens; what does not change in time stays."""
    T = flow["x"].shape[1]
    tensors = {name: t if t.shape[1] != T else t[:, begin:end] for name, t in flow.tensors.items()}
    return dataclasses.replace(flow, tensors=tensors)


# ---------------------------------------------------------------------- the loop as one node of a graph
#
# A node has tensors, numbers and strings for arguments. So the body comes as JSON, and its weights as a list, in the
# order of the modules that declare them.


@functools.lru_cache(maxsize=256)
def _read(description: str) -> tuple[Loop, Any]:
    """The loop that `_describe` described, and its modules without numbers."""
    given = json.loads(description)
    loop = read_part(given["loop"], above.parts, "Loop")
    axes = Axes({name: tuple(axes) for name, axes in given["written"].items()}, "Loop")
    with torch.device("meta"):
        return loop, loop.build_body(Site(given["sizes"], axes, given["depth"], given["layer"]))


def _owners(weights: nn.Module) -> list[Weights]:
    """The modules that declare weights."""
    return [module for module in weights.modules() if isinstance(module, Weights)]


def _holding(module: Any, weights: dict[int, dict[str, Tensor]]) -> Any:
    """A copy of a module, and of those in it, with these tensors in the place of the weights of each."""
    twin = copy.copy(module)
    twin._modules = {name: _holding(inner, weights) for name, inner in module._modules.items()}
    twin._parameters = weights.get(id(module), {})
    return twin


def _flat(leaves: Any, state: State) -> list[Tensor]:
    """The tensors of a state, in the order of its layout."""
    if not isinstance(leaves, dict):
        return [state]
    return [leaf for key, inner in leaves.items() for leaf in _flat(inner, state[key])]


def _tree(leaves: Any, tensors: Iterator[Tensor]) -> State:
    """The state of this layout that holds these tensors."""
    if not isinstance(leaves, dict):
        return next(tensors)
    return {key: _tree(inner, tensors) for key, inner in leaves.items()}


class _Inputs(NamedTuple):
    description: str
    names: str  # of tokens
    form: str
    cast: torch.dtype | None  # of autocast, if it was on where the graph was made
    position: Tensor
    cu_seqlens: Tensor | None
    tokens: list[Tensor]
    weights: list[Tensor]
    state: list[Tensor]


def _run(*inputs: Any) -> list[Tensor]:
    """What the loop writes, then the tensors of its state."""
    description, names, form, cast, position, cu_seqlens, tokens, weights, state = _Inputs(*inputs)
    loop, modules = _read(description)
    given = iter(weights)
    held = {id(owner): {name: next(given) for name in owner.declared} for owner in _owners(modules)}
    flow = Flow(dict(zip(names.split(), tokens, strict=True)), position, form, cu_seqlens, modules.layer)
    before = _tree(modules.leaves, iter(state)) if state else None
    kind = flow["x"].device.type
    with torch.autocast(kind, cast) if cast is not None else nullcontext():
        flow, after = loop.unrolled(flow, _holding(modules, held), before)
    return [flow[name] for name in modules.writes] + _flat(modules.leaves, after)


def _fake(*inputs: Any) -> list[Tensor]:
    """As many tokens and states as the first token has."""
    description, names, form, cast, position, _, tokens, weights, state = _Inputs(*inputs)
    x = tokens[names.split().index("x")]
    (B, T), n = x.shape[:2], position.shape[0]
    first = [tensor if tensor.shape[1] == 1 else tensor[:, :1] for tensor in tokens]
    one = [leaf[:1].expand(B, *leaf.shape[1:]) for leaf in state]
    made = _run(description, names, form, cast, position[:1].expand(B), None, first, weights, one)
    count = len(_read(description)[1].writes)
    written = [tensor.new_empty(B, T, *tensor.shape[2:]) for tensor in made[:count]]
    return written + [leaf.new_empty(n, *leaf.shape[1:]) for leaf in made[count:]]


_loop = one_node("recur::loop", _run, _fake, schema=schema_of(_Inputs))
