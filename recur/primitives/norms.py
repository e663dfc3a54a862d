"""Normalisation over trailing axes, in float32 or wider."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recur.shapes import accumulation_dtype

KINDS = ("rms", "layer", "l2")


def normalise(
    x: Tensor,
    kind: str = "rms",
    *,
    axes: int = 1,
    groups: int = 1,
    eps: float | Tensor = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Norm over the last `axes` axes of x.

    "rms":   x / sqrt(mean(x^2) + eps).   "layer": (x - mean) / sqrt(var + eps), biased variance.
    "l2":    sqrt(n) x / max(|x|, eps), n entries: the eps bounds the length instead of joining the mean square.

    Args:
        x:            [* N...].
        groups:       how many equal stretches of the N... entries are normalised, each by itself.
        eps:          a number, or a tensor that broadcasts against the reduced x (one value a token or head).
        weight, bias: [N...] applied last.

    Returns: [* N...] in x's dtype.   Raises: ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"normalise: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    wide = x.to(accumulation_dtype(x))
    if groups > 1:
        eps = eps[..., None] if isinstance(eps, Tensor) else eps
        wide, axes = wide.flatten(-axes).unflatten(-1, (groups, -1)), 1
    over = tuple(range(-axes, 0))
    entries = math.prod(wide.shape[-axes:])
    if kind == "layer":
        wide = wide - wide.mean(over, keepdim=True)
    if kind == "l2":
        length = torch.linalg.vector_norm(wide, dim=over, keepdim=True)
        wide = wide / length.clamp(min=eps) * entries**0.5
    else:
        wide = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    wide = wide.reshape(x.shape) if groups > 1 else wide
    wide = wide if weight is None else wide * weight
    return (wide if bias is None else wide + bias).to(x.dtype)
