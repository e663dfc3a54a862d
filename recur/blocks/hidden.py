"""The part that lets layers see what shallower layers wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recur.axes import RecipeError, Spec, shown
from recur.blocks.scans import SelectiveScan, StateScan, scan_options
from recur.primitives.diagonal import gated_scan
from recur.primitives.gates import activation
from recur.primitives.hidden import dense_fusion
from recur.primitives.norms import normalise
from recur.recipe import Axes, Flow, Part, Site, State
from recur.shapes import accumulation_dtype
from recur.weights import Param, ones


def at_least_one(part: str, layers: int) -> None:
    """Raise RecipeError unless a part looks at one layer or more."""
    if layers < 1:
        raise RecipeError(f"{part}: layers must be at least 1, got {layers}")


@dataclass(frozen=True)
class DenseFusion(Part):
    """Fuse a tensor with that of the `layers` layers below: k <- rms(k + act(gate) * sum past k); any tensor [B T *].

    The unfused tensor is handed down. The first layer has no past and leaves its tensor as it is, norm included.

    Args:
        source: the tensor [*].
        gate: a tensor of the same axes.
        layers: how many layers below.
        act: activation of the gate.
        eps: of the norm.

    >>> recur.blocks.DenseFusion("k", gate="g", layers=2).formula()
    'k <- rms(k + silu(g) * sum_{i<=2} k of layer l-i)'
    """

    source: str
    gate: str
    layers: int = 1
    act: str = "silu"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        at_least_one("DenseFusion", self.layers)

    @property
    def layers_below(self) -> int:
        return self.layers

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
        options: dict[str, Any] = {"axes": fused.ndim - 2, "eps": self.eps, "weight": weights.weight}
        return flow.set(**{self.source: normalise(fused, **options, form=flow.form)}), None

    def formula(self) -> str:
        x = self.source
        return f"{x} <- rms({x} + {self.act}({self.gate}) * sum_{{i<={self.layers}}} {x} of layer l-i)"


@dataclass(frozen=True)
class _OfStates(Part):
    """A scan that the states of the `layers` layers below join, let in by a gate."""

    scan: Any
    gate: str
    layers: int = 2
    act: str = "silu"

    def __post_init__(self) -> None:
        at_least_one(type(self).__name__, self.layers)
        if not isinstance(self.scan, StateScan):
            raise RecipeError(f"{type(self).__name__}: scan must be a part such as OuterScan, got {shown(self.scan)}")

    @property
    def layers_below(self) -> int:
        return self.layers

    def params(self, site: Site) -> Mapping[str, Param]:
        return self.scan.params(site)

    def facts(self, site: Site) -> Mapping[str, Any]:
        return self.scan.facts(site)

    def init_state(self, site: Site, batch: int, max_len: int | None) -> State:
        return self.scan.init_state(site, batch, max_len)


@dataclass(frozen=True)
class DenseRead(_OfStates):
    """A scan, and what this layer's query reads in the states of the `layers` layers below, let in by a gate.

    y = S_t^T q + act(gate) * sum_{i <= layers} (S_t of layer l-i)^T q: fused states that are read and not carried on. A
    shallower state is never stored but scanned again, one scan per layer, from what that layer has written.

    Args:
        scan: an OuterScan, DeltaScan, OnlineScan or SelectiveScan.
        gate: a tensor of the axes of y.
        layers: how many layers below.
        act: activation of the gate.

    >>> from recur.blocks import SelectiveScan, DenseRead
    >>> DenseRead(SelectiveScan("u"), gate="z").formula().rpartition(" C, ")[2]
    'y <- y + silu(z) * sum_{i<=2} (the same of the states of layer l-i)'
    """

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        ((out, found),) = self.scan.shapes(axes).items()
        Axes({**axes.written, out: found}, axes.reader).same(out, self.gate)
        return {out: found}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        still = replace(flow, in_place=False)  # the layers above scan this token again from the same state
        written, lane = self.scan.written(still, weights), f"{type(self.scan).__name__}."
        y, new = self.scan.read(still, weights, written, state)
        past = [_under(lane, layer) for layer in flow.past[-self.layers :]]
        more = [self._again(still, weights, layer) for layer in past if layer]
        handed = {lane + name: tensor for name, tensor in {**written, "state": state}.items() if tensor is not None}
        fused = dense_fusion(y, more, activation(self.act)(flow[self.gate]))
        return flow.set(**{self.scan.out: fused}).publish(**handed), new

    def _again(self, flow: Flow, weights: Any, written: dict[str, Tensor]) -> Tensor:
        """The states of a shallower layer, read with the query of this one."""
        state = written.pop("state", None)
        return self.scan.read(flow, weights, written, state).y

    def formula(self) -> str:
        y = self.scan.out
        more = f"{self.act}({self.gate}) * sum_{{i<={self.layers}}} (the same of the states of layer l-i)"
        return f"{self.scan.formula()}, {y} <- {y} + {more}"


def _under(lane: str, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(lane): tensor for name, tensor in published.items() if name.startswith(lane)}


@dataclass(frozen=True)
class DenseCarry(_OfStates):
    """Mamba's scan with the states of the `layers` layers below added to its own, and carried on:

    F_t = exp(delta A) * S_{t-1} + (delta u) B, S_t = F_t + act(gate) * sum_{i <= layers} (F_t of layer l-i), y = S_t C.
    What is handed down is F, before fusion. All states are in memory, [B T E N].

    Args:
        scan: a SelectiveScan.
        gate: a tensor [E].
        layers: how many layers below.
        act: activation of the gate.

    >>> from recur.blocks import SelectiveScan, DenseCarry
    >>> DenseCarry(SelectiveScan("u"), gate="z").formula().rpartition(" C, ")[2]
    'with S_t = F_t + silu(z) * sum_{i<=2} (F_t of layer l-i) and F_t the S_t without it'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scan, SelectiveScan):
            raise RecipeError(f"DenseCarry: scan must be a SelectiveScan, got {type(self.scan).__name__}")

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        axes.same(self.scan.source, self.gate)
        return self.scan.shapes(axes)

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        written = self.scan.written(flow, weights)
        x, delta, A, B = (written[name] for name in ("x", "delta", "A", "B"))
        wide = accumulation_dtype(x, delta, A, B)
        write = torch.einsum("bte,btn->bten", (delta * x).to(wide), B.to(wide))
        past = [layer["DenseCarry"] for layer in flow.past[-self.layers :] if "DenseCarry" in layer]
        extra = sum(past, torch.zeros_like(write)) * activation(self.act)(flow[self.gate])[..., None]
        states, new = gated_scan(write + extra, delta[..., None].to(wide) * A, **scan_options(flow, state))
        y = torch.einsum("bten,btn->bte", states, flow[self.scan.C].to(wide)).to(x.dtype)
        return flow.set(**{self.scan.out: y}).publish(DenseCarry=states - extra), new

    def formula(self) -> str:
        F = f"{self.act}({self.gate}) * sum_{{i<={self.layers}}} (F_t of layer l-i)"
        return f"{self.scan.formula()}, with S_t = F_t + {F} and F_t the S_t without it"
