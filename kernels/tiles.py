"""Tiles: rows of a tensor [rows D] in memory, and sums along them. Pointer arithmetic is written here, once."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(tensor, row, offs, inside, cols):
    """Pointers [R D] to rows row + offs of a tensor (pointer, heads, head, D) with axes [rows heads D], and their mask.

    The row is the int64 part; what is added inside a tile fits 32 bits.
    """
    ptr, heads, head, size = tensor
    ptrs = ptr + (row * heads + head) * size + offs[:, None] * (heads * size) + cols[None, :]
    return ptrs, inside[:, None] & (cols[None, :] < size)


@triton.jit
def load_tile(tensor, row, offs, inside, cols):
    """[R D], zeros outside."""
    ptrs, mask = tile_of(tensor, row, offs, inside, cols)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(tensor, row, offs, inside, cols, tile):
    ptrs, mask = tile_of(tensor, row, offs, inside, cols)
    tl.store(ptrs, tile.to(tensor[0].dtype.element_ty), mask=mask)


@triton.jit
def sums_of(chosen, x):
    """[R] sums of the entries of x [R] that each row of chosen [R R] names.

    Not tl.cumsum, which Triton 3.6 gets wrong on Hopper inside a pipelined loop.
    """
    return tl.sum(tl.where(chosen, x[None, :], 0.0), 1)


@triton.jit
def sums_along(weights, x, DOT: tl.constexpr):
    """weights [R R] times x [R D] in float32, by a matmul: cheaper than a scan along the rows.

    The weights are exact in bfloat16, and x is if it is bfloat16. Wider x keeps 17 bits (a high and a low part) where
    matmuls are fed with bfloat16, 22 otherwise.
    """
    if tl.bfloat16 == DOT:
        high = x.to(tl.bfloat16)
        sums = tl.dot(weights.to(tl.bfloat16), high)
        if x.dtype != tl.bfloat16:
            sums = tl.dot(weights.to(tl.bfloat16), (x - high.to(tl.float32)).to(tl.bfloat16), sums)
    else:
        sums = tl.dot(weights, x.to(tl.float32), input_precision="tf32x3")
    return sums


@triton.jit
def one_minus_exp(x):
    """1 − exp(x), by its series near 0 where the difference would cancel."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))
