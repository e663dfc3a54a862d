"""A complex gate, |a_t| exp(i phi_t), is a real one on states twice as wide, once keys and queries are turned:

    e_t = - sum of phi_s over the tokens s after t      k'_t = [k_t cos e_t, -k_t sin e_t]      |a|'_t = [|a_t|, |a_t|]

and q likewise. Phases are counted from the token walked last, so that of the states only a given initial one is turned
as well, by the sum of all.

    turn            q, k, log_decay -> q', k', log |a|', the sum of all
    turn_backward   their gradients

Forward, chunks are a chain: each tells the next ones its sum of phases, in float64, for a float32 keeps no fraction of
many turns. Within a chunk, phases are parts of a turn in 32 bits, which wrap by themselves. Backward, a phase owes what
the tokens before it in its chunk would gain if they were turned on, and what the state that enters the chunk would:
not a sum over all tokens, in which roundings would add up. Everything is read once.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2
from recur.kernels.scan import chunk_of, chunks_of, sum_groups
from recur.kernels.tiles import RESET, awaited, cos_sin, load_tile, numbered, store_tile, tile_of
from torch import Tensor

from recur.primitives.forms import state_count

TURNS = tl.constexpr(0.15915494309189535)  # of a radian
ROUND = tl.constexpr(6755399441055744.0)  # 1.5 2^52, plus a number: the number rounded, in the last bits
NAN = tl.constexpr(0x7FF8000000000000)
LOOK = 32  # chunks: one of so many tells all that comes before it


@triton.jit
def _put(ptrs, x, here):
    """float64 as a word that is not −1."""
    word = x.to(tl.int64, bitcast=True)
    tl.store(ptrs, tl.where(word == -1, NAN, word), mask=here)


@triton.jit
def _entering(mine, place, apart, in_k, LOOK: tl.constexpr):
    """[D]: the sum over the `place` chunks before this one, once they have told it: −1 until then. The one before this
    lies `apart`."""
    back = (place - 1) % LOOK + 1 - tl.arange(0, LOOK)
    here = ((back > 0) & (place > 0))[:, None] & in_k[None, :]
    ptrs = mine[None, :] + back[:, None] * apart
    return tl.sum(awaited(ptrs, here).to(tl.float64, bitcast=True), 0)


@triton.jit
def _fraction(turns):
    """In [−0.5, 0.5], without the conversions of a rounding."""
    return turns - ((turns + ROUND) - ROUND)


@triton.jit
def _word(fraction):
    """Parts of a turn, 2^32 of them."""
    return (fraction * 4294967296.0 + ROUND).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def _angle(word):
    """In radians, turned the other way."""
    return word.to(tl.float32) * -1.4629180792671596e-9


@triton.jit
def _cells(first, start, stop, tile, K, C: tl.constexpr, D: tl.constexpr):
    """Columns of a tile, tokens of a chunk, the row of the first; then which columns and tokens there are."""
    d, offs = tile * D + tl.arange(0, D), tl.arange(0, C)
    return d, offs, first + start, d < K, offs < stop - start


@triton.jit
def _phases(
    gate_ptr, first, start, inside, T, h, K, tile, gate_sb, gate_st, gate_sh, D: tl.constexpr, KEYS: tl.constexpr
):
    """log |a| [C D], and phases in turns, none of more than a half; what is forgotten need not be turned."""
    C: tl.constexpr = inside.shape[0]
    ptr = gate_ptr + first // tl.maximum(T, 1) * gate_sb + h * gate_sh + start * gate_st
    ptrs = ptr + tl.arange(0, C)[:, None] * gate_st
    if KEYS:
        e = tile * (2 * D) + tl.arange(0, 2 * D)
        pairs = tl.load(ptrs + e[None, :], mask=inside[:, None] & (e < 2 * K)[None, :], other=0.0)
        log_a, phase = tl.split(pairs.reshape(C, D, 2))
    else:
        log_a = tl.load(ptrs, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
        phase = tl.load(ptrs + 1, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
    return log_a, _fraction(tl.where(log_a > RESET, phase, 0.0).to(tl.float64) * TURNS)


@triton.jit
def _halves(ptr, row, offs, inside, H, h, K, d):
    """[C D] twice in float32: columns d and K + d of a tensor [B T H 2K]."""
    ptrs, mask = tile_of((ptr, H, h, 2 * K), row, offs, inside, d)
    mask = mask & (d < K)[None, :]
    x, y = tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + K, mask=mask, other=0.0)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def _store_halves(ptr, row, offs, inside, H, h, K, d, x, y):
    ptrs, mask = tile_of((ptr, H, h, 2 * K), row, offs, inside, d)
    mask = mask & (d < K)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + K, y.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "documents", "chunks"])
def turn(
    q_ptr, k_ptr, gate_ptr, cu_ptr,  # read: [B T heads K], [B|1 T|1 H K|1 2]
    told_ptr, write_ptr, wide_ptr, whole_ptr, words_ptr,  # written: [B T H 2K] three times, [B H K]
    T, documents, chunks, gate_sb, gate_st, gate_sh,
    H: tl.constexpr, K: tl.constexpr, GROUPS_Q: tl.constexpr, GROUPS_K: tl.constexpr, KEYS: tl.constexpr,
    BEFORE: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Turn q and k of one chunk. Chunks are drawn by number, so whoever is waited for has begun."""
    pid = tl.atomic_add(words_ptr, 1, sem="relaxed") + 1
    lanes = tl.num_programs(0) // chunks
    drawn, h, tile = pid // lanes, pid % lanes % H, pid % lanes // H
    if cu_ptr is None:  # all rows before the next chunk, so that few wait for who has just begun
        rows = chunks // tl.cdiv(T, BLOCK_C)
        drawn = drawn % rows * tl.cdiv(T, BLOCK_C) + drawn // rows
    chunk = drawn if FLIP else chunks - 1 - drawn
    document, index, first, start, stop = numbered(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    d, offs, row, in_k, inside = _cells(first, start, stop, tile, K, BLOCK_C, BLOCK_K)
    log_a, turns = _phases(gate_ptr, first, start, inside, T, h, K, tile, gate_sb, gate_st, gate_sh, BLOCK_K, KEYS)
    q = load_tile((q_ptr, GROUPS_Q, h // (H // GROUPS_Q), K), row, offs, inside, d).to(tl.float32)
    k = load_tile((k_ptr, GROUPS_K, h // (H // GROUPS_K), K), row, offs, inside, d).to(tl.float32)
    if wide_ptr is not None:
        _store_halves(wide_ptr, row, offs, inside, H, h, K, d, log_a, log_a)
    place = index if FLIP else (stop - start - 1) // BLOCK_C
    mine, total = words_ptr + 2 + (chunk * H + h) * K + d, tl.sum(turns, 0)
    _put(mine, total, in_k & (place % LOOK != 0))
    entering = _entering(mine, place, -(H * K) if FLIP else H * K, in_k, LOOK)
    _put(mine, _fraction(entering + total), in_k & (place % LOOK == 0))
    word = _word(turns)
    since = tl.cumsum(word, 0, reverse=not FLIP) + _word(_fraction(entering))[None, :]
    cos, sin = cos_sin(_angle(since - word))
    _store_halves(write_ptr, row, offs, inside, H, h, K, d, k * cos, -k * sin)
    if BEFORE:
        cos, sin = cos_sin(_angle(since))
    _store_halves(told_ptr, row, offs, inside, H, h, K, d, q * cos, -q * sin)
    last = stop - start <= BLOCK_C if FLIP else index == 0
    whole = _angle(_word(_fraction(entering + total)))
    tl.store(whole_ptr + (document * H + h) * K + d, whole, mask=in_k & last)


@triton.jit(do_not_specialize=["T", "documents", "chunks"])
def turn_backward(
    q_ptr, k_ptr, gate_ptr, cu_ptr, words_ptr, dtold_ptr, dwrite_ptr, dwide_ptr, dturns_ptr,  # read
    dq_ptr, dk_ptr, dgate_ptr,  # written: [B T H K] twice, [B T H K 2]
    T, documents, chunks, gate_sb, gate_st, gate_sh,
    H: tl.constexpr, K: tl.constexpr, GROUPS_Q: tl.constexpr, GROUPS_K: tl.constexpr, KEYS: tl.constexpr,
    BEFORE: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk."""
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.num_programs(0) // chunks
    chunk, h, tile = pid // lanes, pid % lanes % H, pid % lanes // H
    _, index, first, start, stop = numbered(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    d, offs, row, in_k, inside = _cells(first, start, stop, tile, K, BLOCK_C, BLOCK_K)
    log_a, turns = _phases(gate_ptr, first, start, inside, T, h, K, tile, gate_sb, gate_st, gate_sh, BLOCK_K, KEYS)
    place = index if FLIP else (stop - start - 1) // BLOCK_C
    mine = words_ptr + 2 + (chunk * H + h) * K + d
    entering = _entering(mine, place, -(H * K) if FLIP else H * K, in_k, LOOK)
    word = _word(turns)
    since = tl.cumsum(word, 0, reverse=not FLIP) + _word(_fraction(entering))[None, :]
    cos, sin = cos_sin(_angle(since - word))
    x, y = _halves(dwrite_ptr, row, offs, inside, H, h, K, d)
    store_tile((dk_ptr, H, h, K), row, offs, inside, d, x * cos - y * sin)
    k = load_tile((k_ptr, GROUPS_K, h // (H // GROUPS_K), K), row, offs, inside, d).to(tl.float32)
    free = -k * (x * sin + y * cos)  # of this token's own phase
    if BEFORE:
        cos, sin = cos_sin(_angle(since))
    x, y = _halves(dtold_ptr, row, offs, inside, H, h, K, d)
    store_tile((dq_ptr, H, h, K), row, offs, inside, d, x * cos - y * sin)
    q = load_tile((q_ptr, GROUPS_Q, h // (H // GROUPS_Q), K), row, offs, inside, d).to(tl.float32)
    bound = -q * (x * sin + y * cos)
    if not BEFORE:
        free, bound = free + bound, tl.zeros_like(bound)
    dturns = tl.load(dturns_ptr + (chunk * H + h) * K + d, mask=in_k, other=0.0)
    dphase = dturns[None, :] + free - tl.cumsum(free + bound, 0, reverse=FLIP)
    dphase = tl.where(log_a > RESET, dphase, 0.0)
    dlog_a = tl.zeros_like(dphase)
    if dwide_ptr is not None:
        x, y = _halves(dwide_ptr, row, offs, inside, H, h, K, d)
        dlog_a = x + y
    pairs = tl.join(dlog_a, dphase).reshape(BLOCK_C, 2 * BLOCK_K)
    d = tile * (2 * BLOCK_K) + tl.arange(0, 2 * BLOCK_K)
    store_tile((dgate_ptr, H, h, 2 * K), row, offs, inside, d, pairs)


def _launch(
    kernel: Any, q: Tensor, k: Tensor, gate: Tensor, cu_seqlens: Tensor | None, *tensors: Tensor | None,
    before: bool, flip: bool,
) -> None:  # fmt: skip
    """Run one of the kernels on all chunks."""
    (B, T, groups_q, K), groups_k, H = q.shape, k.shape[2], gate.shape[2]
    chunks, block_k = chunks_of(B, T, q.dtype, cu_seqlens), min(32, power_of_2(K))
    sb, st, sh, *_ = gate.expand(B, T, H, -1, 2).stride()
    kernel[(chunks * H * cdiv(K, block_k),)](
        q, k, gate, cu_seqlens, *tensors, T, state_count(B, cu_seqlens), chunks, sb, st, sh,
        H=H, K=K, GROUPS_Q=groups_q, GROUPS_K=groups_k, KEYS=gate.shape[3] == K, BEFORE=before, FLIP=flip,
        BLOCK_C=chunk_of(q.dtype), BLOCK_K=block_k, LOOK=LOOK, num_warps=4, maxnreg=128,
    )  # fmt: skip


@operator("turn")
def turned(
    q: Tensor, k: Tensor, gate: Tensor, cu_seqlens: Tensor | None, before: bool, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn by the phases after each token, or, if flip, before it.

    Args: q, k [B T G K], contiguous, of one dtype; gate [B|1 T|1 H K|1 2], contiguous, log |a| and phases in float32;
        cu_seqlens [n+1]; before: a token is read before its own gate.
    Returns: q and k [B T H 2K]; log |a| likewise, empty unless gates have all axes; turns [chunks H K], zeros, for
        `scan_forward`, whose gradient of them is the only way to the states; angles [B H K], or [n H K], by which to
        turn an initial state back; what the backward reads.
    """
    outs = _fake_turned(q, k, gate, cu_seqlens, before, flip)
    told, write, wide, turns, whole, words = outs
    turns.zero_()
    whole.zero_()  # of documents without tokens
    words.fill_(-1)
    wide_too = wide if wide.numel() else None
    _launch(turn, q, k, gate, cu_seqlens, told, write, wide_too, whole, words, before=before, flip=flip)
    return outs


@fake("turn")
def _fake_turned(
    q: Tensor, k: Tensor, gate: Tensor, cu_seqlens: Tensor | None, before: bool, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, _, K), H = q.shape, gate.shape[2]
    told, write = q.new_empty(B, T, H, 2 * K), q.new_empty(B, T, H, 2 * K)
    wide = gate.new_empty((B, T, H, 2 * K) if gate.shape[:4] == (B, T, H, K) else 0)
    turns = gate.new_empty(chunks_of(B, T, q.dtype, cu_seqlens), H, K)
    whole = gate.new_empty(state_count(B, cu_seqlens), H, K)
    return told, write, wide, turns, whole, q.new_empty(2 + turns.numel(), dtype=torch.int64)


@operator("turn_backward")
def turned_backward(
    q: Tensor, k: Tensor, gate: Tensor, cu_seqlens: Tensor | None, words: Tensor, dtold: Tensor, dwrite: Tensor,
    dwide: Tensor | None, dturns: Tensor, before: bool, flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and gate."""
    (B, T, _, K), H = q.shape, gate.shape[2]
    dq, dk = (x.new_empty(B, T, H, K, dtype=x.dtype if x.shape[2] == H else torch.float32) for x in (q, k))
    outs = (dq, dk, gate.new_empty(B, T, H, K, 2))
    _launch(turn_backward, q, k, gate, cu_seqlens, words, dtold, dwrite, dwide, dturns, *outs, before=before, flip=flip)
    return sum_groups(dq, q), sum_groups(dk, k), outs[2].sum_to_size(gate.shape)


@fake("turn_backward")
def _(q, k, gate, cu_seqlens, words, dtold, dwrite, dwide, dturns, before, flip):
    return torch.empty_like(q), torch.empty_like(k), gate.new_empty(gate.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.before, ctx.flip = inputs
    ctx.save_for_backward(*tensors, output[5])
    ctx.mark_non_differentiable(*output[4:])


def _gradients(ctx, dtold: Tensor, dwrite: Tensor, dwide: Tensor, dturns: Tensor, *_):
    *tensors, words = ctx.saved_tensors
    dtold, dwrite, dwide, dturns = (x.contiguous() for x in (dtold, dwrite, dwide, dturns))
    wide = dwide if dwide.numel() else None
    gradients = turned_backward(*tensors, words, dtold, dwrite, wide, dturns, ctx.before, ctx.flip)
    return *gradients, None, None, None


differentiable("turn", _gradients, _remember)
differentiable("turn_backward")
