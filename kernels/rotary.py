"""Rotary positions: every pair of channels is rotated by the angle position * frequency, in one pass.

    a' = a cos - b sin,  b' = b cos + a sin        pairs (2j, 2j + 1), or (j, j + K/2) if HALVES

The angle is a float64 product rounded to float32, as in torch. Its gradient is the same pass by the opposite angle.
"""

# Jitted functions take no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from recur.kernels.operators import as_it_is, cdiv, differentiable, fake, operator, power_of_2
from recur.kernels.pointwise import tokens
from recur.kernels.tiles import QUARTERS_PER_RADIAN, cos_sin_of_rest
from torch import Tensor

QUARTER = tl.constexpr(1.5707963267948966)  # π / 2


@triton.jit
def rotation(place, frequency):
    """cos and sin of place * frequency, both float64."""
    angle = (place * frequency).to(tl.float32).to(tl.float64)
    quarters = tl.floor(angle * QUARTERS_PER_RADIAN + 0.5)
    rest = (angle - quarters * QUARTER).to(tl.float32)
    return cos_sin_of_rest((quarters - 4 * tl.floor(quarters / 4)).to(tl.int32), rest)


@triton.jit(do_not_specialize=["count", "positions"])
def _rotate(
    x_ptr, position_ptr, frequency_ptr, y_ptr,  # tensors; the heads of a token are contiguous
    count, positions, H, K, x_stride,  # sizes; positions repeat
    HALVES: tl.constexpr, INVERSE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.arange(0, BLOCK_K // 2)
    place = tl.load(position_ptr + t % positions, mask=t < count, other=0).to(tl.float64)
    frequency = tl.load(frequency_ptr + pair, mask=pair < K // 2, other=0.0)
    cos, sin = rotation(place[:, None], frequency[None, :])
    if INVERSE:
        sin = -sin
    row = t.to(tl.int64)[:, None]
    for h in range(H):
        if HALVES:
            here = (t < count)[:, None] & (pair < K // 2)[None, :]
            at = row * x_stride + h * K + pair[None, :]
            a = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
            b = tl.load(x_ptr + at + K // 2, mask=here, other=0.0).to(tl.float32)
            out = y_ptr + row * (H * K) + h * K + pair[None, :]
            tl.store(out, a * cos - b * sin, mask=here)
            tl.store(out + K // 2, b * cos + a * sin, mask=here)
        else:
            k = tl.arange(0, BLOCK_K)
            here = (t < count)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + row * x_stride + h * K + k[None, :], mask=here, other=0.0).to(tl.float32)
            a, b = tl.split(x.reshape(BLOCK_T, BLOCK_K // 2, 2))
            y = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(BLOCK_T, BLOCK_K)
            tl.store(y_ptr + row * (H * K) + h * K + k[None, :], y, mask=here)


@operator("rotate", given=as_it_is)
def rotate(x: Tensor, position: Tensor, frequencies: Tensor, halves: bool, inverse: bool) -> Tensor:
    """x [B T H K] rotated by the angles of positions [B|1 T] and float64 frequencies [K/2]."""
    H, K = x.shape[2:]
    rows, y, BLOCK_K = tokens(x, H * K), x.new_empty(x.shape), power_of_2(K)
    BLOCK_T = max(1, 1024 // BLOCK_K)
    _rotate[(cdiv(len(rows), BLOCK_T),)](
        x_ptr=rows, position_ptr=position.contiguous(), frequency_ptr=frequencies.contiguous(), y_ptr=y,
        count=len(rows), positions=position.numel(), H=H, K=K, x_stride=rows.stride(0), HALVES=halves, INVERSE=inverse,
        BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


@fake("rotate")
def _fake_rotate(x: Tensor, position: Tensor, frequencies: Tensor, halves: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, position, frequencies, ctx.halves, ctx.inverse = inputs
    ctx.save_for_backward(position, frequencies)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    position, frequencies = ctx.saved_tensors
    return rotate(dy, position, frequencies, ctx.halves, not ctx.inverse), None, None, None, None


differentiable("rotate", _backward, _save)
