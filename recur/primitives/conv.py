"""Short causal convolution and token shift: the last few tokens, carried as state like any other memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.forms import ScanOut, check_packing, document_of, first_state, state_count
from recur.primitives.gates import activation
from recur.shapes import accumulation_dtype, bind, expect


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    act: str = "identity",
    form: str = "auto",
) -> ScanOut:
    """Depthwise causal convolution: y_t = act(b + sum_w weight[:, w] x_{t - (W-1) + w}); the last tap, the newest.

    Args:
        x:             [B T D].
        weight:        [D W], oldest tap first.
        bias:          [D].
        initial_state: [B W-1 D] the tokens before the first, newest last ([n W-1 D] if packed); zeros when omitted.
        cu_seqlens:    [n+1] document borders; no tap reaches across one.
        act:           name of a pointwise function applied last.
        form:          "auto" takes one kernel on a GPU (recur.kernel.fused) for up to 8 taps, "recurrent", "chunked"
                       and "parallel" the formula in torch.

    Returns: y [B T D]; state [B W-1 D], the last W-1 inputs.   Raises: ShapeError.   Cost: O(B T D W).

    >>> from recur.primitives.conv import causal_conv
    >>> causal_conv(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1), weight=torch.ones(1, 2)).y.flatten()
    tensor([1., 3., 5.])
    """
    bind("causal_conv", x=(x, "B T D"), weight=(weight, "D W"), bias=(bias, "D"))
    (y,), state = causal_convs(
        (x,), weight, bias, initial_state=initial_state, cu_seqlens=cu_seqlens, act=act, form=form
    )
    return ScanOut(y, state)


def causal_convs(
    xs: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    act: str = "identity",
    form: str = "auto",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`causal_conv` of several tensors [B T D_i], whose channels are the D rows of weight in order.

    Returns: y of each; state [B W-1 D] of all channels.
    """
    fn, widths = activation(act), [x.shape[-1] for x in xs]
    (B, T), (D, W) = xs[0].shape[:2], weight.shape
    expect("causal_conv", "weight", weight, "D W", (sum(widths), W))
    check_packing("causal_conv", cu_seqlens, B, T)
    letters, n = ("B W-1 D", B) if cu_seqlens is None else ("n W-1 D", state_count(B, cu_seqlens))
    expect("causal_conv", "initial_state", initial_state, letters, (n, W - 1, D))
    lacks = (f"W={W}, more than 8", "W at most 8") if W > 8 else kernel.lacks_act(act)
    if kernel.fused(form, *xs, weight, bias, of="causal_conv", lacks=lacks) and len(xs) <= 3:
        initial = None if initial_state is None else initial_state.to(xs[0].dtype)
        return kernel.conv(xs, weight, bias, initial, cu_seqlens, act)
    x = xs[0] if len(xs) == 1 else torch.cat(xs, -1)
    initial_state = first_state(x, (W - 1, D), x.dtype, initial_state, cu_seqlens)
    if T == 0:
        return xs, initial_state
    if cu_seqlens is None and T == 1:  # for one token a convolution costs more to prepare than to compute
        context, wide = torch.cat([initial_state, x], dim=1), accumulation_dtype(x, weight)
        y = (context.to(wide) * weight.to(wide).mT).sum(1, keepdim=True)
        y = (y if bias is None else y + bias.to(wide)).to(x.dtype)
        state = context[:, 1:]
    elif cu_seqlens is None:
        context = torch.cat([initial_state, x], dim=1)
        y = F.conv1d(context.mT, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), groups=D).mT
        state = context[:, T:]
    else:
        before = packed_context(x[0], initial_state, cu_seqlens)
        y = torch.einsum("twd,dw->td", before, weight.to(x.dtype)) + (0 if bias is None else bias.to(x.dtype))
        y, state = y[None], packed_tail(x[0], initial_state, cu_seqlens)
    y = fn(y)
    return (y,) if len(xs) == 1 else y.split(widths, -1), state


def token_shift(x: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> ScanOut:
    """The token before: y_t = x_{t-1}, and initial_state (zeros when omitted) before the first.

    Args:
        x: [B T D].
        initial_state: [B 1 D] ([n 1 D] if packed); zeros when omitted.
        cu_seqlens: [n+1] document borders.

    Returns: y [B T D]; state [B 1 D], the last token.   Source: Peng et al. 2023, arXiv:2305.13048.

    >>> from recur.primitives.conv import token_shift
    >>> token_shift(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)).y.flatten()
    tensor([0., 1., 2.])
    """
    bind("token_shift", x=(x, "B T D"))
    initial_state = _opening("token_shift", x, "1", 1, initial_state, cu_seqlens)
    if x.shape[1] == 0:
        return ScanOut(x, initial_state)
    if cu_seqlens is None:
        context = torch.cat([initial_state, x], 1)
        return ScanOut(context[:, :-1], context[:, -1:])
    before = packed_context(x[0], initial_state, cu_seqlens)[:, 0]
    return ScanOut(before[None], packed_tail(x[0], initial_state, cu_seqlens))


def _opening(
    function: str, x: Tensor, letter: str, history: int, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The `history` tokens before the first of x [B T D]: zeros unless they are given.   Raises: ShapeError."""
    B, T, D = x.shape
    check_packing(function, cu_seqlens, B, T)
    rows, first = state_count(B, cu_seqlens), "B" if cu_seqlens is None else "n"
    expect(function, "initial_state", initial_state, f"{first} {letter} D", (rows, history, D))
    return first_state(x, (history, D), x.dtype, initial_state, cu_seqlens)


def packed_context(x: Tensor, state: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T W D]: each token of a packed row x [T D] after the W-1 tokens of its own document (or its state)."""
    T, history = x.shape[0], state.shape[1]
    document = document_of(cu_seqlens, T)
    offset = torch.arange(T, device=x.device) - cu_seqlens[document]  # tokens of the document already seen
    back = torch.arange(-history, 1, device=x.device)
    inside = offset[:, None] + back >= 0  # [T W]
    token = (torch.arange(T, device=x.device)[:, None] + back).clamp(min=0)
    slot = (history + offset[:, None] + back).clamp(0, max(history - 1, 0))
    if history == 0:
        return x[:, None]
    return torch.where(inside[..., None], x[token], state[document[:, None], slot])


def packed_tail(x: Tensor, state: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[n W-1 D]: the last W-1 tokens of each document of a packed row x [T D]; short ones are filled from state."""
    history = state.shape[1]
    if x.shape[0] == 0 or history == 0:
        return state
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = end - history + torch.arange(history, device=x.device)  # [n W-1]
    slot = (token - begin + history).clamp(0, history - 1)
    old = state[torch.arange(len(state), device=x.device)[:, None], slot]
    return torch.where((token >= begin)[..., None], x[token.clamp(0, x.shape[0] - 1)].to(state.dtype), old)
