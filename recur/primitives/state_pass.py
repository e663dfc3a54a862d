"""The state from chunk to chunk where every chunk first erases something of it: one operator, its own adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur.primitives.diagonal import like_batch
from recur.primitives.layout import as_complex, as_real
from recur.primitives.operators import batched_at, operator, remember, schema_of
from recur.shapes import all_finite, readable


class _Inputs(NamedTuple):
    """The states S_j that enter the chunks, the errors e_j and the solved values u_j:

        e_j = write_j − order reader_j S_j
        u_j = A_inv_j e_j + more_j
        S_{j+1} = decay_j S_j + order writer_jᵀ u_j + added_j

    With order −1 the pass goes from the last chunk to the first. That, with reader and writer exchanged and A_inv
    transposed, is the backward pass. Rows of e_j that are not finite make NaN of later rows of u_j, never of earlier
    ones.
    """

    decay: Tensor  # [n ... K | 1 1]
    reader: Tensor  # [n ... C K]
    writer: Tensor  # [n ... C K]
    A_inv: Tensor  # [n ... C C]
    write: Tensor  # [n ... C V]
    more: Tensor | None  # [n ... C V]
    added: Tensor | None  # [n ... K V]
    start: Tensor  # [... K V], S_0
    sealed: Tensor | None  # [n] bool, the chunks of which S_{j+1} is added_j alone
    order: int


def _run_pass(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _Inputs(*inputs)
    if given.order < 0:  # A_inv is upper triangular: gradients may mix the tokens of a chunk
        return _chunk_by_chunk(torch.bmm, given)
    if readable(given.write):
        found = _chunk_by_chunk(torch.bmm, given)
        if all_finite(found[2]):
            return found
    return _chunk_by_chunk(_lower_bmm, given)


def _lower_bmm(t: Tensor, e: Tensor, *, out: Tensor) -> Tensor:
    """`lower_product` of one chunk, into `out`."""
    return torch.baddbmm((e * 0).cumsum(-2), t, e.nan_to_num(0, 0, 0), out=out)


def _chunk_by_chunk(product: Callable[..., Tensor], given: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pass, with `product` for A_inv_j e_j."""
    *tensors, start, sealed, order = given
    (entering, error, u, final), n = _fake_pass(*given), len(given.write)
    final.copy_(start)

    def columns(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * n if x is None else x.flatten(1, -3).unbind(0)[::order]

    state = final.flatten(0, -3)
    each = (entering, error, u, *tensors)
    ends = [None] * n if sealed is None else sealed.unbind(0)[::order]
    for old, e, new, keep, a, b, t, w, extra, push, end in zip(*map(columns, each), ends, strict=True):
        old.copy_(state)
        before = old if end is None or order > 0 else old.masked_fill(end, 0)
        torch.baddbmm(w, a, before, alpha=-order, out=e)
        product(t, e, out=new)
        if extra is not None:
            new.add_(extra)
        state.copy_(kept(keep, before)).baddbmm_(b.mT, new, alpha=order)
        if end is not None and order > 0:
            state.masked_fill_(end, 0)
        if push is not None:
            state.add_(push)
    return entering, error, u, final


def _fake_pass(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _Inputs(*inputs)
    entering = x.start.new_empty(x.write.shape[0], *x.start.shape)
    error, u, final = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.write, x.write, x.start))
    return entering, error, u, final


def _save_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    decay, reader, writer, A_inv, *_, sealed, ctx.order = inputs
    remember(ctx, decay, reader, writer, A_inv, *output[:3], sealed)
    ctx.set_materialize_grads(False)


def _gradients_pass(
    ctx: Any, grad_entering: Tensor | None, grad_error: Tensor | None, grad_u: Tensor | None, grad_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    decay, reader, writer, A_inv, entering, error, u, sealed = ctx.saved_tensors
    order = ctx.order
    after, push_u, push_error, grad_start = chunked_state_pass(
        decay.conj(),
        writer,
        reader,
        A_inv.mT,
        torch.zeros_like(u) if grad_u is None else grad_u,
        grad_error,
        grad_entering,
        torch.zeros_like(entering[0]) if grad_final is None else grad_final,
        sealed,
        -order,
    )
    grad_added = after if ctx.needs_input_grad[6] else None
    if order > 0:
        after = _unless(sealed, after)
    else:
        entering = _unless(sealed, entering)
    grad_reader, grad_writer = (push_error @ entering.mT).mul_(-order), (u @ after.mT).mul_(order)
    if decay.is_complex():
        grad_decay = as_complex(entering).conj() * as_complex(after)
    else:
        grad_decay = entering * after
    grad_decay = grad_decay.sum(-1, keepdim=True).sum_to_size(decay.shape)
    grad_A_inv = push_u @ error.mT
    grad_more = push_u if ctx.needs_input_grad[5] else None
    return grad_decay, grad_reader, grad_writer, grad_A_inv, push_error, grad_more, grad_added, grad_start, None, None


def _tangent_pass(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    """The same pass: what the tangents of decay, reader, writer and A_inv change is written and added."""
    ddecay, dreader, dwriter, dA_inv, dwrite, dmore, dadded, dstart, *_ = tangents
    decay, reader, writer, A_inv, entering, error, u, sealed = ctx.saved_tensors
    order = ctx.order
    before = entering if order > 0 else _unless(sealed, entering)
    dwrite = torch.zeros_like(error) if dwrite is None else dwrite
    dstart = torch.zeros_like(entering[0]) if dstart is None else dstart
    if dreader is not None:
        dwrite = dwrite - order * (dreader @ before)
    if dA_inv is not None:
        dmore = _sum(dmore, dA_inv @ error)
    if ddecay is not None:
        carried = kept(ddecay, before)
        dadded = _sum(dadded, _unless(sealed, carried) if order > 0 else carried)
    if dwriter is not None:
        written = order * (dwriter.mT @ u)
        dadded = _sum(dadded, _unless(sealed, written) if order > 0 else written)
    return chunked_state_pass(decay, reader, writer, A_inv, dwrite, dmore, dadded, dstart, sealed, order)


def _unless(sealed: Tensor | None, states: Tensor) -> Tensor:
    """States [n ...], 0 where nothing passes between this chunk and the next."""
    return states if sealed is None else states.masked_fill(like_batch(sealed, states), 0)


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


chunked_state_pass = operator(
    "recur::chunked_state_pass",
    _run_pass,
    fake=_fake_pass,
    save=_save_pass,
    backward=_gradients_pass,
    jvp=_tangent_pass,
    vmap=batched_at(*[1] * 7, 0, None, None, out=(1, 1, 1, 0)),
    schema=schema_of(_Inputs, outputs=4),
)


def kept(decay: Tensor, state: Tensor) -> Tensor:
    """decay [... K | 1 1] times state [... K V], or times the real above the imaginary part if decay is complex."""
    return as_real(decay * as_complex(state)) if decay.is_complex() else decay * state
