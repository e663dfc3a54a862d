"""How y leaves a layer: skip, norm and output gate as the stages of one kernel, where they stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recur import kernel
from recur.blocks.gates import OutputGate
from recur.blocks.glue import Norm, Skip
from recur.recipe import Flow, Part, State
from recur.weights import call, watched


@dataclass(frozen=True)
class Leave(Part):
    """Parts that follow each other and all change the same tensor: a Skip, then a Norm and an OutputGate in any order.

    Not written in recipes: `join` finds the parts in a chain, whose weights and names stay as they are. Where the
    kernel does not compute a call, or a hook wants one of their modules to be called, they run one by one.
    """

    parts: tuple[Part, ...] = ()

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        name = _written(self.parts[0]) or ""
        joined = kernel.fused(flow.form, flow[name], compiler=True) and not any(map(watched, weights))
        options = self._options(flow, weights, flow[name]) if joined else None
        if options is not None:
            return flow.set(**{name: kernel.norm(**options)}), None
        for part, own in zip(self.parts, weights, strict=True):
            flow, _ = call(own, part.__call__, flow, None)
        return flow, None

    def _options(self, flow: Flow, weights: Any, y: Tensor) -> dict[str, Any] | None:
        """The arguments of the kernel; None if it does not compute this call."""
        options: dict[str, Any] = {"x": y, "width": y.shape[2:].numel(), "N": y.shape[2:].numel()}
        tensors = [y]
        for part, own in zip(self.parts, weights, strict=True):
            if isinstance(part, Skip):
                if own.D.ndim + own.after != y.ndim - 2:  # the kernel wants the first axes of u
                    return None
                options |= {"u": flow[part.source], "skip": own.D}
                tensors += [flow[part.source], own.D]
            elif isinstance(part, OutputGate):
                options |= {"z": flow[part.gate], "act": part.act, "gate": "after" if "kind" in options else "before"}
                tensors.append(flow[part.gate])
            elif isinstance(part, Norm):
                eps = part.eps_of(flow, own)
                sizes = kernel.rows(y, own.rank, own.groups, eps)
                if sizes is None or part.kind == "smooth_unit":  # for which normalise takes another kind
                    return None
                scale, shift = own.declared_or_none("weight"), own.declared_or_none("bias")
                options |= {"N": sizes[1], "kind": part.kind, "eps": eps, "weight": scale, "bias": shift}
                tensors += [weight for weight in (scale, shift) if weight is not None]
        alike = all(options[name].shape == y.shape for name in ("u", "z") if name in options)
        return options if alike and kernel.fused(flow.form, *tensors, compiler=True) else None


def _written(part: Part) -> str | None:
    """The tensor a part of this kind changes in place; None for any other part."""
    if isinstance(part, Norm):
        return part.source if part.to in (None, part.source) else None
    if isinstance(part, OutputGate):
        return "y" if part.act in kernel.GATES else None
    if isinstance(part, Skip):
        return part.out
    return None


def join(parts: Sequence[Part]) -> tuple[int, Part]:
    """How many of the first of these parts run as one, and what runs: a Leave, or the first by itself."""
    kinds: list[type[Part]] = []
    name = _written(parts[0])
    for part in parts:
        allowed = () if isinstance(part, Skip) and kinds else (Skip, Norm, OutputGate)
        if name is None or _written(part) != name or not isinstance(part, allowed) or type(part) in kinds:
            break
        kinds.append(type(part))
    count = max(1, len(kinds))
    return count, parts[0] if count == 1 else Leave(tuple(parts[:count]))
