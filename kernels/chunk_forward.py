"""The matrix-state scan, forward: outputs, states, and the states that enter segments. Notation: `chunk_scan`."""

# Jitted functions take no annotations but constexpr, join tuples with +, and choose at compile time before run time.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.chunk_scan import (
    add_scores,
    apply_decay_in,
    apply_decay_out,
    at_anchor,
    decayed_scores,
    entering_state,
    head_decay,
    head_gates,
    load_beta,
    load_log_erase,
    locate_pass,
    prepared_of,
    solve_error,
    store_chunk_state,
    store_leaving,
    where_own,
)
from recur.kernels.decay import FORGOTTEN
from recur.kernels.tiles import (
    causal,
    load_tile,
    locate_segment,
    matrix_ptrs,
    off_diagonal,
    segment_at,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "documents", "span", "borders"])
def warm_up(
    prepared, warm_ptr, cu_ptr, T, documents, span, borders,  # written: [2 borders H]
    SCAN: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For one border and head, how many chunks before it, and how many after it, forget whatever enters them, or reach
    the end of the row or document; -1 if more than CHUNKS or a segment's would be needed."""
    H: tl.constexpr = SCAN.H
    pid = tl.program_id(0).to(tl.int64)
    border, h = 1 + pid // H, pid % H
    slot = segment_at(border, cu_ptr, documents, span, True)
    _, left, _, _, _, chunk, before, own, after = locate_segment(slot, cu_ptr, T, documents, span, SCAN.C)
    if (left != border) | (before == 0) | (own == 0):
        return
    offs = tl.arange(0, CHUNKS)
    for AFTER in tl.static_range(2):
        there = own + after if AFTER else before
        inside = offs < tl.minimum(there, span // SCAN.C)
        chunk_head = (chunk + offs if AFTER else chunk - 1 - offs) * H + h
        if prepared.log_norm is not None:  # rows of the state are mixed
            log = tl.cumsum(tl.load(prepared.log_norm + chunk_head, mask=inside, other=0.0), 0)
        elif SCAN.DECAY == "scalar":
            log = tl.cumsum(tl.load(prepared.log_total + chunk_head, mask=inside, other=0.0), 0)
        else:
            rows = tl.arange(0, BLOCK_K)
            at, mask = chunk_head[:, None] * SCAN.K + rows[None, :], inside[:, None] & (rows < SCAN.K)[None, :]
            decay = tl.load(prepared.anchor_in + at, mask=mask, other=0.0)
            decay *= tl.load(prepared.anchor_out + at, mask=mask, other=0.0)
            log = tl.log2(tl.maximum(decay, 1e-38, propagate_nan=tl.PropagateNan.ALL))
            kept = tl.where(tl.cumsum(log, 0) < FORGOTTEN, 0, 1)  # of NaN as well
            log = tl.where(tl.sum(kept, 1) == 0, 2 * FORGOTTEN, 0.0)
        needed = tl.min(tl.where(inside & (log < FORGOTTEN), offs + 1, CHUNKS + 1), 0)
        needed = tl.minimum(needed, tl.where(there <= CHUNKS, there, CHUNKS + 1))
        needed = tl.where(needed <= tl.minimum(CHUNKS, span // SCAN.C), needed, -1)
        tl.store(warm_ptr + (AFTER * borders + border) * H + h, needed.to(tl.int32))


@triton.jit
def _identities(S, rows, cols, ADD: tl.constexpr):
    """Parts of a state, plus an identity from column 0 on if ADD; and as many ones per row."""
    states, ones = (), ()
    for p in tl.static_range(len(S)):
        state = S[p]
        if ADD:
            state += tl.where((rows + p * rows.shape[0])[:, None] == cols[None, :], 1.0, 0.0)
        states, ones = states + (state,), ones + (tl.full([rows.shape[0]], 1.0, tl.float32),)
    return states, ones


@triton.jit
def _read(y, A_qk, S, q_in, k_out, SCAN: tl.constexpr):
    """y + q_in S [C V] and A_qk + q_in k_outᵀ [t s], of a part of the rows of S, both without decay."""
    q_in, k_out = q_in.to(SCAN.DOT), k_out.to(SCAN.DOT)
    y = tl.dot(q_in, S, y, input_precision=SCAN.PRECISION)
    return y, tl.dot(q_in, tl.trans(k_out), A_qk, input_precision=SCAN.PRECISION)


@triton.jit
def _correct(
    v, prediction, x, prepared, error_ptr, chunk_head, row, offs, inside, stored, h, cols, SCAN: tl.constexpr
):  # fmt: skip
    """The delta rule in a chunk: u = β error [C V], error = (1 − A_solve β) (v − prediction), which is stored, with
    prediction = k_in S; β is 1 with an erase key."""
    beta = load_beta(x.beta, row, offs, inside, h, SCAN.H)
    A_solve = tl.load(matrix_ptrs(prepared.A_solve, chunk_head, SCAN.C))
    error = solve_error(v - prediction, A_solve, beta, SCAN)
    if error_ptr is not None:
        store_tile((error_ptr, SCAN.H, h, SCAN.V), row, offs, stored, cols, error)
    return error * beta[:, None] if x.beta is not None else error


@triton.jit
def _update(passing, anchor_in, k_out, written, SCAN: tl.constexpr):
    """A part [BLOCK_K BLOCK_V] of the state that leaves a chunk: what passes through it plus k_outᵀ u, both of key-wise
    decay counted from the anchor."""
    S = tl.dot(tl.trans(k_out.to(SCAN.DOT)), written.to(SCAN.DOT), passing, input_precision=SCAN.PRECISION)
    return S * anchor_in[:, None] if SCAN.DECAY == "key" else S


@triton.jit
def _store_products(ptr, decay_product, at, tile, offs_k, SCAN: tl.constexpr):
    """Store the parts of decay_product as entry `at` of a tensor [borders H K]; the first tile does."""
    for p in tl.static_range(len(decay_product)):
        rows = offs_k + p * offs_k.shape[0]
        tl.store(ptr + at * SCAN.K + rows, decay_product[p], mask=(rows < SCAN.K) & (tile == 0))


@triton.jit(do_not_specialize=["T", "documents", "tiles", "span"])  # not worth a compilation each
def forward(
    x, prepared, entry,  # Given, with dy for v if BACKWARD; Prepared, with q_in for k_out if BACKWARD; Entry
    y_ptr, error_ptr, chunk_states_ptr,  # [B T H V] twice; states before every chunk, at its anchor [chunks H K V]
    leave_ptr, decay_product_ptr,  # final states; or maps [borders H K V], and products of gates [borders H K]
    cu_ptr, T, documents, tiles, span, scale,
    SCAN: tl.constexpr, BACKWARD: tl.constexpr, EMIT: tl.constexpr,  # EMIT: y is wanted
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the state of one segment, in PARTS of BLOCK_K rows.

    With neither y nor chunk_states it computes the map of the segment before a border alone, which is stored at the
    border: without delta rule L, and the decay_product that is the diagonal of Q; with it [L Q], each in tiles of its
    own, Q from an identity, into which nothing is written. Where the state that enters the segment is known, L includes
    it. BACKWARD: such a map for `backward_states`, from the end of the scan."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    V: tl.constexpr = SCAN.V
    C: tl.constexpr = SCAN.C
    RIGHT_TO_LEFT: tl.constexpr = SCAN.REVERSE != BACKWARD
    DELTA: tl.constexpr = x.beta is not None or SCAN.ERASE != "none"
    MAP: tl.constexpr = not EMIT and chunk_states_ptr is None
    Q_BEGIN: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V * BLOCK_V  # first column of Q
    WIDTH: tl.constexpr = Q_BEGIN + K if MAP and DELTA else V
    pid = tl.program_id(0).to(tl.int64)
    tile, h, slot = pid % tiles, pid // tiles % H, pid // tiles // H
    document, first, begin, end, chunk, own, passed, ahead, enters, leaves, warm, idle = locate_pass(
        entry, slot, h, cu_ptr, T, documents, span, tile * BLOCK_V >= V, SCAN, RIGHT_TO_LEFT, MAP, DELTA
    )  # fmt: skip
    if idle:
        return
    offs, offs_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    queries, keys, erasers = prepared_of(prepared, h, SCAN)
    read, gates = off_diagonal(causal(C, SCAN.REVERSE)) if SCAN.BEFORE else causal(C, SCAN.REVERSE), ()
    if SCAN.DECAY == "scalar":
        gates = head_gates(x, first, T, h, cu_ptr, SCAN)
    S = entering_state(entry, document, enters, h, warm == passed, warm < 0, offs_k, offs_v, SCAN, PARTS)
    S, decay_product = _identities(S, offs_k, offs_v - Q_BEGIN, MAP and DELTA)
    steps = own
    if entry.warm is not None:
        warm = tl.maximum(warm, 0)
        if MAP and DELTA:
            warm = tl.where(tile * BLOCK_V >= V, 0, warm)
        steps += warm

    for i in tl.range(0, steps, num_stages=STAGES):
        n = own - 1 - i if RIGHT_TO_LEFT else i
        if entry.warm is not None:
            n += warm if RIGHT_TO_LEFT else -warm
        start = begin + n * C
        row, inside, chunk_head = first + start, offs < end - start, (chunk + n) * H + h
        stored = where_own(inside, entry, n, own)
        log_in, decay_total = head_decay(prepared, chunk_head, SCAN)
        decayed, anchors, products = (), (), ()
        prediction, y = tl.zeros([C, BLOCK_V], tl.float32), tl.zeros([C, BLOCK_V], tl.float32)
        A_qk = tl.zeros([C, C], tl.float32)
        for p in tl.static_range(PARTS):
            rows = offs_k + p * BLOCK_K
            entering, passing, anchor_in, anchor_out = at_anchor(S[p], prepared, chunk_head, rows, SCAN)
            factor = decay_total if SCAN.DECAY == "scalar" else anchor_in * anchor_out
            if SCAN.DECAY == "scalar":
                passing = passing * decay_total
            product = decay_product[p] * factor if decay_product_ptr is not None else decay_product[p]
            if EMIT or DELTA:
                entering = entering.to(SCAN.DOT)
            if chunk_states_ptr is not None:
                store_chunk_state(chunk_states_ptr, entering, entry, chunk_head, n, own, offs_k, offs_v, SCAN, p)
            if PARTS > 1:  # read at once, so that no part waits as an operand
                if DELTA:
                    k_in = load_tile(erasers, row, offs, inside, rows).to(SCAN.DOT)
                    prediction = tl.dot(k_in, entering, prediction, input_precision=SCAN.PRECISION)
                if EMIT:
                    q_in = load_tile(queries, row, offs, inside, rows)
                    k_out = load_tile(keys, row, offs, inside, rows)
                    y, A_qk = _read(y, A_qk, entering, q_in, k_out, SCAN)
            decayed, anchors, products = decayed + (passing,), anchors + (anchor_in,), products + (product,)
        decay_product = products
        if PARTS == 1:
            k_out = load_tile(keys, row, offs, inside, offs_k)
        u = load_tile((x.v, H, h, V), row, offs, inside, offs_v)
        if DELTA:
            if PARTS == 1:
                k_in = k_out
                if prepared.k_in is not None:
                    k_in = load_tile(erasers, row, offs, inside, offs_k)
                prediction = tl.dot(k_in.to(SCAN.DOT), entering, input_precision=SCAN.PRECISION)
            if SCAN.DECAY == "scalar":
                prediction = prediction * tl.exp2(load_log_erase(prepared, chunk_head, log_in, SCAN))[:, None]
            u = _correct(u, prediction, x, prepared, error_ptr, chunk_head, row, offs, inside, stored, h, offs_v, SCAN)
        if BACKWARD:
            written = apply_decay_in(u, log_in, scale, SCAN)
        else:
            written = apply_decay_out(u, prepared, chunk_head, SCAN)
        S = ()
        for p in tl.static_range(PARTS):
            if PARTS > 1:
                k_out = load_tile(keys, row, offs, inside, offs_k + p * BLOCK_K)
            S = S + (_update(decayed[p], anchors[p], k_out, written, SCAN),)
        u = u.to(SCAN.DOT)  # float32 would take twice the registers until the last product
        if EMIT:
            if PARTS == 1:
                q_in = load_tile(queries, row, offs, inside, offs_k)
                y, A_qk = _read(y, A_qk, entering, q_in, k_out, SCAN)
            A_qk = decayed_scores(
                A_qk, read, gates, prepared, chunk_head, start, offs, inside, log_in, scale, SCAN, False
            )
            y = add_scores(apply_decay_in(y, log_in, scale, SCAN), A_qk, u, prepared, chunk_head, SCAN)
            store_tile((y_ptr, H, h, V), row, offs, stored, offs_v, y)

    if leave_ptr is not None:
        at, kept = (leaves if MAP else document) * H + h, True
        if entry.states is not None:
            kept = ahead == 0
        elif MAP and DELTA:  # no column of L is one of Q
            kept = ((offs_v < V) | (offs_v >= Q_BEGIN))[None, :]
        store_leaving(leave_ptr, S, at, kept, offs_k, offs_v, SCAN, WIDTH)
        if decay_product_ptr is not None:
            _store_products(decay_product_ptr, decay_product, at, tile, offs_k, SCAN)


@triton.jit(do_not_specialize=["T", "documents", "span"])
def combine(
    L_ptr, Q_ptr, warm_ptr, state_ptr,  # [borders H ...]: maps S -> Q S + L, or the diagonal of Q; see `Entry`; written
    cu_ptr, T, documents, span, L_stride, Q_stride,  # strides over rows
    SCAN: tl.constexpr, RIGHT_TO_LEFT: tl.constexpr, DELTA: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The states of borders without a warm-up, border by border: S <- Q S + L, or Qᵀ S + L if TRANSPOSE, from one whose
    L includes Q S up to the next that has a warm-up. A Q that is no diagonal needs all rows in one program, which reads
    them as it stored them, BLOCK_V at a time; its transpose is that of the pass in the other direction."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    V: tl.constexpr = SCAN.V
    pid = tl.program_id(0).to(tl.int64)
    border, h, step = 1 + pid // H, pid % H, -1 if RIGHT_TO_LEFT else 1
    slot = segment_at(border, cu_ptr, documents, span, RIGHT_TO_LEFT)
    _, left, _, _, _, _, before, own, after = locate_segment(slot, cu_ptr, T, documents, span, SCAN.C)
    leaves, passed, ahead = (left, after, before) if RIGHT_TO_LEFT else (left + 1, before, after)
    if (leaves != border) | (ahead == 0) | (own == 0):
        return
    borders = tl.cdiv(ahead, span // SCAN.C)  # from this one on
    if warm_ptr is None:
        if passed > 0:
            return
    else:
        previous = tl.load(warm_ptr + (border - step) * H + h, mask=passed > 0, other=0)
        if (tl.load(warm_ptr + border * H + h) >= 0) | (previous < 0):
            return
        count = border * 0 + 1
        while count < borders and tl.load(warm_ptr + (border + count * step) * H + h) < 0:
            count += 1
        borders = count
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None] * V + offs_v[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for i in range(0, borders):
        at = (border + i * step) * H + h
        behind = at - step * H  # the border before, which has numbers if there is one
        L = L_ptr + at * K * L_stride + offs_k[:, None] * L_stride + offs_v[None, :]
        L = tl.load(L, mask=inside, other=0.0)
        if DELTA:
            transition = Q_ptr + (behind if TRANSPOSE else at) * K * Q_stride
            S = L
            for part in tl.range(0, K, BLOCK_V, num_stages=1):
                cols = part + tl.arange(0, BLOCK_V)
                along, across = (1, Q_stride) if TRANSPOSE else (Q_stride, 1)
                Q = transition + offs_k[:, None] * along + cols[None, :] * across
                Q = tl.load(Q, mask=(offs_k < K)[:, None] & (cols < K)[None, :] & (i > 0), other=0.0)
                rows = state_ptr + behind * K * V + cols[:, None] * V + offs_v[None, :]
                rows = tl.load(rows, mask=(cols < K)[:, None] & (offs_v < V)[None, :] & (i > 0), other=0.0)
                S = tl.dot(Q, rows, S, input_precision="tf32x3")
        else:
            S = S * tl.load(Q_ptr + at * K + offs_k, mask=(offs_k < K) & (i > 0), other=0.0)[:, None] + L
        tl.store(state_ptr + at * K * V + cell, S, mask=inside)
        if DELTA:
            tl.debug_barrier()
