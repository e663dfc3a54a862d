"""Elementwise scans: every entry of a state [N V] has its own gate; time is a loop, with the state in registers.

    S_t = A_t * S_{t-1} + k_t u_tᵀ        y_t = S_tᵀ q_t        entry by entry, S [N V]
    selective:  A = exp(rate a),                         u = rate x        Mamba; rate is its delta
    online:     A = 1 − eps k_n² = kept + eps others_n,  u = eps x         Longhorn; kept = 1 / (1 + rate |k|²)

Notation
    B T V      batch, time, channels; G groups of channels that share k and q; N slots of the state per channel
    tile       [R N W]: R W neighbouring channels of one group with all their slots, owned by one program. W and part of
               N lie across the lanes of a warp, R inside a thread: sums over channels (dk, dq) and over slots (y, dx,
               drate) then need few shuffles
    block      UNROLL tokens, which are loaded before the first of them is used; if AHEAD, one block earlier
    stretch    STRETCH tokens: S is stored at the start of each, and the backward pass replays from there; no step is
               inverted
    segment    consecutive stretches, computed by one program. Segments run side by side once a first pass has computed
               the map S -> P * S + R of all but the last; P is 0 where a document starts
    run        tokens of a stretch (or of a segment, where no states are stored) that lie in one document; a document
               starts from its own state
    stream     a tensor [B T *] that is read token by token, with the part of its last axis that a program reads

Kernels
    _segment_map (segments > 1)   rate, k, x          -> P, R [B segments N V]
    _combine (segments > 1)       P, R                -> the state that enters each segment
    _forward                      x, rate, k, q, S    -> y, final states, S at every stretch
    _backward                     the same from right to left, with q for k and dy for u; gradients instead of y

Gates are only multiplied, so a gate of exactly 0 forgets exactly. Partial sums are added in a fixed order. k and q
[V N] that do not change in time are tiles like the state, loaded once, and so are their gradients.
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, annotation-unchecked"

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.cached import cached
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2, processors, recorded
from recur.kernels.packing import mirror, state_count
from recur.kernels.tiles import LOG2E, constants
from torch import Tensor

STRETCH = 32  # tokens from one stored state to the next
UNCUT = tl.constexpr(1 << 30)  # a stretch as long as any row, where no states are stored
LN2 = tl.constexpr(0.6931471805599453)

# If V or room were known to be a multiple of 16, states would be loaded as vectors, in whose layout the tile would be.
RUNTIME = ["B", "T", "documents", "first", "segments", "length"]  # not worth a compilation each
elementwise_jit = triton.jit(do_not_specialize=["V", "room", *RUNTIME])


class Tile(NamedTuple):
    """A program's part of the state and of time, known when it is compiled."""

    N: int  # slots
    WIDTH: int  # channels of a group
    STEP: int  # token t lies at first + STEP t: 1, or -1 from right to left
    R: int
    Q: int  # neighbouring slots that one thread has
    BLOCK_N: int
    W: int
    UNROLL: int
    AHEAD: bool
    STRETCH: int


class Given(NamedTuple):
    """Pointers to what a pass reads of every token, and to a."""

    x: Any  # [B T V]
    rate: Any  # [B T V]
    a: Any  # [N V] in units of log 2, or None where k makes the gate
    k: Any  # [B T G N] | [N V]
    q: Any
    others: Any  # [B T G N], [B T G], where k makes the gate: see `_key_norms`
    norm: Any


class Gradients(NamedTuple):
    """Pointers to gradients; those of k and q per tile, of a and of fixed k and q per segment."""

    dx: Any
    drate: Any
    da: Any
    dk: Any
    dq: Any
    dinitial: Any


# A family of transitions: its gate, and the gradients of what the gate is computed from


@triton.jit
def _selective_gate(rate, a, others, norm):
    """A [R N W], and the factor of x [R W]; a is in units of log 2."""
    return tl.exp2(rate[:, None, :] * a), rate


@triton.jit
def _selective_gradients(G, H, before, x, rate, a, k, norm):
    """dx, drate [R W], parts of dk [. N W], da [R N W]; G is the gradient of S_t, H = A G, `before` is S_{t-1}."""
    gate = H * before
    du = tl.sum(G * k, 1)
    drate = x * du + LN2 * tl.sum(gate * a, 1)
    return rate * du, drate, G * (rate * x)[:, None, :], gate * rate[:, None, :]


@triton.jit
def _online_gate(rate, a, others, norm):
    root = tl.rsqrt(1 + rate * norm)
    kept = root * root
    eps = rate * kept
    return kept[:, None, :] + eps[:, None, :] * others, eps


@triton.jit
def _online_gradients(G, H, before, x, rate, a, k, norm):
    """A = 1 − eps k_n² and eps = rate / (1 + rate |k|²), whose gradient with respect to |k|² is −rate² drate."""
    root = tl.rsqrt(1 + rate * norm)
    kept = root * root
    eps = rate * kept
    gate = G * before
    du = tl.sum(G * k, 1)
    drate = kept * kept * (x * du - tl.sum(gate * (k * k), 1))
    through_gate = tl.sum(eps[:, None, :] * gate, 0) + tl.sum(rate * rate * drate, 0)[None, :]
    dk = tl.sum(G * (eps * x)[:, None, :], 0) - 2 * tl.max(k, 0) * through_gate
    return eps * du, drate, dk[None], gate


# Addresses


