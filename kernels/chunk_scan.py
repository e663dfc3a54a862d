"""The matrix-state scan in chunks: its algebra and notation, the records that its kernels take, and what they share.

    S_t = a_t S_{t-1} + k_t u_tᵀ        y_t = S_tᵀ q_t

Notation
    B T H       batch, time, heads; K, V rows and columns of the state S
    C           tokens per chunk; chunks begin at fixed places of a row, so every kernel finds the same ones
    chunk_head  number of a chunk of one head, chunk · H + h; a tensor [chunks H ...] has one entry for each
    segment     consecutive chunks of one head, which one program scans with the state in registers
    border      the place between two segments of a row or document; a tensor [borders H ...] has one entry per head
    u           v, or with beta the corrected value β_t (v_t − (a_t S_{t-1})ᵀ k_t) of the delta rule, or with an erase key
                v_t − (a_t S_{t-1})ᵀ e_t, without a_t if it reads from the previous state
    error       u / β, which the forward pass keeps for dβ; u itself with an erase key
    decay_in, decay_out, decay_total    see `decay`
    q_in        q · decay_in, k_out = k · decay_out, k_in = k · decay_in, if there is one gate per key channel; otherwise
                they are q, k and k, and decay is applied to their products. Rotated if gates are complex, see `rotate`
    A_qk, A_kk  [C C] decayed scores q_t·k_s and, for the delta rule, k_t·k_s inside a chunk
    A_solve     A_kk (1 + β A_kk)⁻¹; 1 − β A_solve = (1 + β A_kk)⁻¹ is the UT transform (Yang et al. 2024), and
                1 − A_solve β = (1 + A_kk β)⁻¹ gives the error itself, where β is 0 too
    eraser      k, the key under which the delta rule looks up what it corrects; with an erase key e, k_in is e · decay_in
                (decay up to the token before, if it reads from the previous state), A_kk the decayed scores e_t·k_s, and β
                is 1 in all that follows
    KEYS        key channels: K of them, or K / 2 if gates are complex, whose rotation doubles the rows of the state

A chunk that is entered by S computes

    y = q_in S + A_qk u      S <- decay_total S + k_outᵀ u      u = v, or u = β error

with error = (1 − A_solve β) (v − k_in S) and, on the way back, derror = (1 − A_solveᵀ β) du and dβ = rowsum(derror error).
It is linear in S, as is any number of chunks: a segment maps S to Q S + L, with Q [K K], or diagonal without delta
rule. Where the gates of a few chunks before a border multiply to less than 2^FORGOTTEN, whatever enters those chunks is
lost at the border, and the segment behind it needs no map: it begins with zeros that many chunks earlier, a warm-up that
writes nothing. `warm_up` finds the numbers of chunks; maps are computed and combined for the other borders alone. What
is not finite before a warm-up does not reach the segment. The backward pass warms up in the other direction.

The derivative has the shape of the scan in the other direction:

    du = A_qkᵀ dy + k_out dS    dS <- decay_total dS + q_inᵀ dy    dv = du, or dv = β derror, and dS <- dS − k_inᵀ dv
    dq_in = dy Sᵀ    dk_out = u dSᵀ    dk_in = −dv Sᵀ    dA_qk = dy uᵀ    dA_kk = −dv uᵀ    ddecay_total = rowsum(dS S)

With one gate per head, A_qk is decayed pair by pair. With one gate per key channel, q and k are decayed before they are
multiplied, counted from an anchor in the middle of the chunk: q by decay_in / anchor_in and k by decay_out / anchor_out,
where anchor_in · anchor_out = decay_total. That overflows where a chunk forgets too much. Such a chunk is not in range
(`in_range` is 0): its factors are counted from its ends, where none exceeds 1, and its scores are computed token by
token, with products of gates. Kernels that load scores branch on the flag: an unconditional load would be prefetched
into registers.

Kernels, in the order of a training step
    chunk_prepare.cumulative_decay  one gate per head: decay of every chunk
    chunk_prepare.prepare           decayed and rotated q and k; in_range; A_kk; the term of a bonus
    chunk_prepare.scores_exact      A_qk and A_kk of chunks that are not in range
    chunk_prepare.solve_tril        A_solve
    chunk_forward.warm_up           where segments may begin with zeros, and how many chunks earlier
    chunk_forward.forward           y; or the map of a segment; or the state before every chunk
    chunk_forward.combine           the state that enters each segment
    chunk_backward.backward_states  against the direction of the scan: dv, and dS after every chunk; or the map of a segment
    chunk_backward.backward_inputs  every chunk by itself: dq, dk, d log a
    chunk_backward.gradients_exact  what A_qk and A_kk of chunks that are not in range add to dq, dk and d log a
    rotate_backward                 complex gates: from gradients of rotated q and k to those of q, k and phases

More than 256 rows are scanned in PARTS of 128, each a tile of its own: S and dS are tuples of tiles. More than 256
columns are differentiated in BLOCKS, each a program with summands of its own.
"""  # noqa: E501

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from recur.kernels.decay import RESET, gates_of, load_gates, log_before, pair_decay
from recur.kernels.rotate import cos_sin_of, phase_of
from recur.kernels.tiles import LOG2E, load_row, locate_segment, matrix_ptrs, segment_at

