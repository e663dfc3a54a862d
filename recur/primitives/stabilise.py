"""Exponential gates in bounds: everything is divided by the largest weight that anything in the state has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.diagonal import document_starts, leave_documents, linear_recurrence
from recur.primitives.forms import document_of, state_count
from recur.primitives.operators import batch_axis
from recur.shapes import accumulation_dtype, bind, check_float

LEAST = -1e30  # the log of nothing: finite, so that differences of logs stay numbers


def largest_log(
    log_keep: Tensor, log_write: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The running maximum m_t = max(log_keep_t + m_{t-1}, log_write_t) of the logs of all weights in a state.

    With exp(log_keep_t + m_{t-1} - m_t) and exp(log_write_t - m_t), both at most 1, in the place of exp(log_keep_t) and
    exp(log_write_t), a state is exp(-m_t) times what it would be.

    Args:
        log_keep:      [B T H] natural logs, -inf allowed.
        log_write:     [B T H] natural logs, of any sign.
        initial_state: [B H] m before the first token ([n H] if packed); nothing yet when omitted.
        cu_seqlens:    [n+1] document borders.

    Returns: m_t and m_{t-1} [B T H], and the last m [B H], float32 or wider.
    Cost: O(B T H log T), of sums and maxima alone, so nothing cancels.   Source: Beck et al. 2024, arXiv:2405.04517.

    >>> from recur.primitives.stabilise import largest_log
    >>> m, before, last = largest_log(torch.full((1, 3, 1), -1.0), torch.tensor([2.0, 0.0, 5.0]).reshape(1, 3, 1))
    >>> m.flatten()
    tensor([2., 1., 5.])
    """
    bind("largest_log", log_keep=(log_keep, "B T H"), log_write=(log_write, "B T H"))
    check_float("largest_log", log_keep=log_keep, log_write=log_write)
    dtype = accumulation_dtype(log_keep, log_write, initial_state)
    f, m = log_keep.to(dtype), log_write.to(dtype)
    B, T, H = m.shape
    rows = state_count(B, cu_seqlens)
    start = m.new_full((rows, H), LEAST) if initial_state is None else initial_state.to(dtype)
    if T == 0:
        return m, m, start.clone()
    if cu_seqlens is None:
        first, before = torch.arange(T, device=m.device) == 0, start[:, None]
    else:
        first, before = document_starts(cu_seqlens, T), start[document_of(cu_seqlens, T)][None]
    opens = first[None, :, None]
    m = torch.where(opens, torch.maximum(m, f + before), m).clamp(min=LEAST)
    f = torch.where(opens, -torch.inf, f)
    kept = _carried(f.detach(), m.detach())
    m = linear_recurrence(kept.to(dtype), torch.where(kept, f, m), starts=first)
    before = torch.where(opens, before, torch.cat([m[:, :1], m], 1)[:, :-1])
    last = m[:, -1].clone() if cu_seqlens is None else leave_documents(m, start, cu_seqlens)
    return m, before, last


@torch.library.custom_op("recur::largest_carried", mutates_args=())
def _carried(log_keep: Tensor, log_write: Tensor) -> Tensor:
    """[B T H] bool: where m_t = max(log_keep_t + m_{t-1}, log_write_t) is the first of the two. log_keep_0 is -inf."""
    m, f, span = log_write, log_keep, 1
    while span < m.shape[1]:  # m_t is now over the last `span` tokens, f_t what they keep of what was before
        closed = f[:, span:] == -torch.inf  # nothing passes, NaN included, which -inf + NaN would let through
        largest = torch.maximum(m[:, span:], f[:, span:] + m[:, :-span])
        m, f = (
            torch.cat([m[:, :span], torch.where(closed, m[:, span:], largest)], 1),
            torch.cat([f[:, :span], torch.where(closed, -torch.inf, f[:, span:] + f[:, :-span])], 1),
        )
        span *= 2
    return F.pad(log_keep[:, 1:] + m[:, :-1] > log_write[:, 1:], (0, 0, 1, 0))


@_carried.register_fake
def _(log_keep: Tensor, log_write: Tensor) -> Tensor:
    return torch.empty_like(log_write, dtype=torch.bool)


@_carried.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
    """The heads of all calls lie side by side."""
    moved = [batch_axis(info.batch_size, dim, x, 2).flatten(2) for dim, x in zip(in_dims[:2], inputs, strict=True)]
    return _carried(*moved).unflatten(2, (info.batch_size, -1)), 2
