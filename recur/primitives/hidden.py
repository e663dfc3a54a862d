"""Dense-hidden fusion: what shallower layers wrote, let in by a gate of this layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recur.shapes import bind


def dense_fusion(new: Tensor, past: Sequence[Tensor], gate: Tensor) -> Tensor:
    """Add the same quantity of shallower layers, at the same token, through one gate: new + gate * sum(past).

    Works on anything that lives per token: keys, values, queries, what a state was read as. It crosses depth and never
    time, so a scan over the result keeps its parallel form, its step and its state.

    Args:
        new:  [B T *] this layer's own quantity.
        past: the unfused quantities of the m layers below, each [B T *]; empty in the first layer, where new returns.
        gate: [B T *] from this layer's input.

    Returns: [B T *].   Raises: ShapeError if shapes differ.   Cost: O(m B T *), no state.
    Source: He et al. 2024, arXiv:2403.00818.

    >>> from recur.primitives.hidden import dense_fusion
    >>> one = torch.ones(1, 1, 2)
    >>> dense_fusion(one, [one, one], gate=0.5 * one)
    tensor([[[2., 2.]]])
    """
    lane = {f"past_{i}": (p, "B T *") for i, p in enumerate(past)}
    bind("dense_fusion", new=(new, "B T *"), gate=(gate, "B T *"), **lane)
    return new + gate * sum(past) if past else new
