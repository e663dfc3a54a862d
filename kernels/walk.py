"""Elementwise scans, walked: the state stays in registers and time is a loop inside the program.

    S_t = A_t * S_{t-1} + k_t u_tᵀ        y_t = S_tᵀ q_t        entry by entry, S [N V]
    selective:  A = exp(rate a),                         u = rate x        Mamba; rate is its delta
    online:     A = 1 − eps k_n² = kept + eps others_n,  u = eps x         Longhorn; kept = 1 / (1 + rate |k|²)

Legend. B batch, T time, G groups of channels, V channels, N slots of the state. A program owns `R W` neighbouring
channels of one group and all their slots as a tile [R N W], whose last axis and part of N lie across the lanes of a
warp while R lies inside a thread: sums over channels (dk, dq) and over slots (y, dx, drate) then need few shuffles.
UNROLL tokens are loaded before the first of them is used. A stretch is STRETCH tokens: S is kept at the start of each
and the backward replays from there, never inverting a step. Stretches form segments, which run side by side once a
first pass has told what each does to the state: S -> P * S + R.

    summary (segments > 1)   rate, k, x          -> P, R [B segments N V]
    combine (segments > 1)   P, R                -> the state entering each segment
    emit                     x, rate, k, q, S    -> y, final state, S at every stretch
    adjoint                  the same right to left, with q for k and dy for u; gradients instead of y

Gates are only ever multiplied, so a gate of exactly 0 forgets exactly. Partial sums are added in a fixed order.
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 64  # tokens from one kept state to the next
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Were V known to be a multiple of 16, loads of the state would be vectorised along it, and the tile laid out like them.
RUNTIME = ["B", "T", "first", "step", "segments", "length"]  # not worth a compilation each
walker = triton.jit(do_not_specialize=["V", *RUNTIME])


# What a family of transitions is: the gate, and the gradients of what it was made of


@triton.jit
def _selective_gate(rate, a, others, norm):
    """A [R N W] and what multiplies x [R W]; a is in units of log 2."""
    return tl.exp2(rate[:, None, :] * a), rate


@triton.jit
def _selective_gradients(G, before, A, x, rate, a, k, norm):
    """dx, drate [R W], dk before it is summed over channels, da [R N W]; G is the gradient of S_t, `before` S_{t-1}."""
    gate = G * before * A
    du = tl.sum(G * k, 1)
    drate = x * du + LN2 * tl.sum(gate * a, 1)
    return rate * du, drate, G * (rate * x)[:, None, :], gate * rate[:, None, :]


@triton.jit
def _online_gate(rate, a, others, norm):
    kept = 1 / (1 + rate * norm)
    eps = rate * kept
    return kept[:, None, :] + eps[:, None, :] * others, eps


@triton.jit
def _online_gradients(G, before, A, x, rate, a, k, norm):
    """A = 1 − eps k_n² and eps = rate / (1 + rate |k|²), whose gradient with respect to |k|² is −rate² drate."""
    kept = 1 / (1 + rate * norm)
    eps = rate * kept
    gate = G * before
    du = tl.sum(G * k, 1)
    drate = kept * kept * (x * du - tl.sum(gate * (k * k), 1))
    through_norm = rate * rate * drate
    dk = G * (eps * x)[:, None, :] - 2 * k * (eps[:, None, :] * gate + through_norm[:, None, :])
    return eps * du, drate, dk, gate


# Where things are


@triton.jit
def _place(V, G, N, T, segments, length, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """This program's tile, row, segment and group; its channels [R W] and slots [N]; its tokens, start to stop."""
    width = V // G
    tiles = tl.cdiv(width, R * W)
    pid = tl.program_id(0).to(tl.int64)
    tile, group = pid % tiles, pid // tiles % G
    segment, b = pid // (tiles * G) % segments, pid // (tiles * G * segments)
    within = tile * (R * W) + tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    slot = tl.arange(0, BLOCK_N)
    start = (segment * length).to(tl.int32)
    stop = tl.minimum(start + length, T)
    return tile, b, segment, group, group * width + within, within < width, slot, slot < N, start, stop


