"""The delta rule: what is written is the error of what the state would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import cut
from recur.primitives.diagonal import like_batch
from recur.primitives.forms import ScanOut
from recur.primitives.operators import add_to, batched_at, operator, remember
from recur.primitives.within import crossings, joined, lay_out, lower_product, stacked, turned, within
from recur.shapes import all_finite, readable


def delta_scan(
    initial: Tensor,
    cu_seqlens: Tensor | None,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    chunk_size: int,
) -> ScanOut:
    """All tokens in chunks of chunk_size, a power of two: S_t = A_t S_{t-1} + k_t (β_t (v_t − Re(A_t S_{t-1})ᵀ k_t))ᵀ.

    In a chunk entered by S the errors solve (I + diag(β) M) U = diag(β) (V − K⃗ S), M the decayed scores of the keys
    among themselves. U = U0 − W S then is written like any value.

    Args: as `wide_step` with an axis T, which is 1 for a log_decay that does not change; initial [B H K V], or
        [n H K V] for the n documents of cu_seqlens.
    Returns: y [B T H V]; state like initial.
    Cost: about twice `outer_scan`; a loop of T / chunk_size small steps.
    Source: Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464.
    """
    G, K = q.shape[2], q.shape[3]
    chunks = cut(v.shape[1], chunk_size, cu_seqlens)
    q, k, v, beta = (lay_out(chunks, x, G) for x in (q, k, v, beta[..., None]))
    log_decay = None if log_decay is None else lay_out(chunks, log_decay, G)
    q, k, log_decay, turn = turned(q, k, log_decay)
    (scores, overlap), (q, reach), k, total = within((q, k), k, log_decay)
    solve = _unit_inverse(beta * overlap) * beta.mT
    solve = solve if all_finite(beta) else solve.tril()  # 0 times a beta that is not finite is NaN
    decay, initial = total[..., :K, None], rearrange(initial, "B (G r) K V -> B G r K V", G=G)
    if turn is not None:
        decay, initial = decay * turn[..., None], stacked(initial)
        k = stacked(joined(k.mT) * turn[..., None]).mT
    decay, reach, k = (x.expand(chunks.n, *v.shape[1:4], *x.shape[-2:]) for x in (decay, reach, k))
    start, opening = chunks.openings(initial)
    entering, _, u, _ = _walk(decay, reach, k, solve, v, None, opening, start, chunks.sealed, 1)
    y = add_to(lower_product(scores, u), q @ entering)
    state = _kept(chunks.last(decay), chunks.last(entering)) + chunks.last(k).mT @ chunks.last(u)
    state = chunks.settle(state, initial)
    y = chunks.merge(rearrange(y, "n B G r C V -> B n C (G r) V"))
    return ScanOut(y, rearrange(state if turn is None else joined(state), "B G r K V -> B (G r) K V"))


# (I + lower)⁻¹ for [... C C], of which only what is below the diagonal is read. Blocks are joined two by two: under
# inverses A⁻¹ and B⁻¹ of neighbours that X joins stands −B⁻¹ X A⁻¹.


def _run_inverse(lower: Tensor) -> Tensor:
    inverse = torch.ones_like(lower[..., :1, None])  # [... C 1 1]
    while (m := inverse.shape[-1]) < lower.shape[-1]:
        top, bottom = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        cross = -lower_product(bottom, crossings(lower, m) @ top)
        inverse = torch.cat([F.pad(top, (0, m)), torch.cat([cross, bottom], -1)], -2)
    return inverse.squeeze(-3)


def _save_inverse(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    remember(ctx, output)


def _gradients_inverse(ctx: Any, grad: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return (inverse.mT @ (grad @ inverse.mT)).tril(-1).neg()


def _tangent_inverse(ctx: Any, dlower: Tensor) -> Tensor:
    (inverse,) = ctx.saved_tensors
    return (inverse @ (dlower.tril(-1) @ inverse)).neg()


_unit_inverse = operator(
    "recur::unit_inverse",
    _run_inverse,
    fake=torch.empty_like,
    save=_save_inverse,
    backward=_gradients_inverse,
    jvp=_tangent_inverse,
    vmap=batched_at(0, out=0),
)


# From chunk to chunk: the states S_j that enter, the errors e_j and what is written, u_j. Its own adjoint.
#
#     e_j = write_j − order left_j S_j
#     u_j = solve_j e_j + more_j
#     S_{j+1} = decay_j S_j + order right_jᵀ u_j + opening_j
#
# decay [n ... K | 1 1], left and right [n ... C K], solve [n ... C C], write and more [n ... C V], opening [n ... K V],
# start [... K V] is S_0, sealed [n] bool the chunks that hand on the opening alone. With order −1 the walk goes from
# the last chunk to the first. That, with left and right exchanged and solve transposed, is the backward pass. Rows of
# e_j that are not finite make NaN of later rows of u_j, never of earlier ones.


def _run_walk(
    decay: Tensor,
    left: Tensor,
    right: Tensor,
    solve: Tensor,
    write: Tensor,
    more: Tensor | None,
    opening: Tensor | None,
    start: Tensor,
    sealed: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (decay, left, right, solve, write, more, opening, start, sealed, order)
    if order < 0:  # solve is upper triangular: gradients may mix the tokens of a chunk
        return _chunk_by_chunk(torch.bmm, *given)
    if readable(write):
        found = _chunk_by_chunk(torch.bmm, *given)
        if all_finite(found[2]):
            return found
    return _chunk_by_chunk(_lower_bmm, *given)


def _lower_bmm(t: Tensor, e: Tensor, *, out: Tensor) -> Tensor:
    """`lower_product` of one chunk, into `out`."""
    return torch.baddbmm((e * 0).cumsum(-2), t, e.nan_to_num(0, 0, 0), out=out)


def _chunk_by_chunk(
    product: Callable[..., Tensor],
    decay: Tensor,
    left: Tensor,
    right: Tensor,
    solve: Tensor,
    write: Tensor,
    more: Tensor | None,
    opening: Tensor | None,
    start: Tensor,
    sealed: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The walk, with `product` for solve_j e_j."""
    entering, error, u, final = _fake_walk(decay, left, right, solve, write, more, opening, start, sealed, order)
    final.copy_(start)

    def columns(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(write) if x is None else x.flatten(1, -3).unbind(0)[::order]

    state = final.flatten(0, -3)
    names = (entering, error, u, decay, left, right, solve, write, more, opening)
    ends = [None] * len(write) if sealed is None else sealed.unbind(0)[::order]
    for old, e, new, keep, a, b, t, w, extra, push, end in zip(*map(columns, names), ends, strict=True):
        old.copy_(state)
        before = old if end is None or order > 0 else old.masked_fill(end, 0)
        torch.baddbmm(w, a, before, alpha=-order, out=e)
        product(t, e, out=new)
        if extra is not None:
            new.add_(extra)
        state.copy_(_kept(keep, before)).baddbmm_(b.mT, new, alpha=order)
        if end is not None and order > 0:
            state.masked_fill_(end, 0)
        if push is not None:
            state.add_(push)
    return entering, error, u, final


def _fake_walk(
    decay: Tensor,
    left: Tensor,
    right: Tensor,
    solve: Tensor,
    write: Tensor,
    more: Tensor | None,
    opening: Tensor | None,
    start: Tensor,
    sealed: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entering = start.new_empty(write.shape[0], *start.shape)
    error, u, final = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (write, write, start))
    return entering, error, u, final


def _save_walk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    decay, left, right, solve, *_, sealed, ctx.order = inputs
    remember(ctx, decay, left, right, solve, *output[:3], sealed)
    ctx.set_materialize_grads(False)


def _gradients_walk(
    ctx: Any,
    grad_entering: Tensor | None,
    grad_error: Tensor | None,
    grad_u: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor | None, ...]:
    decay, left, right, solve, entering, error, u, sealed = ctx.saved_tensors
    order = ctx.order
    after, push_u, push_error, grad_start = _walk(
        decay.conj(),
        right,
        left,
        solve.mT,
        torch.zeros_like(u) if grad_u is None else grad_u,
        grad_error,
        grad_entering,
        torch.zeros_like(entering[0]) if grad_final is None else grad_final,
        sealed,
        -order,
    )
    grad_opening = after if ctx.needs_input_grad[6] else None
    if order > 0:
        after = _unless(sealed, after)
    else:
        entering = _unless(sealed, entering)
    grad_left, grad_right = (push_error @ entering.mT).mul_(-order), (u @ after.mT).mul_(order)
    if decay.is_complex():
        grad_decay = joined(entering).conj() * joined(after)
    else:
        grad_decay = entering * after
    grad_decay = grad_decay.sum(-1, keepdim=True).sum_to_size(decay.shape)
    grad_solve = push_u @ error.mT
    grad_more = push_u if ctx.needs_input_grad[5] else None
    return grad_decay, grad_left, grad_right, grad_solve, push_error, grad_more, grad_opening, grad_start, None, None


def _tangent_walk(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    """The same walk: what the tangents of decay, left, right and solve add to it is written and pushed."""
    ddecay, dleft, dright, dsolve, dwrite, dmore, dopening, dstart, *_ = tangents
    decay, left, right, solve, entering, error, u, sealed = ctx.saved_tensors
    order = ctx.order
    before = entering if order > 0 else _unless(sealed, entering)
    dwrite = torch.zeros_like(error) if dwrite is None else dwrite
    dstart = torch.zeros_like(entering[0]) if dstart is None else dstart
    if dleft is not None:
        dwrite = dwrite - order * (dleft @ before)
    if dsolve is not None:
        dmore = _sum(dmore, dsolve @ error)
    if ddecay is not None:
        kept = _kept(ddecay, before)
        dopening = _sum(dopening, _unless(sealed, kept) if order > 0 else kept)
    if dright is not None:
        written = order * (dright.mT @ u)
        dopening = _sum(dopening, _unless(sealed, written) if order > 0 else written)
    return _walk(decay, left, right, solve, dwrite, dmore, dopening, dstart, sealed, order)


def _unless(sealed: Tensor | None, states: Tensor) -> Tensor:
    """States [n ...], 0 where nothing passes between this chunk and the next."""
    return states if sealed is None else states.masked_fill(like_batch(sealed, states), 0)


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


_walk = operator(
    "recur::delta_walk",
    _run_walk,
    fake=_fake_walk,
    save=_save_walk,
    backward=_gradients_walk,
    jvp=_tangent_walk,
    vmap=batched_at(*[1] * 7, 0, None, None, out=(1, 1, 1, 0)),
)


def _kept(decay: Tensor, state: Tensor) -> Tensor:
    """decay [... K | 1 1] times state [... K V], or times the real above the imaginary part if decay is complex."""
    return stacked(decay * joined(state)) if decay.is_complex() else decay * state
