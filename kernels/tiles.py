"""Tiles in memory, and where chunks and segments lie.

A tile is rows of a tensor with axes [rows heads D], named by a tuple (pointer, heads, head, D). A chunk is C tokens of
a row or packed document, counted from its first token; a segment is several consecutive chunks, `span` tokens. Complex
numbers are two float32 planes in registers.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
QUARTERS_PER_RADIAN = tl.constexpr(0.6366197723675814)  # 2 / π


@triton.jit
def tile_ptrs(tensor, row, offs, inside, cols):
    """Pointers [R D] to rows row + offs of a tensor (pointer, heads, head, D) with axes [rows heads D], and their mask.

    `row` is int64; what is added inside a tile fits 32 bits.
    """
    ptr, heads, head, size = tensor
    ptrs = ptr + (row * heads + head) * size + offs[:, None] * (heads * size) + cols[None, :]
    return ptrs, inside[:, None] & (cols[None, :] < size)


@triton.jit
def load_tile(tensor, row, offs, inside, cols):
    """[R D], zeros outside."""
    ptrs, mask = tile_ptrs(tensor, row, offs, inside, cols)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_tile(tensor, row, offs, inside, cols, tile):
    """Store [R D], rounded to the dtype of the tensor."""
    ptrs, mask = tile_ptrs(tensor, row, offs, inside, cols)
    tl.store(ptrs, tile.to(tensor[0].dtype.element_ty), mask=mask)


@triton.jit
def load_row(tensor, row, cols):
    """One row [D] in float32, zeros outside."""
    ptr, heads, head, size = tensor
    return tl.load(ptr + (row * heads + head) * size + cols, mask=cols < size, other=0.0).to(tl.float32)


@triton.jit
def add_to_row(tensor, row, cols, x):
    """Add x [D] to one row in memory."""
    ptr, heads, head, size = tensor
    ptrs, mask = ptr + (row * heads + head) * size + cols, cols < size
    tl.store(ptrs, (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) + x).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def matrix_ptrs(ptr, chunk_head, C: tl.constexpr):
    """Pointers [C C] to the matrix of one chunk of one head, in a tensor [chunks H C C]."""
    offs = tl.arange(0, C)
    return ptr + chunk_head * (C * C) + offs[:, None] * C + offs[None, :]


@triton.jit
def find_document(slot, cu_ptr, documents, size, EACH: tl.constexpr):
    """The last document n whose slots, from cu[n] // size + EACH n on, begin at or before `slot`."""
    low, high = 0, documents - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_ptr + middle) // size + EACH * middle <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def locate_chunk(chunk, cu_ptr, T, documents, C):
    """Place of chunk slot `chunk`: its row or document, its index there, and then what `chunk_bounds` returns.

    Slots are numbered over all rows, or over all documents of the one packed row. Document n owns the slots from
    cu[n] // C + n on; some slots hold no token.
    """
    if cu_ptr is None:
        chunks = tl.cdiv(T, C)
        document, index = chunk // chunks, chunk % chunks
        first, begin, stop = document * T, index * C, T
    else:
        document = find_document(chunk, cu_ptr, documents, C, 1)
        cu = tl.load(cu_ptr + document).to(tl.int64)
        index = chunk - cu // C - document
        first, begin, stop = chunk * 0, cu + index * C, tl.load(cu_ptr + document + 1).to(tl.int64)
    return document, index, first, begin, stop


@triton.jit
def chunk_bounds(chunk, cu_ptr, T, documents, C: tl.constexpr):
    """First token of the chunk's row; then, counted from there, where the chunk begins and its row or document ends."""
    _, _, first, begin, stop = locate_chunk(chunk, cu_ptr, T, documents, C)
    return first, begin, stop


