"""Elementwise scans, walked: the state stays in registers and time is a loop inside the program.

    S_t = A_t * S_{t-1} + k_t u_tᵀ        y_t = S_tᵀ q_t        entry by entry, S [N V]
    selective:  A = exp(rate a),                         u = rate x        Mamba; rate is its delta
    online:     A = 1 − eps k_n² = kept + eps others_n,  u = eps x         Longhorn; kept = 1 / (1 + rate |k|²)

Legend. B batch, T time, G groups of channels, V channels, N slots of the state. A program owns `R W` neighbouring channels
of one group and all their slots as a tile [R N W], whose last axis and part of N lie across the lanes of a warp while R
lies inside a thread: sums over channels (dk, dq) are then mostly, sums over slots (y, dx, drate) partly, free of shuffles.
UNROLL tokens are loaded before the first of them is used. A stretch is STRETCH tokens: S is kept at the start of each and
the backward replays from there, never inverting a step. Stretches form segments, which run side by side once a first
pass has told what each does to the state: S -> P * S + R.

    summary (segments > 1)   rate, k, x          -> P, R [B segments V N]
    combine (segments > 1)   P, R                -> the state entering each segment
    emit                     x, rate, k, q, S    -> y, final state, S at every stretch
    adjoint                  the same right to left, with q for k and dy for u; gradients instead of y

Gates are only ever multiplied, so a gate of exactly 0 forgets exactly. Partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 64  # tokens from one kept state to the next
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


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
    """The tile, row, segment and group of this program; its channels [R W], slots [N], and the tokens [start, stop)."""
    width = V // G
    tiles = tl.cdiv(width, R * W)
    pid = tl.program_id(0).to(tl.int64)
    tile, group = pid % tiles, pid // tiles % G
    segment, b = pid // (tiles * G) % segments, pid // (tiles * G * segments)
    within = tile * (R * W) + tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    slot = tl.arange(0, BLOCK_N)
    start = (segment * length).to(tl.int32)
    return (
        tile,
        b,
        segment,
        group,
        group * width + within,
        within < width,
        slot,
        slot < N,
        start,
        tl.minimum(start + length, T),
    )


@triton.jit
def _state_ptrs(ptr, row, channel, slot, V, N):
    """Pointers [R N W] to state `row` of a tensor [* V N]."""
    return ptr + row * V * N + channel[:, None, :] * N + slot[None, :, None]


@triton.jit
def _load_channels(ptr, row, channel, in_v, live, V):
    """One token of a tensor [B T V] -> [R W]; zeros where there is no token, which then neither decays nor writes."""
    return tl.load(ptr + row * V + channel, mask=in_v & live, other=0.0).to(tl.float32)


@triton.jit
def _load_slots(ptr, row, slot, in_n, live, N):
    """One token of a tensor [B T G N] -> [1 N 1]."""
    return tl.load(ptr + row * N + slot, mask=in_n & live, other=0.0).to(tl.float32)[None, :, None]


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
def _summary(
    value_ptr, rate_ptr, a_ptr, write_ptr, others_ptr, norm_ptr, P_ptr, R_ptr,              # tensors
    T, V, G, N, segments, length, first, step,                                              # sizes; token t lies at first + step t
    GATE: tl.constexpr, KEYED: tl.constexpr, ADJOINT: tl.constexpr,                         # variants
    R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr, UNROLL: tl.constexpr,          # tile
):  # fmt: skip
    """What a segment does to the state, S -> P * S + R; or, right to left, to the gradient of the state."""
    tile, b, segment, group, channel, in_v, slot, in_n, start, stop = _place(
        V, G, N, T, segments, length, R, BLOCK_N, W
    )
    in_tile = in_v[:, None, :] & in_n[None, :, None]
    a = tl.zeros((R, BLOCK_N, W), tl.float32)
    if not KEYED:
        a = tl.load(_state_ptrs(a_ptr, 0, channel, slot, V, N), mask=in_tile, other=0.0)
    S = tl.zeros((R, BLOCK_N, W), tl.float32)
    P = tl.full((R, BLOCK_N, W), 1.0, tl.float32)
    blocks = tl.cdiv(stop - start, UNROLL)
    for i in range(0, blocks):
        t0 = start + (blocks - 1 - i if ADJOINT else i) * UNROLL
        values, rates, writes, others, norms = (), (), (), (), ()
        for u in tl.static_range(UNROLL):
            live = t0 + u < stop
            row = b * T + first + step * (t0 + u)
            values = values + (_load_channels(value_ptr, row, channel, in_v, live, V),)
            rates = rates + (_load_channels(rate_ptr, row, channel, in_v, live, V),)
            writes = writes + (_load_slots(write_ptr, row * G + group, slot, in_n, live, N),)
            others, norms = _load_makings(
                others, norms, others_ptr, norm_ptr, row * G + group, slot, in_n, live, N, KEYED
            )
        for i_u in tl.static_range(UNROLL):
            u: tl.constexpr = UNROLL - 1 - i_u if ADJOINT else i_u
            A, scale = GATE(rates[u], a, others[u], norms[u])
            if ADJOINT:
                S = A * (S + writes[u] * values[u][:, None, :])
            else:
                S = A * S + writes[u] * (scale * values[u])[:, None, :]
            P = P * A
    at = b * segments + segment
    tl.store(_state_ptrs(P_ptr, at, channel, slot, V, N), P, mask=in_tile)
    tl.store(_state_ptrs(R_ptr, at, channel, slot, V, N), S, mask=in_tile)
