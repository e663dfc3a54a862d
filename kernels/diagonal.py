"""The diagonal scan, h_t = a_t h_{t-1} + x_t, one number per channel: nothing is used twice, so memory traffic decides.

    forward    x, log_decay             -> y, final states
    backward   dy, log_decay, y         -> dx, dlog_decay, gradients of initial states: H -> conj(a_t) (H + dy_t)

One kernel computes both, the backward pass from the other end. A program loops over all tokens of its channels. Where
channels are too few for that, every tile of tokens has a program, and they are joined by decoupled look-back, see
`lookback`. Everything is read once. Real and imaginary parts of complex numbers are neighbours in D. Packed documents
start from their own state, and empty ones leave the state that entered them.
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.cached import cached
from recur.kernels.lookback import HEADER, distances, publish_pair, take_ticket, wait_pair
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2, processors
from recur.kernels.packing import document_of, document_starts, state_count
from recur.kernels.tiles import LOG2E, cos_sin, split_complex
from torch import Tensor


@triton.jit
def _times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """a b in two planes; the second is zeros if numbers are real, which the compiler drops."""
    re = ar * br
    im = tl.zeros_like(re)
    if COMPLEX:
        re, im = re - ai * bi, ar * bi + ai * br
    return re, im


@triton.jit
def _load(ptr, row, cols, here):
    """Rows of a tensor [rows cols]."""
    return tl.load(ptr + row[:, None] * cols[1] + cols[0][None, :], mask=here, other=0.0)


@triton.jit
def _across(ar, ai, br, bi, COMPLEX: tl.constexpr, PACKED: tl.constexpr):
    """a b, and 0 where a is 0 if documents are packed: what lies before a border may be NaN and is not used."""
    re, im = _times(ar, ai, br, bi, COMPLEX)
    if PACKED:
        cut = (ar == 0) & (ai == 0)
        re, im = tl.where(cut, 0.0, re), tl.where(cut, 0.0, im)
    return re, im


@triton.jit
def _store_planes(ptr, row, cols, here, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.join(re, im).reshape(re.shape[0], re.shape[1] * 2)
    tl.store(ptr + row[:, None] * cols[1] + cols[0][None, :], re, mask=here)


@triton.jit
def _polar(log, COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr):
    """exp of a log decay in two planes, an exact 0 for −inf."""
    re = tl.exp2(log[0] * LOG2E)
    im = tl.zeros_like(re)
    if COMPLEX:
        cos, sin = cos_sin(log[1])
        re, im = re * cos, re * (-sin if CONJUGATE else sin)
    return re, im


@triton.jit
def _then(P, R, P2, R2):
    """h -> P h + R, then the same with P2, R2."""
    return P2 * P, P2 * R + R2


@triton.jit
def _then_complex(Pr, Pi, Rr, Ri, Pr2, Pi2, Rr2, Ri2):
    return Pr2 * Pr - Pi2 * Pi, Pr2 * Pi + Pi2 * Pr, Pr2 * Rr - Pi2 * Ri + Rr2, Pr2 * Ri + Pi2 * Rr + Ri2


@triton.jit
def _then_packed(P, R, P2, R2):
    """The same where P2 may be 0 because a document starts; see `_across`."""
    return tl.where(P2 == 0, 0.0, P2 * P), tl.where(P2 == 0, 0.0, P2 * R) + R2


@triton.jit
def _then_complex_packed(Pr, Pi, Rr, Ri, Pr2, Pi2, Rr2, Ri2):
    Pr, Pi = _across(Pr2, Pi2, Pr, Pi, True, True)
    Rr, Ri = _across(Pr2, Pi2, Rr, Ri, True, True)
    return Pr, Pi, Rr + Rr2, Ri + Ri2


@triton.jit
def _both(P, R, E, F, P2, R2, E2, F2):
    """The same, and E, F for the map of all rows so far but the last."""
    return _then(P, R, P2, R2) + _then(P, R, E2, F2)


@triton.jit
def _both_complex(Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi, Pr2, Pi2, Rr2, Ri2, Er2, Ei2, Fr2, Fi2):
    return _then_complex(Pr, Pi, Rr, Ri, Pr2, Pi2, Rr2, Ri2) + _then_complex(Pr, Pi, Rr, Ri, Er2, Ei2, Fr2, Fi2)


@triton.jit
def _both_packed(P, R, E, F, P2, R2, E2, F2):
    return _then_packed(P, R, P2, R2) + _then_packed(P, R, E2, F2)


@triton.jit
def _both_complex_packed(Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi, Pr2, Pi2, Rr2, Ri2, Er2, Ei2, Fr2, Fi2):
    last = _then_complex_packed(Pr, Pi, Rr, Ri, Pr2, Pi2, Rr2, Ri2)
    return last + _then_complex_packed(Pr, Pi, Rr, Ri, Er2, Ei2, Fr2, Fi2)


@triton.jit
def _publish(ptrs, stride, Pr, Pi, Rr, Ri, here, COMPLEX: tl.constexpr):
    """Publish the map h -> P h + R in one descriptor per number, or if complex in two that are `stride` stride."""
    if COMPLEX:
        publish_pair(ptrs, Pr, Pi, here)
        publish_pair(ptrs + stride, Rr, Ri, here)
    else:
        publish_pair(ptrs, Pr, Rr, here)


@triton.jit
def _entering(ptrs, stride, here, COMPLEX: tl.constexpr, PACKED: tl.constexpr):
    """[1 D]: the state that enters, from the maps of the descriptors [ROWS D], one after the other, applied to 0."""
    first, second = wait_pair(ptrs, here)
    Pr = tl.where(here, first, 1.0)
    if COMPLEX:
        Rr, Ri = wait_pair(ptrs + stride, here)
        _, _, Rr, Ri = tl.associative_scan((Pr, second, Rr, Ri), 0, _then_complex_packed if PACKED else _then_complex)
    else:
        _, Rr = tl.associative_scan((Pr, second), 0, _then_packed if PACKED else _then)
        Ri = tl.zeros_like(Rr)
    return _last(Rr, ptrs.shape[0]), _last(Ri, ptrs.shape[0])


@triton.jit
def _last(tile, ROWS: tl.constexpr):
    """[ROWS D] -> [1 D]: the last row."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], tile, 0.0), 0)[None, :]


