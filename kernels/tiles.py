"""Tiles: rows of a tensor [rows D] in memory, where a chunk lies, and what its gates amount to. Written here, once.

Of a chunk of C tokens the walks need, in units of log 2 and with every sum over gates only, never a difference of logs
that could cancel (but where matmuls are fed with bfloat16, whose rounding hides what a difference loses):

    rise   [C K] or [C]   gates from where the chunk is entered up to and with token t: what a reader sees
    fall   [C K] or [C]   gates after token s up to where the chunk is left: what a writer leaves
    whole  [K] or one     all of them

A gate whose exp is 0 in float32 is a reset: it counts as 2^-160, which is 0 as well, so every factor that spans it is
exactly 0. No factor exceeds 1.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-103.9)  # the log of what is 0 in float32
FLOOR = tl.constexpr(-111.0)  # a reset in sums: exact in bfloat16, and 0 as soon as it is the exponent of e


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
def load_row(tensor, row, cols):
    """[D] in float32, zeros outside."""
    ptr, heads, head, size = tensor
    return tl.load(ptr + (row * heads + head) * size + cols, mask=cols < size, other=0.0).to(tl.float32)


@triton.jit
def numbered(chunk, cu_ptr, T, documents, C: tl.constexpr):
    """Where chunk number `chunk` of all rows, or of all documents of the only row, lies: which row or document, and as
    which of its chunks; then as `place_of`. Document n owns the numbers from cu[n] // C + n on, some of them unused."""
    if cu_ptr is None:
        chunks = tl.cdiv(T, C)
        document, index = chunk // chunks, chunk % chunks
        first, begin, stop = document * T, index * C, T
    else:
        low, high = 0, documents - 1
        while low < high:  # the last document whose numbers begin at or before this one
            middle = (low + high + 1) // 2
            if tl.load(cu_ptr + middle) // C + middle <= chunk:
                low = middle
            else:
                high = middle - 1
        cu = tl.load(cu_ptr + low).to(tl.int64)
        document, index = low, chunk - cu // C - low
        first, begin, stop = chunk * 0, cu + index * C, tl.load(cu_ptr + low + 1).to(tl.int64)
    return document, index, first, begin, stop


@triton.jit
def awaited(ptrs, here):
    """The words of a chain, once other programs have told them: −1 until then."""
    words = tl.load(ptrs, mask=here, other=0, volatile=True)
    while tl.max((words == -1).to(tl.int32)) > 0:
        words = tl.load(ptrs, mask=here, other=0, volatile=True)
    return words


@triton.jit
def place_of(chunk, cu_ptr, T, documents, C: tl.constexpr):
    """Where a chunk begins and must stop: the first token of its row, then tokens of that row."""
    _, _, first, begin, stop = numbered(chunk, cu_ptr, T, documents, C)
    return first, begin, stop


@triton.jit
def strand_of(strand, cu_ptr, H, T, segments, span, C: tl.constexpr):
    """The stretch that one program walks: (row or document, head, segment), and as `place_of` its place, with the
    number of its first chunk."""
    segment, bh = strand % segments, strand // segments
    b, h = bh // H, bh % H
    if cu_ptr is None:
        first, begin = b * T, segment * span
        stop = tl.minimum(begin + span, T)
        chunk = b * tl.cdiv(T, C) + begin // C
    else:
        first, begin, stop = b * 0, tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
        chunk = begin // C + b
    return b, h, segment, first, begin, stop, chunk


@triton.jit
def order(C: tl.constexpr, FLIP: tl.constexpr):
    """[t s], whether token s comes no later than t; from right to left if FLIP."""
    offs = tl.arange(0, C)
    return offs[:, None] <= offs[None, :] if FLIP else offs[:, None] >= offs[None, :]


@triton.jit
def strict(seen):
    """Without the diagonal."""
    offs = tl.arange(0, seen.shape[0])
    return seen & (offs[:, None] != offs[None, :])


@triton.jit
def gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr):
    """The gates of one row and head: pointer and strides."""
    row = first * 0
    if cu_ptr is None:
        row = first // tl.maximum(T, 1)
    return gate_ptr + row * gate_sb + h * gate_sh, gate_st, gate_sd


@triton.jit
def load_gates(gates, start, offs, inside, cols, size, DECAY: tl.constexpr):
    """Logs of the gates [R D] or [R], resets at FLOOR, NaN where they are; outside nothing decays."""
    ptr, stride_t, stride_d = gates
    if DECAY == "key":
        ptrs = ptr + start * stride_t + offs[:, None] * stride_t + cols[None, :] * stride_d
        log_a = tl.load(ptrs, mask=inside[:, None] & (cols[None, :] < size), other=0.0)
    else:
        log_a = tl.load(ptr + start * stride_t + offs * stride_t, mask=inside, other=0.0)
    return tl.maximum(log_a.to(tl.float32), FLOOR, propagate_nan=tl.PropagateNan.ALL).to(log_a.dtype)


