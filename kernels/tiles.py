"""Tiles: rows of a tensor [rows D] in memory, and sums along them. Pointer arithmetic is written here, once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(ptr, row, inside, cols, size):
    """Pointers and mask of rows [R] (int64) and columns [D] of a contiguous tensor [rows, size]."""
    return ptr + row[:, None] * size + cols[None, :], inside[:, None] & (cols[None, :] < size)


@triton.jit
def load_tile(ptr, row, inside, cols, size):
    """[R D], zeros outside."""
    ptrs, mask = tile_of(ptr, row, inside, cols, size)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, row, inside, cols, size, tile):
    ptrs, mask = tile_of(ptr, row, inside, cols, size)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_along(weights, x, DOT: tl.constexpr):
    """weights [R R] times x [R D], float32. The weights are exact in DOT and x loses at most 2^-17 of itself (bfloat16
    high and low part) or 2^-22 (tf32x3): a matmul costs less than a scan along the rows."""
    if DOT == tl.bfloat16:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(weights.to(tl.bfloat16), low, tl.dot(weights.to(tl.bfloat16), high))
    return tl.dot(weights, x, input_precision="tf32x3")