@triton.jit
def _replaced(re, im, ptr, document, cols, in_d, COMPLEX: tl.constexpr):
    """Rows for which a document is given (not −1) are replaced by its state, zeros where there is no tensor."""
    here = (document >= 0)[:, None]
    sr, si = tl.zeros_like(re), tl.zeros_like(im)
    if ptr is not None:
        sr, si = split_complex(_load(ptr, document.to(tl.int64), cols, here & in_d), COMPLEX)
    return tl.where(here, sr, re), tl.where(here, si, im)


@triton.jit(do_not_specialize=["T", "segments", "length", "first", "step"])
def _diagonal(
    value_ptr, log_ptr, y_ptr, initial_ptr, open_ptr, close_ptr, start_ptr,  # read
    out_ptr, dlog_ptr, state_ptr, descriptors_ptr,  # written
    T, D, segments, length, first, step,  # sizes; D counts both planes; token t lies at first + step t
    COMPLEX: tl.constexpr, BACKWARD: tl.constexpr,  # variants
    ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,  # tile
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t, or the backward pass H -> conj(a_t) (H + dy_t) from the other end.

    A tile is ROWS runs of UNROLL tokens, one per row. Each row is scanned by itself, rows are joined by one associative
    scan, and the tokens, still in registers, are scanned again from the state that enters their row. Rows and packed
    documents start from their state in start [B D] and leave one in state; open and close [T] give the document that
    opens or closes at a token, else −1.

    With descriptors every segment is one tile, and they are joined by look-back over at most ROWS of them; the first of
    every ROWS publishes the state it leaves, as the map h -> 0 h + state.
    """
    pid = tl.program_id(0).to(tl.int64)
    if descriptors_ptr is not None:
        pid = take_ticket(descriptors_ptr).to(tl.int64)
    tiles, lanes = tl.cdiv(D, BLOCK_D), tl.num_programs(0) // segments
    segment, tile, b = pid // lanes, pid % lanes % tiles, pid % lanes // tiles
    channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    cols, in_d, base = (channel, D), (channel < D)[None, :], b * T + first
    WIDTH: tl.constexpr = BLOCK_D // 2 if COMPLEX else BLOCK_D
    PACKED: tl.constexpr = open_ptr is not None
    only = tl.zeros((1,), tl.int64)
    start = (segment * length).to(tl.int32)
    stop = tl.minimum(start + length, T)
    one, none = tl.full((ROWS, WIDTH), 1.0, tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    hr, hi = tl.zeros((1, WIDTH), tl.float32), tl.zeros((1, WIDTH), tl.float32)
    if open_ptr is None:
        hr, hi = _replaced(hr, hi, start_ptr, b + only if start == 0 else only - 1, cols, in_d, COMPLEX)
    for t0 in tl.range(start, stop, ROWS * UNROLL, num_stages=STAGES):
        t = t0 + tl.arange(0, ROWS) * UNROLL
        logs, values, before, gates, openings, closings = (), (), (), (), (), ()
        for u in tl.static_range(UNROLL):
            row, inside = base + step * (t + u), t + u < stop
            here = inside[:, None] & in_d
            logs = logs + (_load(log_ptr, row, cols, here),)
            values = values + (_load(value_ptr, row, cols, here),)
            closing = tl.where(t + u + 1 == T, b, -1)
            if open_ptr is not None:
                openings = openings + (tl.load(open_ptr + first + step * (t + u), mask=inside, other=-1),)
                closing = tl.load(close_ptr + first + step * (t + u), mask=inside, other=-1)
            closings = closings + (closing,)
            if BACKWARD:
                before = before + (_load(y_ptr, row + step, cols, here & (closing < 0)[:, None]),)
        Pr, Pi, Rr, Ri = one, none, none, none
        for u in tl.static_range(UNROLL):
            if open_ptr is not None:
                Rr, Ri = _replaced(Rr, Ri, start_ptr, openings[u], cols, in_d, COMPLEX)
                Pr, Pi = _replaced(Pr, Pi, None, openings[u], cols, in_d, COMPLEX)
            ar, ai = _polar(split_complex(logs[u], COMPLEX), COMPLEX, BACKWARD)
            gates = gates + ((ar, ai),)
            xr, xi = split_complex(values[u], COMPLEX)
            if BACKWARD:
                Rr, Ri = _times(ar, ai, Rr + xr, Ri + xi, COMPLEX)
            else:
                Rr, Ri = _times(ar, ai, Rr, Ri, COMPLEX)
                Rr, Ri = Rr + xr, Ri + xi
            Pr, Pi = _across(Pr, Pi, ar, ai, COMPLEX, PACKED)
        if COMPLEX:
            Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi = tl.associative_scan(
                (Pr, Pi, Rr, Ri, one, none, none, none), 0, _both_complex_packed if PACKED else _both_complex
            )
        else:
            Pr, Rr, Er, Fr = tl.associative_scan((Pr, Rr, one, none), 0, _both_packed if PACKED else _both)
            Pi, Ri, Ei, Fi = none, none, none, none
        pr, pi, rr, ri = _last(Pr, ROWS), _last(Pi, ROWS), _last(Rr, ROWS), _last(Ri, ROWS)
        if descriptors_ptr is not None:
            number, count = tile * WIDTH + tl.arange(0, WIDTH)[None, :], D // 2 if COMPLEX else D
            own = descriptors_ptr + HEADER + (b * segments + segment) * count + number
            stride = lanes // tiles * segments * count
            _publish(own, stride, pr, pi, rr, ri, (number < count) & (segment % ROWS != 0), COMPLEX)
            if segment > 0:
                back = distances(segment, ROWS, True)
                hr, hi = _entering(own - back * count, stride, (number < count) & (back > 0), COMPLEX, PACKED)
        sr, si = _across(Er, Ei, hr, hi, COMPLEX, PACKED)
        sr, si = sr + Fr, si + Fi
        hr, hi = _across(pr, pi, hr, hi, COMPLEX, PACKED)
        hr, hi = hr + rr, hi + ri
        if descriptors_ptr is not None:
            zero = tl.zeros_like(hr)
            _publish(own, stride, zero, zero, hr, hi, (number < count) & (segment % ROWS == 0), COMPLEX)
        for u in tl.static_range(UNROLL):
            row, here = base + step * (t + u), (t + u < stop)[:, None] & in_d
            if open_ptr is not None:
                sr, si = _replaced(sr, si, start_ptr, openings[u], cols, in_d, COMPLEX)
            ar, ai = gates[u]
            xr, xi = split_complex(values[u], COMPLEX)
            if BACKWARD:
                sr, si = sr + xr, si + xi
                _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
                br, bi = split_complex(before[u], COMPLEX)
                br, bi = _replaced(br, bi, initial_ptr, closings[u], cols, in_d, COMPLEX)
                sr, si = _times(ar, ai, sr, si, COMPLEX)
                gr, gi = _times(sr, si, br, -bi, COMPLEX)
                _store_planes(dlog_ptr, row, cols, here, gr, gi, COMPLEX)
            else:
                sr, si = _times(ar, ai, sr, si, COMPLEX)
                sr, si = sr + xr, si + xi
                _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
            if open_ptr is not None:
                document = closings[u].to(tl.int64)
                _store_planes(state_ptr, document, cols, (document >= 0)[:, None] & in_d, sr, si, COMPLEX)
    if open_ptr is None:  # noqa: SIM102, decided when compiled
        if segment == segments - 1:
            _store_planes(state_ptr, b + only, cols, in_d, hr, hi, COMPLEX)


# Plan and launch

# By bytes of a number and whether backward, for loops and for look-back: bytes per row, bytes per thread, UNROLL,
# registers, stages. Measured on an H100; float32 has the loops of complex numbers, and more tokens per tile of a chain.
TILES = {
    (2, False): ((128, 16, 8, None, 3), (64, 8, 16, 255, 1)),
    (2, True): ((128, 8, 8, 168, 1), (64, 8, 8, 168, 1)),
    (4, False): ((128, 16, 4, None, 2), (64, 16, 16, 255, 1)),
    (4, True): ((128, 16, 4, None, 2), (64, 16, 8, None, 1)),
    (8, False): ((128, 16, 4, None, 2), (64, 16, 8, 128, 1)),
    (8, True): ((128, 16, 4, None, 2), (128, 16, 4, 128, 1)),
}
WARPS = 4


class DiagonalPlan(NamedTuple):
    """How a diagonal scan is laid out: tiles of ROWS runs of UNROLL tokens, loaded stages − 1 tiles ahead; one segment
    of all tokens, or segments of one tile each that are joined by look-back."""

    ROWS: int
    UNROLL: int
    BLOCK_D: int
    registers: int | None
    stages: int
    tiles: int
    segments: int
    length: int

    @property
    def tile(self) -> dict[str, int | None]:
        tile = {"ROWS": self.ROWS, "UNROLL": self.UNROLL, "BLOCK_D": self.BLOCK_D, "STAGES": self.stages}
        return tile | {"num_warps": WARPS, "enable_fp_fusion": True, "maxnreg": self.registers}


def plan_diagonal(
    B: int, T: int, D: int, *, itemsize: int = 2, backward: bool = False, packed: bool = False, processors: int = 132
) -> DiagonalPlan:
    """Loops, unless they would leave a fourth of the processors without a program: then look-back.

    Args: sizes (D counts both parts of complex numbers); bytes of a number, 8 of a complex one; packed: states of
        documents take registers, so that rows are shorter; processors of the device.
    Returns: DiagonalPlan.
    """
    plane = min(itemsize, 4)
    underfilled = 4 * B * cdiv(D * plane, 128) < 3 * processors
    row, thread, UNROLL, registers, stages = TILES[itemsize, backward][underfilled]
    UNROLL = min(UNROLL, 8) if packed else UNROLL
    BLOCK_D = max(2, min(row // plane, power_of_2(D)))
    ROWS = min(32 * WARPS * thread // plane // BLOCK_D, power_of_2(cdiv(T, UNROLL)))
    length = ROWS * UNROLL if underfilled else T
    return DiagonalPlan(ROWS, UNROLL, BLOCK_D, registers, stages, cdiv(D, BLOCK_D), cdiv(T, length), length)


_PLANS: dict[Hashable, tuple[DiagonalPlan, dict[str, int | None]]] = {}


def _planned(plan: DiagonalPlan) -> tuple[DiagonalPlan, dict[str, int | None]]:
    return plan, plan.tile


def _run_diagonal(
    value: Tensor, log_decay: Tensor, y: Tensor | None, initial: Tensor | None, start: Tensor | None,
    cu_seqlens: Tensor | None, outs: tuple[Tensor, ...], complex_: bool, reverse: bool, backward: bool,
) -> None:  # fmt: skip
    """Launch the scan or its backward; outs are (y, state), or (dx, dlog_decay, dinitial); `start` enters first."""
    B, T, D = value.shape
    itemsize, many = 8 if complex_ else value.element_size(), processors(value.device)
    options = {"itemsize": itemsize, "backward": backward, "packed": cu_seqlens is not None, "processors": many}
    p, tile = cached(
        _PLANS, (plan_diagonal, B, T, D, *options.values()), lambda: _planned(plan_diagonal(B, T, D, **options))
    )
    right_to_left = reverse != backward
    out, dlog, state = outs if backward else (outs[0], None, outs[1])
    borders: tuple[Tensor | None, ...] = (None, None)
    if cu_seqlens is not None:
        document, starts = document_of(cu_seqlens, T), document_starts(cu_seqlens, T)
        borders = tuple(torch.where(at, document, -1) for at in (starts, torch.cat([starts[1:], starts[:1]])))
        borders = borders[::-1] if right_to_left else borders
        state.copy_(torch.zeros_like(state) if start is None else start)  # of documents without tokens
        tile = {**tile, "STAGES": 1}  # loads of documents' states would be staged with the others
    count = 2 + B * p.segments * D  # see `lookback`
    descriptors = value.new_full((count,), -1, dtype=torch.int64) if p.segments > 1 else None
    _diagonal[(p.tiles * p.segments * B,)](
        value_ptr=value, log_ptr=log_decay, y_ptr=y, initial_ptr=initial, open_ptr=borders[0], close_ptr=borders[1],
        start_ptr=start, out_ptr=out, dlog_ptr=dlog, state_ptr=state, descriptors_ptr=descriptors,
        T=T, D=D, segments=p.segments, length=p.length, first=T - 1 if right_to_left else 0,
        step=-1 if right_to_left else 1, COMPLEX=complex_, BACKWARD=backward, **tile,
    )  # fmt: skip


@operator("diagonal")
def _diagonal_scan(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y [B T D] and the final states [B D]; with complex_ the two parts of a number are neighbours in D."""
    outs = _fake_diagonal(x, log_decay, initial, cu_seqlens, complex_, reverse)
    _run_diagonal(x, log_decay, None, None, initial, cu_seqlens, outs, complex_, reverse, False)
    return outs


@fake("diagonal")
def _fake_diagonal(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    rows = state_count(x.shape[0], cu_seqlens)
    return x.new_empty(x.shape), x.new_empty((rows, x.shape[2]), dtype=torch.float32)


@operator("diagonal_backward")
def _diagonal_backward(
    dy: Tensor, dstate: Tensor | None, log_decay: Tensor, y: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    complex_: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, log_decay and the initial states."""
    outs = _fake_diagonal_backward(dy, dstate, log_decay, y, initial, cu_seqlens, complex_, reverse)
    _run_diagonal(dy, log_decay, y, initial, dstate, cu_seqlens, outs, complex_, reverse, True)
    return outs


@fake("diagonal_backward")
def _fake_diagonal_backward(
    dy: Tensor, dstate: Tensor | None, log_decay: Tensor, y: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    complex_: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = state_count(dy.shape[0], cu_seqlens)
    dinitial = dy.new_empty((rows, dy.shape[2]), dtype=torch.float32)
    return dy.new_empty(dy.shape), log_decay.new_empty(log_decay.shape), dinitial


def _save_diagonal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, log_decay, initial, cu_seqlens, ctx.complex, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_decay, output[0], initial, cu_seqlens)


def _diagonal_gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    log_decay, y, initial, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dx, dlog, dinitial = _diagonal_backward(dy, dstate, log_decay, y, initial, cu_seqlens, ctx.complex, ctx.reverse)
    return dx, dlog, None if initial is None else dinitial, None, None, None


differentiable("diagonal", _diagonal_gradients, _save_diagonal)
differentiable("diagonal_backward")


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in this shape; a view only where it is needed, for it takes time and is a node of the graph."""
    return x if x.shape == shape else x.reshape(shape)


def diagonal(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The gated diagonal scan, arguments as `gated_scan`. Returns y and the state [B *]."""
    complex_ = x.is_complex() or log_decay.is_complex()
    log_decay = log_decay if log_decay.shape == x.shape else log_decay.expand(x.shape)
    number = torch.complex64 if complex_ else torch.float32
    rows = state_count(x.shape[0], cu_seqlens)
    start = None if initial is None else initial.to(number)
    if x.numel() == 0:
        state = x.new_zeros((rows, *x.shape[2:]), dtype=number) if start is None else start.clone()
        return x.to(number) if complex_ else x.clone(), state
    if complex_:
        x, log_decay = (torch.view_as_real(t.to(number).resolve_conj()) for t in (x, log_decay))
        start = None if start is None else torch.view_as_real(start.resolve_conj())
    D = x.shape[2:].numel()
    start = None if start is None else _shaped(start, (rows, D))
    tokens = (_shaped(t, (*x.shape[:2], D)) for t in (x, log_decay))
    y, state = _diagonal_scan(*tokens, start, cu_seqlens, complex_, reverse)
    y, state = _shaped(y, x.shape), _shaped(state, (rows, *x.shape[2:]))
    return (torch.view_as_complex(y), torch.view_as_complex(state)) if complex_ else (y, state)