@triton.jit
def locate_segment(slot, cu_ptr, T, documents, span, C: tl.constexpr):
    """Place of segment slot `slot`, numbered as chunk slots are: row or document; number of the border at its left;
    first token of the row; where, counted from there, the segment begins and its row or document ends; slot of its
    first chunk; chunks of the row or document before it, in it and after it.

    A border lies between two segments, and its number names it in tensors [borders ...]; some numbers have none.
    """
    document, index, first, begin, end = locate_chunk(slot, cu_ptr, T, documents, span)
    per, border = span // C, document * tl.cdiv(T, span)
    chunk = document * tl.cdiv(T, C)
    if cu_ptr is not None:
        cu = begin - index * span
        border, chunk = cu // span, cu // C + document
    left = tl.cdiv(tl.maximum(end - begin, 0), C)
    own = tl.minimum(left, per)
    return document, border + index, first, begin, end, chunk + index * per, index * per, own, left - own


@triton.jit
def segment_at(border, cu_ptr, documents, span, AFTER: tl.constexpr):
    """Slot of the segment at the right of a border if AFTER, else at its left. Where the number has no border, that
    segment has another one there, or is the last or the first of its document."""
    slot = border if AFTER else border - 1
    if cu_ptr is not None:
        slot += find_document(border - 1, cu_ptr, documents, span, 0)
    return slot


@triton.jit
def causal(C: tl.constexpr, REVERSE: tl.constexpr):
    """[t s], whether token s comes no later than token t in the direction of the scan."""
    offs = tl.arange(0, C)
    return offs[:, None] <= offs[None, :] if REVERSE else offs[:, None] >= offs[None, :]


@triton.jit
def off_diagonal(mask):
    """The mask [C C] without its diagonal."""
    offs = tl.arange(0, mask.shape[0])
    return mask & (offs[:, None] != offs[None, :])


@triton.jit
def unpack_complex(x):
    """Real and imaginary plane of complex64 that was loaded as int64; of anything else itself and zeros."""
    if x.dtype == tl.int64:
        re = x.to(tl.int32).to(tl.float32, bitcast=True)
        im = (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        re = x.to(tl.float32)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def pack_complex(re, im):
    """Two planes as int64, whose bits are those of complex64."""
    low, high = re.to(tl.uint32, bitcast=True).to(tl.uint64), im.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (low | (high << 32)).to(tl.int64, bitcast=True)


@triton.jit
def split_complex(tile, COMPLEX: tl.constexpr):
    """Real and imaginary plane [R D/2] of a tile [R D] in which they are neighbours; if it is real itself and zeros."""
    re, im = tile.to(tl.float32), tl.zeros_like(tile.to(tl.float32))
    if COMPLEX:
        re, im = tl.split(re.reshape(tile.shape[0], tile.shape[1] // 2, 2))
    return re, im


@triton.jit
def cos_sin(radians):
    """cos and sin by their series, after whole quarters of a circle are taken off: errors of 1e-7 up to 10^4 radians,
    1e-6 up to 10^5, no accuracy beyond. The library's functions spill registers on their rare path."""
    quarters = tl.floor(radians * QUARTERS_PER_RADIAN + 0.5)
    x = radians - quarters * 1.5703125  # π / 2 in three parts, the first two short enough for exact products
    x = (x - quarters * 4.837512969970703e-4) - quarters * 7.549789948768648e-8
    return cos_sin_of_rest(quarters.to(tl.int32), x)


@triton.jit
def cos_sin_of_rest(quarter, x):
    """cos and sin of `quarter` quarters of a circle plus x radians, |x| at most π / 4."""
    z = x * x
    sin = x + x * z * (-1.6666667e-1 + z * (8.333334e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6)))
    cos = 1 + z * (-0.5 + z * (4.1666668e-2 + z * (-1.3888889e-3 + z * (2.4801587e-5 - z * 2.7557319e-7))))
    odd = quarter % 2 != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter + 1) & 2 != 0, -cos, cos), tl.where(quarter & 2 != 0, -sin, sin)


@cache
def constants(record: Any) -> Any:
    """The record (a NamedTuple) with every field a constexpr, so that jitted functions can pass fields on; as it is in
    Triton's interpreter, where numbers are plain ones."""
    compiled = isinstance(load_tile, triton.JITFunction)
    return type(record)(*map(tl.constexpr, record)) if compiled else record
