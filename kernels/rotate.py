"""Complex gates a_t = |a_t| exp(i φ_t) as real ones: keys and queries are rotated, and the state has twice the rows.

    θ_t = −(sum of φ_s over the tokens s after t)      k'_t = [k_t cos θ_t, −k_t sin θ_t]      |a|'_t = [|a_t|, |a_t|]

and q likewise. Phases are counted from the token that the scan reads last, so of all states only a given initial one is
rotated as well, by the sum of all phases: `state_angle` [B H KEYS] in radians, one row per document. `chunk_phase`
[chunks H KEYS] is the phase that the first token of a chunk sees.

A phase is a 32-bit integer, a fraction of a full circle, so sums wrap around by themselves and are exact. Forward, in
`chunk_prepare.prepare`, the chunks of a head pass the sum of their phases on by look-back. Backward, the gradient of a
phase sums over earlier tokens of the same chunk, plus one term for the state that enters the chunk; never over the
whole sequence, where roundings would add up.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from recur.kernels.decay import FLOOR, RESET, gates_of
from recur.kernels.lookback import HEADER, distances, publish, take_ticket, wait
from recur.kernels.tiles import chunk_bounds, cos_sin_of_rest, load_tile, store_tile
from triton.language.extra import libdevice

CIRCLES_PER_RADIAN = tl.constexpr(0.15915494309189535)  # 1 / 2π
UNITS_PER_CIRCLE = tl.constexpr(4294967296.0)  # 2^32
RADIANS_PER_UNIT = tl.constexpr(1.4629180792671596e-9)  # 2π / 2^32
EIGHTH = tl.constexpr(536870912)  # 2^29 units, half of a quarter of a circle
QUARTER_BITS = tl.constexpr(30)  # a quarter of a circle is 2^30 units
ROUND = tl.constexpr(6755399441055744.0)  # 1.5 · 2^52: plus a number, it holds the number rounded in its last bits
WINDOW = 32  # chunks: each so manieth publishes the phase of everything before it, see `lookback`


@triton.jit
def angle(phase):
    """θ in radians of a sum of phases: rotated the other way."""
    return phase.to(tl.float32) * -RADIANS_PER_UNIT


@triton.jit
def cos_sin_of(phase, DOT: tl.constexpr):
    """cos and sin of that angle; the GPU's own, good to 21 bits, where matmuls take bfloat16."""
    if tl.bfloat16 == DOT:
        cos, sin = libdevice.fast_cosf(angle(phase)), libdevice.fast_sinf(angle(phase))
    else:
        quarter = (phase + EIGHTH) >> QUARTER_BITS
        cos, sin = cos_sin_of_rest(-quarter, angle(phase - (quarter << QUARTER_BITS)))
    return cos, sin


