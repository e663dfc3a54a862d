"""The map that a segment of tokens applies to the state, as a value: segments combine, so time can be cut anywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur.primitives.diagonal import gate
from recur.primitives.layout import as_complex, as_real
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


def summary(
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    erase_from: str = "decayed",
    remove: Tensor | None = None,
    write: Tensor | None = None,
) -> Summary:
    """The summary of all T tokens: S_T = transition ∘ S_0 + state, for every S_0.

    Args:
        k: [B T G K] | [B T M G K], or None, tied to the gate.
        v: [B T H V] | [B T M H V].
        log_decay: as in `scan`, like all that follow.
        beta: [B T H] | [B T M H].
        erase: [B T G|H K] | [B T M G|H K].
        erase_from: "decayed" | "previous".
        remove: [B T G|H K] | [B T M G|H K].
        write: [B T H] | [B T H V] | [B T M H] | [B T M H V].

    Returns: Summary, float32 (float64 if an input is), complex where log_decay is.
    Raises: as `scan`.
    Cost: one `scan`; where something is erased one of K more values (2K if complex).
    Source: Martin and Cundy 2018, arXiv:1709.04057.

    >>> k, v = torch.eye(2)[None, :, None], torch.ones(1, 2, 1, 3)
    >>> halves = recur.summary(k[:, :1], v[:, :1], erase=k[:, :1]), recur.summary(k[:, 1:], v[:, 1:], erase=k[:, 1:])
    >>> both = recur.combine(*halves)
    >>> torch.equal(recur.advance(both, torch.zeros(1, 1, 2, 3)), recur.scan(k, k, v, erase=k).state)
    True
    """
    wide: dict[str, Any] = {"erase": erase, "erase_from": erase_from, "remove": remove, "write": write}
    if k is None:  # tied, and nothing is read; without a gate to tie it to, scan says what is missing
        q = v.new_zeros(*v.shape[:3], 1 if log_decay is None else log_decay.shape[-1])
    else:
        q = k if k.ndim == 4 else k[:, :, 0]
    if beta is not None or erase is not None:
        return _erasing_summary(q, k, v, log_decay, beta, **wide)
    state = scan(q, k, v, log_decay, **wide).state
    if log_decay is None:
        return Summary(torch.ones_like(state[..., 0, :1]), state)
    log_decay = log_decay.to(state.dtype)
    each = log_decay[None, None] if log_decay.ndim <= 2 else log_decay
    each = (each if each.ndim == 4 else each.unsqueeze(-1)).expand(*v.shape[:2], v.shape[-2], -1)
    return Summary(gate(each.sum(1)), state)


def _erasing_summary(
    q: Tensor, k: Tensor | None, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, **wide: Any
) -> Summary:
    """The transition is what the scan makes of the identity when it is given nothing to write."""
    (B, H, V), K = (v.shape[0], *v.shape[-2:]), q.shape[-1]
    tensors = (q, v, log_decay, beta, wide["erase"], wide["remove"], wide["write"])
    identity = torch.eye(K, dtype=accumulation_dtype(*tensors), device=v.device)
    if log_decay is not None and log_decay.is_complex():
        identity = torch.cat([identity, 1j * identity], 1)
    columns = identity.shape[1]
    if (write := wide["write"]) is not None and write.ndim == v.ndim:
        wide["write"] = torch.cat([write, write.new_ones(*write.shape[:-1], columns)], -1)
    initial = torch.cat([identity.new_zeros(K, V), identity], 1).expand(B, H, K, V + columns)
    writes = torch.cat([v, v.new_zeros(*v.shape[:-1], columns)], -1)
    final = scan(q, k, writes, log_decay, beta=beta, **wide, initial_state=initial).state
    state, transition = final.split([V, columns], -1)
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