@triton.jit
def _state_ptrs(ptr, row, tile, group, V, G, N, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """Pointers [R*N W] to this program's part of state `row` of a tensor [* N V], and their mask.

    Two axes, because compilers spread three over the lanes of a warp in different orders.
    """
    line = tl.arange(0, R * BLOCK_N)
    slot = line % BLOCK_N
    within = tile * (R * W) + (line // BLOCK_N * W)[:, None] + tl.arange(0, W)[None, :]
    width = V // G
    return ptr + (row * N + slot[:, None]) * V + group * width + within, (slot < N)[:, None] & (within < width)


@triton.jit
def _load_state(ptr, row, tile, group, V, G, N, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    """[R N W]"""
    ptrs, mask = _state_ptrs(ptr, row, tile, group, V, G, N, R, BLOCK_N, W)
    return tl.load(ptrs, mask=mask, other=0.0).reshape(R, BLOCK_N, W)


@triton.jit
def _store_state(S, ptr, row, tile, group, V, G, N, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr):
    ptrs, mask = _state_ptrs(ptr, row, tile, group, V, G, N, R, BLOCK_N, W)
    tl.store(ptrs, S.reshape(R * BLOCK_N, W), mask=mask)


@triton.jit
def _channels(ptr, order, t0, stop, columns, UNROLL: tl.constexpr):
    """UNROLL tokens [R W] of a tensor [B T V]; zeros where there is no token, which then neither decays nor writes."""
    base, step = order
    channel, in_v, V = columns
    tokens = ()
    for u in tl.static_range(UNROLL):
        at = (base + step * (t0 + u)) * V + channel
        tokens = tokens + (tl.load(ptr + at, mask=in_v & (t0 + u < stop), other=0.0).to(tl.float32),)
    return tokens


@triton.jit
def _slots(ptr, order, t0, stop, rows, UNROLL: tl.constexpr):
    """UNROLL tokens [1 N 1] of a tensor [B T G N]."""
    base, step = order
    slot, in_n, N, group, G = rows
    tokens = ()
    for u in tl.static_range(UNROLL):
        at = ((base + step * (t0 + u)) * G + group) * N + slot
        token = tl.load(ptr + at, mask=in_n & (t0 + u < stop), other=0.0).to(tl.float32)
        tokens = tokens + (token[None, :, None],)
    return tokens


@triton.jit
def _norms(others_ptr, norm_ptr, order, t0, stop, rows, KEYED: tl.constexpr, UNROLL: tl.constexpr):
    """UNROLL tokens of others [1 N 1] and of norm, where the gate is made of the key."""
    others, norms = (), ()
    if KEYED:
        others = _slots(others_ptr, order, t0, stop, rows, UNROLL)
    base, step = order
    for u in tl.static_range(UNROLL):
        if KEYED:
            at = (base + step * (t0 + u)) * rows[4] + rows[3]  # G, group
            norms = norms + (tl.load(norm_ptr + at, mask=t0 + u < stop, other=0.0),)
        else:
            others, norms = others + (0.0,), norms + (0.0,)
    return others, norms


@triton.jit
def _times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """a b in two planes; where it is real the second is zeros, which the compiler drops."""
    re = ar * br
    im = tl.zeros_like(re)
    if COMPLEX:
        re, im = re - ai * bi, ar * bi + ai * br
    return re, im


@triton.jit
def _load_planes(ptr, row, cols, here, COMPLEX: tl.constexpr):
    """Rows of a tensor [rows cols] -> real and imaginary part, which lie side by side."""
    tile = tl.load(ptr + row[:, None] * cols[1] + cols[0][None, :], mask=here, other=0.0).to(tl.float32)
    re, im = tile, tl.zeros_like(tile)
    if COMPLEX:
        re, im = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 2, 2))
    return re, im


@triton.jit
def _store_planes(ptr, row, cols, here, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.join(re, im).reshape(re.shape[0], re.shape[1] * 2)
    tl.store(ptr + row[:, None] * cols[1] + cols[0][None, :], re, mask=here)


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
    tl.store(
        others_ptr + row[:, None] * N + slot[None, :], tl.sum(tl.where(other, square[:, None, :], 0.0), 2), mask=here
    )
    tl.store(norm_ptr + row, tl.sum(square, 1), mask=row < rows)


@walker
def _summary(
    value_ptr, rate_ptr, a_ptr, write_ptr, others_ptr, norm_ptr, P_ptr, R_ptr,  # tensors
    T, V, G, N, segments, length, first, step,  # sizes; token t lies at first + step t
    GATE: tl.constexpr, KEYED: tl.constexpr, ADJOINT: tl.constexpr,  # variants
    R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr, UNROLL: tl.constexpr,  # tile
):  # fmt: skip
    """What a segment does to the state, S -> P * S + R; or, right to left, to the gradient of the state."""
    tile, b, segment, group, channel, in_v, slot, in_n, start, stop = _place(
        V, G, N, T, segments, length, R, BLOCK_N, W
    )
    order, columns, rows = (b * T + first, step), (channel, in_v, V), (slot, in_n, N, group, G)
    a = 0.0
    if not KEYED:
        a = _load_state(a_ptr, 0, tile, group, V, G, N, R, BLOCK_N, W)
    S = tl.zeros((R, BLOCK_N, W), tl.float32)
    P = tl.full((R, BLOCK_N, W), 1.0, tl.float32)
    blocks = tl.cdiv(stop - start, UNROLL)
    for i in range(0, blocks):
        t0 = start + (blocks - 1 - i if ADJOINT else i) * UNROLL
        values = _channels(value_ptr, order, t0, stop, columns, UNROLL)
        rates = _channels(rate_ptr, order, t0, stop, columns, UNROLL)
        writes = _slots(write_ptr, order, t0, stop, rows, UNROLL)
        others, norms = _norms(others_ptr, norm_ptr, order, t0, stop, rows, KEYED, UNROLL)
        if ADJOINT:
            for u in tl.static_range(UNROLL - 1, -1, -1):
                A, _ = GATE(rates[u], a, others[u], norms[u])
                S = A * (S + writes[u] * values[u][:, None, :])
                P = P * A
        else:
            for u in tl.static_range(UNROLL):
                A, scale = GATE(rates[u], a, others[u], norms[u])
                S = A * S + writes[u] * (scale * values[u])[:, None, :]
                P = P * A
    at = b * segments + segment
    _store_state(P, P_ptr, at, tile, group, V, G, N, R, BLOCK_N, W)
    _store_state(S, R_ptr, at, tile, group, V, G, N, R, BLOCK_N, W)


@triton.jit
def _combine(
    P_ptr, R_ptr, enter_ptr, size, segments,  # tensors and sizes
    COMPLEX: tl.constexpr, HAS_STATE: tl.constexpr, ADJOINT: tl.constexpr,  # variants
    BLOCK: tl.constexpr,  # tile
):  # fmt: skip
    """R [B segments size] becomes the state that enters each segment; enter [B size] enters the first one walked."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b, offs = pid // blocks + tl.zeros((1,), tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)
    cols, here = (offs, size), (offs < size)[None, :]
    re = tl.zeros((1, BLOCK // 2 if COMPLEX else BLOCK), tl.float32)
    im = re
    if HAS_STATE:
        re, im = _load_planes(enter_ptr, b, cols, here, COMPLEX)
    for i in range(0, segments):
        at = b * segments + (segments - 1 - i if ADJOINT else i)
        Pr, Pi = _load_planes(P_ptr, at, cols, here, COMPLEX)
        Rr, Ri = _load_planes(R_ptr, at, cols, here, COMPLEX)
        _store_planes(R_ptr, at, cols, here, re, im, COMPLEX)
        re, im = _times(Pr, Pi, re, im, COMPLEX)
        re, im = re + Rr, im + Ri


@walker
def _emit(
    x_ptr, rate_ptr, a_ptr, k_ptr, q_ptr, others_ptr, norm_ptr, enter_ptr, y_ptr, state_ptr, kept_ptr,  # tensors
    T, V, G, N, segments, length, first, step,  # sizes; token t lies at first + step t
    GATE: tl.constexpr, KEYED: tl.constexpr, HAS_STATE: tl.constexpr, KEEP: tl.constexpr,  # variants
    R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr, UNROLL: tl.constexpr, STRETCH: tl.constexpr,  # tile
):  # fmt: skip
    """y of one segment, left to right; the state at the start of every stretch; the state after the last token."""
    tile, b, segment, group, channel, in_v, slot, in_n, start, stop = _place(
        V, G, N, T, segments, length, R, BLOCK_N, W
    )
    order, columns, rows = (b * T + first, step), (channel, in_v, V), (slot, in_n, N, group, G)
    a = 0.0
    if not KEYED:
        a = _load_state(a_ptr, 0, tile, group, V, G, N, R, BLOCK_N, W)
    S = tl.zeros((R, BLOCK_N, W), tl.float32)
    if HAS_STATE:
        S = _load_state(enter_ptr, b * segments + segment, tile, group, V, G, N, R, BLOCK_N, W)
    for t0 in range(start, stop, UNROLL):
        if KEEP:  # noqa: SIM102, decided when compiled
            if t0 % STRETCH == 0:
                at = b * tl.cdiv(T, STRETCH) + t0 // STRETCH
                _store_state(S, kept_ptr, at, tile, group, V, G, N, R, BLOCK_N, W)
        xs = _channels(x_ptr, order, t0, stop, columns, UNROLL)
        rates = _channels(rate_ptr, order, t0, stop, columns, UNROLL)
        ks = _slots(k_ptr, order, t0, stop, rows, UNROLL)
        qs = _slots(q_ptr, order, t0, stop, rows, UNROLL)
        others, norms = _norms(others_ptr, norm_ptr, order, t0, stop, rows, KEYED, UNROLL)
        for u in tl.static_range(UNROLL):
            A, scale = GATE(rates[u], a, others[u], norms[u])
            S = A * S + ks[u] * (scale * xs[u])[:, None, :]
            row = b * T + first + step * (t0 + u)
            tl.store(y_ptr + row * V + channel, tl.sum(qs[u] * S, 1), mask=in_v & (t0 + u < stop))
    if stop == T:
        _store_state(S, state_ptr, b, tile, group, V, G, N, R, BLOCK_N, W)


@walker
def _adjoint(
    x_ptr, rate_ptr, a_ptr, k_ptr, q_ptr, others_ptr, norm_ptr, dy_ptr, kept_ptr, enter_ptr, scratch_ptr,  # read
    dx_ptr, drate_ptr, da_ptr, dk_ptr, dq_ptr, dinitial_ptr,  # written
    B, T, V, G, N, segments, length, first, step,  # sizes; token t lies at first + step t
    GATE: tl.constexpr, GRADIENTS: tl.constexpr, KEYED: tl.constexpr,  # variants
    R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr, UNROLL: tl.constexpr, STRETCH: tl.constexpr,  # tile
):  # fmt: skip
    """All gradients of one segment, right to left, a stretch at a time.

    A stretch is walked three times: left to right, leaving S at every block of UNROLL tokens in scratch; then, block by
    block from the right, left to right again with every S in registers, and back. H is the gradient of S_t by all that
    comes after y_t, G = H + q dyᵀ that of S_t itself.
    """
    tile, b, segment, group, channel, in_v, slot, in_n, start, stop = _place(
        V, G, N, T, segments, length, R, BLOCK_N, W
    )
    order, columns, rows = (b * T + first, step), (channel, in_v, V), (slot, in_n, N, group, G)
    a = 0.0
    if not KEYED:
        a = _load_state(a_ptr, 0, tile, group, V, G, N, R, BLOCK_N, W)
    at = b * segments + segment
    H = _load_state(enter_ptr, at, tile, group, V, G, N, R, BLOCK_N, W)
    da = tl.zeros((R, BLOCK_N, W), tl.float32)
    scratch = at * (STRETCH // UNROLL)
    stretches = tl.cdiv(stop - start, STRETCH)
    for i in range(0, stretches):
        left = start + (stretches - 1 - i) * STRETCH
        right = tl.minimum(left + STRETCH, stop)
        kept = b * tl.cdiv(T, STRETCH) + left // STRETCH
        S = _load_state(kept_ptr, kept, tile, group, V, G, N, R, BLOCK_N, W)
        tl.debug_barrier()  # nobody still reads the last stretch's scratch
        _store_state(S, scratch_ptr, scratch, tile, group, V, G, N, R, BLOCK_N, W)
        for t0 in range(left, right - UNROLL, UNROLL):
            xs = _channels(x_ptr, order, t0, right, columns, UNROLL)
            rates = _channels(rate_ptr, order, t0, right, columns, UNROLL)
            ks = _slots(k_ptr, order, t0, right, rows, UNROLL)
            others, norms = _norms(others_ptr, norm_ptr, order, t0, right, rows, KEYED, UNROLL)
            for u in tl.static_range(UNROLL):
                A, scale = GATE(rates[u], a, others[u], norms[u])
                S = A * S + ks[u] * (scale * xs[u])[:, None, :]
            block = scratch + (t0 - left) // UNROLL + 1
            _store_state(S, scratch_ptr, block, tile, group, V, G, N, R, BLOCK_N, W)
        tl.debug_barrier()  # scratch is written by one thread and may be read by another
        blocks = tl.cdiv(right - left, UNROLL)
        for j in range(0, blocks):
            block = blocks - 1 - j
            t0 = left + block * UNROLL
            S = _load_state(scratch_ptr, scratch + block, tile, group, V, G, N, R, BLOCK_N, W)
            xs = _channels(x_ptr, order, t0, right, columns, UNROLL)
            rates = _channels(rate_ptr, order, t0, right, columns, UNROLL)
            ks = _slots(k_ptr, order, t0, right, rows, UNROLL)
            others, norms = _norms(others_ptr, norm_ptr, order, t0, right, rows, KEYED, UNROLL)
            qs = _slots(q_ptr, order, t0, right, rows, UNROLL)
            dys = _channels(dy_ptr, order, t0, right, columns, UNROLL)
            states = (S,)
            for u in tl.static_range(UNROLL):
                A, scale = GATE(rates[u], a, others[u], norms[u])
                S = A * S + ks[u] * (scale * xs[u])[:, None, :]
                states = states + (S,)
            for u in tl.static_range(UNROLL - 1, -1, -1):
                dy = dys[u][:, None, :]
                H = H + qs[u] * dy
                A, scale = GATE(rates[u], a, others[u], norms[u])
                dx, drate, dk, da_t = GRADIENTS(H, states[u], A, xs[u], rates[u], a, ks[u], norms[u])
                H = A * H
                if not KEYED:
                    da += da_t
                live, row = t0 + u < right, b * T + first + step * (t0 + u)
                tl.store(dx_ptr + row * V + channel, dx, mask=in_v & live)
                tl.store(drate_ptr + row * V + channel, drate, mask=in_v & live)
                partial = ((tile * B * T + row) * G + group) * N + slot
                tl.store(dk_ptr + partial, tl.sum(tl.sum(dk, 0), 1), mask=in_n & live)
                tl.store(dq_ptr + partial, tl.sum(tl.sum(states[u + 1] * dy, 0), 1), mask=in_n & live)
    if not KEYED:
        _store_state(da, da_ptr, at, tile, group, V, G, N, R, BLOCK_N, W)
    if start == 0:
        _store_state(H, dinitial_ptr, b, tile, group, V, G, N, R, BLOCK_N, W)


# The diagonal scan: K = 1, so there is nothing to reuse and bytes decide


@triton.jit
def _turn(phase):
    """cos and sin by their series, after whole quarter turns are taken off: the library's spill on their rare path."""
    quarters = tl.floor(phase * 0.6366197723675814 + 0.5)
    x = phase - quarters * 1.5703125  # pi / 2 in three parts, the first two short enough for exact products
    x = (x - quarters * 4.837512969970703e-4) - quarters * 7.549789948768648e-8
    z = x * x
    sin = x * (1 - z / 6 * (1 - z / 20 * (1 - z / 42 * (1 - z / 72))))
    cos = 1 - z / 2 * (1 - z / 12 * (1 - z / 30 * (1 - z / 56 * (1 - z / 90))))
    quarter = quarters.to(tl.int32)
    odd = quarter % 2 != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter + 1) & 2 != 0, -cos, cos), tl.where(quarter & 2 != 0, -sin, sin)


