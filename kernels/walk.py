"""Elementwise scans, walked: the state stays in registers and time is a loop inside the program.

    S_t = A_t * S_{t-1} + k_t u_tᵀ        y_t = S_tᵀ q_t        entry by entry, S [N V]
    selective:  A = exp(rate a),                         u = rate x        Mamba; rate is its delta
    online:     A = 1 − eps k_n² = kept + eps others_n,  u = eps x         Longhorn; kept = 1 / (1 + rate |k|²)

Legend. B batch, T time, G groups of channels, V channels, N slots of the state. A program owns `R W` neighbouring
channels of one group and all their slots as a tile [R N W], whose last axis and part of N lie across the lanes of a
warp while R lies inside a thread: sums over channels (dk, dq) and over slots (y, dx, drate) then need few shuffles.
A block is UNROLL tokens, loaded before the first of them is used; where AHEAD, before the block before them is. A
stretch is STRETCH tokens: S is kept at the start of each and the backward replays from there, never inverting a step. A
run is the part of a stretch, or of a segment where no state is kept, that lies in one document; a document starts from
its own state. Stretches form segments, which run side by side once a first pass has told what all but the last do to
the state: S -> P * S + R, with P = 0 where a document starts. A stream is a tensor [B T *], the part of its last axis
that a program reads, and how many neighbours a thread does.

    summary (segments > 1)   rate, k, x          -> P, R [B segments N V]
    combine (segments > 1)   P, R                -> the state entering each segment
    emit                     x, rate, k, q, S    -> y, final states, S at every stretch
    adjoint                  the same right to left, with q for k and dy for u; gradients instead of y

Gates are only ever multiplied, so a gate of exactly 0 forgets exactly. Partial sums are added in a fixed order.
k and q [V N] that do not change in time are tiles like the state, loaded once, and so are their gradients.
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, annotation-unchecked"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.diagonal import LOG2E
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2, processors, recorded
from torch import Tensor

from recur.primitives.forms import mirror, state_count

STRETCH = 32  # tokens from one kept state to the next
WHOLE = tl.constexpr(1 << 30)  # a stretch as long as any row, where none is kept
LN2 = tl.constexpr(0.6931471805599453)

# Were V or room known to be a multiple of 16, states would be loaded as vectors, and the tile laid out like them.
RUNTIME = ["B", "T", "documents", "first", "segments", "length"]  # not worth a compilation each
walker = triton.jit(do_not_specialize=["V", "room", *RUNTIME])


# What a family of transitions is: the gate, and the gradients of what it was made of


@triton.jit
def _selective_gate(rate, a, others, norm):
    """A [R N W] and what multiplies x [R W]; a is in units of log 2."""
    return tl.exp2(rate[:, None, :] * a), rate


@triton.jit
def _selective_gradients(G, H, before, x, rate, a, k, norm):
    """dx, drate [R W], parts of dk [. N W], da [R N W]; G is the gradient of S_t, H = A G, `before` S_{t-1}."""
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


# Where things are


@triton.jit
def _document(cu_ptr, documents, t, b, T):
    """The document that holds token t of the walk, its first token, and the one after its last; a row is a document."""
    low, begin, end = b + (t >= T), T * 0, T  # always b, but addresses made of it are not kept in registers
    if cu_ptr is not None:
        high = low + documents  # low is 0: there is one row
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_ptr + middle) <= t
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        begin, end = tl.load(cu_ptr + low).to(tl.int32), tl.load(cu_ptr + low + 1).to(tl.int32)
    return low, begin, end


@triton.jit
def _place(T, segments, length, V, G, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """This program's row, segment, and tile of the state (see _state_ptrs); its tokens, start to stop."""
    tiles = tl.cdiv(WIDTH, R * W)
    pid = tl.program_id(0).to(tl.int64)
    tile, group = pid % tiles, pid // tiles % G
    segment, b = pid // (tiles * G) % segments, pid // (tiles * G * segments)
    start = (segment * length).to(tl.int32)
    return b, segment, (tile, group, V, WIDTH), start, tl.minimum(start + length, T)


