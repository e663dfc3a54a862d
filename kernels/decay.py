"""Gates of a chunk, and the decay they add up to. Written here once for all kernels of the matrix-state scan.

Logarithms of decay are in base 2. For a chunk of C tokens, with one gate per key channel [C K] or one per head [C]:

    log_in     from the entry of the chunk up to and including token t: weighs what token t reads of the entering state
    log_out    after token s up to the end of the chunk: weighs what token s writes into the leaving state
    log_total  over the whole chunk, [K] or one number
    cumulative log_in with the token's own gate; differs from log_in only if tokens read before their own gate (BEFORE)

decay_in, decay_out and decay_total are their exponentials (Λ, Γ and γ of Yang et al. 2023, GLA). Every sum runs over
gates only and is no difference of two sums, which would cancel; where matmuls take bfloat16, its rounding hides what a
difference loses, and differences are taken. A gate whose exponential is 0 in float32 is a reset: its log counts as
FLOOR, so that every factor that spans it is exactly 0. No factor exceeds 1.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.tiles import LOG2E, causal, off_diagonal

RESET = tl.constexpr(-103.9)  # the natural log of what is 0 in float32
FORGOTTEN = tl.constexpr(-30.0)  # log2 of a decay below which nothing is left of a state in float32
FLOOR = tl.constexpr(-111.0)  # a reset in sums: exact in bfloat16, and its exponential is 0 (it is 2^-160)


@triton.jit
def gates_of(gate_ptr, first, T, h, gate_sb, gate_sh, gate_st, gate_sd, cu_ptr):
    """The gates of one row and head: pointer, stride over tokens, stride over channels."""
    row = first * 0
    if cu_ptr is None:
        row = first // tl.maximum(T, 1)
    return gate_ptr + row * gate_sb + h * gate_sh, gate_st, gate_sd


@triton.jit
def load_gates(gates, start, offs, inside, cols, size, DECAY: tl.constexpr):
    """Log gates [R D] if DECAY is "key", else [R]: resets at FLOOR, NaN stays NaN, 0 (no decay) outside."""
    ptr, stride_t, stride_d = gates
    if DECAY == "key":
        ptrs = ptr + start * stride_t + offs[:, None] * stride_t + cols[None, :] * stride_d
        log_a = tl.load(ptrs, mask=inside[:, None] & (cols[None, :] < size), other=0.0)
    else:
        log_a = tl.load(ptr + start * stride_t + offs * stride_t, mask=inside, other=0.0)
    return tl.maximum(log_a.to(tl.float32), FLOOR, propagate_nan=tl.PropagateNan.ALL).to(log_a.dtype)


@triton.jit
def tied_key(log_a):
    """k = 1 − exp(log_a), by its series near 0 where the difference would cancel."""
    x = log_a.to(tl.float32)
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp2(x * LOG2E))


@triton.jit
def masked_sums(mask, x, DOT: tl.constexpr):
    """mask x: sums over the rows of x [R D] that each row of the mask [R R] selects, by a matmul, cheaper than a scan.

    Sums are exact in bfloat16 where x is. Wider x keeps 17 bits (a high and a low part) where matmuls take bfloat16,
    22 otherwise.
    """
    if tl.bfloat16 == DOT:
        weights, high = mask.to(tl.bfloat16), x.to(tl.bfloat16)
        sums = tl.dot(weights, high)
        if x.dtype != tl.bfloat16:
            sums = tl.dot(weights, (x - high.to(tl.float32)).to(tl.bfloat16), sums)
    else:
        sums = tl.dot(mask.to(tl.float32), x.to(tl.float32), input_precision="tf32x3")
    return sums


@triton.jit
def log_before(log_a, log_in, REVERSE: tl.constexpr, DOT: tl.constexpr):
    """log_in [C K] without the token's own gate, for erasers that read from the previous state; log_a in base 2."""
    if tl.bfloat16 == DOT:
        log = tl.minimum(log_in - log_a, 0.0)
    else:
        log = masked_sums(off_diagonal(causal(log_a.shape[0], REVERSE)), log_a, DOT)
    return log


@triton.jit
def chunk_decays(log_a, REVERSE: tl.constexpr, BEFORE: tl.constexpr, DOT: tl.constexpr):
    """log_in and log_out [C K], log_total [K] of gates per key channel."""
    log_a = log_a.to(tl.float32) * LOG2E
    cumulative, log_total = tl.cumsum(log_a, 0, reverse=REVERSE), tl.sum(log_a, 0)
    log_in = cumulative
    if BEFORE:
        log_in = masked_sums(off_diagonal(causal(log_a.shape[0], REVERSE)), log_a, DOT)
    if tl.bfloat16 == DOT:
        log_out = tl.minimum(log_total[None, :] - cumulative, 0.0)
    else:
        log_out = masked_sums(off_diagonal(causal(log_a.shape[0], not REVERSE)), log_a, DOT)
    return log_in, log_out, log_total


@triton.jit
def pair_decay(
    log_a, log_in, cumulative, REVERSE: tl.constexpr, BEFORE: tl.constexpr, TRANSPOSE: tl.constexpr, DOT: tl.constexpr
):
    """Decay between a write at s and a read at t, of one gate per head: [t s], or [s t] if TRANSPOSE; 0 where t does
    not see s."""
    C: tl.constexpr = log_a.shape[0]
    seen, after = causal(C, REVERSE), off_diagonal(causal(C, not REVERSE))
    read = off_diagonal(seen) if BEFORE else seen
    if tl.bfloat16 == DOT:
        logs = log_in[None, :] - cumulative[:, None] if TRANSPOSE else log_in[:, None] - cumulative[None, :]
    else:  # sums of gates alone
        upto = tl.where(read, log_a.to(tl.float32)[None, :] * LOG2E + tl.zeros([C, C], tl.float32), 0.0)  # [t r]
        beyond = tl.where(after, 1.0, 0.0)  # [s r], whether token r comes after s
        if TRANSPOSE:
            logs = tl.dot(beyond, tl.trans(upto), input_precision="tf32x3")
        else:
            logs = tl.dot(upto, tl.trans(beyond), input_precision="tf32x3")
    # mask before exp: above the diagonal the difference is positive and could overflow
    if TRANSPOSE:
        read = off_diagonal(causal(C, not REVERSE)) if BEFORE else causal(C, not REVERSE)
    return tl.exp2(tl.where(read, logs, float("-inf")))
