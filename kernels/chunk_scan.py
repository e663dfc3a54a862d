"""The separable scan, S_t = a_t S_{t-1} + k_t v_tᵀ and y_t = S_tᵀ q_t, forward and backward in one program.

Legend
    B T H G     batch, time, heads, groups of heads that share a tensor; K, V rows and columns of the state S
    C, R        tokens a chunk; tokens a tile, C or SUB
    q, k, v     roles, not names: q reads the state, k and v write it. The backward of the scan is the scan:
                    y   left to right   q k v  = q  k  v       gates on the rows of S
                    dq  left to right   q k v  = do v  k       gates on the columns (the state is Sᵀ)
                    dv  right to left   q k v  = k  q  do      gates on the rows
                    dk  right to left   q k v  = v  do q       gates on the columns
                A pair of tokens s, t is weighed by the gates after the earlier one up to the later one in all four.
    log_a       natural log of the gates
    x, half     log2 of the gates summed since the middle of the chunk's total decay; that half. Counted from there the
                reader's factor 2^x and the writer's 2^-x both stay small, and 2^half meets the state twice.
    span        tokens a segment; segments lie side by side in the grid, chunks of a segment one after the other

A chunk whose gates span too much for two factors is walked in tiles of SUB tokens, and a tile which still does, or
forgets everything, token by token (a tile with one token inside): no logs are subtracted there, so resets are exact.
The choice is made at run time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.tiles import load_tile, store_tile, sums_along, sums_of
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-103.9)  # the log of what is 0 in float32
SUB = tl.constexpr(16)  # tokens of the smallest tile that a matmul takes


@triton.jit
def _gates(gates, start, offs, inside, cols, size, DECAY: tl.constexpr):
    """Logs of the gates of R tokens: [R] if one serves the whole state, else [R D]. Outside nothing decays."""
    ptr, stride_t, stride_d = gates
    if DECAY == "none":
        log_a = tl.zeros([offs.shape[0]], tl.float32)
    elif DECAY == "scalar":
        log_a = tl.load(ptr + start * stride_t + offs * stride_t, mask=inside, other=0.0).to(tl.float32)
    else:
        ptrs = ptr + start * stride_t + offs[:, None] * stride_t + cols[None, :] * stride_d
        log_a = tl.load(ptrs, mask=inside[:, None] & (cols[None, :] < size), other=0.0)
    return log_a


@triton.jit
def _tied(log_a):
    """1 − exp(log_a), by its series near 0 where the difference would cancel."""
    x = log_a.to(tl.float32)
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp2(x * LOG2E))


@triton.jit
def _finish(
    y, edge, log_a, row, offs, inside, cols, scale, out, mate, dots_ptr, sums_ptr,
    ALONE: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, TIED: tl.constexpr, GRAD: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Store y [R V]. Of the gate's gradient, Σ_{s≥t} (q_s ⊙ dq_s − k_s ⊙ dk_s), "dots" leaves the first product and
    "sums" makes the rest, `edge` being what the tokens to the right add up to. Returns the edge further left."""
    if not REVERSE:
        y = y * scale
    if TIED != "mate":
        store_tile(out, row, offs, inside, cols, y)
    if GRAD != "none":
        product = y * (_tied(log_a) if TIED == "mate" else load_tile(mate, row, offs, inside, cols).to(tl.float32))
        if DECAY == "scalar":
            product = tl.sum(product, 1)
            at = (row + offs) * out[1] + out[2]
            if GRAD == "dots":
                tl.store(dots_ptr + at, product, mask=inside)
            else:
                product = tl.load(dots_ptr + at, mask=inside, other=0.0) - product
                sums = sums_of(offs[:, None] <= offs[None, :], product) + edge
                edge += tl.sum(product, 0)
                if ALONE:
                    edge = tl.where(tl.sum(log_a, 0) <= RESET, 0.0, edge)
                tl.store(sums_ptr + at, tl.where(log_a <= RESET, 0.0, sums), mask=inside)
        else:
            dots, into = (dots_ptr, out[1], out[2], out[3]), (sums_ptr, out[1], out[2], out[3])
            if GRAD == "dots":
                store_tile(dots, row, offs, inside, cols, product)
            else:
                product = load_tile(dots, row, offs, inside, cols) - product
                later = tl.where(offs[:, None] <= offs[None, :], 1.0, 0.0)
                sums = sums_along(later, product, DOT) + edge[None, :]
                edge += tl.sum(product, 0)
                if ALONE:  # what lies left of a reset owes nothing to what lies right of it
                    edge = tl.where(tl.sum(log_a.to(tl.float32), 0) <= RESET, 0.0, edge)
                sums = tl.where(log_a <= RESET, 0.0, sums)  # nothing depends on the log of 0
                if TIED == "mate":
                    sums -= tl.exp2(log_a.to(tl.float32) * LOG2E) * y
                store_tile(into, row, offs, inside, cols, sums)
    return edge


