"""The matrix-state scan, forward: outputs, states, and the states that enter segments. Notation: `chunk_scan`."""

# Jitted functions take no annotations but constexpr, join tuples with +, and choose at compile time before run time.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.chunk_scan import (
    BONUS,
    LOG_IN,
    LOG_OUT,
    at_anchor,
    decayed_scores,
    head_gates,
    load_log_decay,
    load_log_erase,
    state_offsets,
)
from recur.kernels.tiles import causal, load_tile, locate_segment, matrix_ptrs, off_diagonal, store_tile


@triton.jit
def _enter(
    enter_ptr, b, h, segment, begins, rows, cols,
    SCAN: tl.constexpr, MAP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Parts of the state that enters a segment, zeros where there is no tensor, and as many ones. For the map of a
    segment that of the scan, which enters the first segment, with an identity beside it if it is WIDTH columns wide."""
    V: tl.constexpr = SCAN.V
    S, ones = (), ()
    for p in tl.static_range(PARTS):
        part = rows + p * rows.shape[0]
        _, mask = state_offsets(rows, cols, SCAN.K - p * rows.shape[0], WIDTH)
        state = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
        if enter_ptr is not None:
            entry = enter_ptr + (b * SCAN.H + h if MAP else segment) * (SCAN.K * V)
            given = (mask & (cols < V)[None, :] & begins) if MAP else mask
            state = tl.load(entry + part[:, None] * V + cols[None, :], mask=given, other=0.0)
        if WIDTH > V:
            state += tl.where(part[:, None] + V == cols[None, :], 1.0, 0.0)
        S, ones = S + (state,), ones + (tl.full([rows.shape[0]], 1.0, tl.float32),)
    return S, ones


@triton.jit
def _leave(
    S, decay_product, leave_ptr, decay_product_ptr, segment, b, h, ends, tile, rows, cols,
    SCAN: tl.constexpr, WIDTH: tl.constexpr, EMIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store parts of the state that leaves a segment; with y only of the segment that ends the scan."""
    for p in tl.static_range(PARTS):
        part = rows + p * rows.shape[0]
        cell, mask = state_offsets(rows, cols, SCAN.K - p * rows.shape[0], WIDTH)
        if leave_ptr is not None:
            at = segment
            if EMIT:
                at, mask = b * SCAN.H + h, mask & ends
            tl.store(leave_ptr + (at * SCAN.K + p * rows.shape[0]) * WIDTH + cell, S[p], mask=mask)
        if decay_product_ptr is not None:
            in_rows = (part < SCAN.K) & (tile == 0)
            tl.store(decay_product_ptr + segment * SCAN.K + part, decay_product[p], mask=in_rows)


@triton.jit
def _correct(v, prediction, x, prepared, error_ptr, chunk, n, h, row, offs, inside, cols, SCAN: tl.constexpr):
    """The delta rule in a chunk: u = A_inv β (v − prediction) [C V], prediction = k_in S. Stores the error u / β; β is
    1 with an erase key."""
    H: tl.constexpr = SCAN.H
    C: tl.constexpr = SCAN.C
    DOT: tl.constexpr = SCAN.DOT
    if x.beta is not None:
        beta = tl.load(x.beta + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
    chunk_head = (chunk + n) * H + h
    A_inv = tl.load(matrix_ptrs(prepared.A_inv, chunk_head, C))
    error = v - prediction
    if x.beta is not None:
        u = tl.dot(A_inv, (error * beta[:, None]).to(DOT), input_precision=SCAN.PRECISION)
    else:
        u = tl.dot(A_inv, error.to(DOT), input_precision=SCAN.PRECISION)
    if error_ptr is not None:
        if x.beta is not None:
            A_kk = tl.load(matrix_ptrs(prepared.A_kk, chunk_head, C), mask=inside[:, None], other=0.0)
            error -= tl.dot(A_kk.to(DOT), u.to(DOT), input_precision=SCAN.PRECISION)
        else:
            error = u
        tensor = (error_ptr, H, h, SCAN.V)
        store_tile(tensor, row, offs, inside, cols, error)
    return u


@triton.jit(do_not_specialize=["T", "tiles", "segments", "span"])  # not worth a compilation each
def forward(
    x, prepared,  # Given, with dy for v if BACKWARD; Prepared, with q_in for k_out if BACKWARD
    y_ptr, error_ptr, chunk_states_ptr,  # [B T H V] twice; states before every chunk, at its anchor [chunks H K V]
    enter_ptr, leave_ptr, decay_product_ptr,  # [B H segments K V] states, [B H segments K] product of the gates
    cu_ptr, T, tiles, segments, span, scale,
    SCAN: tl.constexpr, BACKWARD: tl.constexpr, EMIT: tl.constexpr,  # EMIT: y is wanted
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the state of one segment, in PARTS of BLOCK_K rows.

    With neither y nor chunk_states it computes the map of a segment alone: without delta rule L, and the decay_product
    that is the diagonal of Q; with it [L Q], [K V+K], from an identity beside the entering state, into which nothing is
    written. BACKWARD: such a map for `backward_states`, from the end of the scan."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    V: tl.constexpr = SCAN.V
    C: tl.constexpr = SCAN.C
    RIGHT_TO_LEFT: tl.constexpr = SCAN.REVERSE != BACKWARD
    DELTA: tl.constexpr = x.beta is not None or SCAN.ERASE != "none"
    MAP: tl.constexpr = not EMIT and chunk_states_ptr is None
    WIDTH: tl.constexpr = V + K if MAP and DELTA else V
    pid = tl.program_id(0).to(tl.int64)
    tile, segment = pid % tiles, pid // tiles
    b, h, index, first, begin, stop, chunk = locate_segment(segment, cu_ptr, H, T, segments, span, C)
    offs, offs_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    group = h * SCAN.GROUPS_IN // H
    queries, keys = (prepared.q_in, SCAN.GROUPS_IN, group, K), (prepared.k_out, SCAN.GROUPS_IN, group, K)
    erasers, values = (prepared.k_in, SCAN.GROUPS_IN, group, K), (x.v, H, h, V)
    read, gates = off_diagonal(causal(C, SCAN.REVERSE)) if SCAN.BEFORE else causal(C, SCAN.REVERSE), ()
    if SCAN.DECAY == "scalar":
        gates = head_gates(x, first, T, h, cu_ptr, SCAN)
    begins, ends = index == (segments - 1 if RIGHT_TO_LEFT else 0), index == (0 if RIGHT_TO_LEFT else segments - 1)
    S, decay_product = _enter(enter_ptr, b, h, segment, begins, offs_k, offs_v, SCAN, MAP, WIDTH, PARTS)

    chunks = tl.cdiv(stop - begin, C)
    if MAP:  # nobody reads L of the last segment, nor Q of the first
        chunks = tl.where(ends | (begins & (tile * BLOCK_V >= V)), 0, chunks)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - i if RIGHT_TO_LEFT else i
        start = begin + n * C
        row, inside = first + start, offs < stop - start
        chunk_head, log_in = (chunk + n) * H + h, 0.0
        if SCAN.DECAY == "scalar":
            log_in = load_log_decay(prepared.log_decays, chunk_head, C, LOG_IN)
            decay_total = tl.exp2(tl.load(prepared.log_total + chunk_head))
        entering, decayed, anchors, products = (), (), (), ()
        prediction, y = tl.zeros([C, BLOCK_V], tl.float32), tl.zeros([C, BLOCK_V], tl.float32)
        A_qk = tl.zeros([C, C], tl.float32)
        for p in tl.static_range(PARTS):
            rows = offs_k + p * BLOCK_K
            cell, in_state = state_offsets(offs_k, offs_v, K - p * BLOCK_K, WIDTH)
            state, passing, anchor_in, anchor_out = at_anchor(S[p], prepared, chunk_head, rows, SCAN)
            factor = decay_total if SCAN.DECAY == "scalar" else anchor_in * anchor_out
            if SCAN.DECAY == "scalar":
                passing = passing * decay_total
            product = decay_product[p] * factor if decay_product_ptr is not None else decay_product[p]
            if EMIT or DELTA:
                state = state.to(SCAN.DOT)
            if chunk_states_ptr is not None:
                ptrs = chunk_states_ptr + (chunk_head * K + p * BLOCK_K) * V + cell
                tl.store(ptrs, state.to(chunk_states_ptr.dtype.element_ty), mask=in_state)
            if PARTS > 1:  # read at once, so that no part waits as an operand
                if DELTA:
                    k_in = load_tile(erasers, row, offs, inside, rows).to(SCAN.DOT)
                    prediction = tl.dot(k_in, state, prediction, input_precision=SCAN.PRECISION)
                if EMIT:
                    q_in = load_tile(queries, row, offs, inside, rows).to(SCAN.DOT)
                    k_out = load_tile(keys, row, offs, inside, rows).to(SCAN.DOT)
                    y = tl.dot(q_in, state, y, input_precision=SCAN.PRECISION)
                    A_qk = tl.dot(q_in, tl.trans(k_out), A_qk, input_precision=SCAN.PRECISION)
            else:
                entering = (state,)
            decayed, anchors, products = decayed + (passing,), anchors + (anchor_in,), products + (product,)
        decay_product = products
        if PARTS == 1:
            k_out = load_tile(keys, row, offs, inside, offs_k)
        u = load_tile(values, row, offs, inside, offs_v)
        if DELTA:
            if PARTS == 1:
                k_in = load_tile(erasers, row, offs, inside, offs_k)
                prediction = tl.dot(k_in.to(SCAN.DOT), entering[0], input_precision=SCAN.PRECISION)
            if SCAN.DECAY == "scalar":
                prediction = prediction * tl.exp2(load_log_erase(prepared, chunk_head, log_in, SCAN))[:, None]
            u = _correct(u, prediction, x, prepared, error_ptr, chunk, n, h, row, offs, inside, offs_v, SCAN)
        written = u
        if SCAN.DECAY == "scalar":
            weight = tl.exp2(log_in if BACKWARD else load_log_decay(prepared.log_decays, chunk_head, C, LOG_OUT))
            written = u * (weight * scale if BACKWARD else weight)[:, None]
        elif SCAN.DECAY == "none" and BACKWARD:
            written = u * scale
        S = ()
        for p in tl.static_range(PARTS):
            if PARTS > 1:
                k_out = load_tile(keys, row, offs, inside, offs_k + p * BLOCK_K)
            state = tl.dot(
                tl.trans(k_out.to(SCAN.DOT)), written.to(SCAN.DOT), decayed[p], input_precision=SCAN.PRECISION
            )
            S = S + (state * anchors[p][:, None] if SCAN.DECAY == "key" else state,)
        u = u.to(SCAN.DOT)  # float32 would take twice the registers until the last product
        if EMIT:
            if PARTS == 1:
                q_in = load_tile(queries, row, offs, inside, offs_k).to(SCAN.DOT)
                y = tl.dot(q_in, entering[0], input_precision=SCAN.PRECISION)
                A_qk = tl.dot(q_in, tl.trans(k_out.to(SCAN.DOT)), input_precision=SCAN.PRECISION)
            A_qk = decayed_scores(
                A_qk, read, gates, prepared, chunk_head, start, offs, inside, log_in, scale, SCAN, False
            )
            if SCAN.DECAY != "key":
                y = y * (tl.exp2(log_in) * scale)[:, None] if SCAN.DECAY == "scalar" else y * scale
            y = tl.dot(A_qk.to(SCAN.DOT), u, y, input_precision=SCAN.PRECISION)
            if SCAN.BEFORE:
                y += load_log_decay(prepared.log_decays, chunk_head, C, BONUS)[:, None] * u.to(tl.float32)
            store_tile((y_ptr, H, h, V), row, offs, inside, offs_v, y)

    _leave(
        S, decay_product, leave_ptr, decay_product_ptr, segment, b, h, ends, tile, offs_k, offs_v,
        SCAN, WIDTH, EMIT, PARTS,
    )  # fmt: skip


@triton.jit
def combine(
    L_ptr, Q_ptr, enter_ptr, state_ptr,  # maps S -> Q S + L, or the diagonal of Q; [B H K V]; [B H segments K V]
    K, V, segments, L_stride, Q_stride,  # strides over rows
    RIGHT_TO_LEFT: tl.constexpr, DELTA: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state that enters each segment: S <- Q S + L, or Qᵀ S + L if TRANSPOSE, segment by segment; L of the first
    one includes Q S. A Q that is no diagonal needs all rows in one program, which reads them as it stored them, BLOCK_V
    at a time."""
    bh = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None] * V + offs_v[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if enter_ptr is not None:
        S = tl.load(enter_ptr + bh * K * V + cell, mask=inside, other=0.0)
    for i in range(0, segments):
        segment = bh * segments + (segments - 1 - i if RIGHT_TO_LEFT else i)
        state, transition = state_ptr + segment * K * V, Q_ptr + segment * K * Q_stride
        tl.store(state + cell, S, mask=inside)
        L = L_ptr + segment * K * L_stride + offs_k[:, None] * L_stride + offs_v[None, :]
        L = tl.load(L, mask=inside, other=0.0)
        if DELTA:
            tl.debug_barrier()
            S = L
            for part in tl.range(0, K, BLOCK_V, num_stages=1):
                cols = part + tl.arange(0, BLOCK_V)
                along, across = (1, Q_stride) if TRANSPOSE else (Q_stride, 1)
                Q = transition + offs_k[:, None] * along + cols[None, :] * across
                Q = tl.load(Q, mask=(offs_k < K)[:, None] & (cols < K)[None, :] & (i > 0), other=0.0)
                rows = state + cols[:, None] * V + offs_v[None, :]
                rows = tl.load(rows, mask=(cols < K)[:, None] & (offs_v < V)[None, :], other=0.0)
                S = tl.dot(Q, rows, S, input_precision="tf32x3")
        else:
            S = S * tl.load(transition + offs_k, mask=(offs_k < K) & (i > 0), other=0.0)[:, None] + L
