"""Gates: a pointwise function of a projection, and its derivative, in one pass each.

    activate   z, b          -> scale f(z + b)           f: sigmoid, softplus or log sigmoid; b one per channel
    bounded    z, g          -> log a, 1 - a             a = g + (1 - g) sigmoid(z), the forget gate above a bound
    weigh      u, w          -> w u                      w one per head, u [H P]
    polar      c             -> log sigmoid |c| + i arg c  the complex gate of one complex number

Arithmetic and results are float32, except 1 - a and w u, which have the dtype of z and u. The backward reads its
inputs again and keeps nothing else; gradients of b and g are summed per program, in a fixed order, then over programs.
"""

# Jitted functions take no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from recur.kernels.operators import as_it_is, cdiv, differentiable, fake, operator, power_of_2, processors
from recur.kernels.tiles import LOG2E
from torch import Tensor

BLOCK_T, BLOCK_D = 4, 512


@triton.jit
def act_and_slope(z, ACT: tl.constexpr):
    """act(z) and its derivative."""
    gate, slope = z, tl.full(z.shape, 1.0, tl.float32)
    if ACT == "silu" or ACT == "sigmoid":
        s = tl.sigmoid(z)
        gate, slope = s, s * (1 - s)
        if ACT == "silu":
            gate, slope = z * s, s + z * slope
    if ACT == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        gate, slope = z * below, below + z * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
    return gate, slope


@triton.jit
def log_1p(x):
    """log(1 + x) to full precision: the digits of x that 1 + x rounds away are restored by a quotient (Kahan)."""
    u = 1 + x
    d = u - 1
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def log_sigmoid(z):
    return tl.minimum(z, 0.0) - log_1p(tl.exp2(-tl.abs(z) * LOG2E))


@triton.jit
def _value_and_slope(z, FN: tl.constexpr):
    if FN == "sigmoid":
        value = tl.sigmoid(z)
        slope = value * (1 - value)
    elif FN == "softplus":
        value, slope = -log_sigmoid(-z), tl.sigmoid(z)
    else:
        value, slope = log_sigmoid(z), tl.sigmoid(-z)
    return value, slope


