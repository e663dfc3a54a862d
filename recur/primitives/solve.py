"""The triangular solve of a chunk that erases: the UT transform of the delta rule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.decay import crossings, lower_product
from recur.primitives.operators import batched_at, operator, remember


def solve_tril(lower: Tensor) -> Tensor:
    """(I + lower)⁻¹ for [... C C], of which only what is below the diagonal is read.

    Blocks are joined two by two: under inverses A⁻¹ and B⁻¹ of neighbours that X joins stands −B⁻¹ X A⁻¹. What is not
    finite in a row stays out of the rows before it.
    """
    return _inverse(lower)


def _run_inverse(lower: Tensor) -> Tensor:
    rows = lower.shape[-1]
    more = (1 << (rows - 1).bit_length()) - rows  # blocks are joined two by two
    lower = F.pad(lower, (0, more, 0, more)) if more else lower
    inverse = torch.ones_like(lower[..., :1, None])  # [... C 1 1]
    while (m := inverse.shape[-1]) < lower.shape[-1]:
        top, bottom = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        cross = -lower_product(bottom, crossings(lower, m) @ top)
        inverse = torch.cat([F.pad(top, (0, m)), torch.cat([cross, bottom], -1)], -2)
    return inverse.squeeze(-3)[..., :rows, :rows].contiguous()


def _save_inverse(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    remember(ctx, output)


def _gradients_inverse(ctx: Any, grad: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return (inverse.mT @ (grad @ inverse.mT)).tril(-1).neg()


def _tangent_inverse(ctx: Any, dlower: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return (inverse @ (dlower.tril(-1) @ inverse)).neg()


_inverse = operator(
    "recur::solve_tril",
    _run_inverse,
    fake=torch.empty_like,
    save=_save_inverse,
    backward=_gradients_inverse,
    jvp=_tangent_inverse,
    vmap=batched_at(0, out=0),
)