@triton.jit
def phase_of(log_a, radians):
    """Radians as a fraction of a circle in 32 bits; 0 at a reset, where nothing is left to rotate."""
    circles = tl.where(log_a > RESET, radians, 0.0).to(tl.float64) * CIRCLES_PER_RADIAN
    circles -= (circles + ROUND) - ROUND  # in [−0.5, 0.5], without the conversions of a rounding
    return (circles * UNITS_PER_CIRCLE + ROUND).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def load_phases(gates, start, offs, inside, part, KEYS, DECAY: tl.constexpr, D: tl.constexpr):
    """log |a| [C D], resets at FLOOR, and phases [C D], of D key channels from `part` on."""
    ptr, stride_t, _ = gates
    C: tl.constexpr = offs.shape[0]
    ptrs = ptr + start * stride_t + offs[:, None] * stride_t
    if DECAY == "key":
        e = part * 2 + tl.arange(0, 2 * D)
        pairs = tl.load(ptrs + e[None, :], mask=inside[:, None] & (e < 2 * KEYS)[None, :], other=0.0)
        log_a, radians = tl.split(pairs.reshape(C, D, 2))
    else:
        log_a = tl.load(ptrs, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
        radians = tl.load(ptrs + 1, mask=inside[:, None], other=0.0) + tl.zeros([C, D], tl.float32)
    lost = tl.where(log_a > RESET, radians - radians, 0.0)  # NaN where a phase is not finite, which 32 bits cannot show
    return tl.maximum(log_a, FLOOR, propagate_nan=tl.PropagateNan.ALL) + lost, phase_of(log_a, radians)


@triton.jit
def next_chunk_head(descriptors_ptr, cu_ptr, T, chunks, H, REVERSE: tl.constexpr, C: tl.constexpr):
    """The chunk of a head that this program works on, by ticket: from the end of the scan to its beginning."""
    ticket = take_ticket(descriptors_ptr)
    place, h = ticket // H, ticket % H
    if cu_ptr is None:  # all rows before the next chunk, so that few wait for a program that has just begun
        rows = chunks // tl.cdiv(T, C)
        place = place % rows * tl.cdiv(T, C) + place // rows
    chunk = place if REVERSE else chunks - 1 - place
    return chunk * H + h


@triton.jit
def descriptors_of(descriptors_ptr, chunk_head, start, stop, index, H, KEYS, REVERSE: tl.constexpr, C: tl.constexpr):
    """Descriptors of one chunk of a head: their pointer, the distance to those of the chunk it reads from, and the
    number of chunks before it in the order of the look-back."""
    place = index if REVERSE else (stop - start - 1) // C
    return descriptors_ptr + HEADER + chunk_head * KEYS, -(H * KEYS) if REVERSE else H * KEYS, place


@triton.jit
def publish_phases(own, part, phase, KEYS, WINDOW: tl.constexpr):
    """Publish the sum of a chunk's phases [C D], unless the chunk is one that publishes an inclusive prefix."""
    ptrs, _, place = own
    d = part + tl.arange(0, phase.shape[1])
    publish(ptrs + d, tl.sum(phase, 0), (d < KEYS) & (place % WINDOW != 0))


@triton.jit
def sum_phases(own, part, phase, KEYS, REVERSE: tl.constexpr, WINDOW: tl.constexpr):
    """Phase that the chunk's first token sees [D], and the phase at each token [C D], by look-back; publishes the
    former where it is an inclusive prefix that other chunks read."""
    ptrs, stride, place = own
    d = part + tl.arange(0, phase.shape[1])
    back = distances(place, WINDOW, False)
    here = ((back > 0) & (place > 0))[:, None] & (d < KEYS)[None, :]
    before = wait((ptrs + d)[None, :] + back[:, None] * stride, here)
    first = tl.sum(before.to(tl.int32), 0) + tl.sum(phase, 0)
    publish(ptrs + d, first, (d < KEYS) & (place % WINDOW == 0))
    return first, first[None, :] - tl.cumsum(phase, 0, reverse=REVERSE)


@triton.jit(do_not_specialize=["T", "documents"])
def rotate_backward(
    x, prepared, dq_rotated_ptr, dk_rotated_ptr, derase_rotated_ptr, drows_ptr,  # records of `chunk_scan`; gradients
    dphase_state_ptr,
    dq_ptr, dk_ptr, derase_ptr, dgate_ptr,  # written: [B T H KEYS] three times, [B T H KEYS 2]
    cu_ptr, T, documents,
    SCAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From gradients of rotated q, k and erase key [B T H K], of log gates of rows [B T H K] (None with one gate per
    head), and of the rotation of the states that enter chunks [chunks H KEYS], to those of q, k, the erase key and
    complex gates. One program owns BLOCK_D key channels of one chunk of one head."""
    H: tl.constexpr = SCAN.H
    C: tl.constexpr = SCAN.C
    KEYS: tl.constexpr = SCAN.KEYS
    GROUPS: tl.constexpr = SCAN.GROUPS
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk_head = pid % tl.cdiv(KEYS, BLOCK_D), pid // tl.cdiv(KEYS, BLOCK_D)
    chunk, h = chunk_head // H, chunk_head % H
    first, start, stop = chunk_bounds(chunk, cu_ptr, T, documents, C)
    if start >= stop:
        return
    part = (tile * BLOCK_D).to(tl.int32)
    d, offs, row = part + tl.arange(0, BLOCK_D), tl.arange(0, C), first + start
    inside, group = offs < stop - start, h * GROUPS // H
    gates = gates_of(x.gate, first, T, h, x.gate_sb, x.gate_sh, SCAN.GATE_ST, SCAN.GATE_SD, cu_ptr)
    log_a, phase = load_phases(gates, start, offs, inside, part, KEYS, SCAN.DECAY, BLOCK_D)
    begin = tl.load(prepared.chunk_phase + chunk_head * KEYS + d, mask=d < KEYS, other=0)
    after = begin[None, :] - tl.cumsum(phase, 0, reverse=SCAN.REVERSE)
    cos, sin = cos_sin_of(after, SCAN.DOT)
    re = load_tile((dk_rotated_ptr, 2 * H, 2 * h, KEYS), row, offs, inside, d).to(tl.float32)
    im = load_tile((dk_rotated_ptr, 2 * H, 2 * h + 1, KEYS), row, offs, inside, d).to(tl.float32)
    store_tile((dk_ptr, H, h, KEYS), row, offs, inside, d, re * cos - im * sin)
    k = load_tile((x.k, GROUPS, group, KEYS), row, offs, inside, d).to(tl.float32)
    exclusive = -k * (re * sin + im * cos)  # of θ at tokens that do not include this token's own phase
    if SCAN.BEFORE:
        cos, sin = cos_sin_of(after + phase, SCAN.DOT)
    re = load_tile((dq_rotated_ptr, 2 * H, 2 * h, KEYS), row, offs, inside, d).to(tl.float32)
    im = load_tile((dq_rotated_ptr, 2 * H, 2 * h + 1, KEYS), row, offs, inside, d).to(tl.float32)
    store_tile((dq_ptr, H, h, KEYS), row, offs, inside, d, re * cos - im * sin)
    q = load_tile((x.q, GROUPS, group, KEYS), row, offs, inside, d).to(tl.float32)
    inclusive = -q * (re * sin + im * cos)
    if not SCAN.BEFORE:
        exclusive, inclusive = exclusive + inclusive, tl.zeros_like(inclusive)
    if SCAN.ERASE != "none":
        cos, sin = cos_sin_of(after + phase if SCAN.ERASE == "previous" else after, SCAN.DOT)
        re = load_tile((derase_rotated_ptr, 2 * H, 2 * h, KEYS), row, offs, inside, d).to(tl.float32)
        im = load_tile((derase_rotated_ptr, 2 * H, 2 * h + 1, KEYS), row, offs, inside, d).to(tl.float32)
        store_tile((derase_ptr, H, h, KEYS), row, offs, inside, d, re * cos - im * sin)
        erase = load_tile((x.erase, GROUPS, group, KEYS), row, offs, inside, d).to(tl.float32)
        if SCAN.ERASE == "previous":
            inclusive -= erase * (re * sin + im * cos)
        else:
            exclusive -= erase * (re * sin + im * cos)
    dphase = tl.load(dphase_state_ptr + chunk_head * KEYS + d, mask=d < KEYS, other=0.0)
    dphase = dphase[None, :] + exclusive - tl.cumsum(exclusive + inclusive, 0, reverse=SCAN.REVERSE)
    dphase = tl.where(log_a > RESET, dphase, 0.0)
    dlog_a = tl.zeros_like(dphase)
    if drows_ptr is not None:
        dlog_a = load_tile((drows_ptr, 2 * H, 2 * h, KEYS), row, offs, inside, d).to(tl.float32)
        dlog_a += load_tile((drows_ptr, 2 * H, 2 * h + 1, KEYS), row, offs, inside, d)
    pairs = tl.join(dlog_a, dphase).reshape(C, 2 * BLOCK_D)
    store_tile((dgate_ptr, H, h, 2 * KEYS), row, offs, inside, 2 * part + tl.arange(0, 2 * BLOCK_D), pairs)
