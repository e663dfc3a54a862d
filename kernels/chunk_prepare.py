"""The matrix-state scan, first half: what chunks need of gates, keys and queries alone. Notation: `chunk_scan`."""

# Jitted functions take no annotations but constexpr, join tuples with +, and choose at compile time before run time.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.chunk_scan import (
    BONUS,
    CUMULATIVE,
    LOG_ERASE,
    all_in_range,
    first_phase,
    given_of,
    head_gates,
    key_log_erase,
    load_beta,
    load_eraser,
    load_log_decay,
    load_log_erase,
    load_rotated,
    log_anchor,
    token_gates,
    token_phases,
)
from recur.kernels.decay import chunk_decays, gates_of, load_gates, pair_decay, tied_key
from recur.kernels.rotate import (
    angle,
    cos_sin_of,
    descriptors_of,
    load_phases,
    next_chunk_head,
    publish_phases,
    sum_phases,
)
from recur.kernels.tiles import (
    LOG2E,
    causal,
    chunk_bounds,
    load_tile,
    locate_chunk,
    matrix_ptrs,
    off_diagonal,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "documents"])
def cumulative_decay(
    x, log_decays_ptr, log_total_ptr,  # gates [B T H]; [chunks H 4 C]; [chunks H]
    cu_ptr, T, documents,
    SCAN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """log_in, cumulative and log_out of one gate per head, for BLOCK_H heads of one chunk."""
    H: tl.constexpr = SCAN.H
    C: tl.constexpr = SCAN.C
    chunk = tl.program_id(0).to(tl.int64)
    first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
    if start >= stop:
        return
    offs, h = tl.arange(0, C), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # heads are the channels of this tile
    ptr, stride_t, stride_h = gates_of(x.gate, first, T, 0, x.gate_sb, x.gate_sh, SCAN.GATE_ST, x.gate_sh, cu_ptr)
    gates, length = (ptr, stride_t, stride_h), tl.minimum(stop - start, C)
    log_a = load_gates(gates, start, offs, offs < length, h, H, "key").to(tl.float32)
    cumulative = tl.cumsum(log_a, 0, reverse=SCAN.REVERSE)
    # of the neighbour's gates: a sum without the token's own gate that is no difference of sums
    shift = -1 if SCAN.REVERSE else 1
    neighbour = (offs + shift >= 0) & (offs + shift < length)
    log_out = load_gates(gates, start + shift, offs, neighbour, h, H, "key").to(tl.float32)
    log_out = tl.cumsum(log_out, 0, reverse=not SCAN.REVERSE)
    log_in = cumulative
    if SCAN.BEFORE or SCAN.ERASE == "previous":
        neighbour = (offs - shift >= 0) & (offs - shift < length)
        exclusive = load_gates(gates, start - shift, offs, neighbour, h, H, "key").to(tl.float32)
        exclusive = tl.cumsum(exclusive, 0, reverse=SCAN.REVERSE)
        if SCAN.BEFORE:
            log_in = exclusive
    at = log_decays_ptr + ((chunk * H + h) * (4 * C))[None, :] + offs[:, None]
    in_heads = (h < H)[None, :] & (offs >= 0)[:, None]
    tl.store(at, log_in * LOG2E, mask=in_heads)
    tl.store(at + C, cumulative * LOG2E, mask=in_heads)
    tl.store(at + 2 * C, log_out * LOG2E, mask=in_heads)
    if SCAN.ERASE == "previous":
        tl.store(at + LOG_ERASE * C, exclusive * LOG2E, mask=in_heads)
    last = offs[:, None] == (0 if SCAN.REVERSE else C - 1)
    tl.store(log_total_ptr + chunk * H + h, tl.sum(tl.where(last, cumulative, 0.0), 0) * LOG2E, mask=h < H)


@triton.jit
def _slowest(slowest, norm, logs, key, cols, size):
    """The largest log gate of every token, and |k|² [C], these columns included."""
    slowest = tl.maximum(slowest, tl.max(tl.where((cols < size)[None, :], logs, float("-inf")), 1))
    key = key.to(tl.float32)
    return slowest, norm + tl.sum(key * key, 1)


@triton.jit
def _publish_chunk(
    own, gates, k, start, row, offs, inside, SCAN: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Publish the sums of a chunk's phases, PART channels at a time. Returns what `_extremes` does, of |a|."""
    KEYS: tl.constexpr = SCAN.KEYS
    most = start.to(tl.float32) * 0.0
    slowest, norm = tl.full(offs.shape, float("-inf"), tl.float32), tl.zeros(offs.shape, tl.float32)
    for part in tl.range(0, KEYS, PART, num_stages=1):
        log_p, phase = load_phases(gates, start, offs, inside, part, KEYS, SCAN.DECAY, PART)
        publish_phases(own, part, phase, KEYS, WINDOW)
        most = tl.maximum(most, tl.max(tl.abs(tl.sum(log_p, 0)), 0) * LOG2E)
        if NORM and SCAN.DECAY == "key":
            cols = part + tl.arange(0, PART)
            slowest, norm = _slowest(slowest, norm, log_p, load_tile(k, row, offs, inside, cols), cols, KEYS)
    return most, slowest, norm


@triton.jit
def _extremes(
    gates, k, start, row, offs, inside, SCAN: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """-log2 of the least decay_total of a channel, of one gate per key channel; if NORM, the largest log gate of every
    token, and |k|² [C]."""
    CHANNELS: tl.constexpr = BLOCK_K if BLOCK_K < 256 else 256
    most = start.to(tl.float32) * 0.0
    slowest, norm = tl.full(offs.shape, float("-inf"), tl.float32), tl.zeros(offs.shape, tl.float32)
    for part in tl.static_range(0, BLOCK_K, CHANNELS):
        cols = part + tl.arange(0, CHANNELS)
        logs = load_gates(gates, start, offs, inside, cols, SCAN.K, "key").to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(tl.sum(logs, 0) * LOG2E), 0))
        if NORM:
            slowest, norm = _slowest(slowest, norm, logs, load_tile(k, row, offs, inside, cols), cols, SCAN.K)
    return most, slowest, norm


@triton.jit
def _rotations(
    own, gates, out, chunk_head, document_head, is_first, start, offs, inside, part,
    SCAN: tl.constexpr, WINDOW: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """log |a| [C PART] of complex gates; cos and sin [C PART] of the rotations of k, of q and of erase keys. Stores the
    phase that the chunk's first token sees and, of the chunk that is scanned first, the angle of the initial state."""
    KEYS: tl.constexpr = SCAN.KEYS
    offs_p = part + tl.arange(0, PART)
    log_p, phase = load_phases(gates, start, offs, inside, part, KEYS, SCAN.DECAY, PART)
    begin, end = sum_phases(own, part, phase, KEYS, SCAN.REVERSE, WINDOW)
    tl.store(out.chunk_phase + chunk_head * KEYS + offs_p, begin, mask=offs_p < KEYS)
    tl.store(out.state_angle + document_head * KEYS + offs_p, angle(begin), mask=(offs_p < KEYS) & is_first)
    of_k = cos_sin_of(end, SCAN.DOT)
    of_q, of_e = of_k, of_k
    if SCAN.BEFORE:
        of_q = cos_sin_of(end + phase, SCAN.DOT)
    if SCAN.ERASE == "previous":
        of_e = cos_sin_of(end + phase, SCAN.DOT)
    return log_p, of_k, of_q, of_e


@triton.jit
def _half(x, rotation, IMAGINARY: tl.constexpr):
    """The real or the imaginary part of q or k [C PART] that is rotated, by the cos and sin in `rotation`."""
    cos, sin = rotation
    return x * (-sin if IMAGINARY else cos)


@triton.jit
def _store_log_norm(norm, log_total, x, out, chunk_head, row, offs, inside, h, SCAN: tl.constexpr):
    """log2 of a bound of the norm of a chunk's transition, of |k|² and the gates: 1 - beta k kᵀ multiplies k by
    1 - beta |k|² and what is orthogonal to it by 1."""
    beta = load_beta(x.beta, row, offs, inside, h, SCAN.H)
    growth = tl.maximum(tl.abs(1 - beta * norm), 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out.log_norm + chunk_head, log_total + tl.sum(tl.log2(growth), 0))


@triton.jit(do_not_specialize=["T", "documents", "chunks"])
def prepare(
    x, out, descriptors_ptr,  # Given; Prepared, written, but for logs of one gate per head; see `lookback`
    cu_ptr, T, documents, chunks, scale,
    SCAN: tl.constexpr, LIMIT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, PART key channels at a time. LIMIT: log2 of what factors of a chunk in range may reach."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    C: tl.constexpr = SCAN.C
    KEYS: tl.constexpr = SCAN.KEYS
    DECAY: tl.constexpr = SCAN.DECAY
    DOT: tl.constexpr = SCAN.DOT
    COMPLEX: tl.constexpr = descriptors_ptr is not None
    DELTA: tl.constexpr = out.A_kk is not None
    NORM: tl.constexpr = out.log_norm is not None
    HALVES: tl.constexpr = K // KEYS
    chunk_head = tl.program_id(0).to(tl.int64)
    if COMPLEX:
        chunk_head = next_chunk_head(descriptors_ptr, cu_ptr, T, chunks, H, SCAN.REVERSE, C)
    chunk, h = chunk_head // H, chunk_head % H
    document, index, first, start, stop = locate_chunk(chunk, cu_ptr, T, documents, C)
    if start >= stop:
        return
    offs, offs_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
    length = tl.minimum(stop - start, C).to(tl.int32)
    row, inside = first + start, offs < length
    seen = causal(C, SCAN.REVERSE)
    q, k, erase = given_of(x, h, SCAN)
    in_range = 1
    if DECAY != "none":
        gates = head_gates(x, first, T, h, cu_ptr, SCAN)
    if COMPLEX:
        own = descriptors_of(descriptors_ptr, chunk_head, start, stop, index, H, KEYS, SCAN.REVERSE, C)
        most, slowest, norm = _publish_chunk(own, gates, k, start, row, offs, inside, SCAN, NORM, WINDOW, PART)
    elif DECAY == "key":
        most, slowest, norm = _extremes(gates, k, start, row, offs, inside, SCAN, NORM, BLOCK_K)
    if DECAY == "key":
        in_range = tl.where(most <= 2 * LIMIT, 1, 0)
        tl.store(out.in_range + chunk_head, in_range)
        if NORM:  # erasing mixes the rows: of each token the gate that keeps most
            slowest = tl.where(inside, slowest * LOG2E, 0.0)
            _store_log_norm(norm, tl.sum(slowest, 0), x, out, chunk_head, row, offs, inside, h, SCAN)
    A_kk = tl.zeros([C, C], tl.float32)
    now = tl.zeros([C], tl.float32)
    for part in tl.range(0, KEYS, PART, num_stages=1):
        offs_p = part + tl.arange(0, PART)
        if COMPLEX:
            log_p, of_k, of_q, of_e = _rotations(
                own, gates, out, chunk_head, document * H + h, stop - start <= C if SCAN.REVERSE else index == 0,
                start, offs, inside, part, SCAN, WINDOW, PART,
            )  # fmt: skip
        elif DECAY == "key":
            log_p = load_gates(gates, start, offs, inside, offs_p, K, DECAY)
        key = tied_key(log_p) if SCAN.TIED else load_tile(k, row, offs, inside, offs_p)
        query = key
        if DECAY == "key" or SCAN.BEFORE or COMPLEX:
            query = load_tile(q, row, offs, inside, offs_p)
        if DECAY == "key" or x.bonus is not None:
            query = query * scale
        if x.bonus is not None:
            bonus = tl.load(x.bonus + h * K + offs_p, mask=offs_p < K, other=0.0)
            now += tl.sum(query * key * bonus[None, :], 1)
        if DECAY == "key":
            log_in, log_out, log_total = chunk_decays(log_p, SCAN.REVERSE, SCAN.BEFORE, DOT)
            anchor = log_anchor(log_total, in_range)
            decay_in = tl.exp2(log_in - anchor[None, :])
        for half in tl.static_range(HALVES):  # of the rows, if they are twice the keys: real part, imaginary part
            to, q_in, k_out = (H * HALVES, h * HALVES + half, KEYS), query, key
            if COMPLEX:
                q_in, k_out = _half(query, of_q, half), _half(key, of_k, half)
            if out.q_in is not None:
                store_tile((out.q_in,) + to, row, offs, inside, offs_p, q_in * decay_in if DECAY == "key" else q_in)
            if SCAN.ERASE == "none":
                k_in = k_out
                if DECAY == "key":
                    k_in = k_in * decay_in
            if DECAY == "key":
                k_out = k_out * tl.exp2(log_out - anchor[None, :])
            if out.k_out is not None:
                store_tile((out.k_out,) + to, row, offs, inside, offs_p, k_out)
            if DECAY == "key":
                at = (chunk_head * HALVES + half) * KEYS + offs_p
                tl.store(out.anchor_in + at, tl.exp2(anchor), mask=offs_p < KEYS)
                tl.store(out.anchor_out + at, tl.exp2(log_total - anchor), mask=offs_p < KEYS)
            if SCAN.ERASE != "none":
                k_in = load_tile(erase, row, offs, inside, offs_p)
                if COMPLEX:
                    k_in = _half(k_in, of_e, half)
                if DECAY == "key":
                    k_in = k_in * tl.exp2(key_log_erase(log_p, log_in, SCAN) - anchor[None, :])
            if out.k_in is not None:
                store_tile((out.k_in,) + to, row, offs, inside, offs_p, k_in)
            if DELTA:
                A_kk = tl.dot(k_in.to(DOT), tl.trans(k_out.to(DOT)), A_kk, input_precision=SCAN.PRECISION)
    if SCAN.BEFORE:
        tl.store(out.log_decays + chunk_head * (4 * C) + BONUS * C + offs, now)
    if DELTA:
        if NORM and DECAY == "scalar":
            diagonal = tl.sum(tl.where(offs[:, None] == offs[None, :], A_kk, 0.0), 1)  # |k|²
            log_total = tl.load(out.log_total + chunk_head)
            _store_log_norm(diagonal, log_total, x, out, chunk_head, row, offs, inside, h, SCAN)
        if DECAY == "scalar":
            log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
            cumulative = load_log_decay(out.log_decays, chunk_head, C, CUMULATIVE)
            log_e = load_log_erase(out, chunk_head, cumulative, SCAN)
            A_kk *= pair_decay(log_a, log_e, cumulative, SCAN.REVERSE, SCAN.ERASE == "previous", False, DOT)
        A_kk = tl.where(off_diagonal(seen), A_kk, 0.0)
        tl.store(matrix_ptrs(out.A_kk, chunk * H + h, C), A_kk, mask=(inside & (in_range != 0))[:, None])


@triton.jit(do_not_specialize=["T", "documents", "chunk_heads"])
def scores_exact(
    x, prepared, A_qk_ptr, A_kk_ptr,  # Given; Prepared; written: [chunks H C C], the second of the delta rule
    cu_ptr, T, documents, chunk_heads, scale,
    SCAN: tl.constexpr, CHUNKS_PER_PROGRAM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A_qk and A_kk of every chunk that is not in range, token by token. A program looks at CHUNKS_PER_PROGRAM chunks
    of a head and mostly finds that all are in range."""
    H: tl.constexpr = SCAN.H
    K: tl.constexpr = SCAN.K
    C: tl.constexpr = SCAN.C
    KEYS: tl.constexpr = SCAN.KEYS
    begin = tl.program_id(0).to(tl.int64) * CHUNKS_PER_PROGRAM
    if all_in_range(prepared.in_range, begin, chunk_heads, CHUNKS_PER_PROGRAM):
        return
    for chunk_head in range(begin, tl.minimum(begin + CHUNKS_PER_PROGRAM, chunk_heads)):
        if tl.load(prepared.in_range + chunk_head) == 0:
            chunk, h = chunk_head // H, chunk_head % H
            first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
            offs, offs_k = tl.arange(0, C), tl.arange(0, BLOCK_K)
            length, row = tl.minimum(stop - start, C).to(tl.int32), first + start
            q, k, erase = given_of(x, h, SCAN)
            gates = head_gates(x, first, T, h, cu_ptr, SCAN)
            # E [s K]: the key of token s times the gates after it, up to the token that reads
            E = tl.zeros([C, BLOCK_K], tl.float32)
            at = chunk_head * (C * C) + offs
            phase = first_phase(prepared.chunk_phase, chunk_head, offs_k, K, KEYS)
            for i in tl.range(0, length, num_stages=1):
                t = length - 1 - i if SCAN.REVERSE else i
                log_t, a = token_gates(gates, start + t, offs_k, K, KEYS)
                phase_before = phase
                if prepared.chunk_phase is not None:
                    phase -= token_phases(gates, start + t, offs_k, K, KEYS)
                query = load_rotated(q, row + t, offs_k, phase_before if SCAN.BEFORE else phase, K)
                key = tied_key(log_t) if SCAN.TIED else load_rotated(k, row + t, offs_k, phase, K)
                eraser = load_eraser(erase, key, row + t, offs_k, phase_before, phase, SCAN)
                if SCAN.BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                if A_kk_ptr is not None and SCAN.ERASE == "previous":
                    tl.store(A_kk_ptr + at + t * C, tl.sum(E * eraser[None, :], 1))
                E = E * a[None, :]
                if A_kk_ptr is not None and SCAN.ERASE != "previous":
                    tl.store(A_kk_ptr + at + t * C, tl.sum(E * eraser[None, :], 1))
                E = tl.where((offs == t)[:, None], key[None, :], E)
                if not SCAN.BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                tl.store(A_qk_ptr + at + t * C, (scores * scale).to(A_qk_ptr.dtype.element_ty))


@triton.jit
def _store_block(ptr, n, m, block, C: tl.constexpr):
    """Store the [16 16] block in block row n and block column m of a matrix [C C]."""
    offs = tl.arange(0, 16)
    tl.store(ptr + (n * 16 + offs)[:, None] * C + m * 16 + offs[None, :], block)


@triton.jit(do_not_specialize=["T", "documents"])
def solve_tril(A_kk_ptr, beta_ptr, A_solve_ptr, cu_ptr, T, documents, SCAN: tl.constexpr):
    """A_solve = A_kk (1 + β A_kk)⁻¹, in the order of the scan: 16 rows one by one among themselves, then blocks of 16
    by products. β is 1 without beta."""
    H: tl.constexpr = SCAN.H
    C: tl.constexpr = SCAN.C
    REVERSE: tl.constexpr = SCAN.REVERSE
    chunk_head = tl.program_id(0).to(tl.int64)
    chunk, h = chunk_head // H, chunk_head % H
    first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
    if start >= stop:
        return
    N: tl.constexpr = C // 16
    block, offs = tl.arange(0, N), tl.arange(0, 16)
    length = tl.minimum(stop - start, C).to(tl.int32)
    A_kk = A_kk_ptr + chunk_head * (C * C)
    rows = block[:, None] * 16 + offs[None, :]
    beta = load_beta(beta_ptr, first + start, rows, rows < length, h, H)
    # each 16 rows by themselves, all blocks at once: [N 16 16]
    D = tl.zeros([N, 16, 16], tl.float32)
    for r in tl.range(0, 16, num_stages=4):
        t = 15 - r if REVERSE else r
        row = block * 16 + t
        ptrs = A_kk + (row * C + block * 16)[:, None] + offs[None, :]
        A_row = tl.load(ptrs, mask=(row < length)[:, None], other=0.0)
        product = A_row - tl.sum(D * (A_row * beta)[:, :, None], 1)
        D = tl.where((offs == t)[None, :, None], product[:, None, :], D)
    A_solve, diagonal, weights = A_solve_ptr + chunk_head * (C * C), (), ()
    for i in tl.static_range(N):
        n = N - 1 - i if REVERSE else i
        diagonal = diagonal + (tl.sum(tl.where((block == n)[:, None, None], D, 0.0), 0),)
        rows = n * 16 + offs
        weights = weights + (-load_beta(beta_ptr, first + start, rows, rows < length, h, H)[:, None],)
        _store_block(A_solve, n, n, diagonal[i], C)
        for j in tl.static_range(i):
            _store_block(A_solve, N - 1 - j if REVERSE else j, n, tl.zeros([16, 16], tl.float32), C)
    # below the diagonal, with D_i on it: (1 - D_i β) (A_kk_ij - Σ_p A_kk_ip β A_solve_pj), over blocks p from j up to i
    for j in tl.static_range(N):
        m, column = N - 1 - j if REVERSE else j, (diagonal[j] * weights[j],)
        for i in tl.static_range(j + 1, N):
            n = N - 1 - i if REVERSE else i
            rows = n * 16 + offs
            rest = tl.load(
                A_kk + rows[:, None] * C + (m * 16 + offs)[None, :], mask=(rows < length)[:, None], other=0.0
            )
            for p in tl.static_range(j, i):
                cols = (N - 1 - p if REVERSE else p) * 16 + offs
                A_ip = tl.load(A_kk + rows[:, None] * C + cols[None, :], mask=(rows < length)[:, None], other=0.0)
                rest = tl.dot(A_ip, column[p - j], rest, input_precision="tf32x3")
            rest = tl.dot(diagonal[i], rest * weights[i], rest, input_precision="tf32x3")
            column = column + (rest * weights[i],)
            _store_block(A_solve, n, m, rest, C)
