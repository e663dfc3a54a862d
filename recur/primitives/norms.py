"""Normalisation over trailing axes, in float32 or wider."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.operators import transformed
from recur.shapes import accumulation_dtype

KINDS = ("rms", "layer", "l2", "unit", "smooth_unit")


def normalise(
    x: Tensor,
    kind: str = "rms",
    *,
    axes: int = 1,
    groups: int = 1,
    eps: float | Tensor = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    form: str = "auto",
) -> Tensor:
    """Norm over the last `axes` axes of x.

    "rms":   x / sqrt(mean(x^2) + eps).   "layer": (x - mean) / sqrt(var + eps), biased variance.
    "l2":    sqrt(n) x / max(|x|, eps), n entries: the eps bounds the length instead of joining the mean square.
    "unit":  x / max(|x|, eps), vectors of length 1.
    "smooth_unit": x / sqrt(|x|^2 + eps), vectors a little shorter than 1.

    Args:
        x: [* N...].
        kind: which of these.
        axes: how many trailing axes are normalised together.
        groups: how many equal groups of the N... entries are normalised, each by itself.
        eps: a number, or a tensor that broadcasts against the reduced x (one value per token or head).
        weight: [N...] applied last.
        bias: [N...] applied last.
        form: "auto" takes one kernel on a GPU where torch.compile does not do better (recur.kernel.fused); "recurrent",
            "chunked" and "parallel" the formula in torch.

    Returns: [* N...] in x's dtype.   Raises: ValueError for another kind.

    >>> from recur.primitives.norms import normalise
    >>> normalise(torch.tensor([[3.0, 4.0]]), "unit")
    tensor([[0.6000, 0.8000]])
    """
    if kind not in KINDS:
        raise ValueError(f"normalise: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "smooth_unit":  # the mean square of n entries instead of their sum, and the factor 1/sqrt(n) as a weight
        entries = math.prod(x.shape[x.ndim - axes :]) // groups
        shape = x.shape[x.ndim - axes :]
        scale = x.new_full(shape, entries**-0.5) if weight is None else weight * entries**-0.5
        options: dict[str, Any] = {"axes": axes, "groups": groups, "eps": eps / entries, "form": form}
        return normalise(x, "rms", weight=scale, bias=bias, **options)
    if kernel.fused(form, x, weight, bias, of="normalise", compiler=True):
        if (sizes := kernel.rows(x, axes, groups, eps)) is not None:
            width, N = sizes
            return kernel.norm(x, weight=weight, bias=bias, eps=eps, width=width, N=N, kind=kind)
        kernel.fused(form, x, of="normalise", lacks=kernel.ROWS)  # says so
    if kind == "layer" and groups == 1 and not isinstance(eps, Tensor) and _alike(x, weight, bias):
        return F.layer_norm(x, x.shape[-axes:], weight, bias, eps)
    plain = kind == "rms" and groups == 1 and bias is None and not torch.is_grad_enabled() and not transformed()
    if plain and not isinstance(eps, Tensor) and _alike(x, weight):  # the same in one call, but without all derivatives
        return F.rms_norm(x, x.shape[-axes:], weight, eps)
    wide = x.to(accumulation_dtype(x))
    if groups > 1:
        eps = eps[..., None] if isinstance(eps, Tensor) else eps
        wide, axes = wide.flatten(-axes).unflatten(-1, (groups, -1)), 1
    over = tuple(range(-axes, 0))
    entries = math.prod(wide.shape[-axes:])
    if kind == "layer":
        wide = wide - wide.mean(over, keepdim=True)
    if kind in ("l2", "unit"):
        length = torch.linalg.vector_norm(wide, dim=over, keepdim=True)
        wide = wide / length.clamp(min=eps)
        wide = wide * entries**0.5 if kind == "l2" else wide
    else:
        wide = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    wide = wide.reshape(x.shape) if groups > 1 else wide
    wide = wide if weight is None else wide * weight
    return (wide if bias is None else wide + bias).to(x.dtype)


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these have one dtype and there is something to normalise: torch's own norms want it so."""
    return x.numel() > 0 and all(other is None or other.dtype == x.dtype for other in others)