# Rows of log_decays [chunks H 4 C]
LOG_IN, CUMULATIVE, LOG_OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BONUS = tl.constexpr(3)  # what a token's bonus adds to its own read: scale q·(bonus k)
LOG_ERASE = tl.constexpr(3)  # without a bonus: log_in of an eraser that reads from the previous state


class Scan(NamedTuple):
    """What every kernel of a scan knows when it is compiled; their argument SCAN."""

    H: int
    K: int  # rows of the state
    V: int
    KEYS: int  # channels of q and k
    GROUPS: int  # groups of heads that share q and k
    GROUPS_IN: int  # groups of heads that share q_in, k_out and k_in
    DECAY: str  # "none"; "scalar", one gate per head; "key", one per key channel
    GATE_ST: int  # strides of the gates over tokens and channels
    GATE_SD: int
    REVERSE: bool  # from right to left
    BEFORE: bool  # tokens read before their own gate is applied
    TIED: bool  # k is 1 − exp(log a)
    ERASE: str  # state that an erase key reads from, "decayed" or "previous"; "none" without one
    DOT: Any  # dtype that matmuls take
    PRECISION: str
    C: int  # tokens per chunk


class Given(NamedTuple):
    """Pointers to tensors of the caller, those that a kernel reads: q, k [B T G KEYS], v [B T H V], gate [B|1 T|1 H
    KEYS|1], complex ones with a last axis of 2, with strides over batch and heads, beta [B T H], bonus [H K], erase
    [B T G KEYS]."""

    q: Any = None
    k: Any = None
    v: Any = None
    gate: Any = None
    gate_sb: Any = None
    gate_sh: Any = None
    beta: Any = None
    bonus: Any = None
    erase: Any = None


class Prepared(NamedTuple):
    """Pointers to what is computed of q, k and gates alone; None where a scan, or a kernel, does not need it."""

    q_in: Any = None  # [B T H K], these three; or those of the caller
    k_out: Any = None
    k_in: Any = None  # for `forward` None where it is k_out
    anchor_in: Any = (
        None  # [chunks H K] of key-wise decay: decay from the entry of a chunk to its anchor, and from there
    )
    anchor_out: Any = None  # to its end
    in_range: Any = None  # [chunks H] of key-wise decay
    chunk_phase: Any = None  # [chunks H KEYS] of complex gates
    state_angle: Any = None  # [B H KEYS] of complex gates
    log_decays: Any = None  # [chunks H 4 C] of one gate per head, or for a bonus
    log_total: Any = None  # [chunks H] of one gate per head
    log_norm: Any = None  # [chunks H] of the delta rule: log2 of what the norm of a chunk's Q cannot exceed
    A_qk: Any = None  # [chunks H C C], of chunks that are not in range
    A_kk: Any = None  # [chunks H C C] of the delta rule, for `solve_tril` alone
    A_solve: Any = None  # [chunks H C C] of the delta rule


