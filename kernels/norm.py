"""Skip, norm and gate of the output of a scan, before the last projection, in one pass over its rows.

    h = x + D u        skip, where there is one
    h = h act(z)       the gate, where it comes before the norm
    h = norm(h) w + b  over N entries
    y = h act(z)       the gate, where it comes after the norm

A row is the N entries that are normalised together: a head, a group, or all channels of a token. Every step is
optional, so the same two kernels are a plain norm and a plain gate (SwiGLU's silu(z) h). Arithmetic is float32. The
backward reads the inputs again and keeps nothing else; gradients of w, b and D are summed per program, in a fixed
order, then over programs.
"""

# Jitted functions take no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.operators import as_it_is, cdiv, differentiable, fake, operator, power_of_2, processors
from recur.kernels.pointwise import act_and_slope, column_sums, like, tokens
from torch import Tensor

WIDEST = 8192  # entries of a row that fit the registers of one program
TILE = 1024  # entries of a tile, eight per thread of four warps: one load of 16 bytes
BLOCK = 512  # columns of a tile where nothing is normalised


class Given(NamedTuple):
    """Pointers to what the backward reads, None where a step is left out; tokens of dy, x, z and u have any stride."""

    dy: Any
    x: Any
    z: Any
    u: Any
    w: Any
    b: Any
    d: Any
    eps: Any


class Gradients(NamedTuple):
    """Pointers to what the backward writes, None where a step is left out."""

    dx: Any
    dz: Any
    du: Any
    dw: Any
    db: Any
    dd: Any


