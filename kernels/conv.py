"""The short causal convolution: every channel by itself, over its last W tokens, then an activation.

    a_t = b + sum_w weight[w] x_{t - (W-1) + w}        y_t = act(a_t)

    forward    x, weight, b, state      -> y, the last W - 1 tokens
    backward   the same, dy, dstate     -> dx, dweight, db, dinitial:  g_t = dy_t act'(a_t),  dx_t = sum_s weight[W-1-s] g_{t+s}

All tokens of all rows are one sequence, cut into documents: rows of equal length, or those of cu_seqlens. Before the
first token of a document lies its initial state. A tile is tokens by channels; it reads its neighbours' tokens again,
from the cache, and the backward computes a_t again, so that nothing is kept but the inputs. Up to three tensors are
convolved with one weight, whose rows are their channels in order; none is copied.
"""  # noqa: E501

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from recur.kernels.operators import as_it_is, cdiv, differentiable, fake, operator, power_of_2, processors
from recur.kernels.packing import state_count
from recur.kernels.pointwise import act_and_slope, column_sums, like, tokens
from torch import Tensor

WIDEST = 8  # taps


@triton.jit
def _documents(t, cu_ptr, T, documents, halvings):
    """For every token: its document, and where that begins and ends."""
    low = t // tl.maximum(T, 1)
    start, stop = low * T, low * T + T
    if cu_ptr is not None:
        low, high = tl.zeros_like(t), tl.zeros_like(t) + documents - 1
        for _ in range(halvings):  # the last document that begins at or before this token
            middle = (low + high + 1) // 2
            after = tl.load(cu_ptr + middle) <= t
            low, high = tl.where(after, middle, low), tl.where(after, high, middle - 1)
        start, stop = tl.load(cu_ptr + low).to(tl.int32), tl.load(cu_ptr + low + 1).to(tl.int32)
    return low, start, stop


@triton.jit
def _borders(n, cu_ptr, T):
    """Where document n begins and ends."""
    start, stop = n * T, n * T + T
    if cu_ptr is not None:
        start, stop = tl.load(cu_ptr + n).to(tl.int32), tl.load(cu_ptr + n + 1).to(tl.int32)
    return start, stop


@triton.jit
def _read(x, state, at, document, start, stop, here, cols, W: tl.constexpr):
    """Tokens `at` [T C] of documents, the state where they lie before the first; zeros beyond either end."""
    x_ptr, x_stride = x
    inside = here & ((at >= start) & (at < stop))[:, None]
    value = tl.load(x_ptr + at.to(tl.int64)[:, None] * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    state_ptr, first, C = state
    if state_ptr is not None:
        slot = at - start + (W - 1)
        before = here & ((at < start) & (slot >= 0))[:, None]
        row = (document.to(tl.int64) * (W - 1) + slot)[:, None] * C + first + cols[None, :]
        value += tl.load(state_ptr + row, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _weights(weight_ptr, bias_ptr, channel, in_c, W: tl.constexpr):
    """Taps, oldest first, and bias [1 C]."""
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + channel * W + w, mask=in_c, other=0.0).to(tl.float32)[None, :],)
    bias = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=in_c, other=0.0).to(tl.float32)
    return taps, bias[None, :]


