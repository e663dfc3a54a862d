"""Parts that count what a scan has written, and keep exponential gates in bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from recur.axes import RecipeError, Spec
from recur.primitives.stabilise import LEAST, largest_log
from recur.recipe import Axes, Flow, Part, Site, State


@dataclass(frozen=True)
class Stabilise(Part):
    """Divide a state with exponential gates by its largest weight, exp(m): m_t = max(log_a + m_{t-1}, i_t).

    log_a <- log_a + m_{t-1} - m_t, k <- exp(i - m_t) k, floor = exp(-m_t): what 1 has become.

    Args:
        decay: log_a [H].
        write: i [H], the log of the input gate.
        key: k [H K].
        floor: where exp(-m) goes, for DivideByLast.

    >>> recur.blocks.Stabilise().formula()
    'm_t = max(log_a + m_{t-1}, i), log_a <- log_a + m_{t-1} - m_t, k <- exp(i - m_t) k, floor = exp(-m_t)'
    """

    decay: str = "log_a"
    write: str = "i"
    key: str = "k"
    floor: str = "floor"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        found, key = axes.same(self.decay, self.write), axes.rank(self.key, 2)
        axes.must(self.decay, key[:1])
        return {self.decay: found, self.key: key, self.floor: found}

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return site.memory(batch, *site.of(self.decay)).fill_(LEAST)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        log_a, i, k = flow[self.decay], flow[self.write], flow[self.key]
        m, before, last = largest_log(log_a, i, initial_state=state, cu_seqlens=flow.cu_seqlens)
        written = {
            self.decay: log_a.to(m.dtype) + before - m,
            self.key: (torch.exp(i.to(m.dtype) - m)[..., None] * k).to(k.dtype),
            self.floor: torch.exp((-m).clamp(max=80.0)),  # beyond that y is 0 in any case
        }
        return flow.set(**written), last

    def formula(self) -> str:
        a, i, k = self.decay, self.write, self.key
        m = f"m_t = max({a} + m_{{t-1}}, {i})"
        return f"{m}, {a} <- {a} + m_{{t-1}} - m_t, {k} <- exp({i} - m_t) {k}, {self.floor} = exp(-m_t)"


@dataclass(frozen=True)
class AppendOne(Part):
    """A 1 at the end of every value, so that a scan also sums up its keys: v [H V] -> [H V+1].

    Args:
        source: the values.

    >>> recur.blocks.AppendOne("v").formula()
    'v <- [v, 1]'
    """

    source: str = "v"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        *heads, V = axes[self.source]
        return {self.source: (*heads, f"{V}+1")}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(**{self.source: F.pad(flow[self.source], (0, 1), value=1.0)}), None

    def formula(self) -> str:
        return f"{self.source} <- [{self.source}, 1]"


@dataclass(frozen=True)
class DivideByLast(Part):
    """Divide what a scan has read by what it has counted: y [H V+1] -> y_{1..V} / max(|y_{V+1}|, floor) [H V].

    Args:
        floor: a number, or the name of a tensor [H].
        source: y, what the scan has read.

    >>> recur.blocks.DivideByLast("floor").formula()
    'y <- y_{1..V} / max(|y_{V+1}|, floor)'
    """

    floor: float | str = 1e-6
    source: str = "y"

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        *heads, counted = axes[self.source]
        if not counted.endswith("+1"):
            raise RecipeError(
                f"{axes.reader} needs {self.source} to end in a count, got [{' '.join((*heads, counted))}]"
            )
        if isinstance(self.floor, str):
            axes.must(self.floor, tuple(heads))
        return {self.source: (*heads, counted.removesuffix("+1"))}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y, count = flow[self.source][..., :-1], flow[self.source][..., -1:].abs()
        floor = flow[self.floor][..., None] if isinstance(self.floor, str) else count.new_full((), self.floor)
        return flow.set(**{self.source: (y / torch.maximum(count.to(floor.dtype), floor)).to(y.dtype)}), None

    def formula(self) -> str:
        return f"{self.source} <- {self.source}_{{1..V}} / max(|{self.source}_{{V+1}}|, {self.floor})"