class Entry(NamedTuple):
    """Pointers to what enters the segments of a pass: the state or gradient that enters the scan [rows H K V], or one
    per document; at borders without a warm-up what `combine` found [borders H K V], and chunks of warm-up [borders H],
    -1 for none, in the direction of the pass and against it. None where there is one segment, and no gate."""

    initial: Any = None
    states: Any = None
    warm: Any = None
    against: Any = None


@triton.jit
def head_gates(x, first, T, h, cu_ptr, SCAN: tl.constexpr):
    """The gates of one row and head, as `load_gates` takes them."""
    return gates_of(x.gate, first, T, h, x.gate_sb, x.gate_sh, SCAN.GATE_ST, SCAN.GATE_SD, cu_ptr)


@triton.jit
def given_of(x, h, SCAN: tl.constexpr):
    """q, k and the erase key of a head, as `load_tile` takes them; q for a k and k for an erase key that is None."""
    group = h * SCAN.GROUPS // SCAN.H
    q = (x.q, SCAN.GROUPS, group, SCAN.KEYS)
    k = q
    if x.k is not None:
        k = (x.k, SCAN.GROUPS, group, SCAN.KEYS)
    erase = k
    if x.erase is not None:
        erase = (x.erase, SCAN.GROUPS, group, SCAN.KEYS)
    return q, k, erase


@triton.jit
def prepared_of(prepared, h, SCAN: tl.constexpr):
    """q_in, k_out and k_in of a head, as `load_tile` takes them; k_out for a k_in that is None."""
    group = h * SCAN.GROUPS_IN // SCAN.H
    queries, keys = (prepared.q_in, SCAN.GROUPS_IN, group, SCAN.K), (prepared.k_out, SCAN.GROUPS_IN, group, SCAN.K)
    erasers = keys
    if prepared.k_in is not None:
        erasers = (prepared.k_in, SCAN.GROUPS_IN, group, SCAN.K)
    return queries, keys, erasers