@triton.jit
def _load(ptr, offs, here):
    return tl.load(ptr + offs, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _statistics(h, eps, here, N, KIND: tl.constexpr):
    """For rows [R N]: entries (less their mean, if layer), the factor of the norm, and whether it depends on them."""
    varies = eps >= 0
    if KIND == "layer":
        h = tl.where(here, h - (tl.sum(h, 1) / N)[:, None], 0.0)
    if KIND == "rms" or KIND == "layer":
        factor = 1 / tl.sqrt(tl.sum(h * h, 1) / N + eps)
    else:
        length = tl.sqrt(tl.sum(h * h, 1))
        varies = length >= eps
        factor = 1 / tl.where(length < eps, eps, length)  # a NaN stays one
        if KIND == "l2":
            factor *= tl.sqrt(tl.zeros_like(factor) + N)  # N = 1 is a constant, which has no dtype
    return h, factor, varies


@triton.jit
def normed(h, eps, here, N: tl.constexpr, KIND: tl.constexpr):
    """Rows [R N] normalised; eps a number or [R]."""
    h, factor, _ = _statistics(tl.where(here, h, 0.0), tl.zeros((h.shape[0],), tl.float32) + eps, here, N, KIND)
    return h * factor[:, None]


@triton.jit
def _rows(i, seg, inner, heads, N, x_stride, z_stride, u_stride, cols):
    """Offsets of rows number i of a segment [R N] in y, x, z and u: `heads` rows per token, one stride per token."""
    token, r = (i // inner).to(tl.int64)[:, None], (seg + i % inner)[:, None]
    m = r * N + cols[None, :]
    return token * (heads * N) + m, token * x_stride + m, token * z_stride + m, token * u_stride + m, m


@triton.jit(do_not_specialize=["count", "eps_count"])
def _norm_forward(
    x_ptr, z_ptr, u_ptr, w_ptr, b_ptr, d_ptr, eps_ptr, y_ptr,  # tensors; tokens of x, z and u have any stride
    count, heads, N, w_rows, span, eps_count, eps, x_stride, z_stride, u_stride,  # sizes
    KIND: tl.constexpr, GATE: tl.constexpr, ACT: tl.constexpr,  # variants
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,  # tile
):  # fmt: skip
    """y [count N]: one tile of rows."""
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (i < count)[:, None] & (cols < N)[None, :]
    y, x, z, u, m = _rows(i, 0, heads, heads, N, x_stride, z_stride, u_stride, cols)
    h = _load(x_ptr, x, here)
    if d_ptr is not None:
        h += _load(d_ptr, m // span, here) * _load(u_ptr, u, here)
    if GATE != "none":
        gate, _ = act_and_slope(_load(z_ptr, z, here), ACT)
    if GATE == "before":
        h *= gate
    if KIND != "none":
        e = tl.zeros((BLOCK_R,), tl.float32) + eps
        if eps_ptr is not None:
            e = tl.load(eps_ptr + i % eps_count, mask=i < count, other=1.0).to(tl.float32)
        h, factor, _ = _statistics(h, e, here, N, KIND)
        h *= factor[:, None]
        at = (i % w_rows)[:, None] * N + cols[None, :]
        if w_ptr is not None:
            h *= _load(w_ptr, at, here)
        if b_ptr is not None:
            h += _load(b_ptr, at, here)
    if GATE == "after":
        h *= gate
    tl.store(y_ptr + y, h, mask=here)


@triton.jit(do_not_specialize=["count", "eps_count"])
def _norm_backward(
    given, out,  # Given; Gradients, written, those of w, b and D as sums [programs segments N]
    count, heads, N, inner, w_rows, span, eps_count, eps, x_stride, z_stride, u_stride, dy_stride,  # sizes
    KIND: tl.constexpr, GATE: tl.constexpr, ACT: tl.constexpr,  # variants
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,  # tile
):  # fmt: skip
    """Gradients of tiles of rows, and partial sums of those of w, b and D.

    The rows of a token are one segment, or one segment each, so that all rows of a program have the same D and weights.
    """
    pid, programs, seg = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    db, dd = dw, dw
    for first in range(pid * BLOCK_R, count, programs * BLOCK_R):
        i = first + tl.arange(0, BLOCK_R)
        here = (i < count)[:, None] & (cols < N)[None, :]
        at_out, x, z, u, m = _rows(i, seg, inner, heads, N, x_stride, z_stride, u_stride, cols)
        token = (i // inner).to(tl.int64)[:, None]
        dh, h = _load(given.dy, token * dy_stride + m, here), _load(given.x, x, here)
        if given.d is not None:
            skip, other = _load(given.d, m // span, here), _load(given.u, u, here)
            h += skip * other
        if GATE != "none":
            gate, slope = act_and_slope(_load(given.z, z, here), ACT)
        if GATE == "before":
            inside = h
            h *= gate
        if KIND != "none":
            e = tl.zeros((BLOCK_R,), tl.float32) + eps
            if given.eps is not None:
                row = (i // inner) * heads + seg + i % inner
                e = tl.load(given.eps + row % eps_count, mask=i < count, other=1.0).to(tl.float32)
            h, factor, varies = _statistics(h, e, here, N, KIND)
            h *= factor[:, None]
            at = ((seg + i % inner) % w_rows)[:, None] * N + cols[None, :]
            scaled, weight = h, tl.full((BLOCK_R, BLOCK_N), 1.0, tl.float32)
            if given.w is not None:
                weight = _load(given.w, at, here)
                scaled = h * weight
            if GATE == "after":
                if given.b is not None:
                    scaled += _load(given.b, at, here)
                tl.store(out.dz + at_out, dh * scaled * slope, mask=here)
                dh *= gate
            if out.dw is not None:
                dw += tl.where(here, dh * h, 0.0)  # with eps=0 what lies outside is NaN
            if out.db is not None:
                db += dh
            dh *= weight
            along = tl.sum(dh * h, 1)
            if KIND == "unit":
                along *= N  # whose rows have length 1, not sqrt(N)
            along = tl.where(varies, along / N, 0.0)
            if KIND == "layer":
                dh -= (tl.sum(dh, 1) / N)[:, None]
            dh = (dh - h * along[:, None]) * factor[:, None]
        if GATE == "before":
            tl.store(out.dz + at_out, dh * inside * slope, mask=here)
            dh *= gate
        if given.d is not None:
            tl.store(out.du + at_out, dh * skip, mask=here)
            dd += tl.where(here, dh * other, 0.0)
        tl.store(out.dx + at_out, dh, mask=here)
    sums = (pid * tl.num_programs(2) + seg) * N + cols
    if out.dw is not None:
        tl.store(out.dw + sums, tl.sum(dw, 0), mask=cols < N)
    if out.db is not None:
        tl.store(out.db + sums, tl.sum(db, 0), mask=cols < N)
    if out.dd is not None:
        tl.store(out.dd + sums, tl.sum(dd, 0), mask=cols < N)


# Plan and launch


def _tile(N: int, kind: str) -> dict[str, int]:
    """Complete rows where they are normalised, else tiles of columns."""
    BLOCK_N = power_of_2(N) if kind != "none" else min(BLOCK, power_of_2(N))
    BLOCK_R = max(1, TILE // BLOCK_N)
    return {
        "BLOCK_R": BLOCK_R,
        "BLOCK_N": BLOCK_N,
        "num_warps": min(16, max(4, BLOCK_R * BLOCK_N // 256)),
        "enable_fp_fusion": True,
    }


def _strides(width: int, *tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Each as tokens of `width` channels, and the strides from token to token."""
    rows = [None if x is None else tokens(x, width) for x in tensors]
    return rows, [0 if x is None else x.stride(0) for x in rows]


SCHEMA = (
    "Tensor x, Tensor? z, Tensor? u, Tensor? weight, Tensor? bias, Tensor? skip, Tensor? eps_of, float eps, "
    "int width, int N, str kind, str gate, str act"
)


@operator("norm", f"({SCHEMA}) -> Tensor", given=as_it_is)
def _norm(
    x: Tensor, z: Tensor | None, u: Tensor | None, weight: Tensor | None, bias: Tensor | None, skip: Tensor | None,
    eps_of: Tensor | None, eps: float, width: int, N: int, kind: str, gate: str, act: str,
) -> Tensor:  # fmt: skip
    """y like x, whose last axes hold the `width` channels of a token in rows of N; see the head of this file."""
    y, tile, heads = like(x, x), _tile(N, kind), width // N
    (x, z, u), (x_stride, z_stride, u_stride) = _strides(width, x, z, u)  # type: ignore[assignment]
    count = x.shape[0] * heads
    w_rows, span = (1 if weight is None else weight.numel() // N), (1 if skip is None else width // skip.numel())
    grid = (cdiv(count, tile["BLOCK_R"]), cdiv(N, tile["BLOCK_N"]))
    _norm_forward[grid](
        x_ptr=x, z_ptr=z, u_ptr=u, w_ptr=weight, b_ptr=bias, d_ptr=skip, eps_ptr=eps_of, y_ptr=y, count=count,
        heads=heads, N=N, w_rows=w_rows, span=span, eps_count=1 if eps_of is None else eps_of.numel(), eps=eps,
        x_stride=x_stride, z_stride=z_stride, u_stride=u_stride, KIND=kind, GATE=gate, ACT=act, **tile,
    )  # fmt: skip
    return y


@fake("norm")
def _fake_norm(x: Tensor, *rest: Any) -> Tensor:
    return like(x, x)


@operator("norm_backward", f"(Tensor dy, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", given=as_it_is)
def _norm_gradients(
    dy: Tensor, x: Tensor, z: Tensor | None, u: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    skip: Tensor | None, eps_of: Tensor | None, eps: float, width: int, N: int, kind: str, gate: str, act: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, z, u, weight, bias and skip, empty where there is none."""
    given = (x, z, u, weight, bias, skip)
    outs = _fake_norm_gradients(dy, *given)
    made = [None if t is None else out for t, out in zip(given, outs, strict=True)]
    tile, heads = _tile(N, kind), width // N
    (x, z, u, dy), (x_stride, z_stride, u_stride, dy_stride) = _strides(width, x, z, u, dy)  # type: ignore[assignment]
    w_rows, span = (1 if weight is None else weight.numel() // N), (1 if skip is None else width // skip.numel())
    segments = heads if w_rows > 1 or skip is not None else 1
    count, columns = x.shape[0] * heads // segments, cdiv(N, tile["BLOCK_N"])
    programs = cdiv(count, tile["BLOCK_R"])
    if any(t is not None for t in given[3:]):  # few programs leave few sums
        programs = min(programs, cdiv(8 * processors(x.device), columns * segments))
    sums = [None if t is None else x.new_empty((programs, segments, N), dtype=torch.float32) for t in given[3:]]
    _norm_backward[(programs, columns, segments)](
        given=Given(dy=dy, x=x, z=z, u=u, w=weight, b=bias, d=skip, eps=eps_of), out=Gradients(*made[:3], *sums),
        count=count, heads=heads, N=N, inner=heads // segments, w_rows=w_rows, span=span,
        eps_count=1 if eps_of is None else eps_of.numel(), eps=eps, x_stride=x_stride, z_stride=z_stride,
        u_stride=u_stride, dy_stride=dy_stride, KIND=kind, GATE=gate, ACT=act, **tile,
    )  # fmt: skip
    for total, out in zip(sums[:2], made[3:5], strict=True):
        if total is not None and out is not None:
            column_sums(total.view(-1, out.numel()), out)
    if sums[2] is not None and made[5] is not None:
        made[5].copy_(sums[2].view(programs, -1, span).sum((0, 2)).view_as(made[5]))
    return outs


@fake("norm_backward")
def _fake_norm_gradients(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(like(t, dy) for t in inputs[:6])


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    made = _norm_gradients(dy, *saved, *ctx.options)
    return (*(None if t is None else d for t, d in zip(saved[:6], made, strict=True)), *[None] * 7)


differentiable("norm", _backward, _save_norm)
differentiable("norm_backward")


def norm(
    x: Tensor, *, z: Tensor | None = None, u: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, skip: Tensor | None = None, eps: float | Tensor = 0.0, width: int, N: int,
    kind: str = "none", gate: str = "none", act: str = "identity",
) -> Tensor:  # fmt: skip
    """The steps of this file, in order, for which arguments are given; y [*] like x.

    Args:
        x, z, u:      [*], the last axes the `width` channels of a token, in rows of N.
        weight, bias: N entries, or one per channel; skip: one per channel, or per group of neighbouring channels.
        eps:          a number, or a tensor with one per row, of all tokens or repeated over them.
        kind:         "rms", "layer", "l2", "unit" or "none"; gate: "none", "before" or "after" the norm; act: its name.
    """
    of = eps.expand(*eps.shape).contiguous() if isinstance(eps, Tensor) else None
    number = 0.0 if isinstance(eps, Tensor) else eps
    skip = None if skip is None else skip.contiguous()
    return _norm(x, z, u, weight, bias, skip, of, number, width, N, kind, gate, act)
