"""A nonlinear recurrence: parts run token by token, because what they read depends on what they wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from recur.axes import RecipeError, Spec, spec
from recur.recipe import Around, Axes, Flow, Part, Site, State


@dataclass(frozen=True)
class Loop(Around):
    """Run parts on one token after another, each reading what the token before wrote: last_t = feed_{t-1}.

    Args:
        parts: the body; it writes `feed` and may read `last`.
        feed:  the tensor handed on.
        axes:  its axes, such as "H K".
        last:  the name under which the body reads it; zeros before the first token.

    Every form is this loop, so T tokens cost T steps.
    """

    parts: tuple[Part, ...]
    feed: str
    axes: str
    last: str = "last"

    @property
    def causal(self) -> bool:
        return self.body.causal

    @property
    def unrolled(self) -> bool:
        return True

    def inside(self, axes: Axes) -> Axes:
        return dataclasses.replace(axes, written={**axes.written, self.last: spec(self.axes)})

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        written = super().shapes(axes)
        if written.get(self.feed) != spec(self.axes):
            got = f"[{' '.join(written[self.feed])}]" if self.feed in written else "nothing"
            raise RecipeError(f"{axes.reader} must write {self.feed} [{self.axes}] to feed it back, got {got}")
        return written

    def build(self, site: Site) -> Any:
        modules = super().build(site)
        modules.sizes, modules.writes = site.size(self.axes), tuple(self.shapes(site.axes))
        return modules

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        inner = dataclasses.replace(site, axes=self.inside(site.axes))
        parts = self.body.init_state(inner, batch, max_len)
        return {self.last: site.zeros(batch, *site.size(self.axes)), "parts": parts}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        if flow.cu_seqlens is not None:
            return self._documents(flow, weights, state)
        x = flow["x"]
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
            runs.append(self(alone, weights, own))
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
