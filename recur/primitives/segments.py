"""Segment after segment of a scan whose gate fills the matrix state, so that T V N numbers never stand at once.

S_t = A_t * S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t, with channels in their groups, V = G W: u and whatever varies along
channels is [B T G 1 W], k, q and whatever varies along slots [B T G N 1], S [B G N W]. What does not depend on the
token has length 1 at T. A family says how A_t is made; see GATES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.diagonal import (
    LOG2_E,
    document_starts,
    like_batch,
    recurrence,
    walk_left,
    walk_right,
)
from recur.primitives.forms import ScanOut, document_of, state_count

SEGMENT = 2**19  # numbers of A_t that are held at a time: what a cache holds


def update(family: str, S: Tensor, *, u: Tensor, k: Tensor, q: Tensor, **rates: Tensor) -> tuple[Tensor, Tensor]:
    """One token, which defines the scan: y [B G 1 W] and the new S."""
    S = GATES[family].value(*rates.values()) * S + k * u
    return (q * S).sum(-2, keepdim=True), S


def segments(family: str, initial: Tensor | None, cu_seqlens: Tensor | None, **tokens: Tensor) -> ScanOut:
    """All tokens u, k, q and what the gate is made of: y [B T G 1 W], state [B G N W], or one a document.

    Time O(B T V N); memory for one segment, and for one state a segment, from which the backward computes it again.
    """
    y, state, _ = _segments(family, initial, cu_seqlens, list(tokens.values()))
    return ScanOut(y, state)


# Gates: A_t from what varies along channels and slots


class _Gate(NamedTuple):
    """A_t as a function of its makings, and the gradients of the makings from A_t and its gradient.

    `out` and `spare` are memory to write to; the gradient of A_t may be overwritten.
    """

    value: Callable[..., Tensor]
    gradients: Callable[..., list[Tensor]]


def _exponential(delta: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(delta, A * LOG2_E, out=out).exp2_()


def _exponential_gradients(a: Tensor, grad: Tensor, spare: Tensor, delta: Tensor, A: Tensor) -> list[Tensor]:
    grad.mul_(a)
    grad_delta = torch.mul(grad, A, out=spare).sum_to_size(delta.shape)
    return [grad_delta, grad.mul_(delta).sum_to_size(A.shape)]


class OnlineGate(torch.autograd.Function):
    """rate [... 1 W] and square k_n² [... N 1] -> 1 - eps k_n², eps = rate / (1 + rate |k|²).

    With its own derivatives, because those of the steps on the way cancel for long keys and leave rounding alone:
    -k_n² / (1 + rate |k|²)² by the rate, -eps (1 - eps k_n²) by k_n² and eps² k_n² by the other squares.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rate: Tensor, square: Tensor) -> Tensor:
        return torch.addcmul(*closed_form(rate, square))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rate, square = ctx.saved_tensors
        kept, eps, others = closed_form(rate, square)
        moved = square * grad
        total = moved.sum(-2, keepdim=True)
        grad_square = eps * (eps * (total - moved) - (kept + eps * others) * grad)
        return (-kept.square() * total).sum_to_size(rate.shape), grad_square.sum_to_size(square.shape)

    @staticmethod
    def jvp(ctx: Any, rate_t: Tensor, square_t: Tensor) -> Tensor:
        rate, square = ctx.saved_tensors
        kept, eps, others = closed_form(rate, square)
        elsewhere = square_t.sum(-2, keepdim=True) - square_t
        moved = eps.square() * square * elsewhere - eps * (kept + eps * others) * square_t
        return moved - kept.square() * square * rate_t


