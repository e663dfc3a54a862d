"""Segment after segment of a scan whose gate fills the matrix state, so that T V N numbers never stand at once.

S_t = A_t * S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t, with channels in their groups, V = G W: u and whatever varies along
channels is [B T G 1 W], k, q and whatever varies along slots [B T G N 1], S [B G N W]. What does not depend on the
token has length 1 at T. A family says how A_t is made; see GATES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.diagonal import LOG2_E, document_starts, like_batch, recur_backward, recur_forward, recurrence
from recur.primitives.forms import ScanOut, document_of, state_count
from recur.primitives.operators import batch_axis, batched_at, operator, pullback, pushforward, remember, schema_of
from recur.shapes import without_autocast

SEGMENT = 2**19  # numbers of A_t that are held at a time: what a cache holds


def update(family: str, S: Tensor, *, u: Tensor, k: Tensor, q: Tensor, **rates: Tensor) -> tuple[Tensor, Tensor]:
    """One token, which defines the scan: y [B G 1 W] and the new S."""
    S = GATES[family].value(*rates.values()) * S + k * u
    return (q * S).sum(-2, keepdim=True), S


def segments(family: str, initial: Tensor | None, cu_seqlens: Tensor | None, **tokens: Tensor) -> ScanOut:
    """All tokens u, k, q and what the gate is made of: y [B T G 1 W], state [B G N W], or one per document.

    Time O(B T V N); memory for one segment, and for one state per segment, from which the backward computes it again.
    """
    y, state, _ = _segments(family, initial, cu_seqlens, *tokens.values())
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


def closed_form(rate: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kept = 1 - eps |k|², eps, and |k|² - k_n², none by subtraction: the gate 1 - eps k_n² is kept + eps others."""
    kept = 1 / (1 + rate * square.sum(-2, keepdim=True))
    before = F.pad(square[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    after = F.pad(square[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
    return kept, rate * kept, before + after


# rate [... 1 W] and k_n² [... N 1] -> 1 - eps k_n². With its own derivatives, because those of the steps on the way
# cancel for long keys and leave rounding alone: -k_n² / (1 + rate |k|²)² by the rate, -eps (1 - eps k_n²) by k_n² and
# eps² k_n² by the other squares.


def _run_gate(rate: Tensor, square: Tensor) -> Tensor:
    return torch.addcmul(*closed_form(rate, square))


def _fake_gate(rate: Tensor, square: Tensor) -> Tensor:
    return rate.new_empty(torch.broadcast_shapes(rate.shape, square.shape))


def _save_gate(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    remember(ctx, *inputs)


def _gradients_gate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    rate, square = ctx.saved_tensors
    kept, eps, others = closed_form(rate, square)
    moved = square * grad
    total = moved.sum(-2, keepdim=True)
    grad_square = eps * (eps * (total - moved) - (kept + eps * others) * grad)
    return (-kept.square() * total).sum_to_size(rate.shape), grad_square.sum_to_size(square.shape)


def _tangent_gate(ctx: Any, drate: Tensor, dsquare: Tensor) -> Tensor:
    rate, square = ctx.saved_tensors
    kept, eps, others = closed_form(rate, square)
    elsewhere = dsquare.sum(-2, keepdim=True) - dsquare
    moved = eps.square() * square * elsewhere - eps * (kept + eps * others) * dsquare
    return moved - kept.square() * square * drate


_online_gate = operator(
    "recur::online_gate",
    _run_gate,
    fake=_fake_gate,
    save=_save_gate,
    backward=_gradients_gate,
    jvp=_tangent_gate,
    vmap=batched_at(0, 0, out=0),
)


def _online(rate: Tensor, square: Tensor, out: Tensor | None = None) -> Tensor:
    return _online_gate(rate, square) if out is None else torch.addcmul(*closed_form(rate, square), out=out)


def _online_gradients(a: Tensor, grad: Tensor, spare: Tensor, rate: Tensor, square: Tensor) -> list[Tensor]:
    """Those of `_online_gate`, in place."""
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
    """Where documents start and end, by token [T]; a token that is not a border points at row n, one after the last."""

    starts: Tensor  # bool
    opens: Tensor
    closes: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, length: int) -> _Borders:
        document, starts = document_of(cu_seqlens, length), document_starts(cu_seqlens, length)
        none = cu_seqlens.numel() - 1
        ends = torch.cat([starts[1:], starts[:1]])
        return cls(starts, document.where(starts, none), document.where(ends, none))


def _segment_length(u: Tensor, k: Tensor) -> int:
    """Tokens of a segment: their gates together are about SEGMENT numbers, and they are at least 16."""
    B, _, G, _, W = u.shape
    return torch.sym_max(16, SEGMENT // torch.sym_max(1, B * G * k.shape[3] * W))


def _pieces(u: Tensor, k: Tensor) -> list[slice]:
    """The tokens of each segment."""
    T, length = u.shape[1], _segment_length(u, k)
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


class _Inputs(NamedTuple):
    """What the operators take; `first` and `second` are what the gate is made of."""

    family: str
    initial: Tensor | None
    cu_seqlens: Tensor | None
    u: Tensor
    k: Tensor
    q: Tensor
    first: Tensor
    second: Tensor


def _run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Segment after segment: y [B T G 1 W], final states [B G N W], and the states between segments [n+1 B G N W]."""
    family, initial, cu_seqlens, *tokens = _Inputs(*inputs)
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
        h = recur_forward(a, x, between[i], out=x, starts=starts)
        y[:, piece] = _over_slots(q_, h, u_)
        between[i + 1] = h[:, -1]
        if borders is not None:
            final.index_copy_(0, borders.closes[piece], h[0])
    return y, between[-1].clone() if cu_seqlens is None else final[:-1].clone(), between


def _fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, cu_seqlens, u, k, *_ = inputs
    (B, T, G, _, W), N = u.shape, k.shape[3]
    rows, pieces = state_count(B, cu_seqlens), -(-T // _segment_length(u, k))
    return torch.empty_like(u), u.new_empty(rows, G, N, W), u.new_empty(pieces + 1, B, G, N, W)


def _run_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of initial and tokens: from the last segment to the first, each computed again from its entering state.

    G_t = q_t dy_tᵀ + A_{t+1} * G_{t+1} is the gradient of S_t; everything else is a product with it.
    """
    *given, between, grad_y, grad_state = inputs
    family, initial, cu_seqlens, *tokens = _Inputs(*given)
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
        h = recur_forward(gate, x, state, out=x, starts=starts)
        G[:, -1] += carried
        recur_backward(gate, G, out=G, starts=starts)
        carried = gate[:, 0] * G[:, 0]
        if starts is not None:
            carried.masked_fill_(starts[0], 0)
        parts = [_over_slots(k_, G, u_), _over_channels(G, u_, k_), _over_channels(h, dy, q_)]
        torch.mul(G[:, 0], state, out=grad_gate[:, 0])
        torch.mul(G[:, 1:], h[:, :-1], out=grad_gate[:, 1:])
        if borders is not None:
            grad_gate.masked_fill_(like_batch(borders.starts[piece], grad_gate[0]), 0)
            if own is not None:
                grad_gate.addcmul_(G, before)
                grad_own.index_add_(0, borders.opens[piece], (gate * G)[0])
        parts += GATES[family].gradients(gate, grad_gate, h, *rates)
        for gradient, part in zip(_cut(gradients, T, piece), parts, strict=True):
            gradient += part
    if cu_seqlens is not None:
        carried = grad_own[:-1].clone()
    grad_u, grad_k, grad_q, grad_first, grad_second = gradients
    return carried, grad_u, grad_k, grad_q, grad_first, grad_second


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, _, *tokens, _, _, grad_state = inputs
    carried, grad_u, grad_k, grad_q, grad_first, grad_second = map(torch.empty_like, (grad_state, *tokens))
    return carried, grad_u, grad_k, grad_q, grad_first, grad_second


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


# Derivatives: first ones segment by segment; all others, and those in forward mode, from the scan in one piece


def _whole(family: str, entered: bool, cu_seqlens: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan in one piece, out of differentiable operations: of initial if it is `entered`, u, k, q and the rates."""

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        u, k, q, *rates = given[entered:]
        h, state = recurrence(GATES[family].value(*rates), k * u, given[0] if entered else None, cu_seqlens)
        return (q * h).sum(-2, keepdim=True), state

    return run


def _whole_backward(family: str, entered: bool, cu_seqlens: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """Its gradients, of what it is given and of the gradients of y and of the state."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return pullback(_whole(family, entered, cu_seqlens), given[:-2], given[-2:])

    return run


def _placed(values: Iterable[Tensor], places: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One value for each place that is not None, and None for the others."""
    left = iter(values)
    return [None if place is None else next(left) for place in places]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.family, initial, cu_seqlens, *tokens = inputs
    ctx.mark_non_differentiable(output[2])
    remember(ctx, cu_seqlens, output[2], initial, *tokens)


def _gradients(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    cu_seqlens, between, initial, *tokens = ctx.saved_tensors
    with without_autocast(grad_y):
        found = _segments_backward(ctx.family, initial, cu_seqlens, *tokens, between, grad_y, grad_state)
    grad_initial, *gradients = [
        grad if x is not None else None for grad, x in zip(found, (initial, *tokens), strict=True)
    ]
    return None, grad_initial, None, *gradients


def _tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    cu_seqlens, _, *given = ctx.saved_tensors
    whole = _whole(ctx.family, given[0] is not None, cu_seqlens)
    return *pushforward(whole, _given(*given), _given(tangents[1], *tangents[3:])), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.family, initial, cu_seqlens, *tokens, _, grad_y, grad_state = inputs
    remember(ctx, cu_seqlens, initial, *tokens, grad_y, grad_state)
    ctx.mark_non_differentiable(*(y for y, x in zip(output, (initial, *tokens), strict=True) if x is None))


def _second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    cu_seqlens, *given = ctx.saved_tensors
    steepness = _whole_backward(ctx.family, given[0] is not None, cu_seqlens)
    weights = [grad for grad, x in zip(grads, given[:-2], strict=True) if x is not None]
    grad_initial, *tokens, grad_y, grad_state = _placed(pullback(steepness, _given(*given), weights), given)
    return None, grad_initial, None, *tokens, None, grad_y, grad_state


def _second_tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    cu_seqlens, *given = ctx.saved_tensors
    steepness = _whole_backward(ctx.family, given[0] is not None, cu_seqlens)
    moved = _given(tangents[1], *tangents[3:-3], *tangents[-2:])
    return tuple(_placed(pushforward(steepness, _given(*given), moved), given[:-2]))


# vmap: the groups of all calls lie side by side


def _grouped(size: int, dim: int | None, x: Tensor | None, axis: int, groups: int) -> Tensor | None:
    """x, whose groups lie along `axis`, with those of all calls there; one group for all becomes one for each."""
    if x is None:
        return None
    x = batch_axis(size, dim, x, axis)
    return x.expand(*x.shape[: axis + 1], groups, *x.shape[axis + 2 :]).flatten(axis, axis + 1)


def _groups(x: Tensor | None, dim: int | None) -> int:
    """G of a token [B T G ...] with a vmapped axis `dim`."""
    return 0 if x is None else (x if dim is None else x.select(dim, 0)).shape[2]


def _vmap(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    family, initial, cu_seqlens, *tokens = inputs
    G = _groups(tokens[0], in_dims[3])
    entered, borders = _grouped(size, in_dims[1], initial, 1, G), batch_axis(size, in_dims[2], cu_seqlens, None)
    moved = (_grouped(size, dim, x, 2, G) for dim, x in zip(in_dims[3:], tokens, strict=True))
    y, state, between = call(family, entered, borders, *moved)
    return (y.unflatten(2, (size, G)), state.unflatten(1, (size, G)), between.unflatten(2, (size, G))), (2, 1, 2)


def _vmap_backward(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    family, initial, cu_seqlens, *others, grad_state = inputs
    groups = [_groups(x, dim) for x, dim in zip(others, in_dims[3:], strict=False)]
    G = groups[0]
    entered, borders = _grouped(size, in_dims[1], initial, 1, G), batch_axis(size, in_dims[2], cu_seqlens, None)
    moved = (_grouped(size, dim, x, 2, G) for dim, x in zip(in_dims[3:], others, strict=False))
    carried, *gradients = call(family, entered, borders, *moved, _grouped(size, in_dims[-1], grad_state, 1, G))
    each = [gradient.unflatten(2, (size, G)) for gradient in gradients]
    shared = [x.sum(3, keepdim=True) if one == 1 else x for x, one in zip(each, groups, strict=False)]
    return (carried.unflatten(1, (size, G)), *shared), (1, *[2] * len(shared))


_segments = operator(
    "recur::elementwise_segments",
    _run,
    fake=_fake,
    save=_save,
    backward=_gradients,
    jvp=_tangent,
    vmap=_vmap,
    schema=schema_of(_Inputs, outputs=3),
)
_segments_backward = operator(
    "recur::elementwise_segments_backward",
    _run_backward,
    fake=_fake_backward,
    save=_save_backward,
    backward=_second_gradients,
    jvp=_second_tangent,
    vmap=_vmap_backward,
    schema=schema_of(_Inputs, "between", "grad_y", "grad_state", outputs=6),
)
