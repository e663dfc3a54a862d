"""The delta rule: what is written is the error of what the state would have said."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import cut
from recur.primitives.diagonal import gate
from recur.primitives.forms import ScanOut
from recur.primitives.outer import joined, read, stacked, to_heads
from recur.primitives.within import lay_out, turned, within


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
    G, K, V = q.shape[2], q.shape[3], v.shape[3]
    chunks = cut(v.shape[1], chunk_size, cu_seqlens)
    q, k, v, beta = (lay_out(chunks, x, G) for x in (q, k, v, beta[..., None]))
    log_decay = None if log_decay is None else lay_out(chunks, log_decay, G)
    q, k, a, turn = turned(q, k, log_decay)
    (scores, overlap), (q, reach), k, total = within((q, k), k, a)
    right = torch.cat([v, reach.expand(*v.shape[:-1], -1)], -1)
    # only the part below the diagonal is read
    solved = torch.linalg.solve_triangular(beta * overlap, beta * right, upper=False, unitriangular=True)
    write, erase = solved.split([V, k.shape[-1]], -1)

    def leave(state: Tensor, u: Tensor, k: Tensor, total: Tensor, turn: Tensor | None = None) -> Tensor:
        state = total[..., None] * state + k.mT @ u
        return state if turn is None else stacked(joined(state) * turn[..., None])

    ends = [x.expand(-1, chunks.n, *x.shape[2:]) for x in (k, total, turn) if x is not None]
    initial = rearrange(initial, "B (G r) K V -> B G r K V", G=G)
    start = initial if turn is None else stacked(initial)
    state, states, us = start, [], []
    for j, (u, w, *end) in enumerate(zip(*(x.unbind(1) for x in (write, erase, *ends)), strict=True)):
        states.append(chunks.enter(j, state, start))
        us.append(u - w @ states[-1])
        state = leave(states[-1], us[-1], *end)
    entering, u = torch.stack(states, 1), torch.stack(us, 1)
    y = chunks.merge(rearrange(scores @ u + q @ entering, "B n G r C V -> B n C (G r) V"))
    state = chunks.settle(leave(*(chunks.last(x) for x in (entering, u, *ends))), start)
    state = state if turn is None else joined(state)
    return ScanOut(y, rearrange(state, "B G r K V -> B (G r) K V"))