def closed_form(rate: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kept = 1 - eps |k|², eps, and |k|² - k_n², none by subtraction: the gate 1 - eps k_n² is kept + eps others."""
    kept = 1 / (1 + rate * square.sum(-2, keepdim=True))
    before = F.pad(square[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    after = F.pad(square[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
    return kept, rate * kept, before + after


def _online(rate: Tensor, square: Tensor, out: Tensor | None = None) -> Tensor:
    return OnlineGate.apply(rate, square) if out is None else torch.addcmul(*closed_form(rate, square), out=out)


def _online_gradients(a: Tensor, grad: Tensor, spare: Tensor, rate: Tensor, square: Tensor) -> list[Tensor]:
    """The backward of `OnlineGate`, in place."""
    kept = 1 / (1 + rate * square.sum(-2, keepdim=True))
    eps, moved = rate * kept, torch.mul(square, grad, out=spare)
    total = moved.sum(-2, keepdim=True)
    elsewhere = torch.sub(total, moved, out=spare).mul_(eps).addcmul_(a, grad, value=-1)
    return [(-kept.square() * total).sum_to_size(rate.shape), _over_channels(elsewhere, eps, square)]


GATES = {"selective": _Gate(_exponential, _exponential_gradients), "online": _Gate(_online, _online_gradients)}


def _over_slots(weights: Tensor, S: Tensor, like: Tensor) -> Tensor:
    """Sum of weights * S over the slots N, and over whatever else `like` has not."""
    product = weights.mT @ S if weights.shape[-1] == 1 else (weights * S).sum(-2, keepdim=True)
    return product.sum_to_size(like.shape)


def _over_channels(S: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Sum of S * weights over the channels W, and over whatever else `like` has not."""
    product = (weights @ S.mT).mT if like.shape[-1] == 1 else S * weights
    return product.sum_to_size(like.shape)


# Segments


class _Borders(NamedTuple):
    """Where documents start and end, by token [T]; a token that is no border points at row n, one after the last."""

    starts: Tensor  # bool
    opens: Tensor
    closes: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int) -> _Borders:
        document, starts = document_of(cu_seqlens, length), document_starts(cu_seqlens, length)
        none = cu_seqlens.numel() - 1
        ends = torch.cat([starts[1:], starts[:1]])
        return cls(starts, document.where(starts, none), document.where(ends, none))


