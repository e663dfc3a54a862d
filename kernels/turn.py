"""A complex gate, |a_t| exp(i phi_t), is a real one on states twice as wide, once keys and queries are turned:

    e_t = - sum of phi_s over the tokens s after t      k'_t = [k_t cos e_t, -k_t sin e_t]      |a|'_t = [|a_t|, |a_t|]

and q likewise. Phases are counted from the token walked last, so that of the states only a given initial one is turned
as well, by the sum of all: those are `angles` [B H COLS], one a document. `turned` [chunks H COLS] is what a chunk's
first token sees.

Phases are parts of a turn in 32 bits, whose sums wrap by themselves and lose nothing. Forward, in `chunk_scan.prepare`,
chunks are a chain: each tells the next ones its sum. Backward, a phase owes what the tokens before it in its chunk
would gain if they were turned on, and what the state that enters the chunk would: not a sum over all tokens, in which
roundings would add up.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.tiles import FLOOR, RESET, awaited, cos_sin_after, gates_of, load_tile, place_of, store_tile
from triton.language.extra import libdevice

TURNS = tl.constexpr(0.15915494309189535)  # of a radian
ROUND = tl.constexpr(6755399441055744.0)  # 1.5 2^52, plus a number: the number rounded, in the last bits
LOOK = 32  # chunks: one of so many tells all that comes before it


@triton.jit
def angle(word):
    """In radians, turned the other way."""
    return word.to(tl.float32) * -1.4629180792671596e-9


@triton.jit
def cos_sin_of(word, DOT: tl.constexpr):
    """cos and sin of that angle; the GPU's own, good to 21 bits, where matmuls are fed with bfloat16."""
    if tl.bfloat16 == DOT:
        cos, sin = libdevice.fast_cosf(angle(word)), libdevice.fast_sinf(angle(word))
    else:
        quarter = (word + 536870912) >> 30
        cos, sin = cos_sin_after(-quarter, angle(word - (quarter << 30)))
    return cos, sin


