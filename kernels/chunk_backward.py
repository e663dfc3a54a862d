"""The matrix-state scan, backward: gradients of states, then of what chunks read. Notation: `chunk_scan`."""

# Jitted functions take no annotations but constexpr, join tuples with +, and choose at compile time before run time.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.chunk_scan import (
    LOG_IN,
    add_scores,
    all_in_range,
    apply_decay_in,
    apply_decay_out,
    at_anchor,
    decayed_scores,
    entering_state,
    first_phase,
    given_of,
    head_decay,
    head_gates,
    key_log_erase,
    load_beta,
    load_cumulative,
    load_eraser,
    load_log_decay,
    load_log_erase,
    load_rotated,
    locate_pass,
    log_anchor,
    prepared_of,
    solve_error,
    state_offsets,
    store_chunk_state,
    store_leaving,
    token_gates,
    token_phases,
    where_own,
)
from recur.kernels.decay import RESET, chunk_decays, load_gates, masked_sums, pair_decay, tied_key
from recur.kernels.rotate import load_phases
from recur.kernels.tiles import (
    LOG2E,
    add_to_row,
    causal,
    chunk_bounds,
    load_tile,
    matrix_ptrs,
    off_diagonal,
    store_tile,
)


@triton.jit
def _store_dphase(
    dphase_ptr, dS, chunk_states_ptr, entry, chunk_head, n, own, place, h, offs_k, cols,
    SCAN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store what rotating the state that enters this chunk would do [BLOCK_K], of its part P. Rows k and k + K / 2 are
    one complex row with one anchor_in, which is in what `forward` kept and so not yet in dS."""
    K: tl.constexpr = SCAN.K
    V: tl.constexpr = SCAN.V
    _, mask = state_offsets(offs_k, cols, K - P * offs_k.shape[0], V)
    rows = offs_k + P * offs_k.shape[0]
    partner = tl.where(rows < K // 2, rows + K // 2, rows - K // 2)
    ptrs = chunk_states_ptr + chunk_head * (K * V) + partner[:, None] * V + cols[None, :]
    dphase = tl.sum(dS * tl.load(ptrs, mask=mask, other=0.0).to(tl.float32), 1)
    dphase = tl.where(rows < K // 2, -dphase, dphase)
    at = place * (SCAN.H * K) + h * K + rows
    tl.store(dphase_ptr + at, dphase, mask=where_own(rows < K, entry, n, own))


@triton.jit(do_not_specialize=["B", "T", "documents", "chunk_slots", "tiles", "span"])
def backward_states(
    x, prepared, entry, dy_ptr, error_ptr, chunk_states_ptr,  # Given; Prepared; Entry; [B T H V] twice; kept states
    dv_ptr, dbeta_ptr, chunk_dstates_ptr,  # [B T H V], [tiles B T H], gradients of the state after every chunk
    leave_ptr, dphase_state_ptr,  # of initial states, or maps [borders H K V]; [tiles chunks H K] of complex gates
    cu_ptr, B, T, documents, chunk_slots, tiles, span, scale,
    SCAN: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the gradient of the state of one segment, against the direction of the
    scan. Without dv it computes L of the segment behind a border alone, as `forward` does."""
    H: tl.constexpr = SCAN.H
    V: tl.constexpr = SCAN.V
    C: tl.constexpr = SCAN.C
    DOT: tl.constexpr = SCAN.DOT
    PRECISION: tl.constexpr = SCAN.PRECISION
    DELTA: tl.constexpr = x.beta is not None or SCAN.ERASE != "none"
    MAP: tl.constexpr = dv_ptr is None
    pid = tl.program_id(0).to(tl.int64)
    tile, h, slot = pid % tiles, pid // tiles % H, pid // tiles // H
    document, first, begin, end, chunk, own, passed, ahead, enters, leaves, warm, idle = locate_pass(
        entry, slot, h, cu_ptr, T, documents, span, False, SCAN, not SCAN.REVERSE, MAP, False
    )  # fmt: skip
    if idle:
        return
    offs, offs_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    queries, keys, erasers = prepared_of(prepared, h, SCAN)
    read = off_diagonal(causal(C, not SCAN.REVERSE)) if SCAN.BEFORE else causal(C, not SCAN.REVERSE)  # [s t]
    gates = ()
    if SCAN.DECAY == "scalar":
        gates = head_gates(x, first, T, h, cu_ptr, SCAN)
    dS = entering_state(entry, document, enters, h, warm == passed, warm < 0, offs_k, offs_v, SCAN, PARTS)
    warm = tl.maximum(warm, 0)

    for i in tl.range(0, own + warm, num_stages=STAGES):
        n = i - warm if SCAN.REVERSE else own - 1 + warm - i
        start = begin + n * C
        row, inside = first + start, offs < tl.minimum(end - start, C).to(tl.int32)
        chunk_head, stored = (chunk + n) * H + h, where_own(inside, entry, n, own)
        du, A_qk = tl.zeros([C, BLOCK_V], tl.float32), tl.zeros([C, C], tl.float32)  # A_qk [s t]
        states, anchors = (), ()
        for p in tl.static_range(PARTS):
            rows = offs_k + p * BLOCK_K
            if not MAP:
                store_chunk_state(chunk_dstates_ptr, dS[p], entry, chunk_head, n, own, offs_k, offs_v, SCAN, p)
            q_in = load_tile(queries, row, offs, inside, rows).to(DOT)
            k_out = load_tile(keys, row, offs, inside, rows).to(DOT)
            if p == 0:
                dy = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
            state, passing, anchor_in, _ = at_anchor(dS[p], prepared, chunk_head, rows, SCAN)
            state, anchors = state.to(DOT), anchors + (anchor_in,)
            if p == 0:
                log_in, decay_total = head_decay(prepared, chunk_head, SCAN)
                dread = apply_decay_in(dy, log_in, scale, SCAN)
            if SCAN.DECAY == "scalar":
                passing = passing * decay_total
            states = states + (tl.dot(tl.trans(q_in), dread.to(DOT), passing, input_precision=PRECISION),)
            du = tl.dot(k_out, state, du, input_precision=PRECISION)
            A_qk = tl.dot(k_out, tl.trans(q_in), A_qk, input_precision=PRECISION)
        dS = states
        A_qk = decayed_scores(A_qk, read, gates, prepared, chunk_head, start, offs, inside, log_in, scale, SCAN, True)
        du = add_scores(apply_decay_out(du, prepared, chunk_head, SCAN), A_qk, dy, prepared, chunk_head, SCAN)
        if DELTA:
            A_solve = tl.load(prepared.A_solve + chunk_head * (C * C) + offs[None, :] * C + offs[:, None])  # transposed
            beta = load_beta(x.beta, row, offs, inside, h, H)
            du = solve_error(du, A_solve, beta, SCAN)
            if PARTS == 1:  # where it is k_out, by another pointer: one load for both would spill
                k_in = load_tile(erasers, row, offs, inside, offs_k).to(DOT)
            if not MAP and x.beta is not None:
                error = load_tile((error_ptr, H, h, V), row, offs, inside, offs_v)
                at = tile * B * T * H + (row + offs) * H + h
                tl.store(dbeta_ptr + at, tl.sum(du * error, 1), mask=stored)
            if x.beta is not None:
                du = du * beta[:, None]
            if SCAN.DECAY == "scalar":
                dprediction = du * (tl.exp2(load_log_erase(prepared, chunk_head, log_in, SCAN)) * -1.0)[:, None]
            else:
                dprediction = du * -1.0
            states = ()
            for p in tl.static_range(PARTS):
                if PARTS > 1:
                    k_in = load_tile(erasers, row, offs, inside, offs_k + p * BLOCK_K).to(DOT)
                states = states + (tl.dot(tl.trans(k_in), dprediction.to(DOT), dS[p], input_precision=PRECISION),)
            dS = states
        if not MAP:
            store_tile((dv_ptr, H, h, V), row, offs, stored, offs_v, du)
        states = ()
        for p in tl.static_range(PARTS):
            if dphase_state_ptr is not None:
                _store_dphase(
                    dphase_state_ptr, dS[p], chunk_states_ptr, entry, chunk_head, n, own,
                    tile * chunk_slots + chunk + n, h, offs_k, offs_v, SCAN, p,
                )  # fmt: skip
            states = states + (dS[p] * anchors[p][:, None] if SCAN.DECAY == "key" else dS[p],)
        dS = states

    if leave_ptr is not None:
        at, kept = (leaves if MAP else document) * H + h, True if MAP else ahead == 0
        store_leaving(leave_ptr, dS, at, kept, offs_k, offs_v, SCAN, V)


# Gradients of everything that a chunk reads


@triton.jit
def row_gates(gates, start, offs, inside, tile, SCAN: tl.constexpr, BLOCK_K: tl.constexpr):
    """Log gates [C BLOCK_K] of a tile of rows of the state; the absolute value of a complex one belongs to two rows."""
    K: tl.constexpr = SCAN.K
    KEYS: tl.constexpr = SCAN.KEYS
    cols = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    if KEYS == K:
        log_a = load_gates(gates, start, offs, inside, cols, K, "key")
    elif KEYS % BLOCK_K == 0:
        log_a, _ = load_phases(gates, start, offs, inside, (tile * BLOCK_K % KEYS).to(tl.int32), KEYS, "key", BLOCK_K)
    else:
        log_a = load_gates(gates, start, offs, inside, cols % KEYS, K, "key")
    return log_a


@triton.jit
def _anchored_decays(log_a, in_range, SCAN: tl.constexpr):
    """decay_in / anchor_in, decay_out / anchor_out and the former of erasers [C K], of key-wise decay."""
    log_in, log_out, log_total = chunk_decays(log_a, SCAN.REVERSE, SCAN.BEFORE, SCAN.DOT)
    anchor = log_anchor(log_total, in_range)[None, :]
    decay_erase = tl.exp2(key_log_erase(log_a, log_in, SCAN) - anchor)
    return tl.exp2(log_in - anchor), tl.exp2(log_out - anchor), decay_erase


@triton.jit
def _score_gradients(
    dy, u, beta, dv, seen, log_a, log_in, log_erase, cumulative, in_range, scale,
    SCAN: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """dA_qk and dA_kk [t s] before their decay; those of a chunk that is not in range are `gradients_exact`'s part."""
    dA_qk = tl.dot(dy, tl.trans(u), input_precision=SCAN.PRECISION)
    if DELTA and SCAN.ERASE == "none":
        dA_qk = dA_qk * beta[None, :]
    if SCAN.DECAY == "scalar":
        dA_qk = dA_qk * (pair_decay(log_a, log_in, cumulative, SCAN.REVERSE, SCAN.BEFORE, False, SCAN.DOT) * scale)
    else:
        dA_qk = tl.where((off_diagonal(seen) if SCAN.BEFORE else seen) & in_range, dA_qk, 0.0)
    if SCAN.DECAY == "none":
        dA_qk = dA_qk * scale
    dA_qk = dA_qk.to(SCAN.DOT)
    dA_kk = dA_qk
    if DELTA:
        dA_kk = tl.dot(dv, tl.trans(u), input_precision=SCAN.PRECISION)
        dA_kk = dA_kk * -beta[None, :] if SCAN.ERASE == "none" else -dA_kk
        if SCAN.DECAY == "scalar":
            PREVIOUS: tl.constexpr = SCAN.ERASE == "previous"
            dA_kk = dA_kk * pair_decay(log_a, log_erase, cumulative, SCAN.REVERSE, PREVIOUS, False, SCAN.DOT)
        dA_kk = tl.where(off_diagonal(seen) & in_range, dA_kk, 0.0).to(SCAN.DOT)
    return dA_qk, dA_kk


@triton.jit
def _load_dstate(ptr, cell, in_state, S, prepared, chunk_head, rows, SCAN: tl.constexpr):
    """dS [BLOCK_K BLOCK_V] behind a chunk; rowsum(dS S) [BLOCK_K] of what passes through it, of key-wise decay times
    anchor_out, as anchor_in is in S."""
    dS = tl.load(ptr + cell, mask=in_state, other=0.0)
    through = tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    if SCAN.DECAY == "key":
        through *= tl.load(prepared.anchor_out + chunk_head * SCAN.K + rows, mask=rows < SCAN.K, other=0.0)
    return dS, through


@triton.jit
def _load_given(ptr, row, offs, inside, h, cols, SCAN: tl.constexpr):
    """q or k [C BLOCK_K] as the caller gave it."""
    tensor = (ptr, SCAN.GROUPS, h * SCAN.GROUPS // SCAN.H, SCAN.K)
    return load_tile(tensor, row, offs, inside, cols)


@triton.jit
def _reader(
    dy, S, dA_qk, k_out, queries, row, offs, inside, cols, log_a, log_in, in_range, scale,
    SCAN: tl.constexpr, GATES_FIRST: tl.constexpr,
):  # fmt: skip
    """dq [C BLOCK_K], without the decay of key-wise gates unless GATES_FIRST; q_in; q_in dq, which is part of d log a;
    and decay_out of key-wise gates if GATES_FIRST."""
    sums, decay_out = 0.0, 1.0
    if GATES_FIRST:
        q_in = load_tile(queries, row, offs, inside, cols).to(SCAN.DOT)
    dq = tl.dot(dy, tl.trans(S), input_precision=SCAN.PRECISION)
    dq = apply_decay_in(dq, log_in, scale, SCAN)
    dq = tl.dot(dA_qk, k_out, dq, input_precision=SCAN.PRECISION)
    if not GATES_FIRST:
        q_in = load_tile(queries, row, offs, inside, cols).to(SCAN.DOT)
    if SCAN.DECAY == "scalar":
        sums = tl.sum(q_in * dq, 1)
    elif SCAN.DECAY == "key":
        sums = q_in * dq
    if GATES_FIRST:
        decay_in, decay_out, _ = _anchored_decays(log_a, in_range, SCAN)
        dq = dq * (decay_in * scale)
    return dq, q_in, sums, decay_out


@triton.jit
def _eraser(dv, S, dA_kk, k_out, sums, erasers, row, offs, inside, cols, log_erase, SCAN: tl.constexpr):
    """dk_in [C BLOCK_K] of the delta rule, without the decay of key-wise gates; k_in; `sums` plus k_in dk_in."""
    dk_in = -tl.dot(dv, tl.trans(S), input_precision=SCAN.PRECISION)
    if SCAN.DECAY == "scalar":
        dk_in = dk_in * tl.exp2(log_erase)[:, None]
    dk_in = tl.dot(dA_kk, k_out, dk_in, input_precision=SCAN.PRECISION)
    k_in = load_tile(erasers, row, offs, inside, cols).to(SCAN.DOT)
    if SCAN.DECAY == "scalar":
        sums += tl.sum(k_in * dk_in, 1)
    elif SCAN.DECAY == "key":
        sums += k_in * dk_in
    return dk_in, k_in, sums


@triton.jit
def _writer(
    u, dS, beta, through, sums, k_out, dA_qk, dA_kk, q_in, k_in, prepared, chunk_head, offs, cols,
    SCAN: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """dk [C BLOCK_K], without the decay of key-wise gates. What passes through the chunk or leaves it belongs to
    d log a of every token: `through` of one gate per head; of key-wise gates it joins `sums` at the last token."""
    dk = tl.dot(u, tl.trans(dS), input_precision=SCAN.PRECISION)
    if DELTA and SCAN.ERASE == "none":
        dk = dk * beta[:, None]
    dk = apply_decay_out(dk, prepared, chunk_head, SCAN)
    if SCAN.DECAY == "scalar":
        through = tl.sum(through) * tl.exp2(tl.load(prepared.log_total + chunk_head)) + tl.sum(k_out * dk)
    elif SCAN.DECAY == "key":
        dk = dk * tl.load(prepared.anchor_in + chunk_head * SCAN.K + cols, mask=cols < SCAN.K, other=0.0)[None, :]
        through += tl.sum(k_out * dk, 0)
        sums += tl.where((offs == (0 if SCAN.REVERSE else SCAN.C - 1))[:, None], through[None, :], 0.0)
    dk = tl.dot(tl.trans(dA_qk), q_in, dk, input_precision=SCAN.PRECISION)
    if DELTA:
        dk = tl.dot(tl.trans(dA_kk), k_in, dk, input_precision=SCAN.PRECISION)
    return dk, through, sums


@triton.jit
def _scalar_dgate(
    sums, through, k_out, dq, dk, dk_in, queries, erasers, row, offs, inside, cols, SCAN: tl.constexpr
):  # fmt: skip
    """d log a [C] of one gate per head: reads from t on that reach back before t, less writes before t that leave, plus
    what passes through."""
    sums -= tl.sum(k_out * dk, 1)
    dgate = tl.cumsum(sums, 0, reverse=not SCAN.REVERSE) + through
    if SCAN.BEFORE:
        dgate -= tl.sum(load_tile(queries, row, offs, inside, cols) * dq, 1)
    if SCAN.ERASE == "previous":
        dgate -= tl.sum(load_tile(erasers, row, offs, inside, cols) * dk_in, 1)
    return dgate


@triton.jit
def _gates_last(
    sums, dq, dk_in, x, queries, erasers, dgate_to, cu_ptr, first, T, h, tile, start, row, out, offs, inside, cols,
    in_range, scale, SCAN: tl.constexpr, DELTA: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d log a of key-wise gates, stored unless keys are tied; dq and dk_in with their decay; decay_out; log a."""
    dgate = tl.cumsum(sums, 0, reverse=not SCAN.REVERSE)
    if SCAN.BEFORE:
        dgate -= load_tile(queries, row, offs, inside, cols) * dq
    if SCAN.ERASE == "previous":
        tl.debug_barrier()  # loaded before the sums, the tile would spill
        dgate -= load_tile(erasers, row, offs, inside, cols) * dk_in
    gates = head_gates(x, first, T, h, cu_ptr, SCAN)  # computed once more: kept from above, it would spill
    log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
    dgate = tl.where(log_a <= RESET, 0.0, dgate)
    if not SCAN.TIED:
        store_tile(dgate_to, out, offs, inside, cols, dgate)
    log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
    decay_in, decay_out, _ = _anchored_decays(log_a, in_range, SCAN)
    dq = dq * (decay_in * scale)
    if DELTA and SCAN.ERASE == "none":
        dk_in = dk_in * decay_in
    return dgate, dq, dk_in, decay_out, log_a


@triton.jit
def _eraser_decay(gates, start, offs, inside, tile, in_range, SCAN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[C BLOCK_K], from gates that are loaded once more."""
    log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
    _, _, decay_erase = _anchored_decays(log_a, in_range, SCAN)
    return decay_erase


@triton.jit
def _bonus(
    dy, u, x, dbonus_ptr, place, gates, start, row, offs, inside, tile, h, cols, scale,
    SCAN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy·u of every token [C 1], which reads what it writes. Stores what the chunk adds to dbonus."""
    block, chunks, chunk_head = place
    now = tl.sum(dy.to(tl.float32) * u.to(tl.float32), 1)[:, None] * scale
    q = _load_given(x.q, row, offs, inside, h, cols, SCAN)
    if SCAN.TIED:
        k = tied_key(row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K))
    else:
        k = _load_given(x.k, row, offs, inside, h, cols, SCAN)
    at = (block * chunks * SCAN.H + chunk_head) * SCAN.K + cols
    tl.store(dbonus_ptr + at, tl.sum(now * q * k, 0), mask=cols < SCAN.K)
    return now


@triton.jit
def _add_bonus(dq, dk, now, log_a, x, row, offs, inside, h, cols, SCAN: tl.constexpr):
    """dq and dk with what the bonus adds."""
    q = _load_given(x.q, row, offs, inside, h, cols, SCAN)
    k = tied_key(log_a) if SCAN.TIED else _load_given(x.k, row, offs, inside, h, cols, SCAN)
    bonus = tl.load(x.bonus + h * SCAN.K + cols, mask=cols < SCAN.K, other=0.0)
    dq += now * k * bonus[None, :]
    dk += now * q * bonus[None, :]
    return dq, dk


# Registers decide where `backward_inputs` loads what, and some tensors are loaded twice:
#
#   STATES_TOGETHER  dS is loaded beside S, where there are registers and shared memory for both
#   GATES_FIRST      key-wise gates are loaded before anything else, where that costs no spills
#   GATES_LAST       key-wise gates are loaded after the last product; dq waits for them, as it does for a bonus
#
# `python tests/test_kernel_compiles.py` prints the bytes that every program spills.


@triton.jit(do_not_specialize=["B", "T", "tiles", "documents", "chunks"])
def backward_inputs(
    x, prepared, u_ptr, dy_ptr, dv_ptr,  # Given; Prepared; [B T H V], u_ptr v or what is kept as the error
    chunk_states_ptr, chunk_dstates_ptr,  # from `forward` and `backward_states`
    dq_ptr, dk_ptr, derase_ptr, dgate_ptr, dbonus_ptr,  # one per block; dgate of one gate per head one per tile too
    cu_ptr, B, T, tiles, documents, chunks, scale,
    SCAN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns rows [BLOCK_K] and columns [BLOCK_V] of the state around one chunk; BLOCKS of columns add up."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    V: tl.constexpr = SCAN.V
    C: tl.constexpr = SCAN.C
    SCALAR: tl.constexpr = SCAN.DECAY == "scalar"
    KEYWISE: tl.constexpr = SCAN.DECAY == "key"
    DELTA: tl.constexpr = x.beta is not None or SCAN.ERASE != "none"
    STATES_TOGETHER: tl.constexpr = KEYWISE or (SCALAR and (DELTA or BLOCK_V <= 128))
    GATES_FIRST: tl.constexpr = KEYWISE and not DELTA and not SCAN.BEFORE
    GATES_LAST: tl.constexpr = SCAN.BEFORE or (KEYWISE and DELTA)
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk_head, block = pid % tiles, pid // tiles, pid * 0
    if BLOCKS > 1:
        block, chunk_head = chunk_head % BLOCKS, chunk_head // BLOCKS
    chunk, h = chunk_head // H, chunk_head % H
    first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
    if start >= stop:
        return
    offs, offs_v = tl.arange(0, C), tl.arange(0, BLOCK_V)
    if BLOCKS > 1:
        offs_v += (block * BLOCK_V).to(tl.int32)
    offs_k = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    row, inside = first + start, offs < tl.minimum(stop - start, C).to(tl.int32)
    out, seen = row + block * B * T, causal(C, SCAN.REVERSE)  # `out`: rows of what is written
    queries, keys, erasers = prepared_of(prepared, h, SCAN)
    cell = chunk_head * (K * V) + offs_k[:, None] * V + offs_v[None, :]
    in_state = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    gates, log_a, log_in, log_erase, cumulative, in_range = (), 0.0, 0.0, 0.0, 0.0, True
    beta, dv, dk_in, k_in = 0.0, 0.0, 0.0, 0.0
    if SCAN.DECAY != "none":
        gates = head_gates(x, first, T, h, cu_ptr, SCAN)
    if KEYWISE:
        in_range = tl.load(prepared.in_range + chunk_head) != 0
    if GATES_FIRST:
        log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
    if SCALAR:
        log_a = load_gates(gates, start, offs, inside, offs_k, K, "scalar")
        log_in = load_log_decay(prepared.log_decays, chunk_head, C, LOG_IN)
        cumulative = load_cumulative(prepared, chunk_head, log_in, SCAN)
        log_erase = load_log_erase(prepared, chunk_head, log_in, SCAN)

    dy = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(SCAN.DOT)
    u = load_tile((u_ptr, H, h, V), row, offs, inside, offs_v).to(SCAN.DOT)
    if DELTA:
        beta = load_beta(x.beta, row, offs, inside, h, H)
        dv = load_tile((dv_ptr, H, h, V), row, offs, inside, offs_v).to(SCAN.DOT)
    S = tl.load(chunk_states_ptr + cell, mask=in_state, other=0.0)
    if STATES_TOGETHER:
        dS, through = _load_dstate(chunk_dstates_ptr, cell, in_state, S, prepared, chunk_head, offs_k, SCAN)
    k_out = load_tile(keys, row, offs, inside, offs_k).to(SCAN.DOT)
    dA_qk, dA_kk = _score_gradients(
        dy, u, beta, dv, seen, log_a, log_in, log_erase, cumulative, in_range, scale, SCAN, DELTA
    )

    dq, q_in, sums, decay_out = _reader(
        dy, S, dA_qk, k_out, queries, row, offs, inside, offs_k, log_a, log_in, in_range, scale, SCAN, GATES_FIRST
    )
    if not GATES_LAST:
        store_tile((dq_ptr, H, h, K), out, offs, inside, offs_k, dq)
    if DELTA:
        dk_in, k_in, sums = _eraser(dv, S, dA_kk, k_out, sums, erasers, row, offs, inside, offs_k, log_erase, SCAN)
    if x.bonus is not None:
        now = _bonus(
            dy, u, x, dbonus_ptr, (block, chunks, chunk_head), gates, start, row, offs, inside, tile, h, offs_k, scale,
            SCAN, BLOCK_K,
        )  # fmt: skip
    if not STATES_TOGETHER:
        dS, through = _load_dstate(chunk_dstates_ptr, cell, in_state, S, prepared, chunk_head, offs_k, SCAN)
    dk, through, sums = _writer(
        u, dS, beta, through, sums, k_out, dA_qk, dA_kk, q_in, k_in, prepared, chunk_head, offs, offs_k, SCAN, DELTA
    )

    if SCALAR:
        dgate = _scalar_dgate(sums, through, k_out, dq, dk, dk_in, queries, erasers, row, offs, inside, offs_k, SCAN)
        at = (block * tiles + tile) * B * T * H + (row + offs) * H + h
        tl.store(dgate_ptr + at, tl.where(log_a <= RESET, 0.0, dgate), mask=inside)
    elif KEYWISE:
        sums -= k_out * dk
        if GATES_LAST:
            dgate, dq, dk_in, decay_out, log_a = _gates_last(
                sums, dq, dk_in, x, queries, erasers, (dgate_ptr, H, h, K), cu_ptr, first, T, h, tile, start, row, out,
                offs, inside, offs_k, in_range, scale, SCAN, DELTA, BLOCK_K,
            )  # fmt: skip
        dk = dk * decay_out
    if x.beta is not None:
        dk += dk_in
    if x.bonus is not None:
        dq, dk = _add_bonus(dq, dk, now, log_a, x, row, offs, inside, h, offs_k, SCAN)
    if GATES_LAST:
        store_tile((dq_ptr, H, h, K), out, offs, inside, offs_k, dq)
    if not SCAN.TIED:
        store_tile((dk_ptr, H, h, K), out, offs, inside, offs_k, dk)
    if SCAN.ERASE != "none":
        if KEYWISE:
            dk_in = dk_in * _eraser_decay(gates, start, offs, inside, tile, in_range, SCAN, BLOCK_K)
        store_tile((derase_ptr, H, h, K), out, offs, inside, offs_k, dk_in)
    if GATES_FIRST:
        if BLOCK_V > 64:
            log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
        dgate = tl.where(log_a <= RESET, 0.0, tl.cumsum(sums, 0, reverse=not SCAN.REVERSE))
    if SCAN.TIED:
        log_a = row_gates(gates, start, offs, inside, tile, SCAN, BLOCK_K)
        dgate -= tl.exp2(log_a.to(tl.float32) * LOG2E) * dk
    if GATES_FIRST or SCAN.TIED:
        store_tile((dgate_ptr, H, h, K), out, offs, inside, offs_k, dgate)


@triton.jit
def _dot_all_columns(
    x, dy_ptr, u_ptr, dv_ptr, row, offs, inside, h,
    SCAN: tl.constexpr, DELTA: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dy uᵀ and dv uᵀ [t s] of a chunk, BLOCK_V columns at a time; zeros for the second without delta rule."""
    H: tl.constexpr = SCAN.H
    V: tl.constexpr = SCAN.V
    C: tl.constexpr = SCAN.C
    dA_qk, dA_kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in tl.range(0, V, BLOCK_V, num_stages=1):
        offs_v = part + tl.arange(0, BLOCK_V)
        u = load_tile((u_ptr, H, h, V), row, offs, inside, offs_v)
        if x.beta is not None:
            u = u * load_beta(x.beta, row, offs, inside, h, H)[:, None]
        u = u.to(SCAN.DOT)
        dy = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(SCAN.DOT)
        dA_qk = tl.dot(dy, tl.trans(u), dA_qk, input_precision=SCAN.PRECISION)
        if DELTA:
            dv = load_tile((dv_ptr, H, h, V), row, offs, inside, offs_v).to(SCAN.DOT)
            dA_kk = tl.dot(dv, tl.trans(u), dA_kk, input_precision=SCAN.PRECISION)
    return dA_qk, dA_kk


@triton.jit(do_not_specialize=["T", "documents", "chunk_heads"])
def gradients_exact(
    x, prepared, dy_ptr, u_ptr, dv_ptr,  # Given; Prepared; [B T H V], u_ptr as in `backward_inputs`
    dA_qk_ptr, dA_kk_ptr,  # [chunks H C C] float32, scratch
    dq_ptr, dk_ptr, derase_ptr, dgate_ptr,  # added to
    cu_ptr, T, documents, chunk_heads, scale,
    SCAN: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What A_qk and A_kk of chunks that are not in range add to dq, dk and d log a, token by token."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    C: tl.constexpr = SCAN.C
    KEYS: tl.constexpr = SCAN.KEYS
    begin = tl.program_id(0).to(tl.int64) * CHUNKS_PER_PROGRAM
    if all_in_range(prepared.in_range, begin, chunk_heads, CHUNKS_PER_PROGRAM):
        return
    DELTA: tl.constexpr = x.beta is not None or SCAN.ERASE != "none"
    for chunk_head in range(begin, tl.minimum(begin + CHUNKS_PER_PROGRAM, chunk_heads)):
        if tl.load(prepared.in_range + chunk_head) == 0:
            chunk, h = chunk_head // H, chunk_head % H
            first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
            offs = tl.arange(0, C)
            length = tl.minimum(stop - start, C).to(tl.int32)  # 0 for a slot without tokens
            row, inside = first + start, offs < length
            seen, later = causal(C, SCAN.REVERSE), causal(C, not SCAN.REVERSE)
            q, k, erase = given_of(x, h, SCAN)
            dq, dk, dgate = (dq_ptr, H, h, K), (dk_ptr, H, h, K), (dgate_ptr, H, h, K)
            derase = dk
            if SCAN.ERASE != "none":
                derase = (derase_ptr, H, h, K)
            gates = head_gates(x, first, T, h, cu_ptr, SCAN)
            dA_qk, dA_kk = _dot_all_columns(x, dy_ptr, u_ptr, dv_ptr, row, offs, inside, h, SCAN, DELTA, BLOCK_V)
            ptrs = matrix_ptrs(dA_qk_ptr, chunk * H + h, C)
            tl.store(ptrs, tl.where(off_diagonal(seen) if SCAN.BEFORE else seen, dA_qk * scale, 0.0))
            if DELTA:
                tl.store(matrix_ptrs(dA_kk_ptr, chunk * H + h, C), tl.where(off_diagonal(seen), -dA_kk, 0.0))
            tl.debug_barrier()
            at = chunk_head * (C * C)

            # rows of the state are independent of each other here: BLOCK_K of them at a time
            for part in tl.range(0, K, BLOCK_K, num_stages=1):
                offs_k = part + tl.arange(0, BLOCK_K)
                # in the direction of the scan, E [s K] as in `scores_exact`; D [t K] collects d log a
                E = tl.zeros([C, BLOCK_K], tl.float32)
                D = tl.zeros([C, BLOCK_K], tl.float32)
                own = D  # of erasers, which their own gate does not decay
                phase = first_phase(prepared.chunk_phase, chunk_head, offs_k, K, KEYS)
                for i in tl.range(0, length, num_stages=1):
                    t = length - 1 - i if SCAN.REVERSE else i
                    log_t, a = token_gates(gates, start + t, offs_k, K, KEYS)
                    phase_before = phase
                    if prepared.chunk_phase is not None:
                        phase -= token_phases(gates, start + t, offs_k, K, KEYS)
                    key = tied_key(log_t) if SCAN.TIED else load_rotated(k, row + t, offs_k, phase, K)
                    query = load_rotated(q, row + t, offs_k, phase_before if SCAN.BEFORE else phase, K)
                    eraser = load_eraser(erase, key, row + t, offs_k, phase_before, phase, SCAN)
                    if SCAN.ERASE == "previous":
                        dk_in = tl.sum(E * tl.load(dA_kk_ptr + at + t * C + offs)[:, None], 0)
                    if not SCAN.BEFORE:
                        E = E * a[None, :]
                    if DELTA and SCAN.ERASE != "previous":
                        dk_in = tl.sum(E * tl.load(dA_kk_ptr + at + t * C + offs)[:, None], 0)
                    if not SCAN.BEFORE:
                        E = tl.where((offs == t)[:, None], key[None, :], E)
                    dquery = tl.sum(E * tl.load(dA_qk_ptr + at + t * C + offs)[:, None], 0)
                    if SCAN.BEFORE:
                        E = tl.where((offs == t)[:, None], key[None, :], E * a[None, :])
                    product = dquery * query
                    if DELTA:
                        product += dk_in * eraser
                        add_to_row(derase, row + t, offs_k, dk_in)
                    if SCAN.ERASE == "previous":
                        own = tl.where((offs == t)[:, None], (dk_in * eraser)[None, :], own)
                    add_to_row(dq, row + t, offs_k, dquery)
                    D = tl.where((offs == t)[:, None], product[None, :], D)
                if SCAN.BEFORE:
                    own = D

                # against it, E [t K]: the query of token t times the gates before it, down to the token that writes
                tl.debug_barrier()
                E = tl.zeros([C, BLOCK_K], tl.float32)
                R = tl.zeros([C, BLOCK_K], tl.float32)
                for i in tl.range(0, length, num_stages=1):
                    t = i if SCAN.REVERSE else length - 1 - i
                    log_t, a = token_gates(gates, start + t, offs_k, K, KEYS)
                    key = tied_key(log_t) if SCAN.TIED else load_rotated(k, row + t, offs_k, phase, K)
                    phase_after = phase
                    if prepared.chunk_phase is not None:
                        phase += token_phases(gates, start + t, offs_k, K, KEYS)
                    query = load_rotated(q, row + t, offs_k, phase if SCAN.BEFORE else phase_after, K)
                    if not SCAN.BEFORE:
                        E = tl.where((offs == t)[:, None], query[None, :], E)
                    dkey = tl.sum(E * tl.load(dA_qk_ptr + at + offs * C + t)[:, None], 0)
                    eraser = load_eraser(erase, key, row + t, offs_k, phase, phase_after, SCAN)
                    if DELTA:
                        dkey += tl.sum(R * tl.load(dA_kk_ptr + at + offs * C + t)[:, None], 0)
                        if SCAN.ERASE == "previous":
                            R = tl.where((offs == t)[:, None], eraser[None, :], R * a[None, :])
                        else:
                            R = tl.where((offs == t)[:, None], eraser[None, :], R) * a[None, :]
                    E = E * a[None, :]
                    if SCAN.BEFORE:
                        E = tl.where((offs == t)[:, None], query[None, :], E)
                    D = tl.where((offs == t)[:, None], D - (dkey * key)[None, :], D)
                    if SCAN.TIED:
                        add_to_row(
                            dgate, row + t, offs_k, dkey * -tl.where(log_t <= RESET, 0.0, tl.exp2(log_t * LOG2E))
                        )
                    else:
                        add_to_row(dk, row + t, offs_k, dkey)
                tl.debug_barrier()
                log_a = load_gates(gates, start, offs, inside, offs_k % KEYS, K, "key")
                sums = masked_sums(later, D, tl.float32)
                if SCAN.BEFORE or SCAN.ERASE == "previous":
                    sums -= own
                old = load_tile(dgate, row, offs, inside, offs_k).to(tl.float32)
                store_tile(dgate, row, offs, inside, offs_k, tl.where(log_a <= RESET, old, old + sums))