@triton.jit
def tied(log_a):
    """1 − exp(log_a), by its series near 0 where the difference would cancel."""
    x = log_a.to(tl.float32)
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp2(x * LOG2E))


@triton.jit
def sums_along(chosen, x, DOT: tl.constexpr):
    """Sums over the rows of x [R D] that each row of chosen [R R] names, by a matmul: cheaper than a scan.

    Sums are exact in bfloat16 where x is. Wider x keeps 17 bits (a high and a low part) where matmuls are fed with
    bfloat16, 22 otherwise.
    """
    if tl.bfloat16 == DOT:
        weights, high = chosen.to(tl.bfloat16), x.to(tl.bfloat16)
        sums = tl.dot(weights, high)
        if x.dtype != tl.bfloat16:
            sums = tl.dot(weights, (x - high.to(tl.float32)).to(tl.bfloat16), sums)
    else:
        sums = tl.dot(chosen.to(tl.float32), x.to(tl.float32), input_precision="tf32x3")
    return sums


@triton.jit
def reaches(log_a, FLIP: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr):
    """rise and fall of gates a key [C K], and the whole [K]; BEFORE: a reader comes before its own gate."""
    log_a = log_a.to(tl.float32) * LOG2E
    since, whole = tl.cumsum(log_a, 0, reverse=FLIP), tl.sum(log_a, 0)
    rise = since
    if BEFORE:
        rise = sums_along(strict(order(log_a.shape[0], FLIP)), log_a, DOT)
    if tl.bfloat16 == DOT:
        fall = tl.minimum(whole[None, :] - since, 0.0)
    else:
        fall = sums_along(strict(order(log_a.shape[0], not FLIP)), log_a, DOT)
    return rise, fall, whole


@triton.jit
def between(log_a, rise, since, FLIP: tl.constexpr, BEFORE: tl.constexpr, TURN: tl.constexpr, DOT: tl.constexpr):
    """Gates after token s up to and with token t, what weighs their pair, [t s] or [s t] if TURN; 0 if not seen."""
    C: tl.constexpr = log_a.shape[0]
    seen, after = order(C, FLIP), strict(order(C, not FLIP))
    read = strict(seen) if BEFORE else seen
    if tl.bfloat16 == DOT:
        logs = rise[None, :] - since[:, None] if TURN else rise[:, None] - since[None, :]
    else:  # sums of gates alone
        passed = tl.where(read, log_a.to(tl.float32)[None, :] * LOG2E + tl.zeros([C, C], tl.float32), 0.0)  # [t r]
        beyond = tl.where(after, 1.0, 0.0)  # [s r], whether token r comes after s
        if TURN:
            logs = tl.dot(beyond, tl.trans(passed), input_precision="tf32x3")
        else:
            logs = tl.dot(passed, tl.trans(beyond), input_precision="tf32x3")
    # mask before exp: pairs that are not seen have a positive difference, which could overflow
    if TURN:
        read = strict(order(C, not FLIP)) if BEFORE else order(C, not FLIP)
    return tl.exp2(tl.where(read, logs, float("-inf")))


@triton.jit
def cos_sin(phase):
    """cos and sin by their series, after whole quarter turns are taken off, to 1e-7 up to 10^4 radians, 1e-6 up to
    10^5 and no further: the library's spill on their rare path."""
    quarters = tl.floor(phase * 0.6366197723675814 + 0.5)
    x = phase - quarters * 1.5703125  # pi / 2 in three parts, the first two short enough for exact products
    x = (x - quarters * 4.837512969970703e-4) - quarters * 7.549789948768648e-8
    return cos_sin_after(quarters.to(tl.int32), x)


@triton.jit
def cos_sin_after(quarter, x):
    """cos and sin of so many quarter turns and x, at most an eighth of a turn."""
    z = x * x
    sin = x + x * z * (-1.6666667e-1 + z * (8.333334e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6)))
    cos = 1 + z * (-0.5 + z * (4.1666668e-2 + z * (-1.3888889e-3 + z * (2.4801587e-5 - z * 2.7557319e-7))))
    odd = quarter % 2 != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter + 1) & 2 != 0, -cos, cos), tl.where(quarter & 2 != 0, -sin, sin)