@triton.jit
def _document(cu_ptr, documents, t, b, T):
    """The document that token t lies in, its first token, and the one after its last; without cu_seqlens, the row."""
    low, begin, end = (
        b + (t >= T),
        T * 0,
        T,
    )  # always b, but so that addresses computed from it are not kept in registers
    if cu_ptr is not None:
        high = low + documents  # low is 0: there is one row
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) <= t
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        begin, end = tl.load(cu_ptr + low).to(tl.int32), tl.load(cu_ptr + low + 1).to(tl.int32)
    return low, begin, end


@triton.jit
def _place(T, segments, length, V, G, TILE: tl.constexpr):
    """This program's row, segment, and tile of the state (see _state_ptrs); its tokens, start to stop."""
    tiles = tl.cdiv(TILE.WIDTH, TILE.R * TILE.W)
    pid = tl.program_id(0).to(tl.int64)
    tile, group = pid % tiles, pid // tiles % G
    segment, b = pid // (tiles * G) % segments, pid // (tiles * G * segments)
    start = (segment * length).to(tl.int32)
    WIDTH: tl.constexpr = TILE.WIDTH
    return b, segment, (tile, group, V, WIDTH), start, tl.minimum(start + length, T)


@triton.jit
def _state_ptrs(ptr, row, where, TILE: tl.constexpr):
    """Pointers [R*N W] to this program's part of state `row` of a tensor [* N V], and their mask.

    Two axes, because compilers spread three over the lanes of a warp in different orders; declared contiguous, though R
    apart, because that lays the lanes along W. No load becomes a vector load by it, since no alignment is known.
    """
    W: tl.constexpr = TILE.W
    tile, group, V, WIDTH = where
    line = tl.arange(0, TILE.R * TILE.BLOCK_N)[:, None]
    first, q = line % (TILE.BLOCK_N // TILE.Q) * TILE.Q, line % TILE.BLOCK_N // (TILE.BLOCK_N // TILE.Q)
    within = line // TILE.BLOCK_N + tl.max_contiguous(tl.arange(0, W)[None, :] * TILE.R, (1, W))
    place = (row * TILE.N + first) * V + q * V + (group * WIDTH + tile * (TILE.R * TILE.W)) + within
    return ptr + place, (first + q < TILE.N) & (tile * (TILE.R * TILE.W) + within < WIDTH)


@triton.jit
def _flat(S, TILE: tl.constexpr):
    """[R N W] -> [R*N W]"""
    LINES: tl.constexpr = TILE.R * TILE.BLOCK_N
    W: tl.constexpr = TILE.W
    return S.reshape(LINES, W)


@triton.jit
def _unflat(S, TILE: tl.constexpr):
    """[R*N W] -> [R N W]"""
    R: tl.constexpr = TILE.R
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    W: tl.constexpr = TILE.W
    return S.reshape(R, BLOCK_N, W)


@triton.jit
def _neighbour_slots(S, TILE: tl.constexpr):
    """[R N W] -> [R Q N/Q W]"""
    R: tl.constexpr = TILE.R
    Q: tl.constexpr = TILE.Q
    OFFSETS: tl.constexpr = TILE.BLOCK_N // TILE.Q
    W: tl.constexpr = TILE.W
    return S.reshape(R, Q, OFFSETS, W)


@triton.jit
def _zero_state(TILE: tl.constexpr):
    """[R N W]"""
    R: tl.constexpr = TILE.R
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    W: tl.constexpr = TILE.W
    return tl.zeros((R, BLOCK_N, W), tl.float32)


@triton.jit
def _zero_rates(TILE: tl.constexpr):
    """[R W]"""
    R: tl.constexpr = TILE.R
    W: tl.constexpr = TILE.W
    return tl.zeros((R, W), tl.float32)


@triton.jit
def _load_state(ptr, row, where, TILE: tl.constexpr):
    """[R N W], zeros where there is no tensor."""
    S = _zero_state(TILE)
    if ptr is not None:
        ptrs, mask = _state_ptrs(ptr, row, where, TILE)
        S = _unflat(tl.load(ptrs, mask=mask, other=0.0), TILE)
    return S


@triton.jit
def _store_state(S, ptr, row, where, TILE: tl.constexpr):
    ptrs, mask = _state_ptrs(ptr, row, where, TILE)
    tl.store(ptrs, _flat(S, TILE), mask=mask)


@triton.jit
def _scratch_ptrs(ptr, room, block, TILE: tl.constexpr):
    """Pointers [R*N W] to the state at the start of a block, for this program alone, lane beside lane."""
    line = tl.arange(0, TILE.R * TILE.BLOCK_N)[:, None] * TILE.W
    return (
        ptr
        + tl.program_id(0).to(tl.int64) * room
        + block * (TILE.R * TILE.BLOCK_N * TILE.W)
        + line
        + tl.arange(0, TILE.W)[None, :]
    )


@triton.jit
def _axes(where, G, TILE: tl.constexpr):
    """Channels of a row [V], the first of every R; slots of one [G N], the first of every Q; the group of one [G]:
    offsets, mask, length of a row, neighbours at every offset."""
    tile, group, _, WIDTH = where
    within, slot, one = (
        (tile * TILE.W + tl.arange(0, TILE.W)) * TILE.R,
        tl.arange(0, TILE.BLOCK_N // TILE.Q) * TILE.Q,
        tl.arange(0, 1),
    )
    channels = (group * WIDTH + within).to(tl.int32), (within < WIDTH) | (WIDTH % (TILE.R * TILE.W) == 0), WIDTH * G
    slots = (group * TILE.N + slot).to(tl.int32), (slot < TILE.N) | (TILE.N == TILE.BLOCK_N), TILE.N * G
    return (
        channels + (tl.arange(0, TILE.R),),
        slots + (tl.arange(0, TILE.Q),),
        ((group + one).to(tl.int32), one == 0, G, one),
    )


@triton.jit
def _at(ptr, run, i, u: tl.constexpr, axis):
    """Pointers to token i + u of a run in a tensor [B T *], and their mask: one offset per block, which tensors share,
    plus constants."""
    origin, step, count = run
    offs, inside, size, _ = axis
    return ptr + ((origin + step * i) * size + offs) + u * step * size, inside & (i + u < count)


@triton.jit
def _stack(numbers, P: tl.constexpr):
    """P tensors [X] -> [P X], without moving data between threads."""
    tl.static_assert(P == 1 or P == 2 or P == 4)
    x = numbers[0][None]
    if P == 2:
        x = tl.permute(tl.join(numbers[0], numbers[1]), 1, 0)
    if P == 4:
        x = tl.join(tl.join(numbers[0], numbers[2]), tl.join(numbers[1], numbers[3]))
        x = tl.permute(x, 1, 2, 0).reshape(4, x.shape[0])
    return x


@triton.jit
def _unstack(x, P: tl.constexpr):
    """[P X] -> P tensors [X]."""
    x = tl.permute(x, 1, 0)
    if P == 1:
        numbers = (x.reshape(x.shape[0]),)
    if P == 2:
        numbers = tl.split(x)
    if P == 4:
        even, odd = tl.split(x.reshape(x.shape[0], 2, 2))
        zero, two = tl.split(even)
        one, three = tl.split(odd)
        numbers = (zero, one, two, three)
    return numbers


@triton.jit
def _stream(ptr, axis):
    """A tensor that is read token by token, with its axis; () where there is none."""
    stream = ()
    if ptr is not None:
        stream = (ptr, axis)
    return stream


@triton.jit
def _streams(x_ptr, rate_ptr, k_ptr, others_ptr, norm_ptr, channels, slots, group, FIXED: tl.constexpr):
    """What every pass reads of a token, in the order of `_step`; without k where all tokens share it."""
    k = _stream(None if FIXED else k_ptr, slots)
    gate = (_stream(others_ptr, slots), _stream(norm_ptr, group))
    return (_stream(x_ptr, channels), _stream(rate_ptr, channels), k) + gate


@triton.jit
def _load_packed(stream, run, i, UNROLL: tl.constexpr):
    """UNROLL tokens of a stream from the i-th of a run, packed into integers of up to 64 bits."""
    block = ()
    if len(stream) > 0:
        ptr, axis = stream
        P: tl.constexpr = axis[3].shape[0]
        BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
        AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
        wide = tl.uint64 if BITS * AT_ONCE == 64 else (tl.uint32 if BITS * AT_ONCE == 32 else tl.uint16)
        for u in tl.static_range(UNROLL):
            ptrs, mask = _at(ptr, run, i, u, axis)
            for j in tl.static_range(0, P, AT_ONCE):
                block = block + (tl.load((ptrs + j).to(tl.pointer_type(wide)), mask=mask, other=0),)
    return block


@triton.jit
def _fetch(streams, run, i, UNROLL: tl.constexpr):
    """A block of every stream; zeros beyond the run, which neither decay nor write."""
    block = ()
    for s in tl.static_range(len(streams)):
        block = block + (_load_packed(streams[s], run, i, UNROLL),)
    return block


@triton.jit
def _next_block(ahead, streams, run, i, next, AHEAD: tl.constexpr, UNROLL: tl.constexpr):
    """The block that begins with token i, and the one that is loaded one block ahead, if any."""
    if AHEAD:
        block, ahead = ahead, _fetch(streams, run, next, UNROLL)
    else:
        block = _fetch(streams, run, i, UNROLL)
    return block, ahead


@triton.jit
def _unpack(block, u: tl.constexpr, streams, s: tl.constexpr):
    """Token u of a block in stream s as float32 [P X], 0 where there is no tensor."""
    x = 0.0
    if len(streams[s]) > 0:
        kind = streams[s][0].dtype.element_ty
        P: tl.constexpr = streams[s][1][3].shape[0]
        BITS: tl.constexpr = kind.primitive_bitwidth
        AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
        numbers = ()
        for j in tl.static_range(P // AT_ONCE):
            packed = block[s][u * (P // AT_ONCE) + j]
            for h in tl.static_range(AT_ONCE):
                if kind == tl.bfloat16:  # the upper half of a float32; half of all lie there already
                    pair = (packed >> (h // 2 * 32)).to(tl.uint32)
                    number = (pair << 16 if h % 2 == 0 else pair & 0xFFFF0000).to(tl.float32, bitcast=True)
                else:
                    bits = (packed >> (h * BITS)).to(tl.uint16 if BITS == 16 else tl.uint32)
                    number = bits.to(kind, bitcast=True).to(tl.float32)
                numbers = numbers + (number,)
        x = _stack(numbers, P)
    return x


@triton.jit
def _slots(block, u: tl.constexpr, streams, s: tl.constexpr, shared):
    """The same over slots [1 N 1], or the tile that all tokens share."""
    x = shared
    if len(streams[s]) > 0:
        x = _unpack(block, u, streams, s)
        x = x.reshape(1, x.shape[0] * x.shape[1], 1)
    return x


@triton.jit
def _step(block, u: tl.constexpr, streams, k):
    """x, rate [R W]; k [1 N 1], or [R N W] where all tokens share it; others and norm of k, which make the gate."""
    x, rate, norm = _unpack(block, u, streams, 0), _unpack(block, u, streams, 1), _unpack(block, u, streams, 4)
    return x, rate, _slots(block, u, streams, 2, k), _slots(block, u, streams, 3, 0.0), norm


@triton.jit
def _store_packed(ptr, x, run, i, u: tl.constexpr, axis):
    """Store x [P X], P neighbours at every offset of token i + u, up to 64 bits at a time."""
    P: tl.constexpr = x.shape[0]
    ptrs, mask = _at(ptr, run, i, u, axis)
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
    number = tl.uint16 if BITS == 16 else tl.uint32
    wide = tl.uint64 if BITS * AT_ONCE == 64 else (tl.uint32 if BITS * AT_ONCE == 32 else tl.uint16)
    numbers = _unstack(x.to(ptr.dtype.element_ty).to(number, bitcast=True), P)
    for j in tl.static_range(0, P, AT_ONCE):
        packed = numbers[j].to(wide)
        for h in tl.static_range(1, AT_ONCE):
            packed |= numbers[j + h].to(wide) << (h * BITS)
        tl.store((ptrs + j).to(tl.pointer_type(wide)), packed, mask=mask)


@triton.jit
def _store_slot_sums(ptr, x, run, i, u: tl.constexpr, slots):
    """Store x [. N W], summed over channels, for token i + u. Threads first exchange half of their slots for half of
    the channels, so that half as many numbers are left to sum."""
    Q: tl.constexpr = slots[3].shape[0]
    OFFSETS: tl.constexpr = x.shape[1] // Q
    PAIR: tl.constexpr = 2 if Q > 1 else 1
    x = tl.sum(x, 0).reshape(Q // PAIR, PAIR, OFFSETS, 2, x.shape[2] // 2)
    low, high = tl.split(tl.permute(x, 0, 2, 1, 4, 3))
    x = tl.permute(tl.sum(low + high, 3), 0, 2, 1)
    _store_packed(ptr, x.reshape(Q, OFFSETS), run, i, u, slots)


@triton.jit
def _exchange(x, y):
    """Partial sums [R P X] of two tokens -> [R P/2 2X]: two threads that have parts of both take one token each."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    X: tl.constexpr = x.shape[2]
    both = tl.join(x, y).reshape(R, P // 2, 2, X, 2)
    low, high = tl.split(tl.permute(both, 0, 1, 4, 3, 2))
    return (low + high).reshape(R, P // 2, 2 * X)


@triton.jit
def _store_channel_sums(ptr, parts, run, i, channels):
    """Store parts [R P W] of each token from the i-th on, summed over P."""
    TOKENS: tl.constexpr = parts[0].shape[1] if parts[0].shape[1] < 4 else 4
    offs, inside, size, neighbours = channels
    token = tl.arange(0, TOKENS)[:, None]
    X: tl.constexpr = TOKENS * offs.shape[0]
    offs = (offs + token * (run[1] * size)).reshape(X)
    for u in tl.static_range(0, len(parts), TOKENS):
        here = (inside & (i + u + token < run[2])).reshape(X)
        if TOKENS == 1:
            x = parts[u]
        if TOKENS == 2:
            x = _exchange(parts[u], parts[u + 1])
        if TOKENS == 4:
            x = _exchange(_exchange(parts[u], parts[u + 1]), _exchange(parts[u + 2], parts[u + 3]))
        _store_packed(ptr, tl.sum(x, 1), run, i, u, (offs, here, size, neighbours))


@triton.jit
def _run(cu_ptr, documents, todo, start, stop, b, T, BACKWARD: tl.constexpr, STRETCH: tl.constexpr):
    """The next run of a segment with `todo` tokens to go: document, its first token and the one after its last, edges
    of the run."""
    inside = start + todo - 1 if BACKWARD else stop - todo
    document, begin, end = _document(cu_ptr, documents, inside, b, T)
    left = inside // STRETCH * STRETCH
    right = tl.minimum(tl.minimum(left + STRETCH, end), stop)
    return document, begin, end, tl.maximum(tl.maximum(left, begin), start), right


# Programs


@triton.jit
def _key_norms(k_ptr, others_ptr, norm_ptr, rows, N, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """norm [rows] = |k|², and others [rows N] = |k|² − k_n², as a sum over the other slots, which loses no digit."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_N)
    here = (row < rows)[:, None] & (slot < N)[None, :]
    k = tl.load(k_ptr + row[:, None] * N + slot[None, :], mask=here, other=0.0).to(tl.float32)  # [C N]
    squared = k * k
    other = (slot[:, None] != slot[None, :])[None]  # [1 N N]
    others = tl.sum(tl.where(other, squared[:, None, :], 0.0), 2)
    tl.store(others_ptr + row[:, None] * N + slot[None, :], others, mask=here)
    tl.store(norm_ptr + row, tl.sum(squared, 1), mask=row < rows)


@triton.jit
def _accumulate(total, P, rate, A, KEY_GATED: tl.constexpr):
    """Accumulate the product of gates, where a is exponentiated by the sum of rates alone."""
    if KEY_GATED:
        P = P * A
    else:
        total += rate
    return total, P


@elementwise_jit
def _segment_map(
    given, cu_ptr, initial_ptr, P_ptr, R_ptr,  # Given: x and k are dy and q in the backward pass; states; written
    T, V, G, documents, segments, length, first,  # sizes; token t lies at first + STEP t
    GATE: tl.constexpr, FIXED: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,  # FIXED: of k
):  # fmt: skip
    """The map S -> P * S + R of a segment; if BACKWARD that of the gradient of the state, from right to left."""
    UNROLL: tl.constexpr = TILE.UNROLL
    b, segment, where, start, stop = _place(T, segments, length, V, G, TILE)
    channels, slots, group = _axes(where, G, TILE)
    a = _load_state(given.a, 0, where, TILE)
    k = _load_state(given.k if FIXED else None, 0, where, TILE)
    streams = _streams(given.x, given.rate, given.k, given.others, given.norm, channels, slots, group, FIXED)
    S = _zero_state(TILE)
    P = S + 1.0
    total = _zero_rates(TILE)
    todo = tl.where(segment == (0 if BACKWARD else segments - 1), 0, stop - start)  # no segment comes after the last
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, BACKWARD, UNCUT)
        if (right == end) if BACKWARD else (left == begin):
            S = _load_state(initial_ptr, document, where, TILE)
            P, total = _zero_state(TILE), _zero_rates(TILE)
        count = right - left
        run = (b * T + first + TILE.STEP * left, TILE.STEP, count)
        for done in range(0, count, UNROLL):
            i = (count - 1) // UNROLL * UNROLL - done if BACKWARD else done
            block = _fetch(streams, run, i, UNROLL)
            for u in tl.static_range(UNROLL):
                value, rate, w, other, norm = _step(block, UNROLL - 1 - u if BACKWARD else u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                if BACKWARD:
                    S = A * (S + w * value[:, None, :])
                else:
                    S = A * S + w * (scale * value)[:, None, :]
                total, P = _accumulate(total, P, rate, A, given.others is not None)
        todo -= count
    if given.others is None:
        P = P * GATE(total, a, 0.0, 0.0)[0]
    _store_state(P, P_ptr, b * segments + segment, where, TILE)
    _store_state(S, R_ptr, b * segments + segment, where, TILE)


@triton.jit
def _combine(P_ptr, R_ptr, size, segments, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """R [B segments size] becomes the state that enters each segment. Where a document starts P is 0, and the state
    before it, which may be NaN, is not used."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b, offs = pid // blocks, pid % blocks * BLOCK + tl.arange(0, BLOCK)
    S = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, segments):
        at = (b * segments + (segments - 1 - i if BACKWARD else i)) * size + offs
        P = tl.load(P_ptr + at, mask=offs < size, other=0.0)
        R = tl.load(R_ptr + at, mask=offs < size, other=0.0)
        tl.store(R_ptr + at, S, mask=offs < size)
        S = tl.where(P == 0, 0.0, P * S) + R


@elementwise_jit
def _forward(
    given, cu_ptr, initial_ptr, enter_ptr,  # Given; states before rows or documents, and before segments
    y_ptr, state_ptr, kept_ptr,  # written
    T, V, G, documents, segments, length, first,  # sizes; token t lies at first + STEP t
    GATE: tl.constexpr, FIXED_K: tl.constexpr, FIXED_Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y of one segment, left to right; the state at the start of every stretch; that after every document."""
    UNROLL: tl.constexpr = TILE.UNROLL
    b, segment, where, start, stop = _place(T, segments, length, V, G, TILE)
    channels, slots, group = _axes(where, G, TILE)
    a = _load_state(given.a, 0, where, TILE)
    k = _load_state(given.k if FIXED_K else None, 0, where, TILE)
    q = _load_state(given.q if FIXED_Q else None, 0, where, TILE)
    streams = _streams(given.x, given.rate, given.k, given.others, given.norm, channels, slots, group, FIXED_K)
    streams = streams + (_stream(None if FIXED_Q else given.q, slots),)
    S = _load_state(enter_ptr, b * segments + segment, where, TILE)
    todo = stop - start
    CUT: tl.constexpr = UNCUT if kept_ptr is None else TILE.STRETCH
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, False, CUT)
        if left == begin:
            S = _load_state(initial_ptr, document, where, TILE)
        if kept_ptr is not None:  # noqa: SIM102, decided when compiled
            if left % TILE.STRETCH == 0:
                _store_state(S, kept_ptr, b * tl.cdiv(T, TILE.STRETCH) + left // TILE.STRETCH, where, TILE)
        count = right - left
        run = (b * T + first + TILE.STEP * left, TILE.STEP, count)
        ahead = ()
        if TILE.AHEAD:
            ahead = _fetch(streams, run, 0, UNROLL)
        for i in range(0, count, UNROLL):
            block, ahead = _next_block(ahead, streams, run, i, i + UNROLL, TILE.AHEAD, UNROLL)
            parts = ()
            for u in tl.static_range(UNROLL):
                x, rate, k_t, other, norm = _step(block, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
                part = _neighbour_slots(_slots(block, u, streams, 5, q) * S, TILE)
                parts = parts + (tl.sum(part, 1),)
            _store_channel_sums(y_ptr, parts, run, i, channels)
        if right == end:
            _store_state(S, state_ptr, document, where, TILE)
        todo -= count


@elementwise_jit
def _backward(
    given, cu_ptr, initial_ptr, dy_ptr, dstate_ptr, kept_ptr, enter_ptr,  # Given; the rest as in `_forward`
    scratch_ptr, out,  # `room` numbers per program; Gradients, written
    B, room, T, V, G, documents, segments, length, first,  # sizes; token t lies at first + STEP t
    GATE: tl.constexpr, GRADIENTS: tl.constexpr, FIXED_K: tl.constexpr, FIXED_Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment, right to left, a run at a time.

    A run is computed three times: left to right, storing S at every block of UNROLL tokens in scratch; then, block by
    block from the right, left to right again with every S in registers, and back. H is the gradient of S_t through all
    that comes after y_t, dS = H + q dyᵀ that of S_t itself.
    """
    UNROLL: tl.constexpr = TILE.UNROLL
    b, segment, where, start, stop = _place(T, segments, length, V, G, TILE)
    channels, slots, group = _axes(where, G, TILE)
    a = _load_state(given.a, 0, where, TILE)
    k = _load_state(given.k if FIXED_K else None, 0, where, TILE)
    q = _load_state(given.q if FIXED_Q else None, 0, where, TILE)
    streams = _streams(given.x, given.rate, given.k, given.others, given.norm, channels, slots, group, FIXED_K)
    back = (_stream(None if FIXED_Q else given.q, slots), _stream(dy_ptr, channels))
    both = streams + back
    at = b * segments + segment
    H = _load_state(enter_ptr, at, where, TILE)
    da = _zero_state(TILE)
    dk_fixed, dq_fixed = da, da
    todo = stop - start
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, True, TILE.STRETCH)
        if right == end:
            H = _load_state(dstate_ptr, document, where, TILE)
        if left == begin:
            S = _load_state(initial_ptr, document, where, TILE)
        else:
            S = _load_state(kept_ptr, b * tl.cdiv(T, TILE.STRETCH) + left // TILE.STRETCH, where, TILE)
        count = right - left
        last = (count - 1) // UNROLL * UNROLL
        run = (b * T + first + TILE.STEP * left, TILE.STEP, count)
        part = (where[0] * B * T + run[0], TILE.STEP, count)
        tl.debug_barrier()  # all threads have read the scratch of the last run
        tl.store(_scratch_ptrs(scratch_ptr, room, 0, TILE), _flat(S, TILE))
        ahead = ()
        if TILE.AHEAD:
            ahead = _fetch(streams, run, 0, UNROLL)
        for i in range(0, last, UNROLL):
            block, ahead = _next_block(ahead, streams, run, i, i + UNROLL, TILE.AHEAD, UNROLL)
            for u in tl.static_range(UNROLL):
                x, rate, k_t, other, norm = _step(block, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
            tl.store(_scratch_ptrs(scratch_ptr, room, i // UNROLL + 1, TILE), _flat(S, TILE))
        tl.debug_barrier()  # scratch may be read by another thread than wrote it
        if TILE.AHEAD:
            ahead = ahead + _fetch(back, run, last, UNROLL)
        for done in range(0, count, UNROLL):
            i = last - done
            S = _unflat(tl.load(_scratch_ptrs(scratch_ptr, room, i // UNROLL, TILE)), TILE)
            block, ahead = _next_block(ahead, both, run, i, tl.maximum(i - UNROLL, 0), TILE.AHEAD, UNROLL)
            states = ()
            for u in tl.static_range(UNROLL):
                states = states + (S,)
                x, rate, k_t, other, norm = _step(block, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
                dq = S * _unpack(block, u, both, 6)[:, None, :]
                if FIXED_Q:
                    dq_fixed += dq
                else:
                    _store_slot_sums(out.dq, dq, part, i, u, slots)
            for u in tl.static_range(UNROLL - 1, -1, -1):
                x, rate, k_t, other, norm = _step(block, u, streams, k)
                q_t, dy = _slots(block, u, both, 5, q), _unpack(block, u, both, 6)
                dS = H + q_t * dy[:, None, :]
                H = GATE(rate, a, other, norm)[0] * dS
                dx, drate, dk, da_t = GRADIENTS(dS, H, states[u], x, rate, a, k_t, norm)
                if given.a is not None:
                    da += da_t
                if FIXED_K:
                    dk_fixed += dk
                else:
                    _store_slot_sums(out.dk, dk, part, i, u, slots)
                _store_packed(out.dx, dx, run, i, u, channels)
                _store_packed(out.drate, drate, run, i, u, channels)
        if left == begin:
            _store_state(H, out.dinitial, document, where, TILE)
        todo -= count
    if given.a is not None:
        _store_state(da, out.da, at, where, TILE)
    if FIXED_K:
        _store_state(dk_fixed, out.dk, at, where, TILE)
    if FIXED_Q:
        _store_state(dq_fixed, out.dq, at, where, TILE)


# Plan and launch

SELECTIVE, ONLINE = (_selective_gate, _selective_gradients), (_online_gate, _online_gradients)


class Plan(NamedTuple):
    """How one pass is laid out: tile [R N W] of `warps` warps, Q slots and R channels side by side in a thread, UNROLL
    tokens at a time, loaded one block ahead or not, at most `registers` per thread, segments of `length` tokens."""

    R: int
    Q: int
    BLOCK_N: int
    W: int
    UNROLL: int
    AHEAD: bool
    warps: int
    registers: int
    tiles: int
    segments: int
    length: int


def plan(
    B: int, T: int, V: int, G: int, N: int, *, backward: bool = False, key_gated: bool = False, processors: int = 132
) -> Plan:  # fmt: skip
    """The plan of one pass, forward or backward.

    tile       16 entries of the state per thread, so that more of what is loaded is shared; 8 where the exponentials of
               Mamba's forward pass wait for each other and programs are few
    registers  128 in that forward pass, so that 16 warps fit a processor (compilers would take 140, and 12 warps fit)
    AHEAD      where registers are left
    segments   one if that fills the machine, else enough for 64 programs per processor: only other programs hide the
               latency of a token

    Args: sizes; backward: which pass; key_gated: whether k makes the gate; processors of the device.
    Returns: Plan.
    """
    Q, BLOCK_N = math.gcd(4, N), power_of_2(N)
    W, warps = 32 // min(4, BLOCK_N // Q), max(1, BLOCK_N // 32)
    R, full = math.gcd(4, V // G), 7 * processors
    waits = not backward and not key_gated
    if waits and (N > 16 or B * G * cdiv(V // G, R * W) * warps < full):
        R = math.gcd(2, R)
    tiles, stretches = cdiv(V // G, R * W), cdiv(T, STRETCH)
    programs = B * G * tiles * warps
    segments = 1 if programs >= full else cdiv(64 * processors, programs)
    length = cdiv(stretches, min(stretches, segments)) * STRETCH
    UNROLL, AHEAD = 2 if backward and key_gated else 4, key_gated or not backward
    registers = 128 if waits and N <= 16 and R < 4 else 255
    return Plan(R, Q, BLOCK_N, W, UNROLL, AHEAD, warps, registers, tiles, cdiv(T, length), length)


class _Pass(NamedTuple):
    """What the launches of a pass take that follows from shapes alone."""

    plan: Plan
    G: int
    grid: tuple[int]
    common: dict[str, Any]


def _pass_of(
    B: int, T: int, V: int, G: int, N: int, documents: int, key_gated: bool, reverse: bool, backward: bool, many: int,
) -> _Pass:  # fmt: skip
    p = plan(B, T, V, G, N, backward=backward, key_gated=key_gated, processors=many)
    first, step = (T - 1, -1) if reverse else (0, 1)
    tile = constants(Tile(
        N=N, WIDTH=V // G, STEP=step, R=p.R, Q=p.Q, BLOCK_N=p.BLOCK_N, W=p.W, UNROLL=p.UNROLL, AHEAD=p.AHEAD,
        STRETCH=STRETCH,
    ))  # fmt: skip
    common = {
        "T": T, "V": V, "G": G, "documents": documents, "segments": p.segments, "length": p.length, "first": first,
        "GATE": (ONLINE if key_gated else SELECTIVE)[0], "TILE": tile, "num_warps": p.warps, "maxnreg": p.registers,
        "enable_fp_fusion": True,
    }  # fmt: skip
    return _Pass(p, G, (p.tiles * G * p.segments * B,), common)


_PASSES: dict[Hashable, _Pass] = {}


class _Launcher:
    """One pass of a scan whose gate is computed from `a`, or from k if there is none: what all programs take."""

    def __init__(
        self, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, cu_seqlens: Tensor | None, reverse: bool,
        backward: bool,
    ) -> None:  # fmt: skip
        (self.B, self.T, self.V), self.N = x.shape, k.shape[-1]
        G = max(w.shape[2] if w.ndim == 4 else 1 for w in (k, q))
        documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sizes = self.B, self.T, self.V, G, self.N, documents, a is None, reverse, backward, processors(x.device)
        self.laid = laid = cached(_PASSES, (plan, *sizes), lambda: _pass_of(*sizes))
        self.plan, self.grid, self.common = laid.plan, laid.grid, {"cu_ptr": cu_seqlens, **laid.common}
        self.gradients = SELECTIVE[1] if a is not None else ONLINE[1]
        self.cu_seqlens, self.backward = cu_seqlens, backward
        k_tile, q_tile = (w if w.ndim > 2 else w.T.contiguous() for w in (k, q))  # [B T G N] | [N V]
        self.FIXED_K, self.FIXED_Q = k.ndim == 2, q.ndim == 2
        others, norm = (None, None) if a is not None else key_norms(k_tile)
        if a is not None:
            a = torch.mul(a.float().T, LOG2E.value, out=x.new_empty((self.N, self.V), dtype=torch.float32))
        self.given = Given(x=x, rate=rate, a=a, k=k_tile, q=q_tile, others=others, norm=norm)

    def new(self, *shape: int) -> Tensor:
        return self.given.x.new_empty(shape, dtype=torch.float32)

    def entering(self, x: Tensor, k: Tensor, initial: Tensor | None, fixed: bool) -> Tensor | None:
        """The states [B segments N V] that enter the segments, if there are several; `initial` enters rows or
        documents. The backward pass has dy for x and q for k."""
        if self.plan.segments == 1:
            return None
        P, R = (self.new(self.B, self.plan.segments, self.N, self.V) for _ in range(2))
        _segment_map[self.grid](
            given=self.given._replace(x=x, k=k, q=None), initial_ptr=initial, P_ptr=P, R_ptr=R, FIXED=fixed,
            BACKWARD=self.backward, **self.common,
        )  # fmt: skip
        size, block = self.N * self.V, 256
        _combine[(self.B * cdiv(size, block),)](
            P_ptr=P,
            R_ptr=R,
            size=size,
            segments=self.plan.segments,
            BACKWARD=self.backward,
            BLOCK=block,
            num_warps=2,
            enable_fp_fusion=True,
        )
        return R


def key_norms(k: Tensor) -> tuple[Tensor, Tensor]:
    """For k [B T N] or [B T G N]: |k|² − k_n² of the same shape, and |k|²."""
    rows, N = k.numel() // k.shape[-1], k.shape[-1]
    others, norm = torch.empty_like(k, dtype=torch.float32), k.new_empty(k.shape[:-1], dtype=torch.float32)
    BLOCK_N = power_of_2(N)
    BLOCK_C, warps = max(1, 4096 // BLOCK_N**2), max(4, BLOCK_N // 16)
    _key_norms[(cdiv(rows, BLOCK_C),)](
        k_ptr=k,
        others_ptr=others,
        norm_ptr=norm,
        rows=rows,
        N=N,
        BLOCK_C=BLOCK_C,
        BLOCK_N=BLOCK_N,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return others, norm


# Operators, one per direction. States are [B N V] here, one per row or packed document, `stretch_states` those at every
# stretch [B stretches N V]; k and q are [B T N] | [B T G N] | [V N]; a [V N] makes the gate, or k does. Documents lie
# in the order in which they are scanned.


@operator("elementwise")
def _elementwise(
    x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B T V], the final states, and with `save` the state at the start of every stretch."""
    y, state, stretch_states = _fake_elementwise(x, rate, a, k, q, initial, cu_seqlens, reverse, save)
    if cu_seqlens is not None:  # empty documents leave the state that entered them
        state = torch.zeros_like(state) if initial is None else initial.clone()
    run = _Launcher(x, rate, a, k, q, cu_seqlens, reverse, False)
    enter = run.entering(x, run.given.k, initial, run.FIXED_K)
    _forward[run.grid](
        given=run.given, initial_ptr=initial, enter_ptr=enter, y_ptr=y, state_ptr=state,
        kept_ptr=stretch_states if save else None, FIXED_K=run.FIXED_K, FIXED_Q=run.FIXED_Q, **run.common,
    )  # fmt: skip
    return y, state, stretch_states


@fake("elementwise")
def _fake_elementwise(
    x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, V), N = x.shape, k.shape[-1]
    rows = state_count(B, cu_seqlens)
    stretches = cdiv(T, STRETCH) if save else 0
    state, stretch_states = (x.new_empty(shape, dtype=torch.float32) for shape in ((rows, N, V), (B, stretches, N, V)))
    return x.new_empty((B, T, V)), state, stretch_states


@operator("elementwise_backward")
def _elementwise_backward(
    dy: Tensor, dstate: Tensor | None, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor,
    initial: Tensor | None, cu_seqlens: Tensor | None, stretch_states: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, rate, a, k, q and the initial states; that of a is empty where there is none."""
    dx, drate, *_, dinitial = _fake_backward(dy, dstate, x, rate, a, k, q, initial, cu_seqlens, stretch_states, reverse)
    if cu_seqlens is not None:
        dinitial = torch.zeros_like(dinitial) if dstate is None else dstate.clone()
    run = _Launcher(x, rate, a, k, q, cu_seqlens, reverse, True)
    p = run.plan
    per_segment = (run.B * p.segments, run.N, run.V)
    da = None if a is None else run.new(*per_segment)
    dk, dq = (run.new(*per_segment) if t.ndim == 2 else run.new(p.tiles, *t.shape) for t in (k, q))
    enter = run.entering(dy, run.given.q, dstate, run.FIXED_Q)
    room = STRETCH // p.UNROLL * p.R * p.BLOCK_N * p.W
    _backward[run.grid](
        given=run.given, initial_ptr=initial, dy_ptr=dy, dstate_ptr=dstate, kept_ptr=stretch_states, enter_ptr=enter,
        scratch_ptr=run.new(*run.grid, room), B=run.B, room=room,
        out=Gradients(dx=dx, drate=drate, da=da, dk=dk, dq=dq, dinitial=dinitial), GRADIENTS=run.gradients,
        FIXED_K=run.FIXED_K, FIXED_Q=run.FIXED_Q, **run.common,
    )  # fmt: skip
    da = x.new_empty(0) if a is None or da is None else _summed(da, a)
    return dx, drate, da, _summed(dk, k), _summed(dq, q), dinitial


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    """[parts ...] summed, in the dtype of `like`; transposed to [V N] if `like` has two axes."""
    total = parts.sum(0)
    return (total if like.ndim > 2 else total.T).to(like.dtype).contiguous()


@fake("elementwise_backward")
def _fake_backward(
    dy: Tensor, dstate: Tensor | None, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor,
    initial: Tensor | None, cu_seqlens: Tensor | None, stretch_states: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, drate, dk, dq = map(torch.empty_like, (x, rate, k, q))
    da = x.new_empty(0) if a is None else torch.empty_like(a)
    rows = state_count(x.shape[0], cu_seqlens)
    return dx, drate, da, dk, dq, x.new_empty((rows, k.shape[-1], x.shape[2]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, rate, a, k, q, initial, cu_seqlens, stretch_states = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, drate, da, dk, dq, dinitial = _elementwise_backward(
        dy, dstate, x, rate, a, k, q, initial, cu_seqlens, stretch_states, ctx.reverse
    )
    return dx, drate, None if a is None else da, dk, dq, None if initial is None else dinitial, None, None, None


differentiable("elementwise", _gradients, _save)
differentiable("elementwise_backward")


# Public functions


def selective(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's scan, arguments as `selective_scan`. Returns y and the state [B V N]."""
    return _scan(x, delta, A, B, C, initial, cu_seqlens, reverse)


def online(
    x: Tensor, rate: Tensor, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Longhorn's diagonal scan, arguments as `online_scan`. Returns y and the state [B V N]."""
    return _scan(x, rate, None, k, q, initial, cu_seqlens, reverse)


def _scan(
    x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, V), N = x.shape, k.shape[-1]
    rows = state_count(B, cu_seqlens)
    if x.numel() == 0:
        state = x.new_zeros((rows, V, N), dtype=torch.float32) if initial is None else initial.float().clone()
        return x.clone(), state
    G = max(w.shape[2] if w.ndim == 4 else 1 for w in (k, q))
    if G > 1:
        k, q = (w.unsqueeze(2).expand(B, T, G, N) if w.ndim == 3 else w for w in (k, q))
    save = recorded(x, rate, a, k, q, initial)
    state = None if initial is None else initial.float().transpose(1, 2)
    mirrored = reverse and cu_seqlens is not None
    if mirrored:
        state, cu_seqlens = None if state is None else state.flip(0), mirror(cu_seqlens, T)
    y, state, _ = _elementwise(x, rate, a, k, q, state, cu_seqlens, reverse, save)
    return y, (state.flip(0) if mirrored else state).transpose(1, 2)
