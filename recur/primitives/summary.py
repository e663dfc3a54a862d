"""What a stretch of tokens does to the state, as a value. Stretches combine: time can be cut and rejoined anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recur.primitives.decay import as_complex, as_real
from recur.primitives.diagonal import gate
from recur.primitives.scan import scan
from recur.shapes import accumulation_dtype


class Summary(NamedTuple):
    """What a segment of tokens does to a state: S after = transition ∘ S before + state.


    Attributes:
        transition: [B H 1] or [B H K], multiplied into the rows of S; with the delta rule [B H K K], or [B H 2K 2K]
            acting on the real above the imaginary part if log_decay is complex.
        state: [B H K V], what the segment itself leaves.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> whole = recur.summary(one, one, log_decay=torch.tensor([0.5]).log())
    >>> whole.transition.item(), whole.state.item()
    (0.125, 1.75)
    """

    transition: Tensor
    state: Tensor


def summary(k: Tensor | None, v: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None) -> Summary:
    """The summary of all T tokens: S_T = transition ∘ S_0 + state, for every S_0.

    Args:
        k: [B T G K] keys, or None, tied to the gate.
        v: [B T H V] values.
        log_decay: as in `scan`.
        beta: as in `scan`.

    Returns: Summary, float32 (float64 if an input is), complex where log_decay is.   Raises: as `scan`.
    Cost: one `scan`; with beta one of K more values (2K if complex).   Source: Martin and Cundy 2018, arXiv:1709.04057.

    >>> k, v = torch.randn(2, 1, 8, 4, 16)
    >>> left, right = recur.summary(k[:, :5], v[:, :5]), recur.summary(k[:, 5:], v[:, 5:])
    >>> whole = recur.combine(left, right)
    >>> torch.allclose(recur.advance(whole, torch.zeros(1, 4, 16, 16)), recur.scan(k, k, v).state, atol=1e-4)
    True
    """
    q = k
    if q is None:  # tied, and nothing is read; without a gate to tie it to, scan says what is missing
        q = v.new_zeros(*v.shape[:3], 1 if log_decay is None else log_decay.shape[-1])
    if beta is not None:
        return _delta_summary(q, k, v, log_decay, beta)
    state = scan(q, k, v, log_decay).state
    if log_decay is None:
        return Summary(torch.ones_like(state[..., 0, :1]), state)
    log_decay = log_decay.to(state.dtype)
    each = log_decay[None, None] if log_decay.ndim <= 2 else log_decay
    each = (each if each.ndim == 4 else each.unsqueeze(-1)).expand(*v.shape[:3], -1)
    return Summary(gate(each.sum(1)), state)


def _delta_summary(q: Tensor, k: Tensor | None, v: Tensor, log_decay: Tensor | None, beta: Tensor) -> Summary:
    """The transition is what the scan makes of the identity when it is given nothing to write."""
    (B, _, H, V), K = v.shape, q.shape[-1]
    identity = torch.eye(K, dtype=accumulation_dtype(q, v, log_decay, beta), device=v.device)
    if log_decay is not None and log_decay.is_complex():
        identity = torch.cat([identity, 1j * identity], 1)
    columns = identity.shape[1]
    initial = torch.cat([identity.new_zeros(K, V), identity], 1).expand(B, H, K, V + columns)
    writes = torch.cat([v, v.new_zeros(*v.shape[:3], columns)], -1)
    state, transition = scan(q, k, writes, log_decay, beta=beta, initial_state=initial).state.split([V, columns], -1)
    return Summary(as_real(transition) if transition.is_complex() else transition, state)


def combine(left: Summary, right: Summary) -> Summary:
    """`right` after `left` as one segment: transition = P_right P_left, state = P_right ∘ state_left + state_right.

    Args:
        left: the earlier segment.
        right: the later one, which follows it.

    >>> one = recur.Summary(transition=torch.full((1, 1, 1), 0.5), state=torch.ones(1, 1, 1, 1))
    >>> two = recur.combine(one, one)
    >>> two.transition.item(), two.state.item()
    (0.25, 1.5)
    """
    matrix = left.transition.ndim == 4
    transition = right.transition @ left.transition if matrix else right.transition * left.transition
    return Summary(transition, advance(right, left.state))


def advance(summary: Summary, state: Tensor) -> Tensor:
    """The state [B H K V] after a segment, from the one before it.

    Args:
        summary: what the segment does.
        state: [B H K V] before it.

    >>> half = recur.Summary(transition=torch.full((1, 1, 1), 0.5), state=torch.ones(1, 1, 1, 1))
    >>> recur.advance(half, torch.full((1, 1, 1, 1), 4.0)).item()
    3.0
    """
    transition, written = summary
    state = state.to(written.dtype)
    if transition.ndim == 3:
        return transition[..., None] * state + written
    if state.is_complex():
        return as_complex(transition @ as_real(state)) + written
    return transition @ state + written
