"""The part that lets layers see what shallower layers wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recur.axes import RecipeError, Spec
from recur.primitives.gates import activation
from recur.primitives.hidden import dense_fusion
from recur.primitives.norms import normalise
from recur.recipe import Axes, Flow, Part, Site, State
from recur.weights import Param, ones


def at_least_one(part: str, layers: int) -> None:
    """Raise RecipeError unless a part looks at one layer or more."""
    if layers < 1:
        raise RecipeError(f"{part}: layers must be at least 1, got {layers}")


@dataclass(frozen=True)
class DenseFusion(Part):
    """Fuse a tensor with that of the `layers` layers below: k <- rms(k + act(gate) * sum past k); any tensor [B T *].

    The unfused tensor is handed down. The first layer has no past and leaves its tensor as it is, norm included.
    """

    source: str
    gate: str
    layers: int = 1
    act: str = "silu"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        at_least_one("DenseFusion", self.layers)

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {self.source: axes.same(self.source, self.gate)}

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"weight": Param(site.of(self.source), ones, decay=False)}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        new = flow[self.source]
        lane = [layer[self.source] for layer in flow.past[-self.layers :] if self.source in layer]
        flow = flow.publish(**{self.source: new})
        if not lane:
            return flow, None
        fused = dense_fusion(new, lane, activation(self.act)(flow[self.gate]))
        axes = fused.ndim - 2
        return flow.set(**{self.source: normalise(fused, axes=axes, eps=self.eps, weight=weights.weight)}), None

    def formula(self) -> str:
        x = self.source
        return f"{x} <- rms({x} + {self.act}({self.gate}) * sum_{{i<={self.layers}}} {x} of layer l-i)"