@triton.jit
def _running(log_a, half, DECAY: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr):
    """x [R D] or [R], log2 of the gates up to and with token t less half of all. Right to left it is negated."""
    sign: tl.constexpr = -1.0 if REVERSE else 1.0
    offs = tl.arange(0, log_a.shape[0])
    if DECAY == "scalar":
        x = sign * (sums_of(offs[:, None] >= offs[None, :], log_a) * LOG2E - half)
    else:
        weights = tl.where(offs[:, None] >= offs[None, :], sign * 0.5, sign * -0.5)
        x = sums_along(weights, log_a, DOT) * LOG2E
    return x


@triton.jit
def _tile(
    S, q, k, v, x, half, write,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, EMIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R tokens by matmuls: q, k [R K], v [R V], x and half of `_running`. Returns y [R V] and S."""
    R: tl.constexpr = k.shape[0]
    offs = tl.arange(0, R)
    seen = offs[:, None] <= offs[None, :] if REVERSE else offs[:, None] >= offs[None, :]  # [t s]
    y = v
    if DECAY == "rows" or DECAY == "columns":
        rise, fall, middle = tl.exp2(x), tl.exp2(-x) * write, tl.exp2(half)
        if DECAY == "rows":
            q, k, v, middle = (q * rise).to(DOT), (k * fall).to(DOT), v.to(DOT), middle[:, None]
        else:
            q, k, v, middle = q.to(DOT), k.to(DOT), (v * fall).to(DOT), middle[None, :]
        S = S * middle
        if EMIT:
            scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
            y = tl.dot(q, S.to(DOT), input_precision=PRECISION)
            y = tl.dot(scores.to(DOT), v, y, input_precision=PRECISION)
            if DECAY == "columns":
                y = y * rise
        S = tl.dot(tl.trans(k), v, S, input_precision=PRECISION) * middle
    else:
        q, k, v = q.to(DOT), k.to(DOT), v.to(DOT)
        if EMIT:
            y = tl.dot(q, S.to(DOT), input_precision=PRECISION)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if DECAY == "scalar":
                y = y * tl.exp2(half + x)[:, None]
                # mask before exp: pairs not seen have a positive difference, which could overflow
                scores = scores * tl.exp2(tl.where(seen, x[:, None] - x[None, :], float("-inf")))
            else:
                scores = tl.where(seen, scores, 0.0)
            y = tl.dot((scores * write).to(DOT), v, y, input_precision=PRECISION)
        if DECAY == "scalar":
            k = (k * (tl.exp2(half - x) * write)[:, None]).to(DOT)
            S = S * tl.exp2(2 * half)
        else:
            k = (k * write).to(DOT)
        S = tl.dot(tl.trans(k), v, S, input_precision=PRECISION)
    return y, S


@triton.jit
def _step(
    S, edge, share, start, stop, first, scale, q, k, v, gates, offs_k, offs_v, out, mate, dots_ptr, sums_ptr,
    R: tl.constexpr, ALONE: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, TIED: tl.constexpr,
    GRAD: tl.constexpr, EMIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Tokens start to start + R - 1 that lie before stop, or token start ALONE. Returns what is beyond them."""
    offs = tl.arange(0, R)
    row, inside = first + start, offs < (tl.minimum(stop - start, 1) if ALONE else stop - start)
    if DECAY == "columns":
        log_a = _gates(gates, start, offs, inside, offs_v, v[3], DECAY)
    else:
        log_a = _gates(gates, start, offs, inside, offs_k, k[3], DECAY)
    key = _tied(log_a) if TIED == "key" else load_tile(k, row, offs, inside, offs_k)  # [R K]
    value = _tied(log_a) if TIED == "value" else load_tile(v, row, offs, inside, offs_v)  # [R V]
    query = key
    if EMIT:
        query = _tied(log_a) if TIED == "query" else load_tile(q, row, offs, inside, offs_k)  # [R K]
    write = scale if REVERSE else 1.0  # right to left q is part of what is written

    x, half = log_a, tl.sum(log_a.to(tl.float32), 0) * (0.5 * LOG2E)
    calm = True
    if DECAY != "none" and not ALONE:
        x = _running(log_a, half, DECAY, REVERSE, DOT)
        calm = tl.max(tl.where(tl.abs(x) <= LIMIT, 0, 1)) == 0  # NaN, from −inf, is not calm
    if calm:
        if ALONE:
            a = tl.exp2(2 * half)
            if DECAY == "rows":
                a = a[:, None]
            if DECAY == "columns":
                a = a[None, :]
            if not REVERSE:
                S = S * a
            y, S = _tile(S, query, key, value, x, half, write, "none", REVERSE, EMIT, DOT, PRECISION)
            if REVERSE:
                S = S * a
        else:
            y, S = _tile(S, query, key, value, x, half, write, DECAY, REVERSE, EMIT, DOT, PRECISION)
        if EMIT:
            edge = _finish(
                y, edge, log_a, row, offs, inside, offs_v, scale, out, mate, dots_ptr, sums_ptr,
                ALONE, DECAY, REVERSE, TIED, GRAD, DOT,
            )  # fmt: skip
        else:
            share *= tl.exp2(2 * half)
    elif DECAY != "none" and not ALONE:
        size: tl.constexpr = 1 if R == SUB else SUB
        for i in tl.range(0, R, size, num_stages=1):
            at = start + (R - size - i if REVERSE else i)
            S, edge, share = _step(
                S, edge, share, at, stop, first, scale, q, k, v, gates, offs_k, offs_v, out, mate, dots_ptr, sums_ptr,
                SUB, R == SUB, DECAY, REVERSE, TIED, GRAD, EMIT, DOT, PRECISION, LIMIT,
            )  # fmt: skip
    return S, edge, share


@triton.jit(do_not_specialize=["B", "T", "tiles", "segments", "span"])  # not worth a compilation each
def _walk(
    q_ptr, k_ptr, v_ptr, log_a_ptr, y_ptr,  # [B T heads *], in their roles
    enter_ptr, leave_ptr, share_ptr,  # [B H segments K V] states, [B H segments K] product of the gates
    mate_ptr, dots_ptr, sums_ptr, edge_ptr,  # for the gate's gradient
    cu_ptr,  # borders of packed documents, each of which is one segment of the only row
    B, T, tiles, segments, span, stride_ab, stride_ah, scale,
    H: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, GM: tl.constexpr,  # heads of each tensor
    K: tl.constexpr, V: tl.constexpr, stride_at: tl.constexpr, stride_ad: tl.constexpr,  # the model's own sizes: with
    stride_sk: tl.constexpr, stride_sv: tl.constexpr,  # them known, addresses inside a tile cost no registers
    DECAY: tl.constexpr, REVERSE: tl.constexpr, TIED: tl.constexpr, GRAD: tl.constexpr, EMIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns columns [BLOCK_V] of the state of one segment of one head, and walks its tokens."""
    pid = tl.program_id(0).to(tl.int64)
    tile, strand = pid % tiles, pid // tiles  # strand counts (b, h, segment)
    segment, bh = strand % segments, strand // segments
    b, h = bh // H, bh % H
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int32)
    inside = (offs_k < K)[:, None] & (offs_v < V)[None, :]
    cell = offs_k[:, None].to(tl.int64) * stride_sk + offs_v[None, :] * stride_sv  # [K V] inside one state
    q, k, v = (q_ptr, GQ, h * GQ // H, K), (k_ptr, GK, h * GK // H, K), (v_ptr, GV, h * GV // H, V)
    out, mate = (y_ptr, H, h, V), (mate_ptr, GM, h * GM // H, V)
    gates = (log_a_ptr, stride_at, stride_ad)
    if DECAY != "none":
        row = b if cu_ptr is None else b * 0
        gates = (log_a_ptr + row * stride_ab + h * stride_ah, stride_at, stride_ad)

    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if enter_ptr is not None:
        S = tl.load(enter_ptr + strand * K * V + cell, mask=inside, other=0.0)
    edge = tl.zeros([BLOCK_V], tl.float32)
    if edge_ptr is not None:
        edge = tl.load(edge_ptr + strand * V + offs_v, mask=offs_v < V, other=0.0)
    share = tl.full([BLOCK_K], 1.0, tl.float32)
    if DECAY != "columns":
        edge = tl.sum(edge, 0)
    if DECAY != "rows":
        share = 1.0
    if GRAD != "none" and DECAY == "scalar":
        dots_ptr += tile * B * T * H
        if GRAD == "sums":
            sums_ptr += tile * B * T * H
    first = b * T
    begin = segment * span
    stop = tl.minimum(begin + span, T)
    if cu_ptr is not None:
        first, begin, stop = 0, tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
    chunks = tl.cdiv(stop - begin, BLOCK_C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        S, edge, share = _step(
            S, edge, share, begin + (chunks - 1 - i if REVERSE else i) * BLOCK_C, stop, first, scale,
            q, k, v, gates, offs_k, offs_v, out, mate, dots_ptr, sums_ptr,
            BLOCK_C, False, DECAY, REVERSE, TIED, GRAD, EMIT, DOT, PRECISION, LIMIT,
        )  # fmt: skip
    if leave_ptr is not None:
        if EMIT:  # only the segment that ends the sequence
            inside = inside & (segment == (0 if REVERSE else segments - 1))
            strand = bh
        tl.store(leave_ptr + strand * K * V + cell, S, mask=inside)
    if share_ptr is not None:
        share = share + tl.zeros([BLOCK_K], tl.float32)
        tl.store(share_ptr + strand * K + offs_k, share, mask=(offs_k < K) & (tile == 0))


INTERPRETED = not isinstance(_walk, triton.JITFunction)  # Triton's interpreter was asked for: tensors lie on a CPU


@triton.jit
def _combine(
    state_ptr, share_ptr, enter_ptr,  # [B H segments K V] left by each segment alone, [B H segments K], [B H K V]
    K, V, segments,
    REVERSE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
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
        strand = bh * segments + (segments - 1 - i if REVERSE else i)
        left = tl.load(state_ptr + strand * K * V + cell, mask=inside, other=0.0)
        share = tl.load(share_ptr + strand * K + offs_k, mask=offs_k < K, other=0.0)
        tl.store(state_ptr + strand * K * V + cell, S, mask=inside)
        S = S * share[:, None] + left


class Tiles(NamedTuple):
    """Tiles of one walk: BLOCK_C tokens, BLOCK_K rows and BLOCK_V columns of the state, whose columns make `parts`."""

    block_c: int
    block_k: int
    block_v: int
    parts: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a scan is laid on the machine: `segments` of `span` tokens; tiles for states [K V], and for states [V K]."""

    segments: int
    span: int
    straight: Tiles
    turned: Tiles


def plan(*, heads: int, T: int, K: int, V: int, dtype: torch.dtype, processors: int = 132) -> Plan:
    """The plan for `heads` states [K V] (batch times heads) over T tokens.

    One segment if it gives every processor two programs; otherwise as many as that takes, none below 256 tokens.
    """
    straight, turned = _tiles(K, V, dtype), _tiles(V, K, dtype)
    wanted = max(1, 2 * processors // max(1, heads * straight.parts))
    span = 64 * triton.cdiv(max(T, 1), 64 * min(wanted, max(1, T // 256)))
    return Plan(max(1, triton.cdiv(T, span)), span, straight, turned)


# BLOCK_C, widest BLOCK_V, warps, stages for states of at most 64, 128, 256 rows; by trial on an H200
_BFLOAT16 = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 8, 1)}
_FLOAT32 = {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 8, 1)}


def _tiles(rows: int, columns: int, dtype: torch.dtype) -> Tiles:
    """Small states are padded to these tiles: with smaller ones Triton 3.6 computes wrong numbers on Hopper."""
    block_k = max(64, triton.next_power_of_2(rows))
    block_c, block_v, warps, stages = (_BFLOAT16 if dtype == torch.bfloat16 else _FLOAT32)[block_k]
    return Tiles(block_c, block_k, block_v, triton.cdiv(columns, block_v), warps, stages)


class _Scan(NamedTuple):
    """What the walks of one scan share: gates [B|1 T|1 H 1|K] or None, sizes, the operands' dtype."""

    gates: Tensor | None
    sizes: tuple[int, int, int]
    cu_seqlens: Tensor | None
    dtype: torch.dtype
    scale: float
    plan: Plan

    @property
    def rows(self) -> int:
        """How many states a head has: one a batch row, or one a document."""
        return self.sizes[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def walk(
        self,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        y: Tensor | None,
        *,
        widths: tuple[int, int],
        reverse: bool = False,
        turned: bool = False,
        tied: str = "",
        enter: Tensor | None = None,
        leave: Tensor | None = None,
        share: Tensor | None = None,
        grad: str = "none",
        mate: Tensor | None = None,
        dots: Tensor | None = None,
        sums: Tensor | None = None,
        edge: Tensor | None = None,
    ) -> None:
        """Launch one walk. widths are the rows and columns of its state, which is stored transposed if `turned`."""
        (B, T, H), (K, V) = self.sizes, widths
        tiles = self.plan.turned if turned else self.plan.straight
        decay, strides = "none", [0, 0, 0, 0]
        if self.gates is not None:
            width = self.gates.shape[-1]
            decay = "scalar" if width == 1 else "columns" if turned else "rows"
            strides = list(self.gates.expand(B, T, H, width).stride())
        dot, precision, limit = _numbers(self.dtype, decay)
        # a gate a key leaves no shared memory for a second stage of 128 rows: two programs a processor gain more
        stages = 1 if decay in ("rows", "columns") and tiles.block_k > 64 else tiles.stages
        groups = [H if x is None else x.shape[2] for x in (q, k, v, mate)]
        _walk[(tiles.parts * self.rows * H * self.plan.segments,)](
            q, k, v, self.gates, y, enter, leave, share, mate, dots, sums, edge, self.cu_seqlens,
            B, T, tiles.parts, self.plan.segments, self.plan.span, strides[0], strides[2], self.scale,
            H, *groups, K, V, strides[1], strides[3], *((1, K) if turned else (V, 1)),
            DECAY=decay, REVERSE=reverse, TIED=tied, GRAD=grad, EMIT=y is not None,
            DOT=dot, PRECISION=precision, LIMIT=limit,
            BLOCK_C=tiles.block_c, BLOCK_K=tiles.block_k, BLOCK_V=tiles.block_v, STAGES=stages,
            num_warps=tiles.warps,
        )  # fmt: skip

    def entering(
        self, k: Tensor | None, v: Tensor, initial: Tensor | None, *, K: int, reverse: bool, tied: str = ""
    ) -> Tensor | None:
        """[B H segments K V], the state that enters each segment; from the right if reverse."""
        segments = self.plan.segments
        if segments == 1:
            return initial
        (B, _, H), V = self.sizes, v.shape[-1]
        states = torch.empty(B, H, segments, K, V, dtype=torch.float32, device=v.device)
        share = torch.empty(B, H, segments, K, dtype=torch.float32, device=v.device)
        self.walk(None, k, v, None, widths=(K, V), reverse=reverse, tied=tied, leave=states, share=share)
        block_k, block_v = min(16, triton.next_power_of_2(K)), min(64, triton.next_power_of_2(V))
        _combine[(B * H, triton.cdiv(K, block_k), triton.cdiv(V, block_v))](
            states, share, initial, K, V, segments, REVERSE=reverse, BLOCK_K=block_k, BLOCK_V=block_v
        )
        return states


def _numbers(dtype: torch.dtype, decay: str) -> tuple[tl.dtype, str, float]:
    """What matmuls are fed with, their precision, and how far |x| may go.

    float16 is computed in tf32, which has its digits and the range that states need. Where one gate serves the whole
    state no factor exceeds 1, and only the digits of x are at stake.
    """
    if dtype == torch.float32:
        return tl.float32, "tf32x3", 10.0
    dot, precision = (tl.bfloat16, "ieee") if dtype == torch.bfloat16 else (tl.float32, "tf32")
    return dot, precision, 1000.0 if decay == "scalar" else 60.0


def _describe(q: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float) -> _Scan:
    (B, T, H, V), K = v.shape, q.shape[-1]
    processors = torch.cuda.get_device_properties(v.device).multi_processor_count if v.is_cuda else 1
    whole = plan(heads=B * H, T=T, K=K, V=V, dtype=v.dtype, processors=processors)
    if cu_seqlens is not None:
        whole = whole._replace(segments=1, span=T)
    return _Scan(log_decay, (B, T, H), cu_seqlens, v.dtype, scale, whole)


@torch.library.custom_op(
    "recur::chunk_scan",
    mutates_args=(),
    schema="(Tensor q, Tensor? k, Tensor v, Tensor? log_decay, Tensor? initial, Tensor? cu_seqlens, float scale)"
    " -> (Tensor, Tensor)",
)
def chunk_scan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ, y_t = scale S_tᵀ q_t.

    Args: q, k [B T G K] (k None: 1 − exp(log_decay)); v [B T H V], all contiguous and of one dtype; log_decay
        [B|1 T|1 H K|1]; initial [B H K V] float32, [n H K V] for the n documents of cu_seqlens [n+1].
    Returns: y [B T H V]; state like initial.
    """
    (_, _, H, V), K, tied = v.shape, q.shape[-1], "key" if k is None else ""
    scan = _describe(q, v, log_decay, cu_seqlens, scale)
    y, state = torch.empty_like(v), torch.empty(scan.rows, H, K, V, dtype=torch.float32, device=v.device)
    enter = scan.entering(k, v, initial, K=K, reverse=False, tied=tied)
    scan.walk(q, k, v, y, widths=(K, V), tied=tied, enter=enter, leave=state)
    return y, state


@chunk_scan.register_fake
def _(q, k, v, log_decay, initial, cu_seqlens, scale):
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(v), v.new_empty(rows, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


@torch.library.custom_op(
    "recur::chunk_scan_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dstate, Tensor q, Tensor? k, Tensor v, Tensor? log_decay, Tensor? initial, "
    "Tensor? cu_seqlens, Tensor state, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def chunk_scan_backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and initial; empty for what is None. Has no derivative itself.

    Source: the backward of the scan is the scan, with the roles of the legend.
    """
    (B, T, H, V), K = v.shape, q.shape[-1]
    scan = _describe(q, v, log_decay, cu_seqlens, scale)
    tied = k is None
    entered = scan.entering(k, v, initial, K=K, reverse=False, tied="key" if tied else "")
    returned = scan.entering(q, dy, dstate, K=K, reverse=True)
    new = partial(torch.empty, dtype=torch.float32, device=v.device)
    dots = sums = edge = None
    if log_decay is not None:
        if log_decay.shape[-1] == 1:
            dots = sums = new(scan.plan.turned.parts, B, T, H)  # one part of the sum over K for every tile
        else:
            dots = new(B, T, H, K)
            sums = torch.empty_like(log_decay) if log_decay.shape == dots.shape else dots
        edge = _edges(entered, returned, state, dstate, scan.plan.segments)

    dq = torch.empty_like(q) if q.shape[2] == H else new(B, T, H, K)
    scan.walk(
        dy, v, k, dq, widths=(V, K), turned=True, tied="value" if tied else "", enter=entered,
        grad="none" if dots is None else "dots", mate=q, dots=dots,
    )  # fmt: skip
    dv, dinitial = torch.empty_like(v), None if initial is None else torch.empty_like(initial)
    scan.walk(
        k, q, dy, dv, widths=(K, V), reverse=True, tied="query" if tied else "", enter=returned, leave=dinitial
    )  # fmt: skip
    dk = sums if k is None else torch.empty_like(k) if k.shape[2] == H else new(B, T, H, K)  # tied: nothing is stored
    scan.walk(
        v, dy, q, dk, widths=(V, K), reverse=True, turned=True, tied="mate" if tied else "", enter=returned,
        grad="none" if dots is None else "sums", mate=k, dots=dots, sums=sums, edge=edge,
    )  # fmt: skip
    dlog = None if log_decay is None or sums is None else _sum_repeats(sums, log_decay)
    gradients = (_sum_groups(dq, q), None if k is None or dk is None else _sum_groups(dk, k), dv, dlog, dinitial)
    return tuple(v.new_empty(0) if x is None else x for x in gradients)  # type: ignore[return-value]


def _sum_groups(gradient: Tensor, like: Tensor) -> Tensor:
    """[B T H K] -> [B T G K], what the heads of a group owe to the tensor they share."""
    if gradient.shape == like.shape:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def _sum_repeats(sums: Tensor, like: Tensor) -> Tensor:
    """[B T H K] or [tiles B T H] -> [B|1 T|1 H K|1]: a gate that is not repeated in memory gets the sum."""
    every = sums if like.shape[-1] > 1 else sums.sum(0).unsqueeze(-1)
    return every.sum_to_size(like.shape).to(like.dtype)


def _edges(
    entered: Tensor | None, returned: Tensor | None, state: Tensor, dstate: Tensor | None, segments: int
) -> Tensor | None:
    """[B H segments K], rowsum(dS ⊙ S) where each segment ends: what the gates of a segment owe to all later tokens."""
    last = None if dstate is None else (state * dstate).sum(-1)[:, :, None]
    if segments == 1:
        return last
    if last is None:
        last = torch.zeros_like(state[:, :, None, :, 0])
    assert entered is not None
    assert returned is not None
    return torch.cat([(entered[:, :, 1:] * returned[:, :, :-1]).sum(-1), last], 2)


@chunk_scan_backward.register_fake
def _(dy, dstate, q, k, v, log_decay, initial, cu_seqlens, state, scale):
    return tuple(v.new_empty(0) if x is None else torch.empty_like(x) for x in (q, k, v, log_decay, initial))


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, dstate: Tensor | None):
    q, k, v, log_decay, initial, cu_seqlens, state = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    gradients = chunk_scan_backward(dy, dstate, q, k, v, log_decay, initial, cu_seqlens, state, ctx.scale)
    given = (q, k, v, log_decay, initial)
    return *(None if x is None else g for x, g in zip(given, gradients, strict=True)), None, None


chunk_scan.register_autograd(_differentiate, setup_context=_remember)
