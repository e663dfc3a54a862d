"""The separable scan in chunks: S_t = a_t S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t, forward and backward.

Legend
    B T H G     batch, time, heads, groups of heads that share a tensor; K, V rows and columns of the state S
    C           tokens of a chunk; chunks lie at fixed places of a row, so every kernel finds the same ones
    q k v u     u is v, or with beta the error u_t = β_t (v_t − (a_t S_{t-1})ᵀ k_t) of the delta rule
    P           [C C] scores of the chunk, q_t·k_s weighed by the gates between; of the delta rule also M, k_t·k_s
    S, G        state that enters a chunk; gradient of the state that leaves it
    strand      one segment of one head, walked by one program with the state on chip
    FLIP        the scan itself runs from right to left
    rise, fall  see `tiles`

With R = rise(q), R' = rise(k), F = fall(k) and A all gates of a chunk, its whole action is

    y = R S + P u      S <- A S + Fᵀ u      u = v, or u = T β (v − R' S) with T = (1 + β M)⁻¹

which is linear in S, so its derivative has the same shape from right to left:

    du = Pᵀ dy + F G   G <- A G + Rᵀ dy     dv = du, or dv = β r, r = Tᵀ du, and G <- G − R'ᵀ dv
    dR = dy Sᵀ         dF = u Gᵀ            dA = rowsum(G S)       dP = dy uᵀ       dM = −dv uᵀ     dR' = −dv Sᵀ

Kernels
    prepare     every chunk by itself: is it calm? if not, P and M token by token; T
    forward     left to right: y; or what a segment leaves by itself; S before every chunk
    adjoint     right to left: du, r; G after every chunk
    gradient    every chunk by itself: dq, dk, d log a, dβ
    repair      every chunk that is not calm: what dP and dM owe to q, k and log a, token by token

One gate a head: P is weighed pair by pair. A gate a key: q and k are weighed before they meet, from the middle of the
chunk, q by 2^(rise − half) and k by 2^(fall − half), which overflows where a chunk forgets too much. Such a chunk is
not calm, its factors are counted from its ends instead, where none exceeds 1, and P is made by products of gates.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.tiles import (
    LOG2E,
    RESET,
    between,
    load_gates,
    load_row,
    load_tile,
    order,
    place_of,
    reaches,
    reaches_of_one,
    store_tile,
    strand_of,
    strict,
    sums_along,
    tied,
)


@triton.jit
def _square(ptr, chunk, h, H, C: tl.constexpr):
    """Pointers [C C] to the square that belongs to a chunk of a head."""
    offs = tl.arange(0, C)
    return ptr + (chunk * H + h) * (C * C) + offs[:, None] * C + offs[None, :]


@triton.jit
def _middle(whole, calm):
    """[K] log2 of what the factors of a chunk are counted from."""
    return tl.where(calm != 0, 0.5 * whole, 0.0)


# ----------------------------------------------------------------------------------------------------------- prepare


@triton.jit
def _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr):
    """The gates of one row and head: pointer and strides."""
    row = first * 0
    if cu_ptr is None:
        row = first // tl.maximum(T, 1)
    return gate_ptr + row * gate_sb + h * gate_sh, gate_st, gate_sd


@triton.jit(do_not_specialize=["T", "documents"])
def prepare(
    q_ptr, k_ptr, gate_ptr, beta_ptr,  # tensors [B T heads *]
    calm_ptr, scores_ptr, overlap_ptr,  # [chunks H], P [chunks H C C], and β M in float32 if DELTA
    cu_ptr, T, documents, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    DECAY: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whether a chunk is calm, what its keys have in common if DELTA, and its scores if it is not calm."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, h = pid // H, pid % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    row, inside = first + start, offs < length
    seen = order(BLOCK_C, FLIP)
    k, q = (k_ptr, GROUPS, h * GROUPS // H, K), (q_ptr, GROUPS, h * GROUPS // H, K)
    calm = 1
    if DECAY != "none":
        gates = _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
        log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
    if DECAY == "key":
        total = tl.sum(log_a.to(tl.float32), 0) * LOG2E
        calm = tl.where(tl.max(tl.abs(total), 0) <= 2 * LIMIT, 1, 0)
        tl.store(calm_ptr + chunk * H + h, calm)
    if DELTA:
        reach = load_tile(k, row, offs, inside, offs_k)
        key = reach
        if DECAY == "key":
            rise, fall, whole = reaches(log_a, FLIP, False, DOT)
            middle = _middle(whole, calm)[None, :]
            reach, key = reach * tl.exp2(rise - middle), key * tl.exp2(fall - middle)
        M = tl.dot(reach.to(DOT), tl.trans(key.to(DOT)), input_precision=PRECISION)
        if DECAY == "one":
            M = M * between(log_a, FLIP, False, False, DOT)
        beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
        M = tl.where(strict(seen), M, 0.0) * beta[:, None]
        tl.store(_square(overlap_ptr, chunk, h, H, BLOCK_C), M, mask=(inside & (calm != 0))[:, None])
    if DECAY == "key":
        if calm == 0:
            # E [s K]: the key of token s times the gates after it, up to the token that reads
            E = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
            at = (chunk * H + h) * (BLOCK_C * BLOCK_C) + offs
            for i in tl.range(0, length, num_stages=1):
                t = length - 1 - i if FLIP else i
                log_t, a = _gate_row(gates, start + t, offs_k, K)
                query = load_row(q, row + t, offs_k)
                write = tied(log_t) if TIED else load_row(k, row + t, offs_k)
                if BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                E = E * a[None, :]
                if DELTA:
                    weight = tl.load(beta_ptr + (row + t) * H + h).to(tl.float32)
                    tl.store(overlap_ptr + at + t * BLOCK_C, tl.sum(E * write[None, :], 1) * weight)
                E = tl.where((offs == t)[:, None], write[None, :], E)
                if not BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                tl.store(scores_ptr + at + t * BLOCK_C, (scores * scale).to(scores_ptr.dtype.element_ty))


@triton.jit
def _gate_row(gates, t, offs_k, K):
    """Log of the gates of one token [K] and the gates."""
    ptr, stride_t, stride_d = gates
    log_a = tl.load(ptr + t * stride_t + offs_k * stride_d, mask=offs_k < K, other=0.0).to(tl.float32)
    return log_a, tl.where(log_a <= RESET, 0.0, tl.exp2(log_a * LOG2E))


@triton.jit(do_not_specialize=["T", "documents"])
def solve(
    overlap_ptr, solve_ptr, cu_ptr, T, documents,
    H: tl.constexpr, FLIP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """T = (1 + β M)⁻¹ by substitution, row by row in the order of time."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, h = pid // H, pid % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    offs = tl.arange(0, BLOCK_C)
    X = tl.where(offs[:, None] == offs[None, :], 1.0, 0.0)
    at = overlap_ptr + (chunk * H + h) * (BLOCK_C * BLOCK_C)
    first_row = length - 1 if FLIP else 0
    ahead = tl.load(at + first_row * BLOCK_C + offs, mask=offs < length, other=0.0)
    for i in tl.range(0, length, num_stages=1):
        t = length - 1 - i if FLIP else i
        weights = ahead
        t_next = tl.maximum(t - 1, 0) if FLIP else tl.minimum(t + 1, length - 1)
        ahead = tl.load(at + t_next * BLOCK_C + offs, mask=offs < length, other=0.0)
        found = tl.sum(X * weights[:, None], 0)
        X = tl.where((offs == t)[:, None], X - found[None, :], X)
    tl.store(_square(solve_ptr, chunk, h, H, BLOCK_C), X.to(solve_ptr.dtype.element_ty))


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["B", "T", "tiles", "segments", "span"])  # not worth a compilation each
def forward(
    q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, bonus_ptr,  # tensors [B T heads *], bonus [H K]
    y_ptr, u_ptr, keep_ptr,  # [B T H V]; states before every chunk [chunks H K V]
    enter_ptr, leave_ptr, share_ptr,  # [B H segments K V] states, [B H segments K] product of the gates
    calm_ptr, scores_ptr, solve_ptr,  # from `prepare` and `solve`
    cu_ptr, B, T, tiles, segments, span, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    DECAY: tl.constexpr, FLIP: tl.constexpr, BACK: tl.constexpr, EMIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the state of one strand. BACK: the adjoint's state, with q for k and dy for
    v, from the scan's end; only what a segment leaves."""
    pid = tl.program_id(0).to(tl.int64)
    tile, strand = pid % tiles, pid // tiles
    b, h, segment, first, begin, stop, chunk = strand_of(strand, cu_ptr, H, T, segments, span, BLOCK_C)
    LEFT: tl.constexpr = FLIP != BACK
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    BEFORE: tl.constexpr = bonus_ptr is not None
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    in_state = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None].to(tl.int64) * V + offs_v[None, :]
    q, k, v = (q_ptr, GROUPS, h * GROUPS // H, K), (k_ptr, GROUPS, h * GROUPS // H, K), (v_ptr, H, h, V)
    seen, later = order(BLOCK_C, FLIP), order(BLOCK_C, not FLIP)  # [t s], [s t]
    read, unread = seen, later
    if BEFORE:
        read, unread = strict(seen), strict(later)
        bonus = tl.load(bonus_ptr + h * K + offs_k, mask=offs_k < K, other=0.0)
    if DECAY != "none":
        gates = _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if enter_ptr is not None:
        S = tl.load(enter_ptr + strand * (K * V) + cell, mask=in_state, other=0.0)
    passed = tl.zeros([BLOCK_K], tl.float32)  # log2 of the gates of the segment

    chunks = tl.cdiv(stop - begin, BLOCK_C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - i if LEFT else i
        start = begin + n * BLOCK_C
        row, inside = first + start, offs < stop - start
        square = (chunk + n) * H + h
        if keep_ptr is not None:
            tl.store(keep_ptr + square * (K * V) + cell, S.to(keep_ptr.dtype.element_ty), mask=in_state)
        calm = 1
        if DECAY != "none":
            log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
        if DECAY == "key":
            calm = tl.load(calm_ptr + square)
        write = tied(log_a) if TIED else load_tile(k, row, offs, inside, offs_k)
        u = load_tile(v, row, offs, inside, offs_v)
        reach = write
        query = write
        if EMIT:
            query = load_tile(q, row, offs, inside, offs_k)
            told = query * scale
            if BEFORE:
                now = tl.sum(told * write * bonus[None, :], 1)
        # what meets what: factors of the tokens, of the state as it is read, of the state as it is left
        if DECAY == "key":
            rise, fall, whole = reaches(log_a, FLIP, BEFORE, DOT)
            middle = _middle(whole, calm)
            enter, leave = tl.exp2(middle), tl.exp2(whole - middle)
            rise = tl.exp2(rise - middle[None, :])
            write = write * (rise * scale if BACK else tl.exp2(fall - middle[None, :]))
            reach = reach * rise
            if EMIT:
                query = told * rise
            read_state, S = S * enter[:, None], S * leave[:, None]
        else:
            read_state = S
            if DECAY == "one":
                rise, fall, whole = reaches_of_one(log_a, FLIP, BEFORE)
                rise = tl.exp2(rise)
                write = write * (rise * scale if BACK else tl.exp2(fall))[:, None]
                S = S * tl.exp2(whole)
            elif BACK:
                write = write * scale
        if share_ptr is not None and DECAY != "none":
            passed += whole
        if DELTA:
            seen_state = tl.dot(reach.to(DOT), read_state.to(DOT), input_precision=PRECISION)
            if DECAY == "one":
                seen_state = seen_state * rise[:, None]
            beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
            X = tl.load(_square(solve_ptr, chunk + n, h, H, BLOCK_C))
            u = tl.dot(X, ((u - seen_state) * beta[:, None]).to(DOT), input_precision=PRECISION)
            if u_ptr is not None:
                store_tile((u_ptr, H, h, V), row, offs, inside, offs_v, u)
        u = u.to(DOT)
        if EMIT:
            query = query.to(DOT)
            y = tl.dot(query, read_state.to(DOT), input_precision=PRECISION)
            if DECAY == "one":
                weight = between(log_a, FLIP, BEFORE, False, DOT) * scale
                scores = tl.dot(query, tl.trans(reach.to(DOT)), input_precision=PRECISION) * weight
                y = y * (rise * scale)[:, None]
            elif DECAY == "key":
                scores = tl.dot(query, tl.trans(write.to(DOT)), input_precision=PRECISION)
                scores = tl.where(read, scores, 0.0)
                other = tl.load(_square(scores_ptr, chunk + n, h, H, BLOCK_C), mask=(inside & (calm == 0))[:, None], other=0.0)
                scores = tl.where(calm != 0, scores, other.to(tl.float32))
            else:
                scores = tl.where(read, tl.dot(query, tl.trans(reach.to(DOT)), input_precision=PRECISION), 0.0) * scale
                y = y * scale
            y = tl.dot(scores.to(DOT), u, y, input_precision=PRECISION)
            if BEFORE:
                y += now[:, None] * u.to(tl.float32)
            store_tile((y_ptr, H, h, V), row, offs, inside, offs_v, y)
        S = tl.dot(tl.trans(write.to(DOT)), u, S, input_precision=PRECISION)
        if DECAY == "key":
            S = S * enter[:, None]

    if leave_ptr is not None:
        if EMIT:  # only the segment that ends the scan
            in_state = in_state & (segment == (0 if LEFT else segments - 1))
            strand = b * H + h
        tl.store(leave_ptr + strand * (K * V) + cell, S, mask=in_state)
    if share_ptr is not None:
        tl.store(share_ptr + strand * K + offs_k, tl.exp2(passed), mask=(offs_k < K) & (tile == 0))


@triton.jit
def combine(
    state_ptr, share_ptr, enter_ptr,  # [B H segments K V] left by each segment alone, [B H segments K], [B H K V]
    K, V, segments,
    LEFT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Overwrite what each segment leaves by the state that enters it: S <- share S + left, from end to end."""
    bh = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None] * V + offs_v[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if enter_ptr is not None:
        S = tl.load(enter_ptr + bh * K * V + cell, mask=inside, other=0.0)
    for i in range(0, segments):
        strand = bh * segments + (segments - 1 - i if LEFT else i)
        left = tl.load(state_ptr + strand * K * V + cell, mask=inside, other=0.0)
        share = tl.load(share_ptr + strand * K + offs_k, mask=offs_k < K, other=0.0)
        tl.store(state_ptr + strand * K * V + cell, S, mask=inside)
        S = S * share[:, None] + left


# ----------------------------------------------------------------------------------------------------------- adjoint


@triton.jit(do_not_specialize=["B", "T", "tiles", "segments", "span"])
def adjoint(
    q_ptr, k_ptr, dy_ptr, gate_ptr, beta_ptr, bonus_ptr,  # tensors [B T heads *], bonus [H K]
    du_ptr, keep_ptr,  # du, or r if DELTA [B T H V]; gradients of the state after every chunk [chunks H K V]
    enter_ptr, leave_ptr, calm_ptr, scores_ptr, solve_ptr,  # as in `forward`
    cu_ptr, B, T, tiles, segments, span, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    DECAY: tl.constexpr, FLIP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the gradient of the state of one strand, against the scan's direction."""
    pid = tl.program_id(0).to(tl.int64)
    tile, strand = pid % tiles, pid // tiles
    b, h, segment, first, begin, stop, chunk = strand_of(strand, cu_ptr, H, T, segments, span, BLOCK_C)
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    BEFORE: tl.constexpr = bonus_ptr is not None
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    in_state = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None].to(tl.int64) * V + offs_v[None, :]
    q, k, dy = (q_ptr, GROUPS, h * GROUPS // H, K), (k_ptr, GROUPS, h * GROUPS // H, K), (dy_ptr, H, h, V)
    seen, later = order(BLOCK_C, FLIP), order(BLOCK_C, not FLIP)  # [t s], [s t]
    read, unread = seen, later
    if BEFORE:
        read, unread = strict(seen), strict(later)
        bonus = tl.load(bonus_ptr + h * K + offs_k, mask=offs_k < K, other=0.0)
    if DECAY != "none":
        gates = _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    G = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if enter_ptr is not None:
        G = tl.load(enter_ptr + strand * (K * V) + cell, mask=in_state, other=0.0)

    chunks = tl.cdiv(stop - begin, BLOCK_C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = i if FLIP else chunks - 1 - i
        start = begin + n * BLOCK_C
        row, inside = first + start, offs < stop - start
        square = (chunk + n) * H + h
        tl.store(keep_ptr + square * (K * V) + cell, G.to(keep_ptr.dtype.element_ty), mask=in_state)
        calm = 1
        if DECAY != "none":
            log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
        if DECAY == "key":
            calm = tl.load(calm_ptr + square)
        query = load_tile(q, row, offs, inside, offs_k)
        key = tied(log_a) if TIED else load_tile(k, row, offs, inside, offs_k)
        given = load_tile(dy, row, offs, inside, offs_v).to(DOT)
        reach = key
        if BEFORE:
            now = tl.sum(query * scale * key * bonus[None, :], 1)
        if DECAY == "key":
            rise, fall, whole = reaches(log_a, FLIP, BEFORE, DOT)
            middle = _middle(whole, calm)
            enter, leave = tl.exp2(middle), tl.exp2(whole - middle)
            rise = tl.exp2(rise - middle[None, :])
            query, reach = query * (rise * scale), reach * rise
            key = key * tl.exp2(fall - middle[None, :])
            left, G = G * enter[:, None], G * leave[:, None]
            query, key = query.to(DOT), key.to(DOT)
            scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [s t]
            scores = tl.where(unread, scores, 0.0)
            turned = scores_ptr + square * (BLOCK_C * BLOCK_C) + offs[None, :] * BLOCK_C + offs[:, None]
            other = tl.load(turned, mask=(inside & (calm == 0))[None, :], other=0.0)
            scores = tl.where(calm != 0, scores, other.to(tl.float32))
            du = tl.dot(key, left.to(DOT), input_precision=PRECISION)
        else:
            scores = tl.dot(key.to(DOT), tl.trans(query.to(DOT)), input_precision=PRECISION)
            du = tl.dot(key.to(DOT), G.to(DOT), input_precision=PRECISION)
            if DECAY == "one":
                rise, fall, whole = reaches_of_one(log_a, FLIP, BEFORE)
                rise = tl.exp2(rise)
                scores = scores * between(log_a, FLIP, BEFORE, True, DOT) * scale
                du = du * tl.exp2(fall)[:, None]
                query, reach = query * (rise * scale)[:, None], reach * rise[:, None]
                G = G * tl.exp2(whole)
            else:
                scores = tl.where(unread, scores, 0.0) * scale
                query = query * scale
            query = query.to(DOT)
        du = tl.dot(scores.to(DOT), given, du, input_precision=PRECISION)
        if BEFORE:
            du += now[:, None] * given.to(tl.float32)
        G = tl.dot(tl.trans(query), given, G, input_precision=PRECISION)
        if DELTA:
            X = tl.load(solve_ptr + square * (BLOCK_C * BLOCK_C) + offs[None, :] * BLOCK_C + offs[:, None])  # Tᵀ
            du = tl.dot(X, du.to(DOT), input_precision=PRECISION)
            beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
            G = tl.dot(tl.trans(reach.to(DOT)), (du * -beta[:, None]).to(DOT), G, input_precision=PRECISION)
        if DECAY == "key":
            G = G * enter[:, None]
        store_tile((du_ptr, H, h, V), row, offs, inside, offs_v, du)

    if leave_ptr is not None:  # only the segment in which the scan begins
        in_state = in_state & (segment == (segments - 1 if FLIP else 0))
        tl.store(leave_ptr + (b * H + h) * (K * V) + cell, G, mask=in_state)


# ---------------------------------------------------------------------------------------------------------- gradient


@triton.jit(do_not_specialize=["B", "T", "tiles", "documents"])
def gradient(
    q_ptr, k_ptr, v_ptr, dy_ptr, gate_ptr, beta_ptr, bonus_ptr,  # tensors [B T heads *], bonus [H K]
    u_ptr, du_ptr, S_ptr, G_ptr, calm_ptr,  # u and r of the delta rule; from `forward` and `adjoint`
    dq_ptr, dk_ptr, dv_ptr, dgate_ptr, dbeta_ptr, dbonus_ptr,  # dv of DELTA only; dgate one a head and dbeta a tile
    cu_ptr, B, T, tiles, documents, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    DECAY: tl.constexpr, FLIP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns rows [BLOCK_K] of the state around one chunk."""
    pid = tl.program_id(0).to(tl.int64)
    tile, square = pid % tiles, pid // tiles
    chunk, h = square // H, square % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    BEFORE: tl.constexpr = bonus_ptr is not None
    offs, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V)
    offs_k = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    row, inside = first + start, offs < stop - start
    seen, later = order(BLOCK_C, FLIP), order(BLOCK_C, not FLIP)  # [t s], [s t]
    read, unread = seen, later
    if BEFORE:
        read, unread = strict(seen), strict(later)
    k, values = (k_ptr, GROUPS, h * GROUPS // H, K), (v_ptr, H, h, V)
    cell = square * (K * V) + offs_k[:, None] * V + offs_v[None, :]
    in_state = (offs_k < K)[:, None] & (offs_v < V)[None, :]

    calm = 1
    if DECAY != "none":
        gates = _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
        log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
    if DECAY == "key":
        calm = tl.load(calm_ptr + square)
    query = load_tile((q_ptr, GROUPS, h * GROUPS // H, K), row, offs, inside, offs_k)
    key = tied(log_a) if TIED else load_tile(k, row, offs, inside, offs_k)
    given = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    u = load_tile((u_ptr, H, h, V) if DELTA else values, row, offs, inside, offs_v).to(DOT)
    S = tl.load(S_ptr + cell, mask=in_state, other=0.0)
    G = tl.load(G_ptr + cell, mask=in_state, other=0.0)
    plain_query, plain_key = query, key

    # [t s] and [s t]: what the scores owe. A chunk that is not calm leaves them to `repair`.
    dP, dPt = tl.dot(given, tl.trans(u), input_precision=PRECISION), tl.dot(u, tl.trans(given), input_precision=PRECISION)
    dq, dk = tl.dot(given, tl.trans(S), input_precision=PRECISION), tl.dot(u, tl.trans(G), input_precision=PRECISION)
    if DECAY == "key":
        rise, fall, whole = reaches(log_a, FLIP, BEFORE, DOT)
        middle = _middle(whole, calm)
        enter = tl.exp2(middle)[None, :]
        rise, fall = tl.exp2(rise - middle[None, :]), tl.exp2(fall - middle[None, :])
        told, reach, write = (query * (rise * scale)).to(DOT), (key * rise).to(DOT), (key * fall).to(DOT)
        dP, dPt = tl.where(read & (calm != 0), dP, 0.0), tl.where(unread & (calm != 0), dPt, 0.0)
        dq, dk = dq * enter, dk * enter
        cross = dk
        dq = tl.dot(dP.to(DOT), write, dq, input_precision=PRECISION)
        dk = tl.dot(dPt.to(DOT), told, dk, input_precision=PRECISION)
        sums = told * dq
    else:
        told, reach, write = query.to(DOT), key.to(DOT), key.to(DOT)
        if DECAY == "one":
            rise, fall, whole = reaches_of_one(log_a, FLIP, BEFORE)
            rise, fall = tl.exp2(rise), tl.exp2(fall)
            weight, turned = between(log_a, FLIP, BEFORE, False, DOT), between(log_a, FLIP, BEFORE, True, DOT)
            dP, dPt = dP * weight * scale, dPt * turned * scale
            dq, dk = dq * (rise * scale)[:, None], dk * fall[:, None]
        else:
            dP, dPt = tl.where(read, dP, 0.0) * scale, tl.where(unread, dPt, 0.0) * scale
            dq = dq * scale
        cross = dk
        dq = tl.dot(dP.to(DOT), write, dq, input_precision=PRECISION)
        dk = tl.dot(dPt.to(DOT), told, dk, input_precision=PRECISION)
        sums = told * dq

    if DELTA:
        beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
        r = load_tile((du_ptr, H, h, V), row, offs, inside, offs_v)
        dv = r * beta[:, None]
        if tile == 0:
            store_tile((dv_ptr, H, h, V), row, offs, inside, offs_v, dv)
        erase = (dv * -1.0).to(DOT)
        M = tl.dot(reach, tl.trans(write), input_precision=PRECISION)
        dM, dMt = tl.dot(erase, tl.trans(u), input_precision=PRECISION), tl.dot(u, tl.trans(erase), input_precision=PRECISION)
        dreach, told_by_state = tl.dot(erase, tl.trans(S), input_precision=PRECISION), S
        before, ahead = strict(seen), strict(later)
        if DECAY == "key":
            dM, dMt = tl.where(before & (calm != 0), dM, 0.0), tl.where(ahead & (calm != 0), dMt, 0.0)
            M = tl.where(before & (calm != 0), M, 0.0)
            dreach, told_by_state = dreach * enter, S * tl.exp2(middle)[:, None]
        elif DECAY == "one":
            dM, dMt = tl.where(before, dM * weight, 0.0), tl.where(ahead, dMt * turned, 0.0)
            M = tl.where(before, M * weight, 0.0)
            dreach = dreach * rise[:, None]
        else:
            dM, dMt, M = tl.where(before, dM, 0.0), tl.where(ahead, dMt, 0.0), tl.where(before, M, 0.0)
        dreach = tl.dot(dM.to(DOT), write, dreach, input_precision=PRECISION)
        dk = tl.dot(dMt.to(DOT), reach, dk, input_precision=PRECISION)
        sums += reach * dreach
        seen_state = tl.dot(reach, told_by_state.to(DOT), input_precision=PRECISION)
        if DECAY == "one":
            seen_state = seen_state * rise[:, None]
        said = tl.dot(M.to(DOT), u, seen_state, input_precision=PRECISION)
        value = load_tile(values, row, offs, inside, offs_v).to(tl.float32)
        error = tl.where(tile == 0, value, 0.0) - said
        at = tile * B * T * H + (row + offs) * H + h
        tl.store(dbeta_ptr + at, tl.sum(r * error, 1), mask=inside)

    # d log a_t: reads from t on that reach back before t, writes before t that leave, and what passes all of the chunk
    if DECAY == "key":
        sums -= write * dk
        through = write * cross
        passed = tl.sum(through, 0) + tl.sum(S.to(tl.float32) * G.to(tl.float32), 1) * tl.exp2(whole)
        dgate = sums_along(later, sums, DOT) + passed[None, :]
        if BEFORE:
            dgate -= told * dq
        dq, dk = dq * (rise * scale), dk * fall
        if DELTA:
            dk += dreach * rise
        dgate = tl.where(log_a <= RESET, 0.0, dgate)
    elif DECAY == "one":
        sums = tl.sum(sums - write * dk, 1)
        passed = tl.sum(write * cross) + tl.sum(S.to(tl.float32) * G.to(tl.float32)) * tl.exp2(whole)
        dgate = tl.sum(tl.where(later, sums[None, :], 0.0), 1) + passed
        if BEFORE:
            dgate -= tl.sum(told * dq, 1)
        if DELTA:
            dk += dreach
        at = tile * B * T * H + (row + offs) * H + h
        tl.store(dgate_ptr + at, tl.where(log_a <= RESET, 0.0, dgate), mask=inside)
    elif DELTA:
        dk += dreach
    if BEFORE:
        bonus = tl.load(bonus_ptr + h * K + offs_k, mask=offs_k < K, other=0.0)
        now = tl.sum(given.to(tl.float32) * u.to(tl.float32), 1)[:, None] * scale
        dq += now * plain_key * bonus[None, :]
        dk += now * plain_query * bonus[None, :]
        tl.store(dbonus_ptr + square * K + offs_k, tl.sum(now * plain_query * plain_key, 0), mask=offs_k < K)
    store_tile((dq_ptr, H, h, K), row, offs, inside, offs_k, dq)
    if TIED:
        dgate -= tl.exp2(log_a.to(tl.float32) * LOG2E) * dk
    else:
        store_tile((dk_ptr, H, h, K), row, offs, inside, offs_k, dk)
    if DECAY == "key":
        store_tile((dgate_ptr, H, h, K), row, offs, inside, offs_k, dgate)


# ------------------------------------------------------------------------------------------------------------ repair


@triton.jit(do_not_specialize=["T", "documents"])
def repair(
    q_ptr, k_ptr, gate_ptr, beta_ptr, dy_ptr, u_ptr, du_ptr,  # tensors [B T heads *]
    calm_ptr, dP_ptr, dM_ptr,  # [chunks H C C] float32, room for what the scores owe
    dq_ptr, dk_ptr, dgate_ptr, dbeta_ptr,  # added to
    cu_ptr, T, documents, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr,
    FLIP: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the scores of a chunk that is not calm owe to q, k and log a, with products of gates."""
    square = tl.program_id(0).to(tl.int64)
    chunk, h = square // H, square % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    if tl.load(calm_ptr + square) != 0:
        return
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    offs, offs_k, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    row, inside = first + start, offs < length
    seen, later = order(BLOCK_C, FLIP), order(BLOCK_C, not FLIP)
    q, k = (q_ptr, GROUPS, h * GROUPS // H, K), (k_ptr, GROUPS, h * GROUPS // H, K)
    dq, dk, dgate = (dq_ptr, H, h, K), (dk_ptr, H, h, K), (dgate_ptr, H, h, K)
    gates = _gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    u = load_tile((u_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    given = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    dP = tl.dot(given, tl.trans(u), input_precision=PRECISION) * scale
    tl.store(_square(dP_ptr, chunk, h, H, BLOCK_C), tl.where(strict(seen) if BEFORE else seen, dP, 0.0))
    if DELTA:
        r = load_tile((du_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
        dM = tl.dot(r, tl.trans(u), input_precision=PRECISION) * -1.0  # without beta
        tl.store(_square(dM_ptr, chunk, h, H, BLOCK_C), tl.where(strict(seen), dM, 0.0))
    tl.debug_barrier()
    at = square * (BLOCK_C * BLOCK_C)

    # forwards, E [s K] as in `prepare`; what each gate lies between is kept in D [t K]
    E = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    D = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for i in tl.range(0, length, num_stages=1):
        t = length - 1 - i if FLIP else i
        log_t, a = _gate_row(gates, start + t, offs_k, K)
        write = tied(log_t) if TIED else load_row(k, row + t, offs_k)
        query = load_row(q, row + t, offs_k)
        if not BEFORE:
            E = E * a[None, :]
        if DELTA:
            dreach = tl.sum(E * tl.load(dM_ptr + at + t * BLOCK_C + offs)[:, None], 0)
            place = (row + t) * H + h
            tl.store(dbeta_ptr + place, tl.load(dbeta_ptr + place) + tl.sum(dreach * write, 0))
            dreach *= tl.load(beta_ptr + place).to(tl.float32)
        if not BEFORE:
            E = tl.where((offs == t)[:, None], write[None, :], E)
        dquery = tl.sum(E * tl.load(dP_ptr + at + t * BLOCK_C + offs)[:, None], 0)
        if BEFORE:
            E = tl.where((offs == t)[:, None], write[None, :], E * a[None, :])
        product = dquery * query
        if DELTA:
            product += dreach * write
            _add_row(dk, row + t, offs_k, dreach)
        _add_row(dq, row + t, offs_k, dquery)
        D = tl.where((offs == t)[:, None], product[None, :], D)
    read = D

    # backwards, E [t K]: the query of token t times the gates before it, down to the token that writes
    tl.debug_barrier()
    E = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    R = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for i in tl.range(0, length, num_stages=1):
        t = i if FLIP else length - 1 - i
        log_t, a = _gate_row(gates, start + t, offs_k, K)
        write = tied(log_t) if TIED else load_row(k, row + t, offs_k)
        query = load_row(q, row + t, offs_k)
        if not BEFORE:
            E = tl.where((offs == t)[:, None], query[None, :], E)
        owed = tl.sum(E * tl.load(dP_ptr + at + offs * BLOCK_C + t)[:, None], 0)
        if DELTA:
            owed += tl.sum(R * tl.load(dM_ptr + at + offs * BLOCK_C + t)[:, None], 0)
            weight = tl.load(beta_ptr + (row + t) * H + h).to(tl.float32)
            R = tl.where((offs == t)[:, None], (weight * write)[None, :], R) * a[None, :]
        E = E * a[None, :]
        if BEFORE:
            E = tl.where((offs == t)[:, None], query[None, :], E)
        D = tl.where((offs == t)[:, None], D - (owed * write)[None, :], D)
        if TIED:
            _add_row(dgate, row + t, offs_k, owed * -tl.where(log_t <= RESET, 0.0, tl.exp2(log_t * LOG2E)))
        else:
            _add_row(dk, row + t, offs_k, owed)
    tl.debug_barrier()
    log_a = load_gates(gates, start, offs, inside, offs_k, K, "key")
    sums = sums_along(later, D, tl.float32)
    if BEFORE:
        sums -= read
    old = load_tile(dgate, row, offs, inside, offs_k).to(tl.float32)
    store_tile(dgate, row, offs, inside, offs_k, tl.where(log_a <= RESET, old, old + sums))


@triton.jit
def _add_row(tensor, row, cols, more):
    """Add [D] to one row in memory."""
    ptr, heads, head, size = tensor
    ptrs, mask = ptr + (row * heads + head) * size + cols, cols < size
    tl.store(ptrs, (tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) + more).to(ptr.dtype.element_ty), mask=mask)