@triton.jit
def _polar(log_re, log_im, COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr):
    """exp of a log decay in two planes, an exact 0 for −inf."""
    re = tl.exp2(log_re * LOG2E)
    im = tl.zeros_like(re)
    if COMPLEX:
        cos, sin = _turn(log_im)
        re, im = re * cos, re * (-sin if CONJUGATE else sin)
    return re, im


@triton.jit
def _then(P, R, E, F, P2, R2, E2, F2):
    """S -> P S + R, then the same with P2, R2. E, F is what has acted before the last of the rows so far."""
    return P2 * P, P2 * R + R2, E2 * P, E2 * R + F2


@triton.jit
def _then_complex(Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi, Pr2, Pi2, Rr2, Ri2, Er2, Ei2, Fr2, Fi2):
    return (
        Pr2 * Pr - Pi2 * Pi,
        Pr2 * Pi + Pi2 * Pr,
        Pr2 * Rr - Pi2 * Ri + Rr2,
        Pr2 * Ri + Pi2 * Rr + Ri2,
        Er2 * Pr - Ei2 * Pi,
        Er2 * Pi + Ei2 * Pr,
        Er2 * Rr - Ei2 * Ri + Fr2,
        Er2 * Ri + Ei2 * Rr + Fi2,
    )


@triton.jit
def _last(tile, ROWS: tl.constexpr):
    """[ROWS D] -> [1 D]: the last row."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], tile, 0.0), 0)[None, :]


@triton.jit(do_not_specialize=RUNTIME[1:])
def _diagonal(
    value_ptr, log_ptr, y_ptr, initial_ptr, enter_ptr, P_ptr, R_ptr, out_ptr, dlog_ptr, state_ptr,  # tensors
    T, D, segments, length, first, step,  # sizes; D counts both planes; token t lies at first + step t
    COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, EMIT: tl.constexpr,  # variants
    HAS_ENTER: tl.constexpr, HAS_INITIAL: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr,  # tile
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t, or its adjoint H -> conj(a_t) (H + dy_t), walked from the other end.

    A tile is ROWS stretches of UNROLL tokens, one a row. Each row is walked by itself, rows are joined by one scan, and
    the tokens, still in registers, are walked again from the state that enters their row.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    tile, segment, b = pid % tiles, pid // tiles % segments, pid // (tiles * segments)
    channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    cols, in_d, base = (channel, D), (channel < D)[None, :], b * T + first
    WIDTH: tl.constexpr = BLOCK_D // 2 if COMPLEX else BLOCK_D
    at = b * segments + segment + tl.zeros((1,), tl.int64)
    start = (segment * length).to(tl.int32)
    stop = tl.minimum(start + length, T)
    one, none = tl.full((ROWS, WIDTH), 1.0, tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    hr, hi = tl.zeros((1, WIDTH), tl.float32), tl.zeros((1, WIDTH), tl.float32)
    wr, wi = hr + 1.0, hi  # the product of all gates, for the summary
    if HAS_ENTER:
        hr, hi = _load_planes(enter_ptr, at, cols, in_d, COMPLEX)
    for t0 in range(start, stop, ROWS * UNROLL):
        t = t0 + tl.arange(0, ROWS) * UNROLL
        gates, values = (), ()
        for u in tl.static_range(UNROLL):
            row, here = base + step * (t + u), (t + u < stop)[:, None] & in_d
            gates = gates + (_load_planes(log_ptr, row, cols, here, COMPLEX),)
            values = values + (_load_planes(value_ptr, row, cols, here, COMPLEX),)
        Pr, Pi, Rr, Ri = one, none, none, none
        for u in tl.static_range(UNROLL):
            ar, ai = _polar(gates[u][0], gates[u][1], COMPLEX, ADJOINT)
            if ADJOINT:
                Rr, Ri = _times(ar, ai, Rr + values[u][0], Ri + values[u][1], COMPLEX)
            else:
                Rr, Ri = _times(ar, ai, Rr, Ri, COMPLEX)
                Rr, Ri = Rr + values[u][0], Ri + values[u][1]
            Pr, Pi = _times(ar, ai, Pr, Pi, COMPLEX)
        if COMPLEX:
            Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi = tl.associative_scan(
                (Pr, Pi, Rr, Ri, one, none, none, none), 0, _then_complex
            )
        else:
            Pr, Rr, Er, Fr = tl.associative_scan((Pr, Rr, one, none), 0, _then)
            Pi, Ri, Ei, Fi = none, none, none, none
        if EMIT:
            sr, si = _times(Er, Ei, hr, hi, COMPLEX)
            sr, si = sr + Fr, si + Fi
            for u in tl.static_range(UNROLL):
                row, here = base + step * (t + u), (t + u < stop)[:, None] & in_d
                ar, ai = _polar(gates[u][0], gates[u][1], COMPLEX, ADJOINT)
                if ADJOINT:
                    sr, si = sr + values[u][0], si + values[u][1]
                    _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
                    before = here & (t + u + 1 < T)[:, None]
                    br, bi = _load_planes(y_ptr, row + step, cols, before, COMPLEX)
                    if HAS_INITIAL:
                        ir, ii = _load_planes(initial_ptr, b + tl.zeros((1,), tl.int64), cols, in_d, COMPLEX)
                        br, bi = (
                            tl.where((t + u + 1 == T)[:, None], ir, br),
                            tl.where((t + u + 1 == T)[:, None], ii, bi),
                        )
                    sr, si = _times(ar, ai, sr, si, COMPLEX)
                    gr, gi = _times(sr, si, br, -bi, COMPLEX)
                    _store_planes(dlog_ptr, row, cols, here, gr, gi, COMPLEX)
                else:
                    sr, si = _times(ar, ai, sr, si, COMPLEX)
                    sr, si = sr + values[u][0], si + values[u][1]
                    _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
        pr, pi = _last(Pr, ROWS), _last(Pi, ROWS)
        hr, hi = _times(pr, pi, hr, hi, COMPLEX)
        hr, hi = hr + _last(Rr, ROWS), hi + _last(Ri, ROWS)
        if not EMIT:
            wr, wi = _times(pr, pi, wr, wi, COMPLEX)
    if EMIT:
        if stop == T:
            _store_planes(state_ptr, b + tl.zeros((1,), tl.int64), cols, in_d, hr, hi, COMPLEX)
    else:
        _store_planes(P_ptr, at, cols, in_d, wr, wi, COMPLEX)
        _store_planes(R_ptr, at, cols, in_d, hr, hi, COMPLEX)


# Plan and launch


class Plan(NamedTuple):
    """How one walk is cut up: tile [R N W] of `warps` warps, UNROLL tokens at a time, segments of `length` tokens."""

    R: int
    BLOCK_N: int
    W: int
    UNROLL: int
    warps: int
    tiles: int
    segments: int
    length: int

    @property
    def tile(self) -> dict[str, int]:
        """What every program takes by name."""
        return {"R": self.R, "BLOCK_N": self.BLOCK_N, "W": self.W, "UNROLL": self.UNROLL, "num_warps": self.warps}


def plan(B: int, T: int, V: int, G: int, N: int, *, processors: int = 132) -> Plan:
    """8 entries of the state a thread, 1 warp a tile; one segment where that fills the machine, else enough for 64 a
    processor: a token's latency hides behind other programs only (measured on an H200, benchmarks/LOG.md).

    Args: sizes; processors of the device.   Returns: Plan.   Raises: NotImplementedError beyond N = 256.
    """
    if N > 256:
        raise NotImplementedError(f"walk: N must be at most 256, got {N}; form='chunked' takes any")
    BLOCK_N = triton.next_power_of_2(N)
    W = 32 // min(4, BLOCK_N)
    warps = max(1, BLOCK_N // 32)
    R = max(1, min(32 // BLOCK_N * warps, triton.next_power_of_2(triton.cdiv(V // G, W))))
    tiles = triton.cdiv(V // G, R * W)
    stretches = triton.cdiv(T, STRETCH)
    programs = B * G * tiles * warps
    segments = 1 if programs >= 12 * processors else triton.cdiv(64 * processors, programs)
    length = triton.cdiv(stretches, min(stretches, segments)) * STRETCH
    return Plan(R, BLOCK_N, W, 4, warps, tiles, triton.cdiv(T, length), length)


class DiagonalPlan(NamedTuple):
    """How a diagonal scan is cut up: tiles of ROWS stretches of UNROLL tokens; segments of `length` tokens."""

    ROWS: int
    UNROLL: int
    BLOCK_D: int
    warps: int
    tiles: int
    segments: int
    length: int

    @property
    def tile(self) -> dict[str, int]:
        return {"ROWS": self.ROWS, "UNROLL": self.UNROLL, "BLOCK_D": self.BLOCK_D, "num_warps": self.warps}


def plan_diagonal(B: int, T: int, D: int, *, itemsize: int = 2, processors: int = 132) -> DiagonalPlan:
    """Rows of 128 bytes, 16 bytes a thread; where rows are few, shorter ones and more stretches side by side; segments,
    which read everything twice, only where processors would still idle (measured on an H200, benchmarks/LOG.md).

    Args: sizes (D counts both planes of complex numbers); bytes of a number; processors.   Returns: DiagonalPlan.
    """
    few = B * D * itemsize < 2 * 128 * processors
    warps, row, UNROLL = (8, 32, 8) if few else (4, 128, 16 // itemsize)
    BLOCK_D = max(2, min(row // itemsize, triton.next_power_of_2(D)))
    ROWS = min(32 * warps * 16 // itemsize // BLOCK_D, triton.next_power_of_2(triton.cdiv(T, UNROLL)))
    tiles, span = triton.cdiv(D, BLOCK_D), ROWS * UNROLL
    spans, programs = triton.cdiv(T, span), B * tiles
    segments = 1 if 2 * programs >= processors else triton.cdiv(2 * processors, programs)
    length = triton.cdiv(spans, min(spans, segments)) * span
    return DiagonalPlan(ROWS, UNROLL, BLOCK_D, warps, tiles, triton.cdiv(T, length), length)


RULES = {"selective": (_selective_gate, _selective_gradients), "online": (_online_gate, _online_gradients)}


class _Walk:
    """One call: the tensors that all programs read, laid out for them, and what they are launched with."""

    def __init__(self, rule: str, reverse: bool, x: Tensor, rate: Tensor, a: Tensor, k: Tensor) -> None:
        (self.B, self.T, self.V), (self.G, self.N) = x.shape, k.shape[2:]
        self.plan = plan(self.B, self.T, self.V, self.G, self.N, processors=_processors(x.device))
        self.gate, self.gradients = RULES[rule]
        self.keyed = rule == "online"
        self.others, self.norm = _key_norms(k) if self.keyed else (k, k)
        self.x, self.rate, self.k = x.contiguous(), rate.contiguous(), k.contiguous()
        self.a = (a.float() * LOG2E.value).T.contiguous()  # [N V]
        first, step = (self.T - 1, -1) if reverse else (0, 1)
        self.sizes = (self.T, self.V, self.G, self.N, self.plan.segments, self.plan.length, first, step)
        self.grid = (self.plan.tiles * self.G * self.plan.segments * self.B,)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def enter(self, value: Tensor, write: Tensor, initial: Tensor | None, adjoint: bool) -> Tensor | None:
        """The states [B segments N V] that enter the segments, from `initial` [B N V], which enters the first."""
        if self.plan.segments == 1:
            return initial
        R = self.new(self.B, self.plan.segments, self.N, self.V)
        P = torch.empty_like(R)
        tensors = (value, self.rate, self.a, write, self.others, self.norm, P, R)
        _summary[self.grid](*tensors, *self.sizes, self.gate, self.keyed, adjoint, **self.plan.tile)
        _join(P, R, initial, False, adjoint)
        return R


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _join(P: Tensor, R: Tensor, initial: Tensor | None, complex_: bool, adjoint: bool) -> None:
    """Turn R [B segments ...] into the states that enter the segments."""
    B, segments = R.shape[:2]
    size, block = R[0, 0].numel(), 256
    grid = (B * triton.cdiv(size, block),)
    _combine[grid](P, R, initial, size, segments, complex_, initial is not None, adjoint, block, num_warps=2)


def _key_norms(k: Tensor) -> tuple[Tensor, Tensor]:
    """For k [B T G N]: the sum of the other slots' squares [B T G N], and the sum of all [B T G]."""
    k = k.contiguous()
    rows, N = k.numel() // k.shape[-1], k.shape[-1]
    others, norm = torch.empty_like(k, dtype=torch.float32), k.new_empty(k.shape[:3], dtype=torch.float32)
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_C, warps = max(1, 4096 // BLOCK_N**2), max(4, BLOCK_N // 16)
    _others[(triton.cdiv(rows, BLOCK_C),)](k, others, norm, rows, N, BLOCK_C, BLOCK_N, num_warps=warps)
    return others, norm


# Operators, one a direction. States are [B N V] here, `kept` [B stretches N V]


@torch.library.custom_op("recur::walk", mutates_args=())
def _walk(
    x: Tensor,
    rate: Tensor,
    a: Tensor,
    k: Tensor,
    q: Tensor,
    initial: Tensor | None,
    rule: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B T V], the final state, and with `keep` the state at the start of every stretch; k and q are [B T G N]."""
    y, state, kept = _fake_walk(x, rate, a, k, q, initial, rule, reverse, keep)
    with torch.cuda.device_of(x):
        walk = _Walk(rule, reverse, x, rate, a, k)
        enter = walk.enter(walk.x, walk.k, initial, False)
        tensors = (walk.x, walk.rate, walk.a, walk.k, q.contiguous(), walk.others, walk.norm, enter, y, state, kept)
        variant = (walk.gate, walk.keyed, enter is not None, keep)
        _emit[walk.grid](*tensors, *walk.sizes, *variant, STRETCH=STRETCH, **walk.plan.tile)
    return y, state, kept


@_walk.register_fake
def _fake_walk(
    x: Tensor,
    rate: Tensor,
    a: Tensor,
    k: Tensor,
    q: Tensor,
    initial: Tensor | None,
    rule: str,
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, V), N = x.shape, k.shape[3]
    state = x.new_empty((B, N, V), dtype=torch.float32)
    kept = x.new_empty((B, (T + STRETCH - 1) // STRETCH if keep else 0, N, V), dtype=torch.float32)
    return x.new_empty((B, T, V)), state, kept


@torch.library.custom_op("recur::walk_adjoint", mutates_args=())
def _walk_adjoint(
    dy: Tensor, dstate: Tensor, x: Tensor, rate: Tensor, a: Tensor, k: Tensor, q: Tensor, kept: Tensor, rule: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, rate, a, k, q and the initial state."""
    dx, drate, *_, dinitial = _fake_adjoint(dy, dstate, x, rate, a, k, q, kept, rule, reverse)
    q, dy, dstate = q.contiguous(), dy.contiguous(), dstate.contiguous()
    with torch.cuda.device_of(x):
        walk = _Walk(rule, reverse, x, rate, a, k)
        p, B, N, V = walk.plan, walk.B, walk.N, walk.V
        dk, dq = (walk.new(p.tiles, *k.shape) for _ in range(2))
        da = walk.new(B * p.segments, N, 0 if walk.keyed else V)
        enter = walk.enter(dy, q, dstate, True)
        scratch = walk.new(B, p.segments, STRETCH // p.UNROLL, N, V)
        read = (walk.x, walk.rate, walk.a, walk.k, q, walk.others, walk.norm, dy, kept, enter, scratch)
        written = (dx, drate, da, dk, dq, dinitial)
        variant = (walk.gate, walk.gradients, walk.keyed)
        _adjoint[walk.grid](*read, *written, B, *walk.sizes, *variant, STRETCH=STRETCH, **p.tile)
    return dx, drate, da.sum(0).T.to(a.dtype).contiguous(), dk.sum(0).to(k.dtype), dq.sum(0).to(q.dtype), dinitial


@_walk_adjoint.register_fake
def _fake_adjoint(
    dy: Tensor, dstate: Tensor, x: Tensor, rate: Tensor, a: Tensor, k: Tensor, q: Tensor, kept: Tensor, rule: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, drate, da, dk, dq = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, rate, a, k, q))
    return dx, drate, da, dk, dq, torch.empty_like(dstate, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, rate, a, k, q, initial, ctx.rule, ctx.reverse, _ = inputs
    ctx.starts = initial is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rate, a, k, q, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, rate, a, k, q, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dstate = x.new_zeros((x.shape[0], k.shape[3], x.shape[2]), dtype=torch.float32) if dstate is None else dstate
    *grads, dinitial = _walk_adjoint(dy, dstate, x, rate, a, k, q, kept, ctx.rule, ctx.reverse)
    return *grads, dinitial if ctx.starts else None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("walk: form='triton' has first derivatives only; form='chunked' has second ones")


_walk.register_autograd(_gradients, setup_context=_save)
_walk_adjoint.register_autograd(_refuse)


def _run_diagonal(
    value: Tensor, log_decay: Tensor, y: Tensor, initial: Tensor | None, enter: Tensor | None, outs: tuple[Tensor, ...],
    complex_: bool, reverse: bool, adjoint: bool,
) -> None:  # fmt: skip
    """Launch the scan or its adjoint; outs are (y, state) or (dx, dlog_decay, dinitial)."""
    B, T, D = value.shape
    p = plan_diagonal(B, T, D, itemsize=value.element_size(), processors=_processors(value.device))
    sizes = (T, D, p.segments, p.length, *((T - 1, -1) if reverse != adjoint else (0, 1)))
    grid = (p.tiles * p.segments * B,)
    out, dlog, state = outs if adjoint else (outs[0], outs[0], outs[1])
    with torch.cuda.device_of(value):
        P = R = value
        if p.segments > 1:
            P, R = (value.new_empty((B, p.segments, D), dtype=torch.float32) for _ in range(2))
            tensors = (value, log_decay, y, initial, enter, P, R, out, dlog, state)
            _diagonal[grid](*tensors, *sizes, complex_, adjoint, False, False, False, **p.tile)
            _join(P, R, enter, complex_, False)
            enter = R
        tensors = (value, log_decay, y, initial, enter, P, R, out, dlog, state)
        has = (enter is not None, initial is not None)
        _diagonal[grid](*tensors, *sizes, complex_, adjoint, True, *has, **p.tile)


@torch.library.custom_op("recur::diagonal", mutates_args=())
def _diagonal_scan(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y [B T D] and the final state [B D]; with complex_ both planes of a number lie side by side in D."""
    x = x.contiguous()
    y, state = _fake_diagonal(x, log_decay, initial, complex_, reverse)
    _run_diagonal(x, log_decay.contiguous(), y, None, initial, (y, state), complex_, reverse, False)
    return y, state


@_diagonal_scan.register_fake
def _fake_diagonal(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)


@torch.library.custom_op("recur::diagonal_adjoint", mutates_args=())
def _diagonal_adjoint(
    dy: Tensor,
    dstate: Tensor | None,
    log_decay: Tensor,
    y: Tensor,
    initial: Tensor | None,
    complex_: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_decay and the initial state."""
    dy, log_decay = dy.contiguous(), log_decay.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    outs = _fake_diagonal_adjoint(dy, dstate, log_decay, y, initial, complex_, reverse)
    _run_diagonal(dy, log_decay, y, initial, dstate, outs, complex_, reverse, True)
    return outs


@_diagonal_adjoint.register_fake
def _fake_diagonal_adjoint(
    dy: Tensor,
    dstate: Tensor | None,
    log_decay: Tensor,
    y: Tensor,
    initial: Tensor | None,
    complex_: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dlog = log_decay.new_empty(log_decay.shape)
    return dy.new_empty(dy.shape), dlog, dy.new_empty((dy.shape[0], dy.shape[2]), dtype=torch.float32)


def _save_diagonal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, log_decay, initial, ctx.complex, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_decay, output[0], initial)


def _diagonal_gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    log_decay, y, initial = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dx, dlog, dinitial = _diagonal_adjoint(dy, dstate, log_decay, y, initial, ctx.complex, ctx.reverse)
    return dx, dlog, None if initial is None else dinitial, None, None


_diagonal_scan.register_autograd(_diagonal_gradients, setup_context=_save_diagonal)
_diagonal_adjoint.register_autograd(_refuse)


# Doors


def selective(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Mamba's scan, arguments as `selective_scan` with B and C [B T N] | [B T G N]. Returns y and the state [B V N]."""
    return _run("selective", x, delta, A, B, C, initial, reverse)


def online(
    x: Tensor, rate: Tensor, k: Tensor, q: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Longhorn's diagonal scan, arguments as `online_scan`. Returns y and the state [B V N]."""
    return _run("online", x, rate, x.new_empty((0, k.shape[-1])), k, q, initial, reverse)


def diagonal(x: Tensor, log_decay: Tensor, initial: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The gated diagonal scan, arguments as `gated_scan`. Returns y and the state [B *]."""
    inputs = [t for t in (x, log_decay, initial) if t is not None]
    _check_width(inputs)
    complex_ = x.is_complex() or log_decay.is_complex()
    log_decay = log_decay.expand(x.shape)
    number = torch.complex64 if complex_ else torch.float32
    if x.numel() == 0:
        state = (
            x.new_zeros((x.shape[0], *x.shape[2:]), dtype=number) if initial is None else initial.to(number, copy=True)
        )
        return x.to(number) if complex_ else x.clone(), state
    start = None if initial is None else initial.to(number)
    if complex_:
        x, log_decay = (torch.view_as_real(t.to(number)) for t in (x, log_decay))
        start = None if start is None else torch.view_as_real(start)
    flat = None if start is None else start.reshape(x.shape[0], -1)
    rows = (x.shape[0], x.shape[1], -1)
    y, state = _diagonal_scan(x.reshape(rows), log_decay.reshape(rows), flat, complex_, reverse)
    y, state = y.reshape(x.shape), state.reshape(x.shape[0], *x.shape[2:])
    return (torch.view_as_complex(y), torch.view_as_complex(state)) if complex_ else (y, state)


def _run(
    rule: str, x: Tensor, rate: Tensor, a: Tensor, k: Tensor, q: Tensor, initial: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    inputs = [t for t in (x, rate, a, k, q, initial) if t is not None]
    if any(t.dtype == torch.float64 for t in inputs):
        raise NotImplementedError(
            "walk: form='triton' takes float32 and narrower, got float64; form='chunked' takes it"
        )
    B, T, V = x.shape
    G, N = max(k.shape[2] if k.ndim == 4 else 1, q.shape[2] if q.ndim == 4 else 1), k.shape[-1]
    if T == 0 or B == 0 or V == 0:
        state = x.new_zeros((B, V, N), dtype=torch.float32) if initial is None else initial.float().clone()
        return x.clone(), state
    k, q = (t if t.ndim == 4 else t[:, :, None].expand(B, T, G, N) for t in (k, q))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    state = None if initial is None else initial.float().transpose(1, 2).contiguous()
    y, state, _ = _walk(x, rate, a, k, q, state, rule, reverse, keep)
    return y, state.transpose(1, 2)


def _check_width(tensors: list[Tensor]) -> None:
    wide = [t.dtype for t in tensors if t.dtype in (torch.float64, torch.complex128)]
    if wide:
        raise NotImplementedError(f"walk: form='triton' takes float32 and narrower, got {wide[0]}; form='chunked' any")