@triton.jit
def word_of(log_a, phase):
    """Parts of a turn, 2^32 of them; what is forgotten need not be turned."""
    turns = tl.where(log_a > RESET, phase, 0.0).to(tl.float64) * TURNS
    turns -= (turns + ROUND) - ROUND  # in [−0.5, 0.5], without the conversions of a rounding
    return (turns * 4294967296.0 + ROUND).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def phases(gates, start, offs, inside, part, COLS, DECAY: tl.constexpr, D: tl.constexpr):
    """log |a| [C D], resets at FLOOR, and phases in parts of a turn, of D keys from `part` on."""
    ptr, stride_t, _ = gates
    C: tl.constexpr = offs.shape[0]
    ptrs = ptr + start * stride_t + offs[:, None] * stride_t
    if DECAY == "key":
        e = part * 2 + tl.arange(0, 2 * D)
        pairs = tl.load(ptrs + e[None, :], mask=inside[:, None] & (e < 2 * COLS)[None, :], other=0.0)
        log_a, phase = tl.split(pairs.reshape(C, D, 2))
    else:
        log_a = tl.load(ptrs, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
        phase = tl.load(ptrs + 1, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
    lost = tl.where(log_a > RESET, phase - phase, 0.0)  # NaN where a phase is not finite, which a word cannot show
    return tl.maximum(log_a, FLOOR, propagate_nan=tl.PropagateNan.ALL) + lost, word_of(log_a, phase)


@triton.jit
def drawn(words_ptr, cu_ptr, T, chunks, H, FLIP: tl.constexpr, C: tl.constexpr):
    """Number of a chunk of a head. They are drawn in the chain's order, so whoever is waited for has begun."""
    number = tl.atomic_add(words_ptr, 1, sem="relaxed") + 1
    turn, h = number // H, number % H
    if cu_ptr is None:  # all rows before the next chunk, so that few wait for who has just begun
        rows = chunks // tl.cdiv(T, C)
        turn = turn % rows * tl.cdiv(T, C) + turn // rows
    chunk = turn if FLIP else chunks - 1 - turn
    return chunk * H + h


@triton.jit
def chain_of(words_ptr, square, start, stop, index, H, COLS, FLIP: tl.constexpr, C: tl.constexpr):
    """Where a chunk tells, how far from there the one before it does, and how many there are before it."""
    place = index if FLIP else (stop - start - 1) // C
    return words_ptr + 2 + square * COLS, -(H * COLS) if FLIP else H * COLS, place


@triton.jit
def _put(ptrs, word, here):
    """32 bits in 64, which are not −1."""
    tl.store(ptrs, word.to(tl.uint32, bitcast=True).to(tl.int64), mask=here)


@triton.jit
def tell(chain, part, word, COLS, LOOK: tl.constexpr):
    """By how much a chunk turns all before it; one of LOOK waits until it can tell how much it and all after it do."""
    mine, _, place = chain
    d = part + tl.arange(0, word.shape[1])
    _put(mine + d, tl.sum(word, 0), (d < COLS) & (place % LOOK != 0))


@triton.jit
def turned_by(chain, part, word, COLS, FLIP: tl.constexpr, LOOK: tl.constexpr):
    """By how much the chunk's first token is turned [D], and what is read or written after each token [C D], once the
    chunks after it have told: −1 until then."""
    mine, apart, place = chain
    d = part + tl.arange(0, word.shape[1])
    back = (place - 1) % LOOK + 1 - tl.arange(0, LOOK)
    here = ((back > 0) & (place > 0))[:, None] & (d < COLS)[None, :]
    told = awaited((mine + d)[None, :] + back[:, None] * apart, here)
    first = tl.sum(told.to(tl.int32), 0) + tl.sum(word, 0)
    _put(mine + d, first, (d < COLS) & (place % LOOK == 0))
    return first, first[None, :] - tl.cumsum(word, 0, reverse=FLIP)


@triton.jit(do_not_specialize=["T", "documents"])
def turn_backward(
    q_ptr, k_ptr, gate_ptr, turned_ptr, dtold_ptr, dwrite_ptr, dwide_ptr, dturned_ptr,  # read
    dq_ptr, dk_ptr, dgate_ptr,  # written: [B T H K] twice, [B T H K 2]
    cu_ptr, T, documents, gate_sb, gate_sh,
    H: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    DECAY: tl.constexpr, BEFORE: tl.constexpr, FLIP: tl.constexpr, DOT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a chunk's turned keys and queries, and its gates of rows, owe to keys, queries and complex gates."""
    pid = tl.program_id(0).to(tl.int64)
    tile, square = pid % tl.cdiv(COLS, BLOCK_D), pid // tl.cdiv(COLS, BLOCK_D)
    chunk, h = square // H, square % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    part = (tile * BLOCK_D).to(tl.int32)
    d, offs, row = part + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C), first + start
    inside, group = offs < stop - start, h * GROUPS // H
    gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    log_a, word = phases(gates, start, offs, inside, part, COLS, DECAY, BLOCK_D)
    begin = tl.load(turned_ptr + square * COLS + d, mask=d < COLS, other=0)
    after = begin[None, :] - tl.cumsum(word, 0, reverse=FLIP)
    cos, sin = cos_sin_of(after, DOT)
    x = load_tile((dwrite_ptr, 2 * H, 2 * h, COLS), row, offs, inside, d).to(tl.float32)
    y = load_tile((dwrite_ptr, 2 * H, 2 * h + 1, COLS), row, offs, inside, d).to(tl.float32)
    store_tile((dk_ptr, H, h, COLS), row, offs, inside, d, x * cos - y * sin)
    k = load_tile((k_ptr, GROUPS, group, COLS), row, offs, inside, d).to(tl.float32)
    free = -k * (x * sin + y * cos)  # of this token's own phase
    if BEFORE:
        cos, sin = cos_sin_of(after + word, DOT)
    x = load_tile((dtold_ptr, 2 * H, 2 * h, COLS), row, offs, inside, d).to(tl.float32)
    y = load_tile((dtold_ptr, 2 * H, 2 * h + 1, COLS), row, offs, inside, d).to(tl.float32)
    store_tile((dq_ptr, H, h, COLS), row, offs, inside, d, x * cos - y * sin)
    q = load_tile((q_ptr, GROUPS, group, COLS), row, offs, inside, d).to(tl.float32)
    bound = -q * (x * sin + y * cos)
    if not BEFORE:
        free, bound = free + bound, tl.zeros_like(bound)
    dturned = tl.load(dturned_ptr + square * COLS + d, mask=d < COLS, other=0.0)
    dphase = dturned[None, :] + free - tl.cumsum(free + bound, 0, reverse=FLIP)
    dphase = tl.where(log_a > RESET, dphase, 0.0)
    dlog_a = tl.zeros_like(dphase)
    if dwide_ptr is not None:
        dlog_a = load_tile((dwide_ptr, 2 * H, 2 * h, COLS), row, offs, inside, d).to(tl.float32)
        dlog_a += load_tile((dwide_ptr, 2 * H, 2 * h + 1, COLS), row, offs, inside, d)
    pairs = tl.join(dlog_a, dphase).reshape(BLOCK_C, 2 * BLOCK_D)
    store_tile((dgate_ptr, H, h, 2 * COLS), row, offs, inside, 2 * part + tl.arange(0, 2 * BLOCK_D), pairs)