@triton.jit
def load_beta(ptr, row, offs, inside, h, H: tl.constexpr):
    """beta of these tokens of a chunk in float32, 0 outside; 1 without beta."""
    beta = tl.full(offs.shape, 1.0, tl.float32)
    if ptr is not None:
        beta = tl.load(ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
    return beta


@triton.jit
def load_log_decay(ptr, chunk_head, C: tl.constexpr, ROW: tl.constexpr):
    """One of the rows [C] of log_decays."""
    return tl.load(ptr + chunk_head * (4 * C) + ROW * C + tl.arange(0, C))


@triton.jit
def head_decay(prepared, chunk_head, SCAN: tl.constexpr):
    """log_in [C] and decay_total of a chunk, of one gate per head; 0 and 1 otherwise."""
    log_in, decay_total = 0.0, 1.0
    if SCAN.DECAY == "scalar":
        log_in = load_log_decay(prepared.log_decays, chunk_head, SCAN.C, LOG_IN)
        decay_total = tl.exp2(tl.load(prepared.log_total + chunk_head))
    return log_in, decay_total


@triton.jit
def load_cumulative(prepared, chunk_head, log_in, SCAN: tl.constexpr):
    """log_in [C] with the token's own gate, of one gate per head."""
    cumulative = log_in
    if SCAN.BEFORE:
        cumulative = load_log_decay(prepared.log_decays, chunk_head, SCAN.C, CUMULATIVE)
    return cumulative


@triton.jit
def load_log_erase(prepared, chunk_head, log_in, SCAN: tl.constexpr):
    """log_in [C] of what an eraser reads, of one gate per head."""
    log = log_in
    if SCAN.ERASE == "previous":
        log = load_log_decay(prepared.log_decays, chunk_head, SCAN.C, LOG_ERASE)
    return log


@triton.jit
def key_log_erase(log_a, log_in, SCAN: tl.constexpr):
    """log_in [C K] of what an eraser reads, of one gate per key channel."""
    log = log_in
    if SCAN.ERASE == "previous":
        log = log_before(log_a.to(tl.float32) * LOG2E, log_in, SCAN.REVERSE, SCAN.DOT)
    return log


@triton.jit
def apply_decay_in(x, log_in, scale, SCAN: tl.constexpr):
    """x [C D] of tokens that read, times decay_in and the scale; of key-wise gates q_in holds both."""
    if SCAN.DECAY == "scalar":
        x = x * (tl.exp2(log_in) * scale)[:, None]
    elif SCAN.DECAY == "none":
        x = x * scale
    return x


@triton.jit
def apply_decay_out(x, prepared, chunk_head, SCAN: tl.constexpr):
    """x [C D] of tokens that write, times decay_out; of key-wise gates k_out holds it."""
    if SCAN.DECAY == "scalar":
        x = x * tl.exp2(load_log_decay(prepared.log_decays, chunk_head, SCAN.C, LOG_OUT))[:, None]
    return x


@triton.jit
def log_anchor(log_total, in_range):
    """[K] log2 of the decay from the entry of a chunk to the anchor from which its factors are counted."""
    return tl.where(in_range != 0, 0.5 * log_total, 0.0)


@triton.jit
def state_offsets(rows, cols, K, WIDTH):
    """Offsets of entries of a state [K WIDTH], and which of them exist."""
    return rows[:, None].to(tl.int64) * WIDTH + cols[None, :], (rows < K)[:, None] & (cols < WIDTH)[None, :]


@triton.jit
def at_anchor(state, prepared, chunk_head, rows, SCAN: tl.constexpr):
    """A state that enters a chunk, as the chunk sees it: at the anchor, decayed by anchor_in; by anchor_out instead, so
    that it only has to pass the first half once more; and both factors [K]. As it is unless decay is key-wise."""
    seen, passing, anchor_in, anchor_out = state, state, 1.0, 1.0
    if SCAN.DECAY == "key":
        anchor_in = tl.load(prepared.anchor_in + chunk_head * SCAN.K + rows, mask=rows < SCAN.K, other=0.0)
        anchor_out = tl.load(prepared.anchor_out + chunk_head * SCAN.K + rows, mask=rows < SCAN.K, other=0.0)
        seen, passing = state * anchor_in[:, None], state * anchor_out[:, None]
    return seen, passing, anchor_in, anchor_out


@triton.jit
def decayed_scores(
    A, mask, gates, prepared, chunk_head, start, offs, inside, log_in, scale,
    SCAN: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """A_qk of products of q_in and k_out [t s], or its transpose [s t]: masked and decayed, with the scale."""
    C: tl.constexpr = SCAN.C
    if SCAN.DECAY == "scalar":
        log_a = load_gates(gates, start, offs, inside, offs, SCAN.K, SCAN.DECAY)
        cumulative = load_cumulative(prepared, chunk_head, log_in, SCAN)
        A = A * (pair_decay(log_a, log_in, cumulative, SCAN.REVERSE, SCAN.BEFORE, TRANSPOSE, SCAN.DOT) * scale)
    elif SCAN.DECAY == "key":
        in_range = tl.load(prepared.in_range + chunk_head) != 0
        A = tl.where(mask, A, 0.0)
        if not in_range:
            if TRANSPOSE:
                ptrs = prepared.A_qk + chunk_head * (C * C) + offs[None, :] * C + offs[:, None]
                exact = tl.load(ptrs, mask=inside[None, :], other=0.0)
            else:
                exact = tl.load(matrix_ptrs(prepared.A_qk, chunk_head, C), mask=inside[:, None], other=0.0)
            A = exact.to(tl.float32)
    else:
        A = tl.where(mask, A, 0.0) * scale
    return A


@triton.jit
def add_scores(y, A_qk, u, prepared, chunk_head, SCAN: tl.constexpr):
    """y + A_qk u [C V], or du + A_qkᵀ dy; with a bonus also what each token reads of its own write."""
    y = tl.dot(A_qk.to(SCAN.DOT), u, y, input_precision=SCAN.PRECISION)
    if SCAN.BEFORE:
        y += load_log_decay(prepared.log_decays, chunk_head, SCAN.C, BONUS)[:, None] * u.to(tl.float32)
    return y


@triton.jit
def solve_error(error, A_solve, beta, SCAN: tl.constexpr):
    """(1 − A_solve β) error [C V]; of its transpose, (1 − A_solveᵀ β) du. β is 1 with an erase key."""
    weighed = -error * beta[:, None] if SCAN.ERASE == "none" else -error
    return tl.dot(A_solve, weighed.to(SCAN.DOT), error, input_precision=SCAN.PRECISION)


# Where segments begin


@triton.jit
def locate_pass(
    entry, slot, h, cu_ptr, T, documents, span, is_Q,
    SCAN: tl.constexpr, RIGHT_TO_LEFT: tl.constexpr, MAP: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """The segment of a program: what `locate_segment` says of it but its borders; chunks ahead of it; the borders where
    the pass enters and leaves it; chunks of warm-up, -1 where none suffice; whether there is nothing to do.

    If MAP it is the segment that is left at border number slot + 1. Its map is needed if that border has no warm-up; of
    the delta rule, Q only if the one where the segment is entered has none either, in the direction of the pass or
    against it.
    """
    wanted = slot + 1
    if MAP:
        slot = segment_at(wanted, cu_ptr, documents, span, RIGHT_TO_LEFT)
    document, left, first, begin, end, chunk, before, own, after = locate_segment(
        slot, cu_ptr, T, documents, span, SCAN.C
    )  # fmt: skip
    passed, ahead = (after, before) if RIGHT_TO_LEFT else (before, after)
    enters, leaves = (left + 1, left) if RIGHT_TO_LEFT else (left, left + 1)
    idle = (own == 0) & (before > 0)  # a slot without tokens
    if MAP:
        idle = idle | (leaves != wanted) | (ahead == 0)
    warm = passed * 0
    if MAP or entry.states is not None:
        warm = tl.where(passed == 0, 0, -1)
    if entry.warm is not None:
        warm = tl.load(entry.warm + enters * SCAN.H + h, mask=(passed > 0) & (idle == 0), other=0)
        if MAP:
            border, other = leaves * SCAN.H + h, enters * SCAN.H + h
            last = tl.load(entry.warm + border, mask=idle == 0, other=0) < 0
            inner = last & (warm < 0)
            if DELTA:
                back = tl.load(entry.against + border, mask=idle == 0, other=0) < 0
                back = back & (tl.load(entry.against + other, mask=(passed > 0) & (idle == 0), other=0) < 0)
                inner = inner | back
            idle = idle | (tl.where(is_Q, inner, last) == 0)
    elif MAP:
        idle = idle | (is_Q & (passed == 0))
    return document, first, begin, end, chunk, own, passed, ahead, enters, leaves, warm, idle


@triton.jit
def entering_state(
    entry, document, border, h, from_initial, from_border, rows, cols, SCAN: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Parts of the state that enters a segment: that of the scan, that of its border, or zeros."""
    S, ptr = (), entry.states if entry.initial is None else entry.initial
    at, given = document * SCAN.H + h, from_initial
    if entry.states is not None:
        at, given = tl.where(from_border, border * SCAN.H + h, at), from_border
        if entry.initial is not None:  # one load: two would take twice the registers
            ptr, given = entry.states if from_border else entry.initial, from_border | from_initial
    for p in tl.static_range(PARTS):
        cell, mask = state_offsets(rows, cols, SCAN.K - p * rows.shape[0], SCAN.V)
        state = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
        if ptr is not None:
            ptrs = ptr + (at * SCAN.K + p * rows.shape[0]) * SCAN.V + cell
            state = tl.load(ptrs, mask=mask & given, other=0.0)
        S += (state,)
    return S


@triton.jit
def where_own(mask, entry, n, own):
    """The mask if chunk n is one of the segment's own, nothing if it is one of its warm-up, which writes nothing."""
    if entry.warm is not None:
        mask = mask & (n >= 0) & (n < own)
    return mask


@triton.jit
def store_chunk_state(
    ptr, state, entry, chunk_head, n, own, rows, cols, SCAN: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Store part P [BLOCK_K BLOCK_V] of the state around chunk n of a segment in a tensor [chunks H K V]."""
    cell, mask = state_offsets(rows, cols, SCAN.K - P * rows.shape[0], SCAN.V)
    ptrs = ptr + (chunk_head * SCAN.K + P * rows.shape[0]) * SCAN.V + cell
    tl.store(ptrs, state.to(ptr.dtype.element_ty), mask=where_own(mask, entry, n, own))


@triton.jit
def store_leaving(ptr, S, at, kept, rows, cols, SCAN: tl.constexpr, WIDTH: tl.constexpr):
    """Store the parts of a state as entry `at` of a tensor [... K WIDTH], where `kept` is true."""
    for p in tl.static_range(len(S)):
        cell, mask = state_offsets(rows, cols, SCAN.K - p * rows.shape[0], WIDTH)
        tl.store(ptr + (at * SCAN.K + p * rows.shape[0]) * WIDTH + cell, S[p], mask=mask & kept)


# Token by token, for chunks that are not in range


@triton.jit
def all_in_range(in_range_ptr, chunk_head, chunk_heads, CHUNKS_PER_PROGRAM: tl.constexpr):
    """Whether none of the chunks has the flag 0; flags of slots without tokens hold anything."""
    offs = chunk_head + tl.arange(0, CHUNKS_PER_PROGRAM)
    flags = tl.load(in_range_ptr + offs, mask=offs < chunk_heads, other=1)
    return tl.sum(tl.where(flags == 0, 1, 0), 0) == 0


@triton.jit
def token_gates(gates, t, offs_k, K, KEYS: tl.constexpr):
    """Log gates of one token [K] and the gates; of complex ones their absolute value."""
    ptr, stride_t, stride_d = gates
    log_a = tl.load(ptr + t * stride_t + offs_k % KEYS * stride_d, mask=offs_k < K, other=0.0).to(tl.float32)
    return log_a, tl.where(log_a <= RESET, 0.0, tl.exp2(log_a * LOG2E))


@triton.jit
def token_phases(gates, t, offs_k, K, KEYS: tl.constexpr):
    """The phases of one token [K]."""
    ptr, stride_t, stride_d = gates
    ptrs = ptr + t * stride_t + offs_k % KEYS * stride_d
    return phase_of(tl.load(ptrs, mask=offs_k < K, other=0.0), tl.load(ptrs + 1, mask=offs_k < K, other=0.0))


@triton.jit
def first_phase(chunk_phase_ptr, chunk_head, offs_k, K, KEYS: tl.constexpr):
    """The phases [K] that the first token of a chunk sees; 0 unless gates are complex."""
    phase = tl.zeros(offs_k.shape, tl.int32)
    if chunk_phase_ptr is not None:
        phase = tl.load(chunk_phase_ptr + chunk_head * KEYS + offs_k % KEYS, mask=offs_k < K, other=0)
    return phase


@triton.jit
def load_rotated(tensor, row, offs_k, phase, K):
    """Key or query of one token [K] in float32; with half as many channels as rows, real and imaginary part of what it
    is when rotated."""
    ptr, heads, head, KEYS = tensor
    if KEYS == K:
        x = load_row(tensor, row, offs_k)
    else:
        cos, sin = cos_sin_of(phase, tl.float32)
        x = tl.load(ptr + (row * heads + head) * KEYS + offs_k % KEYS, mask=offs_k < K, other=0.0).to(tl.float32)
        x = x * tl.where(offs_k < KEYS, cos, -sin)
    return x


@triton.jit
def load_eraser(erase, key, row, offs_k, phase_before, phase, SCAN: tl.constexpr):
    """The eraser of one token [K]: its key, or its erase key, rotated to the phase of what it reads."""
    eraser = key
    if SCAN.ERASE == "previous":
        eraser = load_rotated(erase, row, offs_k, phase_before, SCAN.K)
    elif SCAN.ERASE == "decayed":
        eraser = load_rotated(erase, row, offs_k, phase, SCAN.K)
    return eraser
