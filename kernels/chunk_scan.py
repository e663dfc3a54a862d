"""The separable scan in chunks: S_t = a_t S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t, forward and backward.

Legend
    B T H G     batch, time, heads, groups of heads that share a tensor; K, V rows and columns of the state S
    C           tokens of a chunk; chunks lie at fixed places of a row, so every kernel finds the same ones
    q k v u     u is v, or with beta the error u_t = β_t (v_t − (a_t S_{t-1})ᵀ k_t) of the delta rule
    P           [C C] scores of the chunk, q_t·k_s weighed by the gates between; of the delta rule also M, k_t·k_s
    e           u = β e: what the forward pass keeps for d β
    S, G        state that enters a chunk; gradient of the state that leaves it
    strand      one segment of one head, walked by one program with the state on chip
    FLIP, LEFT  the scan itself runs from right to left; this walk of it does
    rise, fall  see `tiles`
    told        q as its gates leave it, by its rise, if there is a gate a key; then too
    write       k by its fall, and
    reach       k by its rise; otherwise they are q, k and k, turned if gates are complex
    K, COLS     rows of the state and keys: twice as many rows if gates are complex, for k and q are turned, see `turn`
    near, far   2^half and 2^(whole − half) of a gate a key: a chunk reads near S and leaves near (far S + writeᵀ u)
    square      number of a chunk of a head, chunk H + h
    PARTS       more than 256 rows are walked in parts of 128, each a tile of its own: S, G are tuples of them
    BLOCKS      more than 256 columns are differentiated in blocks, each a program with summands of its own

With R = rise(q), R' = rise(k), F = fall(k) and A all gates of a chunk, its whole action is

    y = R S + P u      S <- A S + Fᵀ u      u = v, or u = T β (v − R' S) with T = (1 + β M)⁻¹

which is linear in S, as many chunks are: a segment turns S into Q S + L, Q being [K K], or diagonal where nothing is
erased. So its derivative has the same shape from right to left:

    du = Pᵀ dy + F G   G <- A G + Rᵀ dy     dv = du, or dv = β r, r = Tᵀ du, and G <- G − R'ᵀ dv
    dR = dy Sᵀ         dF = u Gᵀ            dA = rowsum(G S)       dP = dy uᵀ       dM = −dv uᵀ     dR' = −dv Sᵀ

Kernels
    pace        a gate a head: rise and fall of every chunk
    prepare     q and k as complex gates turn them; a gate a key: as they leave them, and is the chunk calm? M; what a
                bonus adds
    exact       every chunk that is not calm: P and M, token by token
    solve       T
    forward     left to right: y; or what a segment leaves by itself; or S before every chunk (near S of a gate a key)
    combine     what enters each segment
    adjoint     right to left: dv, and G after every chunk; or what a segment of the delta rule leaves by itself
    gradient    every chunk by itself: dq, dk, d log a
    repair      every chunk that is not calm: what dP and dM owe to q, k and log a, token by token

One gate a head: P is weighed pair by pair. A gate a key: q and k are weighed before they meet, from the middle of the
chunk, q by 2^(rise − half) and k by 2^(fall − half), which overflows where a chunk forgets too much. Such a chunk is
not calm: its factors are counted from its ends instead, where none exceeds 1, and P is made by products of gates.
Walks branch on that to load P: asked for in any case, it would be fetched ahead, into registers.
"""

# Jitted functions take no annotations but constexpr, join tuples with +, and choose at compile time before run time.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.tiles import (
    LOG2E,
    RESET,
    between,
    gates_of,
    load_gates,
    load_row,
    load_tile,
    numbered,
    order,
    place_of,
    reaches,
    store_tile,
    strand_of,
    strict,
    sums_along,
    tied,
)
from recur.kernels.turn import angle, chain_of, cos_sin_of, drawn, phases, tell, turned_by, word_of


@triton.jit
def _square(ptr, chunk, h, H, C: tl.constexpr):
    """Pointers [C C] to the square that belongs to a chunk of a head."""
    offs = tl.arange(0, C)
    return ptr + (chunk * H + h) * (C * C) + offs[:, None] * C + offs[None, :]


@triton.jit
def _rates(rates_ptr, square, C: tl.constexpr, which: tl.constexpr):
    """One of the rows [C]: 0 rise, 1 since, 2 fall, 3 what a token's bonus adds to its own read."""
    return tl.load(rates_ptr + square * (4 * C) + which * C + tl.arange(0, C))


@triton.jit
def _middle(whole, calm):
    """[K] log2 of what the factors of a chunk are counted from."""
    return tl.where(calm != 0, 0.5 * whole, 0.0)


# ----------------------------------------------------------------------------------------------------------- prepare