@triton.jit
def _state_ptrs(
    ptr, row, where, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Pointers [R*N W] to this program's part of state `row` of a tensor [* N V], and their mask.

    Two axes, because compilers spread three over the lanes of a warp in different orders, and called contiguous, though
    R apart, because that lays the lanes along W. Nothing is read at once for it: of the alignment nothing is known.
    """
    tile, group, V, WIDTH = where
    line = tl.arange(0, R * BLOCK_N)[:, None]
    first, q = line % (BLOCK_N // Q) * Q, line % BLOCK_N // (BLOCK_N // Q)
    within = line // BLOCK_N + tl.max_contiguous(tl.arange(0, W)[None, :] * R, (1, W))
    place = (row * N + first) * V + q * V + (group * WIDTH + tile * (R * W)) + within
    return ptr + place, (first + q < N) & (tile * (R * W) + within < WIDTH)


@triton.jit
def _load_state(
    ptr, row, where, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """[R N W], zeros where there is no tensor."""
    S = tl.zeros((R, BLOCK_N, W), tl.float32)
    if ptr is not None:
        ptrs, mask = _state_ptrs(ptr, row, where, N, R, Q, BLOCK_N, W)
        S = tl.load(ptrs, mask=mask, other=0.0).reshape(R, BLOCK_N, W)
    return S


@triton.jit
def _store_state(
    S, ptr, row, where, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    ptrs, mask = _state_ptrs(ptr, row, where, N, R, Q, BLOCK_N, W)
    tl.store(ptrs, S.reshape(R * BLOCK_N, W), mask=mask)


@triton.jit
def _scratch_ptrs(ptr, room, block, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """Pointers [R*N W] to the state at the start of a block, which nobody else reads: lane beside lane."""
    line = tl.arange(0, R * BLOCK_N)[:, None] * W
    return ptr + tl.program_id(0).to(tl.int64) * room + block * (R * BLOCK_N * W) + line + tl.arange(0, W)[None, :]


@triton.jit
def _axes(where, G, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """Channels of a row [V], the first of every R; slots of one [G N], the first of every Q; the group of one [G]:
    offsets, mask, length of a row, neighbours at every offset."""
    tile, group, _, WIDTH = where
    within, slot, one = (tile * W + tl.arange(0, W)) * R, tl.arange(0, BLOCK_N // Q) * Q, tl.arange(0, 1)
    channels = (group * WIDTH + within).to(tl.int32), (within < WIDTH) | (WIDTH % (R * W) == 0), WIDTH * G
    slots = (group * N + slot).to(tl.int32), (slot < N) | (N == BLOCK_N), N * G
    return channels + (tl.arange(0, R),), slots + (tl.arange(0, Q),), ((group + one).to(tl.int32), one == 0, G, one)


@triton.jit
def _at(ptr, run, i, u: tl.constexpr, axis):
    """Pointers to token i + u of a run in a tensor [B T *], and their mask: one offset a block, that tensors share, and
    constants."""
    origin, step, count = run
    offs, inside, size, _ = axis
    return ptr + ((origin + step * i) * size + offs) + u * step * size, inside & (i + u < count)


@triton.jit
def _abreast(numbers, P: tl.constexpr):
    """P tensors [X] -> [P X], without moving a number to another thread."""
    tl.static_assert(P == 1 or P == 2 or P == 4)
    x = numbers[0][None]
    if P == 2:
        x = tl.permute(tl.join(numbers[0], numbers[1]), 1, 0)
    if P == 4:
        x = tl.join(tl.join(numbers[0], numbers[2]), tl.join(numbers[1], numbers[3]))
        x = tl.permute(x, 1, 2, 0).reshape(4, x.shape[0])
    return x


@triton.jit
def _apart(x, P: tl.constexpr):
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
    """What every walk reads of a token, in the order of `_step`; k is none of it where all tokens share it."""
    k = _stream(None if FIXED else k_ptr, slots)
    gate = (_stream(others_ptr, slots), _stream(norm_ptr, group))
    return (_stream(x_ptr, channels), _stream(rate_ptr, channels), k) + gate


@triton.jit
def _words(stream, run, i, UNROLL: tl.constexpr):
    """UNROLL tokens of a stream from the i-th of a run, up to 64 bits a word."""
    words = ()
    if len(stream) > 0:
        ptr, axis = stream
        P: tl.constexpr = axis[3].shape[0]
        BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
        AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
        wide = tl.uint64 if BITS * AT_ONCE == 64 else (tl.uint32 if BITS * AT_ONCE == 32 else tl.uint16)
        for u in tl.static_range(UNROLL):
            ptrs, mask = _at(ptr, run, i, u, axis)
            for j in tl.static_range(0, P, AT_ONCE):
                words = words + (tl.load((ptrs + j).to(tl.pointer_type(wide)), mask=mask, other=0),)
    return words


@triton.jit
def _fetch(streams, run, i, UNROLL: tl.constexpr):
    """A block of every stream; zeros where a token is none, which then neither decays nor writes."""
    block = ()
    for s in tl.static_range(len(streams)):
        block = block + (_words(streams[s], run, i, UNROLL),)
    return block


@triton.jit
def _turn(ahead, streams, run, i, next, AHEAD: tl.constexpr, UNROLL: tl.constexpr):
    """The block that begins with token i, and the one that is loaded ahead of its use, if any."""
    if AHEAD:
        block, ahead = ahead, _fetch(streams, run, next, UNROLL)
    else:
        block = _fetch(streams, run, i, UNROLL)
    return block, ahead


@triton.jit
def _number(block, u: tl.constexpr, streams, s: tl.constexpr):
    """Token u of a block in stream s as float32 [P X], 0 where there is no tensor."""
    x = 0.0
    if len(streams[s]) > 0:
        kind = streams[s][0].dtype.element_ty
        P: tl.constexpr = streams[s][1][3].shape[0]
        BITS: tl.constexpr = kind.primitive_bitwidth
        AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
        numbers = ()
        for j in tl.static_range(P // AT_ONCE):
            word = block[s][u * (P // AT_ONCE) + j]
            for h in tl.static_range(AT_ONCE):
                if kind == tl.bfloat16:  # the upper half of a float32; half of all lie there already
                    pair = (word >> (h // 2 * 32)).to(tl.uint32)
                    number = (pair << 16 if h % 2 == 0 else pair & 0xFFFF0000).to(tl.float32, bitcast=True)
                else:
                    bits = (word >> (h * BITS)).to(tl.uint16 if BITS == 16 else tl.uint32)
                    number = bits.to(kind, bitcast=True).to(tl.float32)
                numbers = numbers + (number,)
        x = _abreast(numbers, P)
    return x


@triton.jit
def _slots(block, u: tl.constexpr, streams, s: tl.constexpr, whole):
    """The same over slots [1 N 1], or what all tokens share."""
    x = whole
    if len(streams[s]) > 0:
        x = _number(block, u, streams, s)
        x = x.reshape(1, x.shape[0] * x.shape[1], 1)
    return x


@triton.jit
def _step(block, u: tl.constexpr, streams, k):
    """x, rate [R W], k [1 N 1], or [R N W] where all tokens share it, and what gates are made of: others, norm."""
    x, rate, norm = _number(block, u, streams, 0), _number(block, u, streams, 1), _number(block, u, streams, 4)
    return x, rate, _slots(block, u, streams, 2, k), _slots(block, u, streams, 3, 0.0), norm


@triton.jit
def _write(ptr, x, run, i, u: tl.constexpr, axis):
    """x [P X], what token i + u has for P neighbours at every offset, written up to 64 bits at a time."""
    P: tl.constexpr = x.shape[0]
    ptrs, mask = _at(ptr, run, i, u, axis)
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    AT_ONCE: tl.constexpr = P if P * BITS < 64 else 64 // BITS
    number = tl.uint16 if BITS == 16 else tl.uint32
    wide = tl.uint64 if BITS * AT_ONCE == 64 else (tl.uint32 if BITS * AT_ONCE == 32 else tl.uint16)
    numbers = _apart(x.to(ptr.dtype.element_ty).to(number, bitcast=True), P)
    for j in tl.static_range(0, P, AT_ONCE):
        word = numbers[j].to(wide)
        for h in tl.static_range(1, AT_ONCE):
            word |= numbers[j + h].to(wide) << (h * BITS)
        tl.store((ptrs + j).to(tl.pointer_type(wide)), word, mask=mask)


@triton.jit
def _write_sums(ptr, x, run, i, u: tl.constexpr, slots):
    """x [. N W] summed over channels, as token i + u over slots. Threads first give each other half of their slots for
    half of the channels, so that half as many numbers meet."""
    Q: tl.constexpr = slots[3].shape[0]
    OFFSETS: tl.constexpr = x.shape[1] // Q
    PAIR: tl.constexpr = 2 if Q > 1 else 1
    x = tl.sum(x, 0).reshape(Q // PAIR, PAIR, OFFSETS, 2, x.shape[2] // 2)
    low, high = tl.split(tl.permute(x, 0, 2, 1, 4, 3))
    x = tl.permute(tl.sum(low + high, 3), 0, 2, 1)
    _write(ptr, x.reshape(Q, OFFSETS), run, i, u, slots)


@triton.jit
def _meet(x, y):
    """Parts [R P X] of two tokens' sums -> [R P/2 2X]: of threads that have parts of both, each takes one token."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    X: tl.constexpr = x.shape[2]
    both = tl.join(x, y).reshape(R, P // 2, 2, X, 2)
    low, high = tl.split(tl.permute(both, 0, 1, 4, 3, 2))
    return (low + high).reshape(R, P // 2, 2 * X)


@triton.jit
def _write_channels(ptr, parts, run, i, channels):
    """Parts [R P W] of what each token from the i-th on has for R channels at every offset, summed over P."""
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
            x = _meet(parts[u], parts[u + 1])
        if TOKENS == 4:
            x = _meet(_meet(parts[u], parts[u + 1]), _meet(parts[u + 2], parts[u + 3]))
        _write(ptr, tl.sum(x, 1), run, i, u, (offs, here, size, neighbours))


@triton.jit
def _run(cu_ptr, documents, todo, start, stop, b, T, ADJOINT: tl.constexpr, STRETCH: tl.constexpr):
    """The next run of a segment with `todo` tokens to go: document, its first token and the one after its last, edges
    of the run."""
    inside = start + todo - 1 if ADJOINT else stop - todo
    document, begin, end = _document(cu_ptr, documents, inside, b, T)
    left = inside // STRETCH * STRETCH
    right = tl.minimum(tl.minimum(left + STRETCH, end), stop)
    return document, begin, end, tl.maximum(tl.maximum(left, begin), start), right


# Programs


@triton.jit
def _others(k_ptr, others_ptr, norm_ptr, rows, N, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """others [rows N] = sum of the other slots' k², norm [rows] = |k|². Summed, not subtracted: no digit is lost."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_N)
    here = (row < rows)[:, None] & (slot < N)[None, :]
    k = tl.load(k_ptr + row[:, None] * N + slot[None, :], mask=here, other=0.0).to(tl.float32)  # [C N]
    square = k * k
    other = (slot[:, None] != slot[None, :])[None]  # [1 N N]
    others = tl.sum(tl.where(other, square[:, None, :], 0.0), 2)
    tl.store(others_ptr + row[:, None] * N + slot[None, :], others, mask=here)
    tl.store(norm_ptr + row, tl.sum(square, 1), mask=row < rows)


@triton.jit
def _passed(total, P, rate, A, KEYED: tl.constexpr):
    """The sum of rates and the product of gates, each where it is needed: exponentials are multiplied by adding."""
    if KEYED:
        P = P * A
    else:
        total += rate
    return total, P


@walker
def _summary(
    value_ptr, rate_ptr, a_ptr, write_ptr, others_ptr, norm_ptr, cu_ptr, initial_ptr, P_ptr, R_ptr,  # tensors
    T, V, G, documents, segments, length, first,  # sizes; token t lies at first + STEP t
    GATE: tl.constexpr, FIXED: tl.constexpr, ADJOINT: tl.constexpr, STEP: tl.constexpr,  # variants
    N: tl.constexpr, WIDTH: tl.constexpr,  # slots and channels of a group
    R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,  # tile
    UNROLL: tl.constexpr, AHEAD: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state, S -> P * S + R; or, right to left, to the gradient of the state."""
    b, segment, where, start, stop = _place(T, segments, length, V, G, WIDTH, R, W)
    channels, slots, group = _axes(where, G, N, R, Q, BLOCK_N, W)
    a = _load_state(a_ptr, 0, where, N, R, Q, BLOCK_N, W)
    write = _load_state(write_ptr if FIXED else None, 0, where, N, R, Q, BLOCK_N, W)
    streams = _streams(value_ptr, rate_ptr, write_ptr, others_ptr, norm_ptr, channels, slots, group, FIXED)
    S = tl.zeros((R, BLOCK_N, W), tl.float32)
    P = S + 1.0
    total = tl.zeros((R, W), tl.float32)
    todo = tl.where(segment == (0 if ADJOINT else segments - 1), 0, stop - start)  # no segment comes after the last
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, ADJOINT, WHOLE)
        if (right == end) if ADJOINT else (left == begin):
            S = _load_state(initial_ptr, document, where, N, R, Q, BLOCK_N, W)
            P, total = tl.zeros((R, BLOCK_N, W), tl.float32), tl.zeros((R, W), tl.float32)
        count = right - left
        run = (b * T + first + STEP * left, STEP, count)
        for block in range(0, count, UNROLL):
            i = (count - 1) // UNROLL * UNROLL - block if ADJOINT else block
            words = _fetch(streams, run, i, UNROLL)
            for u in tl.static_range(UNROLL):
                value, rate, w, other, norm = _step(words, UNROLL - 1 - u if ADJOINT else u, streams, write)
                A, scale = GATE(rate, a, other, norm)
                if ADJOINT:
                    S = A * (S + w * value[:, None, :])
                else:
                    S = A * S + w * (scale * value)[:, None, :]
                total, P = _passed(total, P, rate, A, others_ptr is not None)
        todo -= count
    if others_ptr is None:
        P = P * GATE(total, a, 0.0, 0.0)[0]
    _store_state(P, P_ptr, b * segments + segment, where, N, R, Q, BLOCK_N, W)
    _store_state(S, R_ptr, b * segments + segment, where, N, R, Q, BLOCK_N, W)


@triton.jit
def _combine(P_ptr, R_ptr, size, segments, ADJOINT: tl.constexpr, BLOCK: tl.constexpr):
    """R [B segments size] becomes the state that enters each segment; where a document starts P is 0, and what was
    before it, which may be NaN, is not looked at."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b, offs = pid // blocks, pid % blocks * BLOCK + tl.arange(0, BLOCK)
    S = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, segments):
        at = (b * segments + (segments - 1 - i if ADJOINT else i)) * size + offs
        P = tl.load(P_ptr + at, mask=offs < size, other=0.0)
        R = tl.load(R_ptr + at, mask=offs < size, other=0.0)
        tl.store(R_ptr + at, S, mask=offs < size)
        S = tl.where(P == 0, 0.0, P * S) + R


@walker
def _emit(
    x_ptr, rate_ptr, a_ptr, k_ptr, q_ptr, others_ptr, norm_ptr, cu_ptr, initial_ptr, enter_ptr,  # read
    y_ptr, state_ptr, kept_ptr,  # written
    T, V, G, documents, segments, length, first,  # sizes; token t lies at first + STEP t
    GATE: tl.constexpr, FIXED_K: tl.constexpr, FIXED_Q: tl.constexpr, STEP: tl.constexpr,  # variants
    N: tl.constexpr, WIDTH: tl.constexpr,  # slots and channels of a group
    R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,  # tile
    UNROLL: tl.constexpr, AHEAD: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """y of one segment, left to right; the state at the start of every stretch; that after every document."""
    b, segment, where, start, stop = _place(T, segments, length, V, G, WIDTH, R, W)
    channels, slots, group = _axes(where, G, N, R, Q, BLOCK_N, W)
    a = _load_state(a_ptr, 0, where, N, R, Q, BLOCK_N, W)
    k = _load_state(k_ptr if FIXED_K else None, 0, where, N, R, Q, BLOCK_N, W)
    q = _load_state(q_ptr if FIXED_Q else None, 0, where, N, R, Q, BLOCK_N, W)
    streams = _streams(x_ptr, rate_ptr, k_ptr, others_ptr, norm_ptr, channels, slots, group, FIXED_K)
    streams = streams + (_stream(None if FIXED_Q else q_ptr, slots),)
    S = _load_state(enter_ptr, b * segments + segment, where, N, R, Q, BLOCK_N, W)
    todo = stop - start
    CUT: tl.constexpr = WHOLE if kept_ptr is None else STRETCH
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, False, CUT)
        if left == begin:
            S = _load_state(initial_ptr, document, where, N, R, Q, BLOCK_N, W)
        if kept_ptr is not None:  # noqa: SIM102, decided when compiled
            if left % STRETCH == 0:
                _store_state(S, kept_ptr, b * tl.cdiv(T, STRETCH) + left // STRETCH, where, N, R, Q, BLOCK_N, W)
        count = right - left
        run = (b * T + first + STEP * left, STEP, count)
        ahead = ()
        if AHEAD:
            ahead = _fetch(streams, run, 0, UNROLL)
        for i in range(0, count, UNROLL):
            words, ahead = _turn(ahead, streams, run, i, i + UNROLL, AHEAD, UNROLL)
            parts = ()
            for u in tl.static_range(UNROLL):
                x, rate, k_t, other, norm = _step(words, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
                part = (_slots(words, u, streams, 5, q) * S).reshape(R, Q, BLOCK_N // Q, W)
                parts = parts + (tl.sum(part, 1),)
            _write_channels(y_ptr, parts, run, i, channels)
        if right == end:
            _store_state(S, state_ptr, document, where, N, R, Q, BLOCK_N, W)
        todo -= count


@walker
def _adjoint(
    x_ptr, rate_ptr, a_ptr, k_ptr, q_ptr, others_ptr, norm_ptr, cu_ptr, initial_ptr,  # read
    dy_ptr, dstate_ptr, kept_ptr, enter_ptr, scratch_ptr,
    dx_ptr, drate_ptr, da_ptr, dk_ptr, dq_ptr, dinitial_ptr,  # written
    B, room, T, V, G, documents, segments, length, first,  # sizes; a program has `room` numbers of scratch
    GATE: tl.constexpr, GRADIENTS: tl.constexpr, FIXED_K: tl.constexpr, FIXED_Q: tl.constexpr,  # variants
    STEP: tl.constexpr,  # token t lies at first + STEP t
    N: tl.constexpr, WIDTH: tl.constexpr,  # slots and channels of a group
    R: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,  # tile
    UNROLL: tl.constexpr, AHEAD: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment, right to left, a run at a time.

    A run is walked three times: left to right, leaving S at every block of UNROLL tokens in scratch; then, block by
    block from the right, left to right again with every S in registers, and back. H is the gradient of S_t by all that
    comes after y_t, dS = H + q dyᵀ that of S_t itself.
    """
    b, segment, where, start, stop = _place(T, segments, length, V, G, WIDTH, R, W)
    channels, slots, group = _axes(where, G, N, R, Q, BLOCK_N, W)
    a = _load_state(a_ptr, 0, where, N, R, Q, BLOCK_N, W)
    k = _load_state(k_ptr if FIXED_K else None, 0, where, N, R, Q, BLOCK_N, W)
    q = _load_state(q_ptr if FIXED_Q else None, 0, where, N, R, Q, BLOCK_N, W)
    streams = _streams(x_ptr, rate_ptr, k_ptr, others_ptr, norm_ptr, channels, slots, group, FIXED_K)
    back = (_stream(None if FIXED_Q else q_ptr, slots), _stream(dy_ptr, channels))
    both = streams + back
    at = b * segments + segment
    H = _load_state(enter_ptr, at, where, N, R, Q, BLOCK_N, W)
    da = tl.zeros((R, BLOCK_N, W), tl.float32)
    dk_whole, dq_whole = da, da
    todo = stop - start
    while todo > 0:
        document, begin, end, left, right = _run(cu_ptr, documents, todo, start, stop, b, T, True, STRETCH)
        if right == end:
            H = _load_state(dstate_ptr, document, where, N, R, Q, BLOCK_N, W)
        if left == begin:
            S = _load_state(initial_ptr, document, where, N, R, Q, BLOCK_N, W)
        else:
            S = _load_state(kept_ptr, b * tl.cdiv(T, STRETCH) + left // STRETCH, where, N, R, Q, BLOCK_N, W)
        count = right - left
        last = (count - 1) // UNROLL * UNROLL
        run = (b * T + first + STEP * left, STEP, count)
        part = (where[0] * B * T + run[0], STEP, count)
        tl.debug_barrier()  # nobody still reads the last run's scratch
        tl.store(_scratch_ptrs(scratch_ptr, room, 0, R, BLOCK_N, W), S.reshape(R * BLOCK_N, W))
        ahead = ()
        if AHEAD:
            ahead = _fetch(streams, run, 0, UNROLL)
        for i in range(0, last, UNROLL):
            words, ahead = _turn(ahead, streams, run, i, i + UNROLL, AHEAD, UNROLL)
            for u in tl.static_range(UNROLL):
                x, rate, k_t, other, norm = _step(words, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
            tl.store(_scratch_ptrs(scratch_ptr, room, i // UNROLL + 1, R, BLOCK_N, W), S.reshape(R * BLOCK_N, W))
        tl.debug_barrier()  # scratch is written by one thread and may be read by another
        if AHEAD:
            ahead = ahead + _fetch(back, run, last, UNROLL)
        for block in range(0, count, UNROLL):
            i = last - block
            S = tl.load(_scratch_ptrs(scratch_ptr, room, i // UNROLL, R, BLOCK_N, W)).reshape(R, BLOCK_N, W)
            words, ahead = _turn(ahead, both, run, i, tl.maximum(i - UNROLL, 0), AHEAD, UNROLL)
            states = ()
            for u in tl.static_range(UNROLL):
                states = states + (S,)
                x, rate, k_t, other, norm = _step(words, u, streams, k)
                A, scale = GATE(rate, a, other, norm)
                S = A * S + k_t * (scale * x)[:, None, :]
                dq = S * _number(words, u, both, 6)[:, None, :]
                if FIXED_Q:
                    dq_whole += dq
                else:
                    _write_sums(dq_ptr, dq, part, i, u, slots)
            for u in tl.static_range(UNROLL - 1, -1, -1):
                x, rate, k_t, other, norm = _step(words, u, streams, k)
                q_t, dy = _slots(words, u, both, 5, q), _number(words, u, both, 6)
                dS = H + q_t * dy[:, None, :]
                H = GATE(rate, a, other, norm)[0] * dS
                dx, drate, dk, da_t = GRADIENTS(dS, H, states[u], x, rate, a, k_t, norm)
                if a_ptr is not None:
                    da += da_t
                if FIXED_K:
                    dk_whole += dk
                else:
                    _write_sums(dk_ptr, dk, part, i, u, slots)
                _write(dx_ptr, dx, run, i, u, channels)
                _write(drate_ptr, drate, run, i, u, channels)
        if left == begin:
            _store_state(H, dinitial_ptr, document, where, N, R, Q, BLOCK_N, W)
        todo -= count
    if a_ptr is not None:
        _store_state(da, da_ptr, at, where, N, R, Q, BLOCK_N, W)
    if FIXED_K:
        _store_state(dk_whole, dk_ptr, at, where, N, R, Q, BLOCK_N, W)
    if FIXED_Q:
        _store_state(dq_whole, dq_ptr, at, where, N, R, Q, BLOCK_N, W)


# Plan and launch

SELECTIVE, ONLINE = (_selective_gate, _selective_gradients), (_online_gate, _online_gradients)


class Plan(NamedTuple):
    """How one walk is cut up: tile [R N W] of `warps` warps, Q slots and R channels side by side in a thread, UNROLL
    tokens at a time, loaded a block ahead or not, at most `registers` a thread, segments of `length` tokens."""

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

    @property
    def tile(self) -> dict[str, int]:
        """What every program takes by name."""
        tile = {"R": self.R, "Q": self.Q, "BLOCK_N": self.BLOCK_N, "W": self.W, "UNROLL": self.UNROLL}
        return {
            **tile,
            "AHEAD": self.AHEAD,
            "STRETCH": STRETCH,
            "num_warps": self.warps,
            "enable_fp_fusion": True,
            "maxnreg": self.registers,
        }


def plan(
    B: int, T: int, V: int, G: int, N: int, *, adjoint: bool = False, keyed: bool = False, processors: int = 132
) -> Plan:  # fmt: skip
    """16 entries of the state a thread, so that more of what is loaded is shared; 8 where the exponentials of Mamba's
    forward walk wait for each other and programs are few, in 128 registers, that 16 warps fit a processor (140 are what
    compilers like, and 12 warps). Blocks are loaded ahead where registers are left. One segment where that fills the
    machine, else enough for 64 a processor: a token's latency hides behind other programs only.

    Args: sizes; whether the walk is the backward one, and its gate made of the key; processors of the device.
    Returns: Plan.
    """
    Q, BLOCK_N = math.gcd(4, N), power_of_2(N)
    W, warps = 32 // min(4, BLOCK_N // Q), max(1, BLOCK_N // 32)
    R, full = math.gcd(4, V // G), 7 * processors
    waits = not adjoint and not keyed
    if waits and (N > 16 or B * G * cdiv(V // G, R * W) * warps < full):
        R = math.gcd(2, R)
    tiles, stretches = cdiv(V // G, R * W), cdiv(T, STRETCH)
    programs = B * G * tiles * warps
    segments = 1 if programs >= full else cdiv(64 * processors, programs)
    length = cdiv(stretches, min(stretches, segments)) * STRETCH
    UNROLL, AHEAD = 2 if adjoint and keyed else 4, keyed or not adjoint
    registers = 128 if waits and N <= 16 and R < 4 else 255
    return Plan(R, Q, BLOCK_N, W, UNROLL, AHEAD, warps, registers, tiles, cdiv(T, length), length)


class _Walk:
    """One call of a scan with its gate made of `a`, or of k where there is none: what all programs read and know."""

    def __init__(
        self, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, cu_seqlens: Tensor | None, reverse: bool,
        adjoint: bool,
    ) -> None:  # fmt: skip
        (self.B, self.T, self.V), self.N = x.shape, k.shape[-1]
        self.G = max(w.shape[2] if w.ndim == 4 else 1 for w in (k, q))
        kind = {"adjoint": adjoint, "keyed": a is None, "processors": processors(x.device)}
        self.plan = plan(self.B, self.T, self.V, self.G, self.N, **kind)
        self.gate, self.gradients = SELECTIVE if a is not None else ONLINE
        self.x, self.rate, self.cu_seqlens, self.adjoint = x, rate, cu_seqlens, adjoint
        self.k, self.q = (w if w.ndim == 4 else w.T.contiguous() for w in (k, q))  # [B T G N] | [N V]
        self.FIXED_K, self.FIXED_Q = k.ndim == 2, q.ndim == 2
        self.others, self.norm = (None, None) if a is not None else _key_norms(self.k)
        self.a = None if a is None else torch.mul(a.float().T, LOG2E.value, out=self.new(self.N, self.V))  # [N V]
        documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first, step = (self.T - 1, -1) if reverse else (0, 1)
        self.sizes = (self.T, self.V, self.G, documents, self.plan.segments, self.plan.length, first)
        self.known = {"STEP": step, "N": self.N, "WIDTH": self.V // self.G, **self.plan.tile}
        self.grid = (self.plan.tiles * self.G * self.plan.segments * self.B,)

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def enter(self, value: Tensor, write: Tensor, initial: Tensor | None, fixed: bool) -> Tensor | None:
        """The states [B segments N V] that enter the segments if there are some; `initial` enters rows or documents."""
        if self.plan.segments == 1:
            return None
        P, R = (self.new(self.B, self.plan.segments, self.N, self.V) for _ in range(2))
        tensors = (value, self.rate, self.a, write, self.others, self.norm, self.cu_seqlens, initial, P, R)
        _summary[self.grid](*tensors, *self.sizes, self.gate, fixed, self.adjoint, **self.known)
        size, block = self.N * self.V, 256
        _combine[(self.B * cdiv(size, block),)](
            P, R, size, self.plan.segments, self.adjoint, block, num_warps=2, enable_fp_fusion=True
        )
        return R


def _key_norms(k: Tensor) -> tuple[Tensor, Tensor]:
    """For k [B T G N]: the sum of the other slots' squares [B T G N], and the sum of all [B T G]."""
    rows, N = k.numel() // k.shape[-1], k.shape[-1]
    others, norm = torch.empty_like(k, dtype=torch.float32), k.new_empty(k.shape[:3], dtype=torch.float32)
    BLOCK_N = power_of_2(N)
    BLOCK_C, warps = max(1, 4096 // BLOCK_N**2), max(4, BLOCK_N // 16)
    _others[(cdiv(rows, BLOCK_C),)](k, others, norm, rows, N, BLOCK_C, BLOCK_N, num_warps=warps, enable_fp_fusion=True)
    return others, norm


# Operators, one a direction. States are [B N V] here, one a row or a packed document, `kept` [B stretches N V]; k and q
# are [B T G N] | [V N]; a [V N] makes the gate, or k does. Documents lie in the order in which they are walked.


@operator("walk")
def _walk(
    x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B T V], the final states, and with `keep` the state at the start of every stretch."""
    y, state, kept = _fake_walk(x, rate, a, k, q, initial, cu_seqlens, reverse, keep)
    if cu_seqlens is not None:  # empty documents hand on their state
        state = torch.zeros_like(state) if initial is None else initial.clone()
    w = _Walk(x, rate, a, k, q, cu_seqlens, reverse, False)
    enter = w.enter(w.x, w.k, initial, w.FIXED_K)
    tensors = (w.x, w.rate, w.a, w.k, w.q, w.others, w.norm, cu_seqlens, initial, enter)
    written = (y, state, kept if keep else None)
    _emit[w.grid](*tensors, *written, *w.sizes, w.gate, w.FIXED_K, w.FIXED_Q, **w.known)
    return y, state, kept


@fake("walk")
def _fake_walk(
    x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, V), N = x.shape, k.shape[-1]
    rows = state_count(B, cu_seqlens)
    stretches = cdiv(T, STRETCH) if keep else 0
    state, kept = (x.new_empty(shape, dtype=torch.float32) for shape in ((rows, N, V), (B, stretches, N, V)))
    return x.new_empty((B, T, V)), state, kept


@operator("walk_adjoint")
def _walk_adjoint(
    dy: Tensor, dstate: Tensor | None, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor,
    initial: Tensor | None, cu_seqlens: Tensor | None, kept: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, rate, a, k, q and the initial states; that of a is empty where there is none."""
    dx, drate, *_, dinitial = _fake_adjoint(dy, dstate, x, rate, a, k, q, initial, cu_seqlens, kept, reverse)
    if cu_seqlens is not None:
        dinitial = torch.zeros_like(dinitial) if dstate is None else dstate.clone()
    w = _Walk(x, rate, a, k, q, cu_seqlens, reverse, True)
    p = w.plan
    whole = (w.B * p.segments, w.N, w.V)
    da = None if a is None else w.new(*whole)
    dk, dq = (w.new(*whole) if t.ndim == 2 else w.new(p.tiles, *t.shape) for t in (k, q))
    enter = w.enter(dy, w.q, dstate, w.FIXED_Q)
    room = STRETCH // p.UNROLL * p.R * p.BLOCK_N * p.W
    scratch = w.new(*w.grid, room)
    read = (w.x, w.rate, w.a, w.k, w.q, w.others, w.norm, cu_seqlens, initial, dy, dstate, kept, enter, scratch)
    written = (dx, drate, da, dk, dq, dinitial)
    _adjoint[w.grid](
        *read, *written, w.B, room, *w.sizes, w.gate, w.gradients, w.FIXED_K, w.FIXED_Q, **w.known
    )  # fmt: skip
    da = x.new_empty(0) if a is None or da is None else _summed(da, a)
    return dx, drate, da, _summed(dk, k), _summed(dq, q), dinitial


def _summed(parts: Tensor, like: Tensor) -> Tensor:
    """[parts ...] summed to the axes and dtype of `like`, whose last two are turned around if it has no others."""
    total = parts.sum(0)
    return (total if like.ndim > 2 else total.T).to(like.dtype).contiguous()


@fake("walk_adjoint")
def _fake_adjoint(
    dy: Tensor, dstate: Tensor | None, x: Tensor, rate: Tensor, a: Tensor | None, k: Tensor, q: Tensor,
    initial: Tensor | None, cu_seqlens: Tensor | None, kept: Tensor, reverse: bool,
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
    x, rate, a, k, q, initial, cu_seqlens, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, drate, da, dk, dq, dinitial = _walk_adjoint(
        dy, dstate, x, rate, a, k, q, initial, cu_seqlens, kept, ctx.reverse
    )
    return dx, drate, None if a is None else da, dk, dq, None if initial is None else dinitial, None, None, None


differentiable("walk", _gradients, _save)
differentiable("walk_adjoint")


# Doors


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
    k, q = (w.unsqueeze(2).expand(B, T, G, N) if w.ndim == 3 else w for w in (k, q))
    keep = recorded(x, rate, a, k, q, initial)
    state = None if initial is None else initial.float().transpose(1, 2)
    mirrored = reverse and cu_seqlens is not None
    if mirrored:
        state, cu_seqlens = None if state is None else state.flip(0), mirror(cu_seqlens, T)
    y, state, _ = _walk(x, rate, a, k, q, state, cu_seqlens, reverse, keep)
    return y, (state.flip(0) if mirrored else state).transpose(1, 2)
