"""The diagonal scan, h_t = a_t h_{t-1} + x_t, one number a channel: nothing is used twice, so bytes decide.

    summary (segments > 1)   a, x          -> P, R [B segments D]: what a segment does to the state, h -> P h + R
    combine (segments > 1)   P, R          -> the state entering each segment
    emit                     a, x, h       -> y, final states
    adjoint                  the same from the other end, H -> conj(a_t) (H + dy_t); dx, dlog_decay instead of y

Complex numbers are two planes side by side in D. Packed documents open with their own state, and empty ones hand it on.
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.operators import cdiv, differentiable, fake, operator, power_of_2, processors
from torch import Tensor

from recur.primitives.diagonal import document_starts
from recur.primitives.forms import document_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """a b in two planes; where it is real the second is zeros, which the compiler drops."""
    re = ar * br
    im = tl.zeros_like(re)
    if COMPLEX:
        re, im = re - ai * bi, ar * bi + ai * br
    return re, im


@triton.jit
def _load_planes(ptr, row, cols, here, COMPLEX: tl.constexpr):
    """Rows of a tensor [rows cols] -> real and imaginary part, which lie side by side."""
    tile = tl.load(ptr + row[:, None] * cols[1] + cols[0][None, :], mask=here, other=0.0).to(tl.float32)
    re, im = tile, tl.zeros_like(tile)
    if COMPLEX:
        re, im = tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 2, 2))
    return re, im


@triton.jit
def _store_planes(ptr, row, cols, here, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.join(re, im).reshape(re.shape[0], re.shape[1] * 2)
    tl.store(ptr + row[:, None] * cols[1] + cols[0][None, :], re, mask=here)


@triton.jit
def _combine(P_ptr, R_ptr, size, segments, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr):
    """R [B segments size] becomes the state that enters each segment; where a row starts P is 0."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    b, offs = pid // blocks + tl.zeros((1,), tl.int64), pid % blocks * BLOCK + tl.arange(0, BLOCK)
    cols, here = (offs, size), (offs < size)[None, :]
    re = tl.zeros((1, BLOCK // 2 if COMPLEX else BLOCK), tl.float32)
    im = re
    for i in range(0, segments):
        at = b * segments + (segments - 1 - i if ADJOINT else i)
        Pr, Pi = _load_planes(P_ptr, at, cols, here, COMPLEX)
        Rr, Ri = _load_planes(R_ptr, at, cols, here, COMPLEX)
        _store_planes(R_ptr, at, cols, here, re, im, COMPLEX)
        re, im = _times(Pr, Pi, re, im, COMPLEX)
        re, im = re + Rr, im + Ri


@triton.jit
def _turn(phase):
    """cos and sin by their series, after whole quarter turns are taken off: the library's spill on their rare path."""
    quarters = tl.floor(phase * 0.6366197723675814 + 0.5)
    x = phase - quarters * 1.5703125  # pi / 2 in three parts, the first two short enough for exact products
    x = (x - quarters * 4.837512969970703e-4) - quarters * 7.549789948768648e-8
    z = x * x
    sin = x + x * z * (-1.6666667e-1 + z * (8.333334e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6)))
    cos = 1 + z * (-0.5 + z * (4.1666668e-2 + z * (-1.3888889e-3 + z * (2.4801587e-5 - z * 2.7557319e-7))))
    quarter = quarters.to(tl.int32)
    odd = quarter % 2 != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter + 1) & 2 != 0, -cos, cos), tl.where(quarter & 2 != 0, -sin, sin)


@triton.jit
def _polar(log, COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr):
    """exp of a log decay in two planes, an exact 0 for −inf."""
    re = tl.exp2(log[0] * LOG2E)
    im = tl.zeros_like(re)
    if COMPLEX:
        cos, sin = _turn(log[1])
        re, im = re * cos, re * (-sin if CONJUGATE else sin)
    return re, im


@triton.jit
def _then(P, R, E, F, P2, R2, E2, F2):
    """S -> P S + R, then the same with P2, R2. E, F is what has acted before the last of the rows so far."""
    return P2 * P, P2 * R + R2, E2 * P, E2 * R + F2


@triton.jit
def _then_complex(Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi, Pr2, Pi2, Rr2, Ri2, Er2, Ei2, Fr2, Fi2):
    return (
        Pr2 * Pr - Pi2 * Pi,
        Pr2 * Pi + Pi2 * Pr,
        Pr2 * Rr - Pi2 * Ri + Rr2,
        Pr2 * Ri + Pi2 * Rr + Ri2,
        Er2 * Pr - Ei2 * Pi,
        Er2 * Pi + Ei2 * Pr,
        Er2 * Rr - Ei2 * Ri + Fr2,
        Er2 * Ri + Ei2 * Rr + Fi2,
    )