@triton.jit(do_not_specialize=["T", "documents"])
def pace(
    gate_ptr, rates_ptr, whole_ptr,  # [B T H], [chunks H 4 C], [chunks H]
    cu_ptr, T, documents, gate_sb, gate_sh,
    H: tl.constexpr, gate_st: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """rise, since (rise with the token's own gate) and fall of one gate a head, for all heads of a chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    offs, h = tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ptr, stride_t, stride_h = gates_of(gate_ptr, first, T, 0, gate_sb, gate_sh, gate_st, gate_sh, cu_ptr)
    gates, within = (ptr, stride_t, stride_h), tl.minimum(stop - start, BLOCK_C)
    since = tl.cumsum(load_gates(gates, start, offs, offs < within, h, H, "key").to(tl.float32), 0, reverse=FLIP)
    # the same of the tokens beside it: a sum without the token's own gate is no difference of sums
    shift = -1 if FLIP else 1
    beside = (offs + shift >= 0) & (offs + shift < within)
    fall = load_gates(gates, start + shift, offs, beside, h, H, "key").to(tl.float32)
    fall = tl.cumsum(fall, 0, reverse=not FLIP)
    rise = since
    if BEFORE:
        beside = (offs - shift >= 0) & (offs - shift < within)
        rise = load_gates(gates, start - shift, offs, beside, h, H, "key").to(tl.float32)
        rise = tl.cumsum(rise, 0, reverse=FLIP)
    at = rates_ptr + ((chunk * H + h) * (4 * BLOCK_C))[None, :] + offs[:, None]
    real = (h < H)[None, :] & (offs >= 0)[:, None]
    tl.store(at, rise * LOG2E, mask=real)
    tl.store(at + BLOCK_C, since * LOG2E, mask=real)
    tl.store(at + 2 * BLOCK_C, fall * LOG2E, mask=real)
    last = offs[:, None] == (0 if FLIP else BLOCK_C - 1)
    tl.store(whole_ptr + chunk * H + h, tl.sum(tl.where(last, since, 0.0), 0) * LOG2E, mask=h < H)


@triton.jit(do_not_specialize=["T", "documents", "chunks"])
def prepare(
    q_ptr, k_ptr, gate_ptr, bonus_ptr,  # tensors [B T heads *], bonus [H K]
    told_ptr, write_ptr, reach_ptr, near_ptr, far_ptr, calm_ptr,  # if the gates are a key's; the first two if complex
    turned_ptr, angles_ptr, words_ptr,  # if they are complex, see `turn`
    rates_ptr, overlap_ptr,  # from `pace` if a head has one gate; M [chunks H C C], if T is not known
    cu_ptr, T, documents, chunks, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    gate_st: tl.constexpr, gate_sd: tl.constexpr, DECAY: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, LOOK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """All that a chunk needs to know of its gates, keys and queries alone, PART keys at a time."""
    COMPLEX: tl.constexpr = words_ptr is not None
    HALVES: tl.constexpr = K // COLS
    pid = tl.program_id(0).to(tl.int64)
    if COMPLEX:
        pid = drawn(words_ptr, cu_ptr, T, chunks, H, FLIP, BLOCK_C)
    chunk, h = pid // H, pid % H
    document, index, first, start, stop = numbered(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    MEET: tl.constexpr = overlap_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    row, inside = first + start, offs < length
    seen = order(BLOCK_C, FLIP)
    k, q = (k_ptr, GROUPS, h * GROUPS // H, COLS), (q_ptr, GROUPS, h * GROUPS // H, COLS)
    calm = 1
    if DECAY != "none":
        gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    if COMPLEX:
        chain = chain_of(words_ptr, pid, start, stop, index, H, COLS, FLIP, BLOCK_C)
        most = start.to(tl.float32) * 0.0
        for part in tl.range(0, COLS, PART, num_stages=1):
            log_p, word = phases(gates, start, offs, inside, part, COLS, DECAY, PART)
            tell(chain, part, word, COLS, LOOK)
            most = tl.maximum(most, tl.max(tl.abs(tl.sum(log_p, 0)), 0) * LOG2E)
    elif DECAY == "key":
        FEW: tl.constexpr = BLOCK_K if BLOCK_K < 256 else 256
        most = start.to(tl.float32) * 0.0
        for part in tl.static_range(0, BLOCK_K, FEW):
            logs = load_gates(gates, start, offs, inside, part + tl.arange(0, FEW), K, DECAY)
            most = tl.maximum(most, tl.max(tl.abs(tl.sum(logs.to(tl.float32), 0) * LOG2E), 0))
    if DECAY == "key":
        calm = tl.where(most <= 2 * LIMIT, 1, 0)
        tl.store(calm_ptr + pid, calm)
    M = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    now = tl.zeros([BLOCK_C], tl.float32)
    for part in tl.range(0, COLS, PART, num_stages=1):
        offs_p = part + tl.arange(0, PART)
        if COMPLEX:
            log_p, word = phases(gates, start, offs, inside, part, COLS, DECAY, PART)
            begin, end = turned_by(chain, part, word, COLS, FLIP, LOOK)
            tl.store(turned_ptr + pid * COLS + offs_p, begin, mask=offs_p < COLS)
            last = stop - start <= BLOCK_C if FLIP else index == 0
            tl.store(angles_ptr + (document * H + h) * COLS + offs_p, angle(begin), mask=(offs_p < COLS) & last)
            cos, sin = cos_sin_of(end, DOT)
            cos_q, sin_q = cos, sin
            if BEFORE:
                cos_q, sin_q = cos_sin_of(end + word, DOT)
        elif DECAY == "key":
            log_p = load_gates(gates, start, offs, inside, offs_p, K, DECAY)
        key = tied(log_p) if TIED else load_tile(k, row, offs, inside, offs_p)
        query = key
        if DECAY == "key" or BEFORE or COMPLEX:
            query = load_tile(q, row, offs, inside, offs_p)
        if DECAY == "key" or bonus_ptr is not None:
            query = query * scale
        if bonus_ptr is not None:
            bonus = tl.load(bonus_ptr + h * K + offs_p, mask=offs_p < K, other=0.0)
            now += tl.sum(query * key * bonus[None, :], 1)
        if DECAY == "key":
            rise, fall, whole = reaches(log_p, FLIP, BEFORE, DOT)
            middle = _middle(whole, calm)
            rise = tl.exp2(rise - middle[None, :])
        for half in tl.static_range(HALVES):  # of the rows, if they are twice the keys: real part, imaginary part
            to, read, write = (H * HALVES, h * HALVES + half, COLS), query, key
            if COMPLEX:
                read, write = query * (-sin_q if half else cos_q), key * (-sin if half else cos)
            if told_ptr is not None:
                store_tile((told_ptr,) + to, row, offs, inside, offs_p, read * rise if DECAY == "key" else read)
            reach = write
            if DECAY == "key":
                reach, write = write * rise, write * tl.exp2(fall - middle[None, :])
            if write_ptr is not None:
                store_tile((write_ptr,) + to, row, offs, inside, offs_p, write)
            if DECAY == "key":
                at = (pid * HALVES + half) * COLS + offs_p
                tl.store(near_ptr + at, tl.exp2(middle), mask=offs_p < COLS)
                tl.store(far_ptr + at, tl.exp2(whole - middle), mask=offs_p < COLS)
            if reach_ptr is not None:
                store_tile((reach_ptr,) + to, row, offs, inside, offs_p, reach)
            if MEET:
                M = tl.dot(reach.to(DOT), tl.trans(write.to(DOT)), M, input_precision=PRECISION)
    if BEFORE:
        tl.store(rates_ptr + pid * (4 * BLOCK_C) + 3 * BLOCK_C + offs, now)
    if MEET:
        if DECAY == "one":
            log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
            rise, since = _rates(rates_ptr, pid, BLOCK_C, 0), _rates(rates_ptr, pid, BLOCK_C, 1)
            M = M * between(log_a, rise, since, FLIP, False, False, DOT)
        M = tl.where(strict(seen), M, 0.0)
        tl.store(_square(overlap_ptr, chunk, h, H, BLOCK_C), M, mask=(inside & (calm != 0))[:, None])


@triton.jit(do_not_specialize=["T", "documents", "squares"])
def exact(
    q_ptr, k_ptr, gate_ptr, turned_ptr, calm_ptr, scores_ptr, overlap_ptr,  # what `prepare` left out
    cu_ptr, T, documents, squares, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    gate_st: tl.constexpr, gate_sd: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr, FEW: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P, and M of the delta rule, of every chunk that is not calm, with products of gates; FEW chunks a program, which
    mostly finds that all are calm."""
    pid = tl.program_id(0).to(tl.int64) * FEW
    if _all_calm(calm_ptr, pid, squares, FEW):
        return
    TIED: tl.constexpr = k_ptr is None
    for square in range(pid, tl.minimum(pid + FEW, squares)):
        if tl.load(calm_ptr + square) == 0:
            chunk, h = square // H, square % H
            first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
            offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
            length, row = tl.minimum(stop - start, BLOCK_C).to(tl.int32), first + start
            k, q = (k_ptr, GROUPS, h * GROUPS // H, COLS), (q_ptr, GROUPS, h * GROUPS // H, COLS)
            gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
            # E [s K]: the key of token s times the gates after it, up to the token that reads
            E = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
            at = square * (BLOCK_C * BLOCK_C) + offs
            turned = _turned(turned_ptr, square, offs_k, K, COLS)
            for i in tl.range(0, length, num_stages=1):
                t = length - 1 - i if FLIP else i
                log_t, a = _gate_row(gates, start + t, offs_k, K, COLS)
                told = turned
                if turned_ptr is not None:
                    turned -= _word_row(gates, start + t, offs_k, K, COLS)
                query = _row(q, row + t, offs_k, told if BEFORE else turned, K)
                key = tied(log_t) if TIED else _row(k, row + t, offs_k, turned, K)
                if BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                E = E * a[None, :]
                if overlap_ptr is not None:
                    tl.store(overlap_ptr + at + t * BLOCK_C, tl.sum(E * key[None, :], 1))
                E = tl.where((offs == t)[:, None], key[None, :], E)
                if not BEFORE:
                    scores = tl.sum(E * query[None, :], 1)
                tl.store(scores_ptr + at + t * BLOCK_C, (scores * scale).to(scores_ptr.dtype.element_ty))


@triton.jit
def _all_calm(calm_ptr, square, squares, FEW: tl.constexpr):
    """Whether none of FEW chunks has the flag 0; the flags of numbers that no document uses hold anything."""
    offs = square + tl.arange(0, FEW)
    flags = tl.load(calm_ptr + offs, mask=offs < squares, other=1)
    return tl.sum(tl.where(flags == 0, 1, 0), 0) == 0


@triton.jit
def _gate_row(gates, t, offs_k, K, COLS: tl.constexpr):
    """Log of the gates of one token [K] and the gates, of their size if they are complex."""
    ptr, stride_t, stride_d = gates
    log_a = tl.load(ptr + t * stride_t + offs_k % COLS * stride_d, mask=offs_k < K, other=0.0).to(tl.float32)
    return log_a, tl.where(log_a <= RESET, 0.0, tl.exp2(log_a * LOG2E))


@triton.jit
def _word_row(gates, t, offs_k, K, COLS: tl.constexpr):
    """The phases of one token [K], in parts of a turn."""
    ptr, stride_t, stride_d = gates
    ptrs = ptr + t * stride_t + offs_k % COLS * stride_d
    return word_of(tl.load(ptrs, mask=offs_k < K, other=0.0), tl.load(ptrs + 1, mask=offs_k < K, other=0.0))


@triton.jit
def _turned(turned_ptr, square, offs_k, K, COLS: tl.constexpr):
    """By how much the rows [K] are turned where a chunk begins: not, unless gates are complex."""
    word = tl.zeros(offs_k.shape, tl.int32)
    if turned_ptr is not None:
        word = tl.load(turned_ptr + square * COLS + offs_k % COLS, mask=offs_k < K, other=0)
    return word


@triton.jit
def _row(tensor, row, offs_k, word, K):
    """A token's key or query [K] in float32; if it has half of the rows, they are real and imaginary part of what it is
    when turned."""
    ptr, heads, head, COLS = tensor
    if COLS == K:
        x = load_row(tensor, row, offs_k)
    else:
        cos, sin = cos_sin_of(word, tl.float32)
        x = tl.load(ptr + (row * heads + head) * COLS + offs_k % COLS, mask=offs_k < K, other=0.0).to(tl.float32)
        x = x * tl.where(offs_k < COLS, cos, -sin)
    return x


@triton.jit
def _store_block(ptr, n, m, block, C: tl.constexpr):
    """Columns of block m of the rows of block n, [16 16], of a square."""
    few = tl.arange(0, 16)
    tl.store(ptr + (n * 16 + few)[:, None] * C + m * 16 + few[None, :], block)


@triton.jit(do_not_specialize=["T", "documents"])
def solve(
    overlap_ptr, beta_ptr, solve_ptr, cu_ptr, T, documents,
    H: tl.constexpr, FLIP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """T = (1 + β M)⁻¹, in the order of time: 16 rows one by one among themselves, then blocks of 16 by products."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, h = pid // H, pid % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    N: tl.constexpr = BLOCK_C // 16
    block, few = tl.arange(0, N), tl.arange(0, 16)
    length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    beta = beta_ptr + (first + start) * H + h
    M = overlap_ptr + pid * (BLOCK_C * BLOCK_C)
    # each 16 rows by themselves, all blocks at once: [N 16 16]
    D = tl.where(few[:, None] == few[None, :], 1.0, 0.0)[None, :, :] + tl.zeros([N, 16, 16], tl.float32)
    for r in tl.range(0, 16, num_stages=4):
        t = 15 - r if FLIP else r
        rows = block * 16 + t
        weight = tl.load(beta + rows * H, mask=rows < length, other=0.0).to(tl.float32)
        ptrs = M + (rows * BLOCK_C + block * 16)[:, None] + few[None, :]
        told = tl.load(ptrs, mask=(rows < length)[:, None], other=0.0) * weight[:, None]
        found = tl.sum(D * told[:, :, None], 1)
        D = tl.where((few == t)[None, :, None], D - found[:, None, :], D)
    X, own = solve_ptr + pid * (BLOCK_C * BLOCK_C), ()
    for i in tl.static_range(N):
        n = N - 1 - i if FLIP else i
        own = own + (tl.sum(tl.where((block == n)[:, None, None], D, 0.0), 0),)
        _store_block(X, n, n, own[i], BLOCK_C)
        for j in tl.static_range(i):
            _store_block(X, N - 1 - j if FLIP else j, n, tl.zeros([16, 16], tl.float32), BLOCK_C)
    # a block below those of the diagonal, D_i X_ij = -D_i Σ_p β M_ip X_pj, with the blocks p from j up to i
    for j in tl.static_range(N):
        m, done = N - 1 - j if FLIP else j, (own[j],)
        for i in tl.static_range(j + 1, N):
            n = N - 1 - i if FLIP else i
            rows = n * 16 + few
            weight = tl.load(beta + rows * H, mask=rows < length, other=0.0).to(tl.float32)
            found = tl.zeros([16, 16], tl.float32)
            for p in tl.static_range(j, i):
                cols = (N - 1 - p if FLIP else p) * 16 + few
                met = tl.load(M + rows[:, None] * BLOCK_C + cols[None, :], mask=(rows < length)[:, None], other=0.0)
                found = tl.dot(met * weight[:, None], done[p - j], found, input_precision="tf32x3")
            found = -tl.dot(own[i], found, input_precision="tf32x3")
            done = done + (found,)
            _store_block(X, n, m, found, BLOCK_C)


# ----------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _cells(rows, cols, K, WIDTH):
    """Where entries of a state [K WIDTH] lie, and which of them there are."""
    return rows[:, None].to(tl.int64) * WIDTH + cols[None, :], (rows < K)[:, None] & (cols < WIDTH)[None, :]


@triton.jit(do_not_specialize=["T", "tiles", "segments", "span"])  # not worth a compilation each
def forward(
    told_ptr, write_ptr, reach_ptr, v_ptr, gate_ptr, beta_ptr,  # [B T heads *]; q and k as the gates leave them
    near_ptr, far_ptr, calm_ptr, scores_ptr, rates_ptr, whole_ptr, overlap_ptr, solve_ptr,  # from those above
    y_ptr, e_ptr, keep_ptr,  # [B T H V]; states before every chunk, as its reads see them [chunks H K V]
    enter_ptr, leave_ptr, share_ptr,  # [B H segments K V] states, [B H segments K] product of the gates
    cu_ptr, T, tiles, segments, span, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    gate_st: tl.constexpr, gate_sd: tl.constexpr, DECAY: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr,
    BACK: tl.constexpr, EMIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the state of one strand, in PARTS of BLOCK_K rows. BACK: the adjoint's
    state, with q for k and dy for v, from the scan's end; only what a segment leaves. What a segment of the delta rule
    leaves is [L Q], [K V+K]: the identity stands beside the state that enters it, and nothing is written there."""
    pid = tl.program_id(0).to(tl.int64)
    tile, strand = pid % tiles, pid // tiles
    b, h, segment, first, begin, stop, chunk = strand_of(strand, cu_ptr, H, T, segments, span, BLOCK_C)
    LEFT: tl.constexpr = FLIP != BACK
    DELTA: tl.constexpr = beta_ptr is not None
    ALONE: tl.constexpr = not EMIT and keep_ptr is None
    WIDTH: tl.constexpr = V + K if ALONE and DELTA else V
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    group = h * GROUPS // H
    told, keys, reaching = (told_ptr, GROUPS, group, K), (write_ptr, GROUPS, group, K), (reach_ptr, GROUPS, group, K)
    values = (v_ptr, H, h, V)
    read = strict(order(BLOCK_C, FLIP)) if BEFORE else order(BLOCK_C, FLIP)
    if DECAY == "one":
        gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    begins, ends = segment == (segments - 1 if LEFT else 0), segment == (0 if LEFT else segments - 1)
    S, share = (), ()
    for p in tl.static_range(PARTS):
        rows = offs_k + p * BLOCK_K
        cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, WIDTH)
        tile_p = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if enter_ptr is not None:
            entry = enter_ptr + (b * H + h if ALONE else strand) * (K * V)  # of the scan, or of every segment
            given = (in_state & (offs_v < V)[None, :] & begins) if ALONE else in_state
            tile_p = tl.load(entry + rows[:, None] * V + offs_v[None, :], mask=given, other=0.0)
        if WIDTH > V:
            tile_p += tl.where(rows[:, None] + V == offs_v[None, :], 1.0, 0.0)
        S, share = S + (tile_p,), share + (tl.full([BLOCK_K], 1.0, tl.float32),)

    chunks = tl.cdiv(stop - begin, BLOCK_C)
    if ALONE:  # the last has no L to give, and the first no Q
        chunks = tl.where(ends | (begins & (tile * BLOCK_V >= V)), 0, chunks)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = chunks - 1 - i if LEFT else i
        start = begin + n * BLOCK_C
        row, inside = first + start, offs < stop - start
        square = (chunk + n) * H + h
        if DECAY == "one":
            rise, whole = _rates(rates_ptr, square, BLOCK_C, 0), tl.exp2(tl.load(whole_ptr + square))
        states, kept, nears, shares = (), (), (), ()
        found, y = tl.zeros([BLOCK_C, BLOCK_V], tl.float32), tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
        scores = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for p in tl.static_range(PARTS):
            rows = offs_k + p * BLOCK_K
            cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, WIDTH)
            state, passed, share_p = S[p], S[p], share[p]
            if DECAY == "key":
                near = tl.load(near_ptr + square * K + rows, mask=rows < K, other=0.0)
                far = tl.load(far_ptr + square * K + rows, mask=rows < K, other=0.0)
                state, passed, nears = S[p] * near[:, None], S[p] * far[:, None], nears + (near,)
                if share_ptr is not None:
                    share_p *= near * far
            if DECAY == "one":
                passed = passed * whole
                if share_ptr is not None:
                    share_p *= whole
            if EMIT or DELTA:
                state = state.to(DOT)
            if keep_ptr is not None:
                tl.store(
                    keep_ptr + (square * K + p * BLOCK_K) * V + cell, state.to(keep_ptr.dtype.element_ty), mask=in_state
                )
            if PARTS > 1:  # read at once, so that no part waits as an operand
                if DELTA:
                    reach = load_tile(reaching, row, offs, inside, rows).to(DOT)
                    found = tl.dot(reach, state, found, input_precision=PRECISION)
                if EMIT:
                    query = load_tile(told, row, offs, inside, rows).to(DOT)
                    write = load_tile(keys, row, offs, inside, rows).to(DOT)
                    y = tl.dot(query, state, y, input_precision=PRECISION)
                    scores = tl.dot(query, tl.trans(write), scores, input_precision=PRECISION)
            else:
                states = (state,)
            kept, shares = kept + (passed,), shares + (share_p,)
        share = shares
        if PARTS == 1:
            write = load_tile(keys, row, offs, inside, offs_k)
        u = load_tile(values, row, offs, inside, offs_v)
        if DELTA:
            if PARTS == 1:
                reach = load_tile(reaching, row, offs, inside, offs_k)
                found = tl.dot(reach.to(DOT), states[0], input_precision=PRECISION)
            if DECAY == "one":
                found = found * tl.exp2(rise)[:, None]
            beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
            X = tl.load(_square(solve_ptr, chunk + n, h, H, BLOCK_C))
            error = u - found
            u = tl.dot(X, (error * beta[:, None]).to(DOT), input_precision=PRECISION)
            if e_ptr is not None:  # what u would be with beta 1
                M = tl.load(_square(overlap_ptr, chunk + n, h, H, BLOCK_C), mask=inside[:, None], other=0.0)
                error -= tl.dot(M.to(DOT), u.to(DOT), input_precision=PRECISION)
                store_tile((e_ptr, H, h, V), row, offs, inside, offs_v, error)
        wrote = u
        if DECAY == "one":
            wrote = u * (tl.exp2(rise) * scale if BACK else tl.exp2(_rates(rates_ptr, square, BLOCK_C, 2)))[:, None]
        elif DECAY == "none" and BACK:
            wrote = u * scale
        S = ()
        for p in tl.static_range(PARTS):
            if PARTS > 1:
                write = load_tile(keys, row, offs, inside, offs_k + p * BLOCK_K)
            state = tl.dot(tl.trans(write.to(DOT)), wrote.to(DOT), kept[p], input_precision=PRECISION)
            if DECAY == "key":
                state = state * nears[p][:, None]
            S = S + (state,)
        u = u.to(DOT)  # in float32 it would wait below, in registers that are not there
        if EMIT:
            if PARTS == 1:
                query = load_tile(told, row, offs, inside, offs_k).to(DOT)
                y = tl.dot(query, states[0], input_precision=PRECISION)
                scores = tl.dot(query, tl.trans(write.to(DOT)), input_precision=PRECISION)
            if DECAY == "one":
                log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
                since = _rates(rates_ptr, square, BLOCK_C, 1)
                scores = scores * (between(log_a, rise, since, FLIP, BEFORE, False, DOT) * scale)
                y = y * (tl.exp2(rise) * scale)[:, None]
            elif DECAY == "key":
                calm = tl.load(calm_ptr + square) != 0
                scores = tl.where(read, scores, 0.0)
                if not calm:
                    exact = tl.load(_square(scores_ptr, chunk + n, h, H, BLOCK_C), mask=inside[:, None], other=0.0)
                    scores = exact.to(tl.float32)
            else:
                scores, y = tl.where(read, scores, 0.0) * scale, y * scale
            y = tl.dot(scores.to(DOT), u, y, input_precision=PRECISION)
            if BEFORE:
                y += _rates(rates_ptr, square, BLOCK_C, 3)[:, None] * u.to(tl.float32)
            store_tile((y_ptr, H, h, V), row, offs, inside, offs_v, y)

    for p in tl.static_range(PARTS):
        rows = offs_k + p * BLOCK_K
        cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, WIDTH)
        if leave_ptr is not None:
            at = strand
            if EMIT:  # only the segment that ends the scan
                at, in_state = b * H + h, in_state & ends
            tl.store(leave_ptr + (at * K + p * BLOCK_K) * WIDTH + cell, S[p], mask=in_state)
        if share_ptr is not None:
            tl.store(share_ptr + strand * K + rows, share[p], mask=(rows < K) & (tile == 0))