@triton.jit(do_not_specialize=["tokens", "T", "documents", "halvings", "tiles"])
def _conv_forward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_ptr, y_ptr, state_ptr,  # tensors
    tokens, T, D, first, C, x_stride, documents, halvings,  # sizes; the D channels from `first` on, of C
    W: tl.constexpr, ACT: tl.constexpr,  # variants
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,  # tile
):  # fmt: skip
    """One tile of y, and the last tokens of some of the documents."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c, x, initial = cols < D, (x_ptr, x_stride), (initial_ptr, first, C)
    taps, bias = _weights(weight_ptr, bias_ptr, first + cols, in_c, W)
    t = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    here = (t < tokens)[:, None] & in_c[None, :]
    document, start, stop = _documents(t, cu_ptr, T, documents, halvings)
    a = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + bias
    for w in tl.static_range(W):
        a += taps[w] * _read(x, initial, t + (w - W + 1), document, start, stop, here, cols, W)
    y, _ = act_and_slope(a, ACT)
    tl.store(y_ptr + t.to(tl.int64)[:, None] * D + cols[None, :], y, mask=here)
    if W > 1:
        j = tl.arange(0, BLOCK_W)
        in_w = (j < W - 1)[:, None] & in_c[None, :]
        for n in range(pid, documents, programs):
            begin, end = _borders(n, cu_ptr, T)
            begins, ends, owner = tl.zeros_like(j) + begin, tl.zeros_like(j) + end, tl.zeros_like(j) + n
            last = _read(x, initial, ends - (W - 1) + j, owner, begins, ends, in_w, cols, W)
            row = (owner.to(tl.int64) * (W - 1) + j)[:, None] * C + first + cols[None, :]
            tl.store(state_ptr + row, last, mask=in_w)


@triton.jit
def _gradients(
    x, dy, state, dstate_ptr, t, document, start, stop, here, cols, taps, bias, W: tl.constexpr, ACT: tl.constexpr
):
    """dx of tokens t, or of the slots of the state that lie before them; the tokens that y_t reads, and g_t."""
    tiles, dx, g = (), tl.zeros(here.shape, tl.float32), tl.zeros(here.shape, tl.float32)
    for o in tl.static_range(2 * W - 1):
        tiles = tiles + (_read(x, state, t + (o - W + 1), document, start, stop, here, cols, W),)
    for s in tl.static_range(W - 1, -1, -1):
        a = tl.zeros(here.shape, tl.float32) + bias
        for w in tl.static_range(W):
            a += taps[w] * tiles[s + w]
        _, slope = act_and_slope(a, ACT)
        g = _read(dy, (None, 0, 0), t + s, document, start, stop, here, cols, W) * slope
        g = tl.where(((t + s >= start) & (t + s < stop))[:, None], g, 0.0)  # the slope beyond the ends may be NaN
        dx += taps[W - 1 - s] * g
    if dstate_ptr is not None:  # the last tokens are the state
        slot = t - stop + (W - 1)
        row = (document.to(tl.int64) * (W - 1) + slot)[:, None] * state[2] + state[1] + cols[None, :]
        dx += tl.load(dstate_ptr + row, mask=here & (slot >= 0)[:, None], other=0.0).to(tl.float32)
    return dx, tiles, g


@triton.jit(do_not_specialize=["tokens", "T", "documents", "halvings", "length"])
def _conv_backward(
    dy, dstate_ptr, x, weight_ptr, bias_ptr, initial_ptr, cu_ptr,  # read; dy and x with the stride over tokens
    dx_ptr, dinitial_ptr, sums_ptr,  # written; sums [programs C W] and then [C], which are dweight and db
    tokens, T, D, first, C, documents, halvings, length,  # sizes
    W: tl.constexpr, ACT: tl.constexpr,  # variants
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,  # tile
):  # fmt: skip
    """`length` tokens, tile by tile, and gradients of the initial states of some of the documents."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c, initial = cols < D, (initial_ptr, first, C)
    taps, bias = _weights(weight_ptr, bias_ptr, first + cols, in_c, W)
    db, dtaps = tl.zeros((BLOCK_T, BLOCK_C), tl.float32), ()
    for w in tl.static_range(W):  # noqa: B007, `_` would be carried through the loop over tiles
        dtaps = dtaps + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    for t0 in range(pid * length, tl.minimum(pid * length + length, tokens), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        here = (t < tokens)[:, None] & in_c[None, :]
        document, start, stop = _documents(t, cu_ptr, T, documents, halvings)
        dx, tiles, g = _gradients(x, dy, initial, dstate_ptr, t, document, start, stop, here, cols, taps, bias, W, ACT)
        tl.store(dx_ptr + t.to(tl.int64)[:, None] * D + cols[None, :], dx, mask=here)
        g, more = tl.where(here, g, 0.0), ()
        db += g
        for w in tl.static_range(W):
            more = more + (dtaps[w] + g * tiles[w],)
        dtaps = more
    channel, row = first + cols, sums_ptr + pid.to(tl.int64) * (C * W + C)
    tl.store(row + C * W + channel, tl.sum(db, 0), mask=in_c)
    for w in tl.static_range(W):
        tl.store(row + channel * W + w, tl.sum(dtaps[w], 0), mask=in_c)
    if dinitial_ptr is not None:
        j = tl.arange(0, BLOCK_W)
        in_w = (j < W - 1)[:, None] & in_c[None, :]
        for n in range(pid, documents, programs):
            begin, end = _borders(n, cu_ptr, T)
            begins, ends, owner = tl.zeros_like(j) + begin, tl.zeros_like(j) + end, tl.zeros_like(j) + n
            slots = begins - (W - 1) + j
            found = _gradients(x, dy, initial, dstate_ptr, slots, owner, begins, ends, in_w, cols, taps, bias, W, ACT)
            at = (owner.to(tl.int64) * (W - 1) + j)[:, None] * C + first + cols[None, :]
            tl.store(dinitial_ptr + at, found[0], mask=in_w)


# Launch


def _tile(x: Tensor, W: int, backward: bool) -> dict[str, int]:
    """In the backward a thread holds 2 W - 1 tiles of tokens and W sums, so tiles are small."""
    BLOCK_T = (8 if W <= 4 and x.element_size() == 2 else 4) if backward else 16
    return {
        "BLOCK_T": BLOCK_T,
        "BLOCK_C": min(128, power_of_2(x.shape[2])),
        "BLOCK_W": power_of_2(W - 1),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _sizes(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens, tokens per row, documents, and the steps of a binary search over documents."""
    B, T = x.shape[:2]
    documents = state_count(B, cu_seqlens)
    return B * T, T, documents, (documents - 1).bit_length() if cu_seqlens is not None else 0


def _pieces(*xs: Tensor | None) -> list[tuple[int, int, Tensor]]:
    """For each tensor: its index, its first channel among all, and itself."""
    found, first = [], 0
    for i, x in enumerate(xs):
        if x is not None:
            found.append((i, first, x))
            first += x.shape[2]
    return found


@operator("conv", given=as_it_is)
def _conv(
    x: Tensor, x2: Tensor | None, x3: Tensor | None, weight: Tensor, bias: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y of each of the tensors [B T D], empty where there is none, and the state [n W-1 C] of all their channels C."""
    C, W = weight.shape
    *ys, state = _fake_conv(x, x2, x3, weight, bias, initial, cu_seqlens, act)
    count, T, documents, halvings = _sizes(x, cu_seqlens)
    for i, first, piece in _pieces(x, x2, x3):
        D, tile = piece.shape[2], _tile(piece, W, False)
        rows = tokens(piece, D)
        grid = (cdiv(count, tile["BLOCK_T"]), cdiv(D, tile["BLOCK_C"]))
        _conv_forward[grid](
            x_ptr=rows, weight_ptr=weight, bias_ptr=bias, initial_ptr=initial, cu_ptr=cu_seqlens, y_ptr=ys[i],
            state_ptr=state, tokens=count, T=T, D=D, first=first, C=C, x_stride=rows.stride(0), documents=documents,
            halvings=halvings, W=W, ACT=act, **tile,
        )  # fmt: skip
    return (*ys, state)


@fake("conv")
def _fake_conv(
    x: Tensor, x2: Tensor | None, x3: Tensor | None, weight: Tensor, bias: Tensor | None, initial: Tensor | None,
    cu_seqlens: Tensor | None, act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    C, W = weight.shape
    state = x.new_empty((state_count(x.shape[0], cu_seqlens), W - 1, C))
    return (*(like(piece, x) for piece in (x, x2, x3)), state)


@operator("conv_backward", (
    "(Tensor dy, Tensor dy2, Tensor dy3, Tensor? dstate, Tensor x, Tensor? x2, Tensor? x3, Tensor weight, "
    "Tensor? bias, Tensor? initial, Tensor? cu_seqlens, str act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
), given=as_it_is)  # fmt: skip
def _conv_gradients(
    dy: Tensor, dy2: Tensor, dy3: Tensor, dstate: Tensor | None, x: Tensor, x2: Tensor | None, x3: Tensor | None,
    weight: Tensor, bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, act: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the tensors, weight, bias and initial state, empty where there is none."""
    C, W = weight.shape
    given = (x, x2, x3, weight, bias, initial)
    outs = _fake_conv_gradients(dy, dy2, dy3, dstate, *given)
    made = [None if t is None else out for t, out in zip(given, outs, strict=True)]
    count, T, documents, halvings = _sizes(x, cu_seqlens)
    dstate = None if dstate is None else dstate.contiguous()
    step = _tile(x, W, True)["BLOCK_T"]
    tiles = cdiv(count, step)
    per = cdiv(tiles, max(1, min(tiles, cdiv(8 * processors(x.device), cdiv(C, 128)))))  # few sums, but enough programs
    programs = cdiv(tiles, per)
    sums = x.new_empty((programs, C * W + C), dtype=torch.float32)
    for i, first, piece in _pieces(x, x2, x3):
        D, tile = piece.shape[2], _tile(piece, W, True) | {"BLOCK_T": step}
        rows, drows = tokens(piece, D), tokens((dy, dy2, dy3)[i], D)
        _conv_backward[(programs, cdiv(D, tile["BLOCK_C"]))](
            dy=(drows, drows.stride(0)), dstate_ptr=dstate, x=(rows, rows.stride(0)), weight_ptr=weight, bias_ptr=bias,
            initial_ptr=initial, cu_ptr=cu_seqlens, dx_ptr=made[i], dinitial_ptr=made[5], sums_ptr=sums, tokens=count,
            T=T, D=D, first=first, C=C, documents=documents, halvings=halvings, length=per * step, W=W, ACT=act, **tile,
        )  # fmt: skip
    for out, total in ((made[3], sums[:, : C * W]), (made[4], sums[:, C * W :])):
        if out is not None:
            column_sums(total, out)
    return outs


@fake("conv_backward")
def _fake_conv_gradients(
    dy: Tensor, dy2: Tensor, dy3: Tensor, dstate: Tensor | None, *given: Any
) -> tuple[Tensor, ...]:
    return tuple(like(t, dy) for t in given[:6])


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x, *others = tensors[:3]
    dys = [
        dy if dy is not None else x.new_empty(0) if piece is None else piece.new_zeros(piece.shape)
        for dy, piece in zip(grads[:3], (x, *others), strict=True)
    ]
    made = _conv_gradients(*dys, grads[3], *tensors, ctx.act)
    return (*(None if t is None else d for t, d in zip(tensors[:6], made, strict=True)), None, None)


differentiable("conv", _backward, _save_conv)
differentiable("conv_backward")


def conv(
    xs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None,
    act: str,
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """act of the causal convolution of up to three tensors [B T D], whose channels are the rows of weight [C W] in
    order; bias [C], initial state [n W-1 C]. Returns the results, and the last W - 1 tokens."""
    given = (*xs, None, None)[:3]
    initial = None if initial is None else initial.contiguous()
    *ys, state = _conv(*given, weight.contiguous(), bias, initial, cu_seqlens, act)
    return tuple(ys[: len(xs)]), state