@triton.jit
def _last(tile, ROWS: tl.constexpr):
    """[ROWS D] -> [1 D]: the last row."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], tile, 0.0), 0)[None, :]


@triton.jit
def _border(borders_ptr, position, inside):
    """[ROWS]: the packed document that opens, or closes, at these tokens; −1 if none does."""
    return tl.load(borders_ptr + position, mask=inside, other=-1)


@triton.jit
def _replaced(re, im, ptr, document, cols, in_d, COMPLEX: tl.constexpr):
    """Rows that name a document are replaced by its state, zeros where there is no tensor."""
    here = (document >= 0)[:, None]
    sr, si = tl.zeros_like(re), tl.zeros_like(im)
    if ptr is not None:
        sr, si = _load_planes(ptr, document.to(tl.int64), cols, here & in_d, COMPLEX)
    return tl.where(here, sr, re), tl.where(here, si, im)


@triton.jit(do_not_specialize=["T", "segments", "length", "first", "step"])
def _diagonal(
    value_ptr, log_ptr, y_ptr, initial_ptr, open_ptr, close_ptr, start_ptr, enter_ptr,  # read
    P_ptr, R_ptr, out_ptr, dlog_ptr, state_ptr,  # written
    T, D, segments, length, first, step,  # sizes; D counts both planes; token t lies at first + step t
    COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, EMIT: tl.constexpr,  # variants
    ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr,  # tile
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t, or its adjoint H -> conj(a_t) (H + dy_t), walked from the other end.

    A tile is ROWS stretches of UNROLL tokens, one a row. Each row is walked by itself, rows are joined by one scan, and
    the tokens, still in registers, are walked again from the state that enters their row. Rows and packed documents
    open with their state of start [B D] and leave one in state; open and close [T] name the document at its borders.
    """
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0).to(tl.int64)
    tile, segment, b = pid % tiles, pid // tiles % segments, pid // (tiles * segments)
    channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    cols, in_d, base = (channel, D), (channel < D)[None, :], b * T + first
    WIDTH: tl.constexpr = BLOCK_D // 2 if COMPLEX else BLOCK_D
    only = tl.zeros((1,), tl.int64)
    at = b * segments + segment + only
    start = (segment * length).to(tl.int32)
    stop = tl.minimum(start + length, T)
    one, none = tl.full((ROWS, WIDTH), 1.0, tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    hr, hi = tl.zeros((1, WIDTH), tl.float32), tl.zeros((1, WIDTH), tl.float32)
    wr, wi = hr + 1.0, hi  # the product of all gates, for the summary
    if enter_ptr is not None:
        hr, hi = _load_planes(enter_ptr, at, cols, in_d, COMPLEX)
    if open_ptr is None:
        opening = b + only if start == 0 else only - 1
        hr, hi = _replaced(hr, hi, start_ptr, opening, cols, in_d, COMPLEX)
        wr = tl.where((opening >= 0)[:, None], 0.0, wr)
    for t0 in range(start, stop, ROWS * UNROLL):
        t = t0 + tl.arange(0, ROWS) * UNROLL
        gates, values = (), ()
        for u in tl.static_range(UNROLL):
            row, here = base + step * (t + u), (t + u < stop)[:, None] & in_d
            gates = gates + (_polar(_load_planes(log_ptr, row, cols, here, COMPLEX), COMPLEX, ADJOINT),)
            values = values + (_load_planes(value_ptr, row, cols, here, COMPLEX),)
        Pr, Pi, Rr, Ri = one, none, none, none
        for u in tl.static_range(UNROLL):
            if open_ptr is not None:
                opening = _border(open_ptr, first + step * (t + u), t + u < stop)
                Rr, Ri = _replaced(Rr, Ri, start_ptr, opening, cols, in_d, COMPLEX)
                Pr, Pi = _replaced(Pr, Pi, None, opening, cols, in_d, COMPLEX)
            ar, ai = gates[u]
            if ADJOINT:
                Rr, Ri = _times(ar, ai, Rr + values[u][0], Ri + values[u][1], COMPLEX)
            else:
                Rr, Ri = _times(ar, ai, Rr, Ri, COMPLEX)
                Rr, Ri = Rr + values[u][0], Ri + values[u][1]
            Pr, Pi = _times(ar, ai, Pr, Pi, COMPLEX)
        if COMPLEX:
            Pr, Pi, Rr, Ri, Er, Ei, Fr, Fi = tl.associative_scan(
                (Pr, Pi, Rr, Ri, one, none, none, none), 0, _then_complex
            )
        else:
            Pr, Rr, Er, Fr = tl.associative_scan((Pr, Rr, one, none), 0, _then)
            Pi, Ri, Ei, Fi = none, none, none, none
        if EMIT:
            sr, si = _times(Er, Ei, hr, hi, COMPLEX)
            sr, si = sr + Fr, si + Fi
            for u in tl.static_range(UNROLL):
                row, inside = base + step * (t + u), t + u < stop
                here = inside[:, None] & in_d
                ar, ai = gates[u]
                if open_ptr is None:
                    closing = tl.where(t + u + 1 == T, b, -1)
                else:
                    opening = _border(open_ptr, first + step * (t + u), inside)
                    closing = _border(close_ptr, first + step * (t + u), inside)
                    sr, si = _replaced(sr, si, start_ptr, opening, cols, in_d, COMPLEX)
                if ADJOINT:
                    sr, si = sr + values[u][0], si + values[u][1]
                    _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
                    br, bi = _load_planes(y_ptr, row + step, cols, here & (closing < 0)[:, None], COMPLEX)
                    br, bi = _replaced(br, bi, initial_ptr, closing, cols, in_d, COMPLEX)
                    sr, si = _times(ar, ai, sr, si, COMPLEX)
                    gr, gi = _times(sr, si, br, -bi, COMPLEX)
                    _store_planes(dlog_ptr, row, cols, here, gr, gi, COMPLEX)
                else:
                    sr, si = _times(ar, ai, sr, si, COMPLEX)
                    sr, si = sr + values[u][0], si + values[u][1]
                    _store_planes(out_ptr, row, cols, here, sr, si, COMPLEX)
                if open_ptr is not None:
                    leaving = (closing >= 0)[:, None] & in_d
                    _store_planes(state_ptr, closing.to(tl.int64), cols, leaving, sr, si, COMPLEX)
        pr, pi = _last(Pr, ROWS), _last(Pi, ROWS)
        hr, hi = _times(pr, pi, hr, hi, COMPLEX)
        hr, hi = hr + _last(Rr, ROWS), hi + _last(Ri, ROWS)
        if not EMIT:
            wr, wi = _times(pr, pi, wr, wi, COMPLEX)
    if not EMIT:
        _store_planes(P_ptr, at, cols, in_d, wr, wi, COMPLEX)
        _store_planes(R_ptr, at, cols, in_d, hr, hi, COMPLEX)
    elif open_ptr is None:  # noqa: SIM102, decided when compiled
        if stop == T:
            _store_planes(state_ptr, b + only, cols, in_d, hr, hi, COMPLEX)


# Plan and launch


class DiagonalPlan(NamedTuple):
    """How a diagonal scan is cut up: tiles of ROWS stretches of UNROLL tokens; segments of `length` tokens."""

    ROWS: int
    UNROLL: int
    BLOCK_D: int
    warps: int
    tiles: int
    segments: int
    length: int

    @property
    def tile(self) -> dict[str, int]:
        return {"ROWS": self.ROWS, "UNROLL": self.UNROLL, "BLOCK_D": self.BLOCK_D, "num_warps": self.warps}


def plan_diagonal(B: int, T: int, D: int, *, itemsize: int = 2, processors: int = 132) -> DiagonalPlan:
    """Rows of 128 bytes, 16 bytes a thread; where rows are few, shorter ones and more stretches side by side; segments,
    which read everything twice, only where processors would still idle (measured on an H200, benchmarks/LOG.md).

    Args: sizes (D counts both planes of complex numbers); bytes of a number; processors.   Returns: DiagonalPlan.
    """
    few = B * D * itemsize < 2 * 128 * processors
    warps, row, UNROLL = (8, 32, 8) if few else (4, 128, 16 // itemsize)
    BLOCK_D = max(2, min(row // itemsize, power_of_2(D)))
    ROWS = min(32 * warps * 16 // itemsize // BLOCK_D, power_of_2(cdiv(T, UNROLL)))
    tiles, span = cdiv(D, BLOCK_D), ROWS * UNROLL
    spans, programs = cdiv(T, span), B * tiles
    segments = 1 if 2 * programs >= processors else cdiv(2 * processors, programs)
    length = cdiv(spans, min(spans, segments)) * span
    return DiagonalPlan(ROWS, UNROLL, BLOCK_D, warps, tiles, cdiv(T, length), length)


def join(P: Tensor, R: Tensor, complex_: bool, adjoint: bool) -> None:
    """Turn R [B segments ...] into the states that enter the segments."""
    B, segments = R.shape[:2]
    size, block = R[0, 0].numel(), 256
    _combine[(B * cdiv(size, block),)](P, R, size, segments, complex_, adjoint, block, num_warps=2)


def _run_diagonal(
    value: Tensor, log_decay: Tensor, y: Tensor | None, initial: Tensor | None, start: Tensor | None,
    cu_seqlens: Tensor | None, outs: tuple[Tensor, ...], complex_: bool, reverse: bool, adjoint: bool,
) -> None:  # fmt: skip
    """Launch the scan, or its adjoint; outs are (y, state), or (dx, dlog_decay, dinitial); `start` enters first."""
    B, T, D = value.shape
    p = plan_diagonal(B, T, D, itemsize=value.element_size(), processors=processors(value.device))
    turned = reverse != adjoint
    sizes = (T, D, p.segments, p.length, *((T - 1, -1) if turned else (0, 1)))
    grid = (p.tiles * p.segments * B,)
    out, dlog, state = outs if adjoint else (outs[0], None, outs[1])
    borders: tuple[Tensor | None, ...] = (None, None)
    if cu_seqlens is not None:
        document, starts = document_of(cu_seqlens, T), document_starts(cu_seqlens, T)
        borders = tuple(torch.where(at, document, -1) for at in (starts, torch.cat([starts[1:], starts[:1]])))
        borders = borders[::-1] if turned else borders
    P = R = enter = None
    read = (value, log_decay, y, initial, *borders, start)
    if p.segments > 1:
        P, R = (value.new_empty((B, p.segments, D), dtype=torch.float32) for _ in range(2))
        written = (P, R, out, dlog, state)
        _diagonal[grid](*read, None, *written, *sizes, complex_, adjoint, False, **p.tile)
        join(P, R, complex_, False)
        enter = R
    _diagonal[grid](*read, enter, P, R, out, dlog, state, *sizes, complex_, adjoint, True, **p.tile)


@operator("diagonal")
def _diagonal_scan(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y [B T D] and the final states [B D]; with complex_ both planes of a number lie side by side in D."""
    x = x.contiguous()
    y, state = _fake_diagonal(x, log_decay, initial, cu_seqlens, complex_, reverse)
    if cu_seqlens is not None:
        state = torch.zeros_like(state) if initial is None else initial.clone()
    log_decay = log_decay.contiguous()
    _run_diagonal(x, log_decay, None, None, initial, cu_seqlens, (y, state), complex_, reverse, False)
    return y, state


@fake("diagonal")
def _fake_diagonal(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, complex_: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty((rows, x.shape[2]), dtype=torch.float32)


@operator("diagonal_adjoint")
def _diagonal_adjoint(
    dy: Tensor, dstate: Tensor | None, log_decay: Tensor, y: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    complex_: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, log_decay and the initial states."""
    dy, log_decay = dy.contiguous(), log_decay.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    dx, dlog, dinitial = _fake_diagonal_adjoint(dy, dstate, log_decay, y, initial, cu_seqlens, complex_, reverse)
    if cu_seqlens is not None:
        dinitial = torch.zeros_like(dinitial) if dstate is None else dstate.clone()
    outs = (dx, dlog, dinitial)
    _run_diagonal(dy, log_decay, y, initial, dstate, cu_seqlens, outs, complex_, reverse, True)
    return outs


@fake("diagonal_adjoint")
def _fake_diagonal_adjoint(
    dy: Tensor, dstate: Tensor | None, log_decay: Tensor, y: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
    complex_: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = dy.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dinitial = dy.new_empty((rows, dy.shape[2]), dtype=torch.float32)
    return dy.new_empty(dy.shape), log_decay.new_empty(log_decay.shape), dinitial


def _save_diagonal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, log_decay, initial, cu_seqlens, ctx.complex, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_decay, output[0], initial, cu_seqlens)


def _diagonal_gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    log_decay, y, initial, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dx, dlog, dinitial = _diagonal_adjoint(dy, dstate, log_decay, y, initial, cu_seqlens, ctx.complex, ctx.reverse)
    return dx, dlog, None if initial is None else dinitial, None, None, None


differentiable("diagonal", _diagonal_gradients, _save_diagonal)
differentiable("diagonal_adjoint")


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not always a view, which takes time and is a node of the graph."""
    return x if x.shape == shape else x.reshape(shape)


def diagonal(
    x: Tensor, log_decay: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The gated diagonal scan, arguments as `gated_scan`. Returns y and the state [B *]."""
    complex_ = x.is_complex() or log_decay.is_complex()
    log_decay = log_decay if log_decay.shape == x.shape else log_decay.expand(x.shape)
    number = torch.complex64 if complex_ else torch.float32
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
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