@triton.jit
def combine(
    left_ptr, share_ptr, enter_ptr, state_ptr,  # L and Q, or its diagonal; [B H K V], [B H segments K V]
    K, V, segments, left_sk, share_sk,
    LEFT: tl.constexpr, DELTA: tl.constexpr, TURN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state that enters each segment: S <- Q S + L, or Qᵀ S + L if TURN, from end to end; L of the first holds Q S.
    A Q that is no diagonal needs all rows in one program, which reads them as it stored them, BLOCK_V at a time."""
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
        state, share = state_ptr + strand * K * V, share_ptr + strand * K * share_sk
        tl.store(state + cell, S, mask=inside)
        left = left_ptr + strand * K * left_sk + offs_k[:, None] * left_sk + offs_v[None, :]
        left = tl.load(left, mask=inside, other=0.0)
        if DELTA:
            tl.debug_barrier()
            S = left
            for part in tl.range(0, K, BLOCK_V, num_stages=1):
                cols = part + tl.arange(0, BLOCK_V)
                along, across = (1, share_sk) if TURN else (share_sk, 1)
                Q = share + offs_k[:, None] * along + cols[None, :] * across
                Q = tl.load(Q, mask=(offs_k < K)[:, None] & (cols < K)[None, :] & (i > 0), other=0.0)
                rows = state + cols[:, None] * V + offs_v[None, :]
                rows = tl.load(rows, mask=(cols < K)[:, None] & (offs_v < V)[None, :], other=0.0)
                S = tl.dot(Q, rows, S, input_precision="tf32x3")
        else:
            S = S * tl.load(share + offs_k, mask=(offs_k < K) & (i > 0), other=0.0)[:, None] + left


# ----------------------------------------------------------------------------------------------------------- adjoint


@triton.jit(do_not_specialize=["B", "T", "numbers", "tiles", "segments", "span"])
def adjoint(
    told_ptr, write_ptr, reach_ptr, dy_ptr, gate_ptr, beta_ptr, e_ptr,
    near_ptr, far_ptr, calm_ptr, scores_ptr, rates_ptr, whole_ptr, solve_ptr,
    dv_ptr, dbeta_ptr, keep_ptr,  # [B T H V], [tiles B T H], gradients of the state after every chunk [chunks H K V]
    enter_ptr, leave_ptr, state_ptr, moment_ptr,  # the last two if rows are turned: [chunks H K V], [tiles chunks H K]
    cu_ptr, B, T, numbers, tiles, segments, span, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    gate_st: tl.constexpr, gate_sd: tl.constexpr, DECAY: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the gradient of the state of one strand, against the scan's direction.
    Without dv only what a segment leaves."""
    pid = tl.program_id(0).to(tl.int64)
    tile, strand = pid % tiles, pid // tiles
    b, h, segment, first, begin, stop, chunk = strand_of(strand, cu_ptr, H, T, segments, span, BLOCK_C)
    DELTA: tl.constexpr = beta_ptr is not None
    ALONE: tl.constexpr = dv_ptr is None
    offs, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    group = h * GROUPS // H
    told, keys, reaching = (told_ptr, GROUPS, group, K), (write_ptr, GROUPS, group, K), (reach_ptr, GROUPS, group, K)
    unread = strict(order(BLOCK_C, not FLIP)) if BEFORE else order(BLOCK_C, not FLIP)  # [s t]
    if DECAY == "one":
        gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    begins, ends = segment == (segments - 1 if FLIP else 0), segment == (0 if FLIP else segments - 1)
    G = ()
    for p in tl.static_range(PARTS):
        rows = offs_k + p * BLOCK_K
        cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, V)
        state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
        if enter_ptr is not None:
            entry = enter_ptr + (b * H + h if ALONE else strand) * (K * V)
            state = tl.load(entry + p * BLOCK_K * V + cell, mask=in_state & ends if ALONE else in_state, other=0.0)
        G = G + (state,)

    chunks = tl.cdiv(stop - begin, BLOCK_C)
    if ALONE:
        chunks = tl.where(begins, 0, chunks)
    for i in tl.range(0, chunks, num_stages=STAGES):
        n = i if FLIP else chunks - 1 - i
        start = begin + n * BLOCK_C
        row, inside = first + start, offs < tl.minimum(stop - start, BLOCK_C).to(tl.int32)
        square = (chunk + n) * H + h
        du, scores = tl.zeros([BLOCK_C, BLOCK_V], tl.float32), tl.zeros([BLOCK_C, BLOCK_C], tl.float32)  # [s t]
        states, nears = (), ()
        for p in tl.static_range(PARTS):
            rows = offs_k + p * BLOCK_K
            cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, V)
            if not ALONE:
                tl.store(
                    keep_ptr + (square * K + p * BLOCK_K) * V + cell, G[p].to(keep_ptr.dtype.element_ty), mask=in_state
                )
            query = load_tile(told, row, offs, inside, rows).to(DOT)
            key = load_tile(keys, row, offs, inside, rows).to(DOT)
            if p == 0:
                given = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
            state, passed = G[p], G[p]
            if DECAY == "key":
                near = tl.load(near_ptr + square * K + rows, mask=rows < K, other=0.0)
                far = tl.load(far_ptr + square * K + rows, mask=rows < K, other=0.0)
                state, passed, nears = G[p] * near[:, None], G[p] * far[:, None], nears + (near,)
            state = state.to(DOT)
            if p == 0:
                moved = given
                if DECAY == "one":
                    rise, whole = _rates(rates_ptr, square, BLOCK_C, 0), tl.exp2(tl.load(whole_ptr + square))
                    moved = given * (tl.exp2(rise) * scale)[:, None]
                elif DECAY == "none":
                    moved = given * scale
            if DECAY == "one":
                passed = passed * whole
            states = states + (tl.dot(tl.trans(query), moved.to(DOT), passed, input_precision=PRECISION),)
            du = tl.dot(key, state, du, input_precision=PRECISION)
            scores = tl.dot(key, tl.trans(query), scores, input_precision=PRECISION)
        G = states
        if DECAY == "one":
            log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
            since = _rates(rates_ptr, square, BLOCK_C, 1)
            scores = scores * (between(log_a, rise, since, FLIP, BEFORE, True, DOT) * scale)
            du = du * tl.exp2(_rates(rates_ptr, square, BLOCK_C, 2))[:, None]
        elif DECAY == "key":
            calm = tl.load(calm_ptr + square) != 0
            scores = tl.where(unread, scores, 0.0)
            if not calm:
                turned = scores_ptr + square * (BLOCK_C * BLOCK_C) + offs[None, :] * BLOCK_C + offs[:, None]
                scores = tl.load(turned, mask=inside[None, :], other=0.0).to(tl.float32)
        else:
            scores = tl.where(unread, scores, 0.0) * scale
        du = tl.dot(scores.to(DOT), given, du, input_precision=PRECISION)
        if BEFORE:
            du += _rates(rates_ptr, square, BLOCK_C, 3)[:, None] * given.to(tl.float32)
        if DELTA:
            X = tl.load(solve_ptr + square * (BLOCK_C * BLOCK_C) + offs[None, :] * BLOCK_C + offs[:, None])  # Tᵀ
            du = tl.dot(X, du.to(DOT), input_precision=PRECISION)
            beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
            if PARTS == 1:
                reach = load_tile(reaching, row, offs, inside, offs_k).to(DOT)
            if not ALONE:
                e = load_tile((e_ptr, H, h, V), row, offs, inside, offs_v)
                at = tile * B * T * H + (row + offs) * H + h
                tl.store(dbeta_ptr + at, tl.sum(du * e, 1), mask=inside)
            du = du * beta[:, None]
            erased = du * (tl.exp2(rise) * -1.0)[:, None] if DECAY == "one" else du * -1.0
            states = ()
            for p in tl.static_range(PARTS):
                if PARTS > 1:
                    reach = load_tile(reaching, row, offs, inside, offs_k + p * BLOCK_K).to(DOT)
                states = states + (tl.dot(tl.trans(reach), erased.to(DOT), G[p], input_precision=PRECISION),)
            G = states
        if not ALONE:
            store_tile((dv_ptr, H, h, V), row, offs, inside, offs_v, du)
        states = ()
        for p in tl.static_range(PARTS):
            state = G[p]
            if moment_ptr is not None:
                # what turning the state that enters this chunk would do: rows k and k + K / 2 are one complex row, with
                # one near, which is in what `forward` kept and so not yet in G
                rows = offs_k + p * BLOCK_K
                _, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, V)
                partner = tl.where(rows < K // 2, rows + K // 2, rows - K // 2)
                other = state_ptr + square * (K * V) + partner[:, None] * V + offs_v[None, :]
                moment = tl.sum(state * tl.load(other, mask=in_state, other=0.0).to(tl.float32), 1)
                moment = tl.where(rows < K // 2, -moment, moment)
                at = (tile * numbers + chunk + n) * (H * K) + h * K + rows
                tl.store(moment_ptr + at, moment, mask=rows < K)
            if DECAY == "key":
                state = state * nears[p][:, None]
            states = states + (state,)
        G = states

    if leave_ptr is not None:
        if not ALONE:  # only the segment in which the scan begins
            strand = b * H + h
        for p in tl.static_range(PARTS):
            cell, in_state = _cells(offs_k, offs_v, K - p * BLOCK_K, V)
            if not ALONE:
                in_state = in_state & begins
            tl.store(leave_ptr + (strand * K + p * BLOCK_K) * V + cell, G[p], mask=in_state)


# ---------------------------------------------------------------------------------------------------------- gradient


@triton.jit
def _row_gates(gates, start, offs, inside, tile, K, COLS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Logs of the gates [C BLOCK_K] of a tile of rows; the size of a complex one belongs to two rows."""
    cols = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    if COLS == K:
        log_a = load_gates(gates, start, offs, inside, cols, K, "key")
    elif COLS % BLOCK_K == 0:
        log_a, _ = phases(gates, start, offs, inside, (tile * BLOCK_K % COLS).to(tl.int32), COLS, "key", BLOCK_K)
    else:
        log_a = load_gates(gates, start, offs, inside, cols % COLS, K, "key")
    return log_a


@triton.jit
def _weights(log_a, calm, FLIP: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr):
    """What gates a key weigh readers and writers with [C K], counted from the middle of the chunk."""
    rise, fall, whole = reaches(log_a, FLIP, BEFORE, DOT)
    middle = _middle(whole, calm)[None, :]
    return tl.exp2(rise - middle), tl.exp2(fall - middle)


@triton.jit(do_not_specialize=["B", "T", "tiles", "documents", "chunks"])
def gradient(
    q_ptr, k_ptr, told_ptr, write_ptr, reach_ptr, u_ptr, dy_ptr, dv_ptr, gate_ptr, beta_ptr, bonus_ptr,
    S_ptr, G_ptr, near_ptr, far_ptr, calm_ptr, rates_ptr, whole_ptr,  # S as kept; u_ptr is v, or u with beta 1
    dq_ptr, dk_ptr, dgate_ptr, dbonus_ptr,  # of every block apart; dgate, if a head has one gate, of every tile too
    cu_ptr, B, T, tiles, documents, chunks, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PLAIN: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
    V: tl.constexpr, gate_st: tl.constexpr, gate_sd: tl.constexpr, DECAY: tl.constexpr, FLIP: tl.constexpr,
    BEFORE: tl.constexpr, TIED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program owns rows [BLOCK_K] and columns [BLOCK_V] of the state around one chunk. All it finds is linear in
    columns: a state of several BLOCKS of them has as many summands of each gradient.

    Registers are what is short here: loads stand where they are needed, some twice. A gate a key is read first where
    that costs no spills (EARLY), else last; dq waits for it then, and for a bonus (LATE)."""
    pid = tl.program_id(0).to(tl.int64)
    tile, square, block = pid % tiles, pid // tiles, pid * 0
    if BLOCKS > 1:
        block, square = square % BLOCKS, square // BLOCKS
    chunk, h = square // H, square % H
    first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
    if start >= stop:
        return
    DELTA: tl.constexpr = beta_ptr is not None
    BONUS: tl.constexpr = bonus_ptr is not None
    offs, offs_v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V)
    if BLOCKS > 1:
        offs_v += (block * BLOCK_V).to(tl.int32)
    offs_k = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    row, inside = first + start, offs < tl.minimum(stop - start, BLOCK_C).to(tl.int32)
    out = row + block * B * T  # rows of what is written
    # S and G, while there are registers and shared memory for both
    SIDE_BY_SIDE: tl.constexpr = DECAY == "key" or (DECAY == "one" and (DELTA or BLOCK_V <= 128))
    EARLY: tl.constexpr = DECAY == "key" and not DELTA and not BEFORE
    LATE: tl.constexpr = BEFORE or (DECAY == "key" and DELTA)
    seen = order(BLOCK_C, FLIP)  # [t s]
    group = h * GROUPS // H
    told, keys, reaching = (told_ptr, GROUPS, group, K), (write_ptr, GROUPS, group, K), (reach_ptr, GROUPS, group, K)
    cell = square * (K * V) + offs_k[:, None] * V + offs_v[None, :]
    in_state = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    calm = True
    if DECAY != "none":
        gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
    if DECAY == "key":
        calm = tl.load(calm_ptr + square) != 0
    if EARLY:
        log_a = _row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K)
    if DECAY == "one":
        log_a = load_gates(gates, start, offs, inside, offs_k, K, DECAY)
        rise, since = _rates(rates_ptr, square, BLOCK_C, 0), _rates(rates_ptr, square, BLOCK_C, 1)

    given = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    u = load_tile((u_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    if DELTA:
        beta = tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)
        erase = load_tile((dv_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
    S = tl.load(S_ptr + cell, mask=in_state, other=0.0)
    if SIDE_BY_SIDE:
        G = tl.load(G_ptr + cell, mask=in_state, other=0.0)
        passed = tl.sum(S.to(tl.float32) * G.to(tl.float32), 1)
        if DECAY == "key":
            passed *= tl.load(far_ptr + square * K + offs_k, mask=offs_k < K, other=0.0)
    write = load_tile(keys, row, offs, inside, offs_k).to(DOT)

    # what is owed to the scores [t s]; `repair` has that of a chunk that is not calm
    dP = tl.dot(given, tl.trans(u), input_precision=PRECISION)
    if DELTA:
        dP = dP * beta[None, :]
    if DECAY == "one":
        dP = dP * (between(log_a, rise, since, FLIP, BEFORE, False, DOT) * scale)
    else:
        dP = tl.where((strict(seen) if BEFORE else seen) & calm, dP, 0.0)
    if DECAY == "none":
        dP = dP * scale
    dP = dP.to(DOT)
    if DELTA:
        dM = tl.dot(erase, tl.trans(u), input_precision=PRECISION) * -beta[None, :]
        if DECAY == "one":
            dM = dM * between(log_a, rise, since, FLIP, False, False, DOT)
        dM = tl.where(strict(seen) & calm, dM, 0.0).to(DOT)

    # what readers owe
    if EARLY:
        query = load_tile(told, row, offs, inside, offs_k).to(DOT)
    dq = tl.dot(given, tl.trans(S), input_precision=PRECISION)
    if DECAY == "one":
        dq = dq * (tl.exp2(rise) * scale)[:, None]
    elif DECAY == "none":
        dq = dq * scale
    dq = tl.dot(dP, write, dq, input_precision=PRECISION)
    if not EARLY:
        query = load_tile(told, row, offs, inside, offs_k).to(DOT)
    if DECAY == "one":
        sums = tl.sum(query * dq, 1)
    elif DECAY == "key":
        sums = query * dq
    if EARLY:
        rise, fall = _weights(log_a, calm, FLIP, BEFORE, DOT)
        dq = dq * (rise * scale)
    if not LATE:
        store_tile((dq_ptr, H, h, K), out, offs, inside, offs_k, dq)
    if DELTA:
        dreach = -tl.dot(erase, tl.trans(S), input_precision=PRECISION)
        if DECAY == "one":
            dreach = dreach * tl.exp2(rise)[:, None]
        dreach = tl.dot(dM, write, dreach, input_precision=PRECISION)
        reach = load_tile(reaching, row, offs, inside, offs_k).to(DOT)
        if DECAY == "one":
            sums += tl.sum(reach * dreach, 1)
        elif DECAY == "key":
            sums += reach * dreach
    if BONUS:  # a token reads what it writes
        now = tl.sum(given.to(tl.float32) * u.to(tl.float32), 1)[:, None] * scale
        plain_q = load_tile((q_ptr, GROUPS_PLAIN, h * GROUPS_PLAIN // H, K), row, offs, inside, offs_k)
        if TIED:
            plain_k = tied(_row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K))
        else:
            plain_k = load_tile((k_ptr, GROUPS_PLAIN, h * GROUPS_PLAIN // H, K), row, offs, inside, offs_k)
        at = (block * chunks * H + square) * K + offs_k
        tl.store(dbonus_ptr + at, tl.sum(now * plain_q * plain_k, 0), mask=offs_k < K)

    # what writers owe
    if not SIDE_BY_SIDE:
        G = tl.load(G_ptr + cell, mask=in_state, other=0.0)
        if DECAY == "one":
            passed = tl.sum(S.to(tl.float32) * G.to(tl.float32), 1)
    dk = tl.dot(u, tl.trans(G), input_precision=PRECISION)
    if DELTA:
        dk = dk * beta[:, None]
    if DECAY == "one":
        dk = dk * tl.exp2(_rates(rates_ptr, square, BLOCK_C, 2))[:, None]
        passed = tl.sum(passed) * tl.exp2(tl.load(whole_ptr + square)) + tl.sum(write * dk)
    elif DECAY == "key":
        dk = dk * tl.load(near_ptr + square * K + offs_k, mask=offs_k < K, other=0.0)[None, :]
        passed += tl.sum(write * dk, 0)  # for all tokens: joins the one walked last, which is in every sum below
        sums += tl.where((offs == (0 if FLIP else BLOCK_C - 1))[:, None], passed[None, :], 0.0)
    dk = tl.dot(tl.trans(dP), query, dk, input_precision=PRECISION)
    if DELTA:
        dk = tl.dot(tl.trans(dM), reach, dk, input_precision=PRECISION)

    # d log a_t: reads from t on that reach back before t, writes before t that leave, and what passes all of the chunk
    if DECAY == "one":
        sums -= tl.sum(write * dk, 1)
        dgate = tl.cumsum(sums, 0, reverse=not FLIP) + passed
        if BEFORE:
            dgate -= tl.sum(load_tile(told, row, offs, inside, offs_k) * dq, 1)
        at = (block * tiles + tile) * B * T * H + (row + offs) * H + h
        tl.store(dgate_ptr + at, tl.where(log_a <= RESET, 0.0, dgate), mask=inside)
    elif DECAY == "key":
        sums -= write * dk
        if LATE:
            dgate = tl.cumsum(sums, 0, reverse=not FLIP)
            if BEFORE:
                dgate -= load_tile(told, row, offs, inside, offs_k) * dq
            gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)  # kept, it would spill
            log_a = _row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K)
            dgate = tl.where(log_a <= RESET, 0.0, dgate)
            if not TIED:
                store_tile((dgate_ptr, H, h, K), out, offs, inside, offs_k, dgate)
            log_a = _row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K)
            rise, fall = _weights(log_a, calm, FLIP, BEFORE, DOT)
            dq = dq * (rise * scale)
            if DELTA:
                dreach = dreach * rise
        dk = dk * fall
    if DELTA:
        dk += dreach
    if BONUS:
        plain_q = load_tile((q_ptr, GROUPS_PLAIN, h * GROUPS_PLAIN // H, K), row, offs, inside, offs_k)
        if TIED:
            plain_k = tied(log_a)
        else:
            plain_k = load_tile((k_ptr, GROUPS_PLAIN, h * GROUPS_PLAIN // H, K), row, offs, inside, offs_k)
        bonus = tl.load(bonus_ptr + h * K + offs_k, mask=offs_k < K, other=0.0)
        dq += now * plain_k * bonus[None, :]
        dk += now * plain_q * bonus[None, :]
    if LATE:
        store_tile((dq_ptr, H, h, K), out, offs, inside, offs_k, dq)
    if not TIED:
        store_tile((dk_ptr, H, h, K), out, offs, inside, offs_k, dk)
    if EARLY:
        if BLOCK_V > 64:
            log_a = _row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K)
        dgate = tl.where(log_a <= RESET, 0.0, tl.cumsum(sums, 0, reverse=not FLIP))
    if TIED:
        log_a = _row_gates(gates, start, offs, inside, tile, K, COLS, BLOCK_K)
        dgate -= tl.exp2(log_a.to(tl.float32) * LOG2E) * dk
    if EARLY or TIED:
        store_tile((dgate_ptr, H, h, K), out, offs, inside, offs_k, dgate)


# ------------------------------------------------------------------------------------------------------------ repair


@triton.jit(do_not_specialize=["T", "documents", "squares"])
def repair(
    q_ptr, k_ptr, gate_ptr, turned_ptr, beta_ptr, dy_ptr, u_ptr, dv_ptr,  # tensors [B T heads *]
    calm_ptr, dP_ptr, dM_ptr,  # [chunks H C C] float32, room for what the scores owe
    dq_ptr, dk_ptr, dgate_ptr,  # added to
    cu_ptr, T, documents, squares, gate_sb, gate_sh, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr,
    gate_st: tl.constexpr, gate_sd: tl.constexpr, FLIP: tl.constexpr, BEFORE: tl.constexpr, FEW: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the scores of a chunk that is not calm owe to q, k and log a, with products of gates."""
    pid = tl.program_id(0).to(tl.int64) * FEW
    if _all_calm(calm_ptr, pid, squares, FEW):
        return
    DELTA: tl.constexpr = beta_ptr is not None
    TIED: tl.constexpr = k_ptr is None
    for square in range(pid, tl.minimum(pid + FEW, squares)):
        if tl.load(calm_ptr + square) == 0:
            chunk, h = square // H, square % H
            first, start, stop = place_of(chunk, cu_ptr, T, documents, BLOCK_C)
            offs = tl.arange(0, BLOCK_C)
            length = tl.minimum(stop - start, BLOCK_C).to(tl.int32)  # none for a number that no document uses
            row, inside = first + start, offs < length
            seen, later = order(BLOCK_C, FLIP), order(BLOCK_C, not FLIP)
            q, k = (q_ptr, GROUPS, h * GROUPS // H, COLS), (k_ptr, GROUPS, h * GROUPS // H, COLS)
            dq, dk, dgate = (dq_ptr, H, h, K), (dk_ptr, H, h, K), (dgate_ptr, H, h, K)
            gates = gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr)
            dP, dM = tl.zeros([BLOCK_C, BLOCK_C], tl.float32), tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
            for part in tl.range(0, V, BLOCK_V, num_stages=1):
                offs_v = part + tl.arange(0, BLOCK_V)
                u = load_tile((u_ptr, H, h, V), row, offs, inside, offs_v)
                if DELTA:
                    u = u * tl.load(beta_ptr + (row + offs) * H + h, mask=inside, other=0.0).to(tl.float32)[:, None]
                u = u.to(DOT)
                given = load_tile((dy_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
                dP = tl.dot(given, tl.trans(u), dP, input_precision=PRECISION)
                if DELTA:
                    erase = load_tile((dv_ptr, H, h, V), row, offs, inside, offs_v).to(DOT)
                    dM = tl.dot(erase, tl.trans(u), dM, input_precision=PRECISION)
            tl.store(_square(dP_ptr, chunk, h, H, BLOCK_C), tl.where(strict(seen) if BEFORE else seen, dP * scale, 0.0))
            if DELTA:
                tl.store(_square(dM_ptr, chunk, h, H, BLOCK_C), tl.where(strict(seen), -dM, 0.0))
            tl.debug_barrier()
            at = square * (BLOCK_C * BLOCK_C)

            # rows of the state are independent of each other here: BLOCK_K of them at a time
            for part in tl.range(0, K, BLOCK_K, num_stages=1):
                offs_k = part + tl.arange(0, BLOCK_K)
                # forwards, E [s K] as in `exact`; what each gate lies between is kept in D [t K]
                E = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
                D = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
                turned = _turned(turned_ptr, square, offs_k, K, COLS)
                for i in tl.range(0, length, num_stages=1):
                    t = length - 1 - i if FLIP else i
                    log_t, a = _gate_row(gates, start + t, offs_k, K, COLS)
                    told = turned
                    if turned_ptr is not None:
                        turned -= _word_row(gates, start + t, offs_k, K, COLS)
                    write = tied(log_t) if TIED else _row(k, row + t, offs_k, turned, K)
                    query = _row(q, row + t, offs_k, told if BEFORE else turned, K)
                    if not BEFORE:
                        E = E * a[None, :]
                    if DELTA:
                        dreach = tl.sum(E * tl.load(dM_ptr + at + t * BLOCK_C + offs)[:, None], 0)
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
                    log_t, a = _gate_row(gates, start + t, offs_k, K, COLS)
                    write = tied(log_t) if TIED else _row(k, row + t, offs_k, turned, K)
                    wrote = turned
                    if turned_ptr is not None:
                        turned += _word_row(gates, start + t, offs_k, K, COLS)
                    query = _row(q, row + t, offs_k, turned if BEFORE else wrote, K)
                    if not BEFORE:
                        E = tl.where((offs == t)[:, None], query[None, :], E)
                    owed = tl.sum(E * tl.load(dP_ptr + at + offs * BLOCK_C + t)[:, None], 0)
                    if DELTA:
                        owed += tl.sum(R * tl.load(dM_ptr + at + offs * BLOCK_C + t)[:, None], 0)
                        R = tl.where((offs == t)[:, None], write[None, :], R) * a[None, :]
                    E = E * a[None, :]
                    if BEFORE:
                        E = tl.where((offs == t)[:, None], query[None, :], E)
                    D = tl.where((offs == t)[:, None], D - (owed * write)[None, :], D)
                    if TIED:
                        _add_row(dgate, row + t, offs_k, owed * -tl.where(log_t <= RESET, 0.0, tl.exp2(log_t * LOG2E)))
                    else:
                        _add_row(dk, row + t, offs_k, owed)
                tl.debug_barrier()
                log_a = load_gates(gates, start, offs, inside, offs_k % COLS, K, "key")
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
