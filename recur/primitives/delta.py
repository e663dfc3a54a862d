"""The delta rule: what is written is the error of what the state would have said."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import cut
from recur.primitives.diagonal import gate
from recur.primitives.forms import ScanOut
from recur.primitives.outer import read, to_heads
from recur.primitives.within import crossings, joined, lay_out, stacked, turned, within


def delta_step(
    state: Tensor, *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token, pure: S' = exp(log_decay) S, S = S' + k (β (v − Re(S')ᵀ k))ᵀ, y = Re(S)ᵀ q.

    Args: state [B H K V]; q, k [B G K]; v [B H V]; beta [B H]; log_decay [B H K | 1].   Returns: y [B H V], S.
    """
    q, k = to_heads(q, v.shape[1]), to_heads(k, v.shape[1])
    kept = state if log_decay is None else gate(log_decay)[..., None] * state
    u = beta[..., None] * (v - read(kept, k))
    new = kept + k[..., None] * u[..., None, :]
    return read(new, q), new


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

    Args: as `delta_step` with an axis T, which is 1 for a log_decay that does not change; initial [B H K V], or
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
    solve = _UnitInverse.apply(beta * overlap) * beta.mT
    write, erase = solve @ v, solve @ reach
    decay, initial = total[..., :K, None], rearrange(initial, "B (G r) K V -> B G r K V", G=G)
    if turn is not None:
        decay, initial = decay * turn[..., None], stacked(initial)
        k = stacked(joined(k.mT) * turn[..., None]).mT
    decay, k = decay.expand(chunks.n, *v.shape[1:4], -1, -1), k.expand(*v.shape[:-1], -1)
    states, u = _Walk.apply(chunks.seal(decay), erase, chunks.seal(k), write, chunks.openings(initial), 1)
    entering = states[:-1]
    y = chunks.merge(rearrange(scores @ u + q @ entering, "n B G r C V -> B n C (G r) V"))
    state = _kept(chunks.last(decay), chunks.last(entering)) + chunks.last(k).mT @ chunks.last(u)
    state = chunks.settle(state, initial)
    return ScanOut(y, rearrange(state if turn is None else joined(state), "B G r K V -> B (G r) K V"))


class _UnitInverse(torch.autograd.Function):
    """(I + lower)⁻¹ for [... C C], of which only what is below the diagonal is read.

    Blocks are joined two by two: under inverses A⁻¹ and B⁻¹ of neighbours that X joins stands −B⁻¹ X A⁻¹.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = torch.ones_like(lower[..., :1, None])  # [... C 1 1]
        while (m := inverse.shape[-1]) < lower.shape[-1]:
            top, bottom = inverse.unflatten(-3, (-1, 2)).unbind(-3)
            cross = -(bottom @ (crossings(lower, m) @ top))
            inverse = torch.cat([F.pad(top, (0, m)), torch.cat([cross, bottom], -1)], -2)
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ (grad @ inverse.mT)).tril(-1)


class _Walk(torch.autograd.Function):
    """The state from chunk to chunk, S_0 ... S_n, and what is written, u_0 ... u_{n-1}; its own adjoint.

        u_j = write_j − order left_j S_j        S_{j+1} = decay_j S_j + order right_jᵀ u_j + opening_{j+1}

    decay [n ... K | 1 1], left and right [n ... C K], write [n ... C V], opening [n+1 ... K V], S_0 = opening_0. With
    order −1 the walk is from the right: u_j reads S_{j+1} and S_j is made. Backward is the walk in the other order with
    left and right exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, decay: Tensor, left: Tensor, right: Tensor, write: Tensor, opening: Tensor, order: int
    ) -> tuple[Tensor, Tensor]:
        states, u = (x.clone(memory_format=torch.contiguous_format) for x in (opening, write))
        before, after = _sides(states, order)
        columns = (x.flatten(1, -3).unbind(0)[::order] for x in (decay, left, right, u, before, after))
        for keep, erase, key, value, old, new in zip(*columns, strict=True):
            value.baddbmm_(erase, old, alpha=-order)
            new.add_(_kept(keep, old)).baddbmm_(key.mT, value, alpha=order)
        ctx.save_for_backward(decay, left, right, states, u)
        ctx.order = order
        return states, u

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        decay, left, right, states, u = ctx.saved_tensors
        order = ctx.order
        grad_opening, grad_write = _Walk.apply(decay.conj(), right, left, grad_u, grad_states, -order)
        (before, _), (_, after) = _sides(states, order), _sides(grad_opening, order)
        grad_left, grad_right = -order * (grad_write @ before.mT), order * (u @ after.mT)
        if decay.is_complex():
            before, after = joined(before).conj(), joined(after)
        grad_decay = (before * after).sum(-1, keepdim=True).sum_to_size(decay.shape)
        return grad_decay, grad_left, grad_right, grad_write, grad_opening, None


def _sides(states: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The states each chunk reads and those it makes, of the n+1 that stand between chunks."""
    return (states[:-1], states[1:]) if order > 0 else (states[1:], states[:-1])


def _kept(decay: Tensor, state: Tensor) -> Tensor:
    """decay [... K | 1 1] times state [... K V], or times the real above the imaginary part if decay is complex."""
    return stacked(decay * joined(state)) if decay.is_complex() else decay * state