@triton.jit
def _place(pid_t, D, stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens and channels of a tile [T D], and its offsets in tensors whose tokens are `stride` and D apart."""
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = t.to(tl.int64)[:, None]
    return t, d, row * stride + d[None, :], row * D + d[None, :]


@triton.jit(do_not_specialize=["count"])
def _activate_forward(
    z_ptr, b_ptr, y_ptr, count, D, z_stride, scale,
    FN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = scale f(z + b), [count D]."""
    t, d, z_at, y_at = _place(tl.program_id(0), D, z_stride, BLOCK_T, BLOCK_D)
    here = (t < count)[:, None] & (d < D)[None, :]
    z = tl.load(z_ptr + z_at, mask=here, other=0.0).to(tl.float32)
    if b_ptr is not None:
        z += tl.load(b_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    value, _ = _value_and_slope(z, FN)
    tl.store(y_ptr + y_at, value * scale, mask=here)


@triton.jit(do_not_specialize=["count"])
def _activate_backward(
    dy_ptr, z_ptr, b_ptr, dz_ptr, db_ptr, count, D, dy_stride, z_stride, scale,
    FN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz, and the sums of it that are db [programs D]."""
    tiles, programs = tl.cdiv(count, BLOCK_T), tl.num_programs(0)
    db = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        t, d, z_at, dz_at = _place(tile, D, z_stride, BLOCK_T, BLOCK_D)
        here = (t < count)[:, None] & (d < D)[None, :]
        z = tl.load(z_ptr + z_at, mask=here, other=0.0).to(tl.float32)
        if b_ptr is not None:
            z += tl.load(b_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        dy = tl.load(dy_ptr + t.to(tl.int64)[:, None] * dy_stride + d[None, :], mask=here, other=0.0)
        _, slope = _value_and_slope(z, FN)
        dz = dy.to(tl.float32) * slope * scale
        tl.store(dz_ptr + dz_at, dz, mask=here)
        if db_ptr is not None:
            db += dz
    if db_ptr is not None:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(db_ptr + tl.program_id(0) * D + d, tl.sum(db, 0), mask=d < D)


@triton.jit
def bounded_gate(z, g):
    """log a and 1 - a of a = g + (1 - g) sigmoid(z), both without a difference that cancels."""
    keep = (1 - g) * tl.sigmoid(-z)
    a = g + (1 - g) * tl.sigmoid(z)
    above = tl.where(a < 0.5, tl.log(a), log_1p(-keep))  # neither is formed by a difference
    return tl.where(g > 0, above, log_sigmoid(z)), keep


@triton.jit(do_not_specialize=["count"])
def _bounded_forward(z_ptr, g_ptr, log_ptr, keep_ptr, count, D, z_stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """log a of a = g + (1 - g) sigmoid(z), and 1 - a = (1 - g) sigmoid(-z)."""
    t, d, z_at, y_at = _place(tl.program_id(0), D, z_stride, BLOCK_T, BLOCK_D)
    here = (t < count)[:, None] & (d < D)[None, :]
    z = tl.load(z_ptr + z_at, mask=here, other=0.0).to(tl.float32)
    log_a, keep = log_sigmoid(z), tl.sigmoid(-z)
    if g_ptr is not None:
        log_a, keep = bounded_gate(z, tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :])
    tl.store(log_ptr + y_at, log_a, mask=here)
    tl.store(keep_ptr + y_at, keep, mask=here)


@triton.jit(do_not_specialize=["count"])
def _bounded_backward(
    dlog_ptr, dkeep_ptr, z_ptr, g_ptr, dz_ptr, dg_ptr, count, D, z_stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz, and the sums that are dg [programs D]; at g = 0 log a has no gradient for g, where it would be infinite."""
    tiles, programs = tl.cdiv(count, BLOCK_T), tl.num_programs(0)
    dg = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        t, d, z_at, y_at = _place(tile, D, z_stride, BLOCK_T, BLOCK_D)
        here = (t < count)[:, None] & (d < D)[None, :]
        z = tl.load(z_ptr + z_at, mask=here, other=0.0).to(tl.float32)
        dlog = tl.load(dlog_ptr + y_at, mask=here, other=0.0)
        dkeep = tl.load(dkeep_ptr + y_at, mask=here, other=0.0).to(tl.float32)
        forget, hold = tl.sigmoid(-z), tl.sigmoid(z)
        ratio, free = tl.full(z.shape, 1.0, tl.float32), tl.full(z.shape, 1.0, tl.float32)
        if g_ptr is not None:
            g = tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            a, free = g + (1 - g) * hold, free - g
            safe = tl.where(g > 0, a, 1.0)
            ratio = tl.where(g > 0, free * hold / safe, 1.0)
            dg += tl.where(g > 0, dlog * forget / safe, 0.0) - dkeep * forget
        tl.store(dz_ptr + y_at, (dlog * ratio - dkeep * free * hold) * forget, mask=here)
    if dg_ptr is not None:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dg_ptr + tl.program_id(0) * D + d, tl.sum(dg, 0), mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _column_sums(x_ptr, out_ptr, rows, D, stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        here = (r < rows)[:, None] & (d < D)[None, :]
        total += tl.load(x_ptr + r[:, None] * stride + d[None, :], mask=here, other=0.0)
    tl.store(out_ptr + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _weigh_forward(u_ptr, w_ptr, y_ptr, rows, H, P, u_stride, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr):
    """y = w u; one row per token and head."""
    i, p = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    here = (i < rows)[:, None] & (p < P)[None, :]
    u_at = (i // H).to(tl.int64)[:, None] * u_stride + (i % H)[:, None] * P + p[None, :]
    w = tl.load(w_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + u_at, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + i.to(tl.int64)[:, None] * P + p[None, :], w[:, None] * u, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _weigh_backward(
    dy_ptr, u_ptr, w_ptr, du_ptr, dw_ptr, rows, H, P, dy_stride, u_stride,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i, p = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    here = (i < rows)[:, None] & (p < P)[None, :]
    token, m = (i // H).to(tl.int64)[:, None], (i % H)[:, None] * P + p[None, :]
    w = tl.load(w_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + token * u_stride + m, mask=here, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * dy_stride + m, mask=here, other=0.0).to(tl.float32)
    tl.store(du_ptr + i.to(tl.int64)[:, None] * P + p[None, :], w[:, None] * dy, mask=here)
    tl.store(dw_ptr + i, tl.sum(dy * u, 1), mask=i < rows)


@triton.jit
def angle_of(re, im):
    """arg(re + i im), to 2e-7: a quotient of at most tan(π / 8), its polynomial (Cephes), and then the octant."""
    x, y = tl.abs(re), tl.abs(im)
    low, high = tl.minimum(x, y), tl.maximum(x, y)
    t = low / tl.where(high == 0, 1.0, high)
    s = tl.where(t > 0.41421356, (t - 1) / (t + 1), t)
    z = s * s
    angle = s + s * z * (-3.3332949e-1 + z * (1.9977711e-1 + z * (-1.3877686e-1 + z * 8.0537445e-2)))
    angle = tl.where(t > 0.41421356, angle + 0.78539816, angle)
    angle = tl.where(y > x, 1.5707963 - angle, angle)
    angle = tl.where(re < 0, 3.1415927 - angle, angle)
    angle = tl.where(im < 0, -angle, angle)
    return tl.where((re == re) & (im == im), angle, float("nan"))


@triton.jit
def radius_of(re, im):
    """|re + i im| without overflow."""
    x, y = tl.abs(re), tl.abs(im)
    high = tl.maximum(x, y)
    t = tl.minimum(x, y) / tl.where(high == 0, 1.0, high)
    return high * tl.sqrt(1 + t * t)


@triton.jit
def _load_pair(re_ptr, im_ptr, t, d, row_stride, stride, here):
    at = t.to(tl.int64)[:, None] * row_stride + d[None, :] * stride
    return (
        tl.load(re_ptr + at, mask=here, other=0.0).to(tl.float32),
        tl.load(im_ptr + at, mask=here, other=0.0).to(tl.float32),
    )


@triton.jit(do_not_specialize=["count"])
def _polar_forward(
    re_ptr, im_ptr, y_ptr, count, D, row_stride, stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """log sigmoid |c| and arg c, neighbours in y [count D 2]."""
    t, d, _, y_at = _place(tl.program_id(0), D, 0, BLOCK_T, BLOCK_D)
    here = (t < count)[:, None] & (d < D)[None, :]
    re, im = _load_pair(re_ptr, im_ptr, t, d, row_stride, stride, here)
    tl.store(y_ptr + 2 * y_at, log_sigmoid(radius_of(re, im)), mask=here)
    tl.store(y_ptr + 2 * y_at + 1, angle_of(re, im), mask=here)


@triton.jit(do_not_specialize=["count"])
def _polar_backward(
    dy_ptr, re_ptr, im_ptr, dre_ptr, dim_ptr, count, D, row_stride, stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of re and im, 0 where both are."""
    t, d, _, y_at = _place(tl.program_id(0), D, 0, BLOCK_T, BLOCK_D)
    here = (t < count)[:, None] & (d < D)[None, :]
    re, im = _load_pair(re_ptr, im_ptr, t, d, row_stride, stride, here)
    dlog = tl.load(dy_ptr + 2 * y_at, mask=here, other=0.0)
    dphase = tl.load(dy_ptr + 2 * y_at + 1, mask=here, other=0.0)
    r = radius_of(re, im)
    inverse = tl.where(r == 0, 0.0, 1 / tl.where(r == 0, 1.0, r))
    cos, sin = re * inverse, im * inverse
    dr, dphase = dlog * tl.sigmoid(-r), dphase * inverse
    tl.store(dre_ptr + y_at, dr * cos - dphase * sin, mask=here)
    tl.store(dim_ptr + y_at, dr * sin + dphase * cos, mask=here)


# Launch


def tokens(x: Tensor, width: int) -> Tensor:
    """x as [tokens width], without a copy if the channels of a token are contiguous; tokens may have any stride."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 or width == 1 else x.contiguous()


def like(x: Tensor | None, other: Tensor) -> Tensor:
    """New and contiguous, of the shape and dtype of x; empty if x is None, because operators cannot return None."""
    return other.new_empty(0) if x is None else x.new_empty(x.shape)


def column_sums(x: Tensor, out: Tensor) -> None:
    """Sums over the rows of x [rows D] into out, which has D entries of any dtype."""
    rows, D = x.shape
    _column_sums[(cdiv(D, 32),)](
        x, out, rows, D, x.stride(0), BLOCK_R=64, BLOCK_D=32, num_warps=4, enable_fp_fusion=True
    )


def _width(x: Tensor) -> int:
    return x.shape[2:].numel() if x.ndim > 2 else x.shape[-1]


def _tile(D: int) -> dict[str, int]:
    return {"BLOCK_T": BLOCK_T, "BLOCK_D": min(BLOCK_D, power_of_2(D)), "num_warps": 4, "enable_fp_fusion": True}


def _grid(count: int, D: int, device: torch.device, summed: bool, BLOCK_D: int) -> tuple[int, int]:
    """One program per tile; if sums are taken, few enough programs that they leave few sums."""
    columns, programs = cdiv(D, BLOCK_D), cdiv(count, BLOCK_T)
    return (min(programs, cdiv(8 * processors(device), columns)) if summed else programs), columns


@operator("activate", given=as_it_is)
def _activate(z: Tensor, bias: Tensor | None, fn: str, scale: float) -> Tensor:
    """scale f(z + b) in float32."""
    D = _width(z)
    rows, y, tile = tokens(z, D), _fake_activate(z, bias, fn, scale), _tile(D)
    grid = _grid(len(rows), D, z.device, False, tile["BLOCK_D"])
    _activate_forward[grid](rows, bias, y, len(rows), D, rows.stride(0), scale, fn, **tile)
    return y


@fake("activate")
def _fake_activate(z: Tensor, bias: Tensor | None, fn: str, scale: float) -> Tensor:
    return z.new_empty(z.shape, dtype=torch.float32)


@operator("activate_backward", given=as_it_is)
def _activate_gradients(dy: Tensor, z: Tensor, bias: Tensor | None, fn: str, scale: float) -> tuple[Tensor, Tensor]:
    """dz and db."""
    D = _width(z)
    rows, dy, tile = tokens(z, D), tokens(dy, D), _tile(D)
    dz, db = _fake_activate_gradients(dy, z, bias, fn, scale)
    grid = _grid(len(rows), D, z.device, bias is not None, tile["BLOCK_D"])
    sums = None if bias is None else dz.new_empty((grid[0], D), dtype=torch.float32)
    strides = (dy.stride(0), rows.stride(0))
    _activate_backward[grid](dy, rows, bias, dz, sums, len(rows), D, *strides, scale, fn, **tile)
    if sums is not None:
        column_sums(sums, db)
    return dz, db


@fake("activate_backward")
def _fake_activate_gradients(
    dy: Tensor, z: Tensor, bias: Tensor | None, fn: str, scale: float
) -> tuple[Tensor, Tensor]:
    return like(z, z), like(bias, z)


def _save_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, bias, *ctx.options = inputs
    ctx.save_for_backward(z, bias)


def _activate_backwards(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    z, bias = ctx.saved_tensors
    dz, db = _activate_gradients(dy, z, bias, *ctx.options)
    return dz, None if bias is None else db, None, None


differentiable("activate", _activate_backwards, _save_activate)
differentiable("activate_backward")


@operator("bounded", given=as_it_is)
def _bounded(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    D = _width(z)
    rows, (log_a, keep), tile = tokens(z, D), _fake_bounded(z, bound), _tile(D)
    grid = _grid(len(rows), D, z.device, False, tile["BLOCK_D"])
    _bounded_forward[grid](rows, bound, log_a, keep, len(rows), D, rows.stride(0), **tile)
    return log_a, keep


@fake("bounded")
def _fake_bounded(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape, dtype=torch.float32), z.new_empty(z.shape)


@operator("bounded_backward", given=as_it_is)
def _bounded_gradients(dlog: Tensor, dkeep: Tensor, z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    D = _width(z)
    rows, (dz, dg), tile = tokens(z, D), _fake_bounded_gradients(dlog, dkeep, z, bound), _tile(D)
    grid = _grid(len(rows), D, z.device, bound is not None, tile["BLOCK_D"])
    sums = None if bound is None else dz.new_empty((grid[0], D), dtype=torch.float32)
    given = (dlog.contiguous(), dkeep.contiguous(), rows, bound)
    _bounded_backward[grid](*given, dz, sums, len(rows), D, rows.stride(0), **tile)
    if sums is not None:
        column_sums(sums, dg)
    return dz, dg


@fake("bounded_backward")
def _fake_bounded_gradients(dlog: Tensor, dkeep: Tensor, z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    return like(z, z), like(bound, z)


def _save_bounded(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _bounded_backwards(ctx: Any, dlog: Tensor, dkeep: Tensor) -> tuple[Tensor | None, ...]:
    z, bound = ctx.saved_tensors
    dz, dg = _bounded_gradients(dlog, dkeep, z, bound)
    return dz, None if bound is None else dg


differentiable("bounded", _bounded_backwards, _save_bounded)
differentiable("bounded_backward")


def _heads(u: Tensor, w: Tensor) -> tuple[int, int, dict[str, int]]:
    """Heads per token, channels per head, and a tile of a few heads."""
    H = w.shape[2:].numel()
    P = u.shape[2:].numel() // H
    BLOCK_P = power_of_2(P)
    return H, P, {"BLOCK_R": max(1, 1024 // BLOCK_P), "BLOCK_P": BLOCK_P, "num_warps": 4, "enable_fp_fusion": True}


@operator("weigh", given=as_it_is)
def _weigh(u: Tensor, w: Tensor) -> Tensor:
    H, P, tile = _heads(u, w)
    rows, y = tokens(u, H * P), like(u, u)
    grid = (cdiv(w.numel(), tile["BLOCK_R"]),)
    _weigh_forward[grid](rows, w.contiguous(), y, w.numel(), H, P, rows.stride(0), **tile)
    return y


@fake("weigh")
def _fake_weigh(u: Tensor, w: Tensor) -> Tensor:
    return like(u, u)


@operator("weigh_backward", given=as_it_is)
def _weigh_gradients(dy: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    H, P, tile = _heads(u, w)
    drows, rows, (du, dw) = tokens(dy, H * P), tokens(u, H * P), _fake_weigh_gradients(dy, u, w)
    grid, strides = (cdiv(w.numel(), tile["BLOCK_R"]),), (drows.stride(0), rows.stride(0))
    _weigh_backward[grid](drows, rows, w.contiguous(), du, dw, w.numel(), H, P, *strides, **tile)
    return du, dw


@fake("weigh_backward")
def _fake_weigh_gradients(dy: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return like(u, u), like(w, w)


def _save_weigh(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weigh_backwards(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _weigh_gradients(dy, *ctx.saved_tensors)


differentiable("weigh", _weigh_backwards, _save_weigh)
differentiable("weigh_backward")


def _pairs(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    """re and im as [tokens D] of equal strides."""
    D = _width(re)
    re, im = re.reshape(-1, D), im.reshape(-1, D)
    if re.stride() != im.stride():
        re, im = re.contiguous(), im.contiguous()
    return re, im, _tile(D)


@operator("polar", given=as_it_is)
def _polar(re: Tensor, im: Tensor) -> Tensor:
    """log sigmoid |c| and arg c as pairs of float32."""
    y, (x, z, tile) = _fake_polar(re, im), _pairs(re, im)
    count, D = x.shape
    grid = _grid(count, D, x.device, False, tile["BLOCK_D"])
    _polar_forward[grid](x, z, y, count, D, *x.stride(), **tile)
    return y


@fake("polar")
def _fake_polar(re: Tensor, im: Tensor) -> Tensor:
    return re.new_empty((*re.shape, 2), dtype=torch.float32)


@operator("polar_backward", given=as_it_is)
def _polar_gradients(dy: Tensor, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    (dre, dim), (x, z, tile) = _fake_polar_gradients(dy, re, im), _pairs(re, im)
    count, D = x.shape
    grid = _grid(count, D, x.device, False, tile["BLOCK_D"])
    _polar_backward[grid](dy.contiguous(), x, z, dre, dim, count, D, *x.stride(), **tile)
    return dre, dim


@fake("polar_backward")
def _fake_polar_gradients(dy: Tensor, re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    return like(re, re), like(im, im)


def _save_polar(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _polar_backwards(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _polar_gradients(dy, *ctx.saved_tensors)


differentiable("polar", _polar_backwards, _save_polar)
differentiable("polar_backward")


def polar(re: Tensor, im: Tensor) -> Tensor:
    """log sigmoid |c| + i arg c, complex64, of c = re + i im [B T *]."""
    return torch.view_as_complex(_polar(re, im))


def weigh(u: Tensor, w: Tensor) -> Tensor:
    """w u in the dtype of u; u [B T H P], w [B T H]."""
    return _weigh(u, w)


def activate(z: Tensor, bias: Tensor | None, fn: str, scale: float = 1.0) -> Tensor:
    """scale f(z + b) in float32; z [B T *], b [*]; fn is "sigmoid", "softplus" or "log_sigmoid"."""
    return _activate(z, None if bias is None else bias.contiguous(), fn, scale)


def bounded(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """log a in float32 and 1 - a in the dtype of z, of the forget gate a = g + (1 - g) sigmoid(z); z [B T *], g [*]."""
    return _bounded(z, None if bound is None else bound.contiguous())
