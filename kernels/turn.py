"""A complex gate, |a_t| exp(i phi_t), is a real one on states twice as wide, once keys and queries are turned:

    e_t = - sum of phi_s over the tokens s after t      k'_t = [k_t cos e_t, -k_t sin e_t]      a'_t = [|a_t|, |a_t|]

and q likewise. Phases are counted from the token walked last, so that only a given initial state is turned as well,
by the whole sum; where documents are packed, the states at their borders are.

    turn            q, k, log_decay -> q', k', log |a|' and sums at the borders
    turn_backward   their gradients

Everything is read once. Tiles of tokens are a chain: each tells the next ones its sum of phases, as a fraction of a
turn in float64, for a float32 keeps no fraction of many turns. A gradient of a phase is a sum over the other tokens,
and a chain from the other end.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2
from recur.kernels.scan import sum_groups
from recur.kernels.tiles import RESET, cos_sin
from torch import Tensor

TURN = tl.constexpr(6.283185307179586)
NAN = tl.constexpr(0x7FF8000000000000)
LOOK = 32  # tiles: one of so many tells all that comes before it
WARPS = 4


@triton.jit
def _put(ptrs, x, here):
    """float64 as a word that is not −1."""
    word = x.to(tl.int64, bitcast=True)
    tl.store(ptrs, tl.where(word == -1, NAN, word), mask=here)


@triton.jit
def _entering(words, segment, K, d, LOOK: tl.constexpr):
    """[D]: the sum over all segments before this one, once they have told it: −1 until then."""
    back = (segment - 1) % LOOK + 1 - tl.arange(0, LOOK)
    here = ((back > 0) & (segment > 0))[:, None] & (d < K)[None, :]
    ptrs = words + (segment - back)[:, None] * K + d[None, :]
    told = tl.load(ptrs, mask=here, other=0, volatile=True)
    while tl.max((told == -1).to(tl.int32)) > 0:
        told = tl.load(ptrs, mask=here, other=0, volatile=True)
    return tl.sum(told.to(tl.float64, bitcast=True), 0)


@triton.jit
def _chain(words, total, segment, K, d, LOOK: tl.constexpr):
    """Tell the sum of this segment, and return what enters it."""
    mine = words + segment * K + d
    _put(mine, total, (d < K) & (segment % LOOK != 0))
    entering = _entering(words, segment, K, d, LOOK)
    _put(mine, entering + total, (d < K) & (segment % LOOK == 0))
    return entering


@triton.jit
def _place(words_ptr, segments, H, tiles):
    """Segment, batch row, head and tile of a program, drawn by number, so whoever is waited for has begun."""
    pid = tl.atomic_add(words_ptr, 1, sem="relaxed") + 1
    lane, segment = pid % (tl.num_programs(0) // segments), pid // (tl.num_programs(0) // segments)
    return segment, lane // tiles // H, lane // tiles % H, lane % tiles


@triton.jit
def _phases(gate_ptr, b, h, t, inside, K, d, gate_sb, gate_st, gate_sh, gate_sd: tl.constexpr):
    """log |a| [R D], and phases in turns; what is forgotten need not be turned."""
    ptrs = gate_ptr + b * gate_sb + h * gate_sh + t[:, None] * gate_st + d[None, :] * gate_sd
    here = (inside[:, None] & (d < K)[None, :])[:, :, None] & (tl.arange(0, 2) >= 0)[None, None, :]
    log_a, phase = tl.split(tl.load(ptrs[:, :, None] + tl.arange(0, 2)[None, None, :], mask=here, other=0.0))
    turns = tl.where(log_a > RESET, phase, 0.0).to(tl.float64) / TURN
    return log_a, turns


@triton.jit
def _cos_sin(turns):
    """Of −turns, and the angle itself in (−pi, pi]."""
    angle = ((tl.floor(turns + 0.5) - turns) * TURN).to(tl.float32)
    cos, sin = cos_sin(angle)
    return cos, sin, angle


@triton.jit
def _halves(ptr, row, K, d, here):
    """Both halves of rows [2 K], in float32."""
    ptrs = ptr + row[:, None] * (2 * K) + d[None, :]
    x, y = tl.load(ptrs, mask=here, other=0.0), tl.load(ptrs + K, mask=here, other=0.0)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def _store_halves(ptr, row, K, d, here, x, y):
    ptrs = ptr + row[:, None] * (2 * K) + d[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=here)
    tl.store(ptrs + K, y.to(ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T", "segments", "first", "step"])
def turn(
    q_ptr, k_ptr, gate_ptr,  # read: [B T heads K], [B|1 T|1 H K|1 2]
    told_ptr, write_ptr, wide_ptr, edges_ptr, words_ptr,  # written: [B T H 2K] three times, [B T|1 H K]
    T, segments, first, step, gate_sb, gate_st, gate_sh,  # the token walked as number n lies at first + step n
    H: tl.constexpr, K: tl.constexpr, GROUPS_Q: tl.constexpr, GROUPS_K: tl.constexpr, gate_sd: tl.constexpr,  # sizes
    BEFORE: tl.constexpr, PACKED: tl.constexpr,  # q is read before its own gate; edges of every token
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, LOOK: tl.constexpr,  # tile
):  # fmt: skip
    """Turn q and k of one tile."""
    segment, b, h, tile = _place(words_ptr, segments, H, tl.cdiv(K, BLOCK_K))
    d, number = tile * BLOCK_K + tl.arange(0, BLOCK_K), segment * ROWS + tl.arange(0, ROWS)
    t, inside = first + step * number, number < T
    here, row = inside[:, None] & (d < K)[None, :], b * T + t
    log_a, turns = _phases(gate_ptr, b, h, t, inside, K, d, gate_sb, gate_st, gate_sh, gate_sd)
    q = tl.load(q_ptr + ((row * GROUPS_Q + h // (H // GROUPS_Q)) * K)[:, None] + d[None, :], mask=here, other=0.0)
    k = tl.load(k_ptr + ((row * GROUPS_K + h // (H // GROUPS_K)) * K)[:, None] + d[None, :], mask=here, other=0.0)
    out = row * H + h
    if wide_ptr is not None:
        _store_halves(wide_ptr, out, K, d, here, log_a, log_a)
    entering = _chain(words_ptr + 2 + (b * H + h) * segments * K, tl.sum(turns, 0), segment, K, d, LOOK)
    since = tl.cumsum(turns, 0) + entering[None, :]
    cos, sin, _ = _cos_sin(since - turns)
    _store_halves(write_ptr, out, K, d, here, k * cos, -k * sin)
    if BEFORE:
        cos, sin, edge = _cos_sin(since)
    else:
        edge = ((tl.floor(since + 0.5) - since) * TURN).to(tl.float32)
    _store_halves(told_ptr, out, K, d, here, q * cos, -q * sin)
    if PACKED:
        tl.store(edges_ptr + out[:, None] * K + d[None, :], edge, mask=here)
    else:
        ptrs = edges_ptr + (b * H + h) * K + d[None, :] + (number * 0)[:, None]
        tl.store(ptrs, edge, mask=here & (number == T - 1)[:, None])


@triton.jit(do_not_specialize=["T", "segments", "first", "step"])
def turn_backward(
    q_ptr, k_ptr, gate_ptr, words_ptr, dtold_ptr, dwrite_ptr, dwide_ptr, dedges_ptr,  # read
    dq_ptr, dk_ptr, dgate_ptr, passed_ptr,  # written: [B T H K] twice, [B T H K 2]
    T, segments, first, step, gate_sb, gate_st, gate_sh,
    H: tl.constexpr, K: tl.constexpr, GROUPS_Q: tl.constexpr, GROUPS_K: tl.constexpr, gate_sd: tl.constexpr,
    BEFORE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile, tiles walked from the other end."""
    place, b, h, tile = _place(passed_ptr, segments, H, tl.cdiv(K, BLOCK_K))
    segment, lane = segments - 1 - place, (b * H + h) * segments * K
    d, number = tile * BLOCK_K + tl.arange(0, BLOCK_K), segment * ROWS + tl.arange(0, ROWS)
    t, inside = first + step * number, number < T
    here, row = inside[:, None] & (d < K)[None, :], b * T + t
    log_a, turns = _phases(gate_ptr, b, h, t, inside, K, d, gate_sb, gate_st, gate_sh, gate_sd)
    since = tl.cumsum(turns, 0) + _entering(words_ptr + 2 + lane, segment, K, d, LOOK)[None, :]
    q = tl.load(q_ptr + ((row * GROUPS_Q + h // (H // GROUPS_Q)) * K)[:, None] + d[None, :], mask=here, other=0.0)
    k = tl.load(k_ptr + ((row * GROUPS_K + h // (H // GROUPS_K)) * K)[:, None] + d[None, :], mask=here, other=0.0)
    out = row * H + h
    cos, sin, _ = _cos_sin(since - turns)
    x, y = _halves(dwrite_ptr, out, K, d, here)
    tl.store(dk_ptr + out[:, None] * K + d[None, :], (x * cos - y * sin).to(dk_ptr.dtype.element_ty), mask=here)
    later = -k * (x * sin + y * cos)  # owed by the phases of the tokens walked before
    here_too = tl.zeros_like(later)  # and by this token's own
    if BEFORE:
        cos, sin, _ = _cos_sin(since)
    x, y = _halves(dtold_ptr, out, K, d, here)
    tl.store(dq_ptr + out[:, None] * K + d[None, :], (x * cos - y * sin).to(dq_ptr.dtype.element_ty), mask=here)
    if BEFORE:
        here_too += -q * (x * sin + y * cos)
    else:
        later += -q * (x * sin + y * cos)
    if dedges_ptr is not None:
        if PACKED:
            here_too += tl.load(dedges_ptr + out[:, None] * K + d[None, :], mask=here, other=0.0)
        else:
            ptrs = dedges_ptr + (b * H + h) * K + d[None, :] + (number * 0)[:, None]
            here_too += tl.load(ptrs, mask=here & (number == T - 1)[:, None], other=0.0)
    owed = later.to(tl.float64) + here_too.to(tl.float64)
    entering = _chain(passed_ptr + 2 + lane, tl.sum(owed, 0), place, K, d, LOOK)
    dphase = later - (tl.cumsum(owed, 0, reverse=True) + entering[None, :])
    dphase = tl.where(log_a > RESET, dphase, 0.0).to(tl.float32)
    dlog_a = tl.zeros_like(dphase)
    if dwide_ptr is not None:
        x, y = _halves(dwide_ptr, out, K, d, here)
        dlog_a = x + y
    ptrs = dgate_ptr + (out * (2 * K))[:, None] + tl.arange(0, 2 * BLOCK_K)[None, :] + tile * (2 * BLOCK_K)
    in_k = tile * (2 * BLOCK_K) + tl.arange(0, 2 * BLOCK_K) < 2 * K
    pairs = tl.join(dlog_a, dphase).reshape(ROWS, 2 * BLOCK_K)
    tl.store(ptrs, pairs, mask=inside[:, None] & in_k[None, :])


def _launch(kernel: Any, q: Tensor, k: Tensor, gate: Tensor, *tensors: Tensor | None, before: bool, packed: bool,
            flip: bool, chain: Tensor) -> None:  # fmt: skip
    """Run one of the kernels on all tiles; `chain` are the words it tells, not there yet."""
    (B, T, groups_q, K), groups_k, H = q.shape, k.shape[2], gate.shape[2]
    rows, block_k, segments = _tiles(T, K)
    sb, st, sh, sd, _ = gate.expand(B, T, H, K, 2).stride()
    kernel[(B * H * cdiv(K, block_k) * segments,)](
        q, k, gate, *tensors, chain, T, segments, *((0, 1) if flip else (T - 1, -1)), sb, st, sh,
        H=H, K=K, GROUPS_Q=groups_q, GROUPS_K=groups_k, gate_sd=sd, BEFORE=before, PACKED=packed,
        ROWS=rows, BLOCK_K=block_k, LOOK=LOOK, num_warps=WARPS,
    )  # fmt: skip


def _tiles(T: int, K: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many tiles are a chain."""
    block_k = min(64, power_of_2(K))
    rows = min(2048 // block_k, 64)
    return rows, block_k, cdiv(T, rows)


def _words(q: Tensor, gate: Tensor) -> Tensor:
    """What a chain tells: the number drawn last, nothing, and a word for every sum."""
    B, T, _, K = q.shape
    return q.new_full((2 + B * gate.shape[2] * _tiles(T, K)[2] * K,), -1, dtype=torch.int64)


@operator("turn")
def turned(
    q: Tensor, k: Tensor, gate: Tensor, before: bool, packed: bool, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn by the phases after each token, or, if flip, before it.

    Args: q, k [B T G K], contiguous; gate [B|1 T|1 H K|1 2], log |a| and phases in float32; before: a token is read
        before its own gate; packed: return sums at every token.
    Returns: q and k [B T H 2K]; log |a| likewise, empty unless gates have all axes; sums with the token's own phase
        [B T H K], or, unless packed, [B 1 H K] of the token walked last; what the backward reads.
    """
    told, write, wide, edges, words = _fake_turned(q, k, gate, before, packed, flip)
    words.fill_(-1)
    wide_too = wide if wide.numel() else None
    _launch(turn, q, k, gate, told, write, wide_too, edges, before=before, packed=packed, flip=flip, chain=words)
    return told, write, wide, edges, words


@fake("turn")
def _fake_turned(
    q: Tensor, k: Tensor, gate: Tensor, before: bool, packed: bool, flip: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, _, K), H = q.shape, gate.shape[2]
    told, write = q.new_empty(B, T, H, 2 * K), k.new_empty(B, T, H, 2 * K)
    wide = gate.new_empty((B, T, H, 2 * K) if gate.shape[:4] == (B, T, H, K) else 0)
    return told, write, wide, gate.new_empty(B, T if packed else 1, H, K), torch.empty_like(_words(q, gate))


@operator("turn_backward")
def turned_backward(
    q: Tensor, k: Tensor, gate: Tensor, words: Tensor, dtold: Tensor, dwrite: Tensor, dwide: Tensor | None,
    dedges: Tensor | None, before: bool, packed: bool, flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and gate."""
    (B, T, _, K), H = q.shape, gate.shape[2]
    dq, dk = (x.new_empty(B, T, H, K, dtype=x.dtype if x.shape[2] == H else torch.float32) for x in (q, k))
    dgate = gate.new_empty(B, T, H, K, 2)
    _launch(
        turn_backward, q, k, gate, words, dtold, dwrite, dwide, dedges, dq, dk, dgate,
        before=before, packed=packed, flip=flip, chain=_words(q, gate),
    )  # fmt: skip
    return sum_groups(dq, q), sum_groups(dk, k), dgate.sum_to_size(gate.shape)


@fake("turn_backward")
def _(q, k, gate, words, dtold, dwrite, dwide, dedges, before, packed, flip):
    return torch.empty_like(q), torch.empty_like(k), gate.new_empty(gate.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.before, ctx.packed, ctx.flip = inputs
    ctx.save_for_backward(*tensors, output[4])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dtold: Tensor | None, dwrite: Tensor | None, dwide: Tensor | None, dedges: Tensor | None, _):
    q, k, gate, words = ctx.saved_tensors
    told = q.new_zeros(*q.shape[:2], gate.shape[2], 2 * q.shape[3]) if dtold is None or dwrite is None else None
    dtold, dwrite = (told if x is None else x.contiguous() for x in (dtold, dwrite))
    dwide = None if dwide is None or not dwide.numel() else dwide.contiguous()
    dedges = None if dedges is None else dedges.contiguous()
    grads = turned_backward(q, k, gate, words, dtold, dwrite, dwide, dedges, ctx.before, ctx.packed, ctx.flip)
    return *grads, None, None, None


differentiable("turn", _gradients, _remember)
differentiable("turn_backward")