def _pieces(u: Tensor, k: Tensor) -> list[slice]:
    """Segments of tokens whose gates together are about SEGMENT numbers, at least 16 tokens each."""
    B, T, G, _, W = u.shape
    length = max(16, SEGMENT // max(1, B * G * k.shape[3] * W))
    return [slice(start, min(start + length, T)) for start in range(0, T, length)]


def _cut(tokens: list[Tensor], T: int, piece: slice) -> list[Tensor]:
    return [tensor[:, piece] if tensor.shape[1] == T else tensor for tensor in tokens]


def _padded(states: Tensor) -> Tensor:
    """[n+1 ...]: a row of zeros after the last."""
    return torch.cat([states, torch.zeros_like(states[:1])]) if len(states) else states.new_zeros(1, *states.shape[1:])


def _room(u: Tensor, k: Tensor, tensors: int) -> Tensor:
    """[tensors B L G N W] for one segment after the other: fresh memory would cost more than the arithmetic."""
    B, _, G, _, W = u.shape
    return u.new_empty(tensors, B, _pieces(u, k)[0].stop, G, k.shape[3], W)


@torch.library.custom_op("recur::elementwise_segments", mutates_args=())
def _segments(
    family: str, initial: Tensor | None, cu_seqlens: Tensor | None, tokens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Segment after segment: y [B T G 1 W], final states [B G N W], and the states between segments [n+1 B G N W]."""
    u, k = tokens[:2]
    (B, T, G, _, W), N, pieces = u.shape, k.shape[3], _pieces(u, k)
    y, between = torch.empty_like(u), u.new_zeros(len(pieces) + 1, B, G, N, W)
    if cu_seqlens is None and initial is not None:
        between[0] = initial
    borders = None if cu_seqlens is None else _Borders.of(cu_seqlens, T)
    if cu_seqlens is not None:
        own = None if initial is None else _padded(initial)
        final = u.new_zeros(cu_seqlens.numel(), G, N, W) if own is None else own.clone()
    room = _room(u, k, 2)
    for i, piece in enumerate(pieces):
        u_, k_, q_, *rates = _cut(tokens, T, piece)
        a, x = room[:, :, : piece.stop - piece.start]
        GATES[family].value(*rates, out=a)
        torch.mul(k_, u_, out=x)
        if borders is not None and own is not None:
            x.addcmul_(a, own.index_select(0, borders.opens[piece])[None])
        starts = None if borders is None else borders.starts[piece]
        h = walk_right(a, x, between[i], out=x, starts=starts)
        y[:, piece] = _over_slots(q_, h, u_)
        between[i + 1] = h[:, -1]
        if borders is not None:
            final.index_copy_(0, borders.closes[piece], h[0])
    return y, between[-1].clone() if cu_seqlens is None else final[:-1].clone(), between


@_segments.register_fake
def _(
    family: str, initial: Tensor | None, cu_seqlens: Tensor | None, tokens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    u, k = tokens[:2]
    (B, _, G, _, W), N = u.shape, k.shape[3]
    rows = state_count(B, cu_seqlens)
    return torch.empty_like(u), u.new_empty(rows, G, N, W), u.new_empty(len(_pieces(u, k)) + 1, B, G, N, W)


@torch.library.custom_op("recur::elementwise_segments_backward", mutates_args=())
def _segments_backward(
    family: str,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: list[Tensor],
    between: Tensor,
    grad_y: Tensor,
    grad_state: Tensor,
) -> list[Tensor]:
    """Gradients of initial and tokens: from the last segment to the first, each computed again from its entering state.

    G_t = q_t dy_tᵀ + A_{t+1} * G_{t+1} is the gradient of S_t; everything else is a product with it.
    """
    u, k = tokens[:2]
    T, pieces = u.shape[1], _pieces(u, k)
    gradients = [torch.zeros_like(tensor) for tensor in tokens]
    borders = starts = None
    if cu_seqlens is None:
        carried = grad_state
    else:
        carried = torch.zeros_like(between[0])
        borders, grad_final = _Borders.of(cu_seqlens, T), _padded(grad_state)
        own = None if initial is None else _padded(initial)
        grad_own = _padded(grad_state * like_batch(cu_seqlens[1:] == cu_seqlens[:-1], grad_state))
    room = _room(u, k, 4)
    for i, piece in reversed(list(enumerate(pieces))):
        u_, k_, q_, *rates = _cut(tokens, T, piece)
        dy, state = grad_y[:, piece], between[i]
        gate, x, G, grad_gate = room[:, :, : piece.stop - piece.start]
        GATES[family].value(*rates, out=gate)
        torch.mul(k_, u_, out=x)
        torch.mul(q_, dy, out=G)
        if borders is not None:
            starts = borders.starts[piece]
            if own is not None:
                before = own.index_select(0, borders.opens[piece])[None]
                x.addcmul_(gate, before)
            G += grad_final.index_select(0, borders.closes[piece])
        h = walk_right(gate, x, state, out=x, starts=starts)
        G[:, -1] += carried
        walk_left(gate, G, out=G, starts=starts)
        carried = gate[:, 0] * G[:, 0]
        if starts is not None:
            carried.masked_fill_(starts[0], 0)
        parts = [_over_slots(k_, G, u_), _over_channels(G, u_, k_), _over_channels(h, dy, q_)]
        torch.mul(G[:, 0], state, out=grad_gate[:, 0])
        torch.mul(G[:, 1:], h[:, :-1], out=grad_gate[:, 1:])
        if starts is not None:
            grad_gate.masked_fill_(like_batch(starts, grad_gate[0]), 0)
            if own is not None:
                grad_gate.addcmul_(G, before)
                grad_own.index_add_(0, borders.opens[piece], (gate * G)[0])
        parts += GATES[family].gradients(gate, grad_gate, h, *rates)
        for gradient, part in zip(_cut(gradients, T, piece), parts, strict=True):
            gradient += part
    if cu_seqlens is None:
        return [carried, *gradients]
    return [grad_own[:-1].clone(), *gradients]


@_segments_backward.register_fake
def _(
    family: str,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: list[Tensor],
    between: Tensor,
    grad_y: Tensor,
    grad_state: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(grad_state), *(torch.empty_like(tensor) for tensor in tokens)]


def _whole(family: str, initial: Tensor | None, cu_seqlens: Tensor | None, tokens: list[Tensor]) -> ScanOut:
    """The scan in one piece, out of differentiable operations: how second derivatives are taken."""
    u, k, q, *rates = tokens
    h, state = recurrence(GATES[family].value(*rates), k * u, initial, cu_seqlens)
    return ScanOut((q * h).sum(-2, keepdim=True), state)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.family, initial, cu_seqlens, tokens = inputs
    ctx.save_for_backward(initial, cu_seqlens, output[2], *tokens)


def _gradients(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Any, ...]:
    initial, cu_seqlens, between, *tokens = ctx.saved_tensors
    with torch.autocast(grad_y.device.type, enabled=False):
        if torch.is_grad_enabled():
            sources = [tensor for tensor in (initial, *tokens) if tensor is not None and tensor.requires_grad]
            outputs = _whole(ctx.family, initial, cu_seqlens, tokens)
            found = iter(torch.autograd.grad(outputs, sources, (grad_y, grad_state), create_graph=True))
            grad_initial, *gradients = [
                next(found) if tensor is not None and tensor.requires_grad else None for tensor in (initial, *tokens)
            ]
        else:
            grad_initial, *gradients = _segments_backward(
                ctx.family, initial, cu_seqlens, tokens, between, grad_y, grad_state
            )
    return None, None if initial is None else grad_initial, None, gradients


_segments.register_autograd(_gradients, setup_context=_save)
