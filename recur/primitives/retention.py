"""RetNet's constant decays, and by what its parallel and chunkwise forms divide before the head norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.forms import document_of
from recur.shapes import bind


def retention_decay(heads: int, device: torch.device | None = None) -> Tensor:
    """[H] float64 log(1 - 2^(-5-h)), as float32 has it (which published code stores) while that is not 0.

    Args:
        heads: H.
        device: of the result.

    Source: Sun et al. 2023, arXiv:2307.08621.

    >>> from recur.primitives.retention import retention_decay
    >>> retention_decay(2).exp()
    tensor([0.9688, 0.9844], dtype=torch.float64)
    """
    gap = 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64, device=device))
    stored = torch.log(1 - gap.float()).double()
    return torch.where(stored < 0, stored, torch.log1p(-gap))


@torch.no_grad()
def parallel_scale(
    q: Tensor, k: Tensor, log_a: Tensor, *, most: float = 5e4, cu_seqlens: Tensor | None = None
) -> Tensor:
    """s_t c_t with s_t^2 = sum_{s<=t} a^(t-s), c_t = clamp(sum_{s<=t} |q_t . k_s| a^(t-s) / s_t, 1, most).

    Args:
        q, k:  [B T H K].
        log_a: [H] log decay.
        cu_seqlens: [n+1] borders of documents, which do not see each other.

    Returns: [B T H], without gradient.   Raises: ShapeError.   Cost: O(B H T^2 K).
    Source: Sun et al. 2023, arXiv:2307.08621.
    """
    bind("parallel_scale", q=(q, "B T H K"), k=(k, "B T H K"), log_a=(log_a, "H"))
    q, k, log_a = q.detach(), k.detach(), log_a.detach()  # no_grad lets tangents of forward mode through
    token = torch.arange(q.shape[1], device=q.device)
    sees = token[:, None] >= token
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, len(token))
        sees = sees & (document[:, None] == document)
    distance = torch.where(sees, token[:, None] - token, torch.inf)
    weight = (log_a[:, None, None] * distance).exp()  # [H T T], 0 where nothing is seen
    grown = weight.sum(-1).sqrt()
    scores = torch.einsum("bthk,bshk->bhts", q, k).abs().mul(weight)
    scores = scores.masked_fill(weight == 0, 0).sum(-1) / grown  # 0 times NaN is NaN
    return (scores.clamp(1, most) * grown).transpose(1, 2)


@torch.no_grad()
def chunkwise_scale(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, chunk: int) -> Tensor:
    """s_t max(c_t, m), s and c as in `parallel_scale` with sums that start anew in every chunk, and c without a bound.

    m is at least 1 and the largest column sum of |S| / sum_{s<chunk} a^s, S the state that enters the chunk.

    Args: q, k [B T H K]; v [B T H V]; log_a [H]; chunk: tokens in one.
    Returns: [B T H], without gradient.   Raises: ShapeError.   Cost: O(B H T (chunk + V) K).
    Source: Sun et al. 2023, arXiv:2307.08621.
    """
    B, T, H, _ = q.shape
    if T == 0:
        return q.new_ones(B, T, H)
    q, k, v, log_a = q.detach(), k.detach(), v.detach(), log_a.detach()
    pieces = [F.pad(x, (0, 0, 0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)) for x in (q, k, v)]
    q, k, v = pieces  # [B n C H *]
    inside = parallel_scale(q.flatten(0, 1), k.flatten(0, 1), log_a, most=torch.inf).unflatten(
        0, q.shape[:2]
    )  # [B n C H]
    age = torch.arange(chunk - 1, -1, -1, device=q.device)
    weight = (log_a * age[:, None]).exp()  # [C H]
    writes = torch.einsum("bnchk,bnchv,ch->nbhkv", k, v, weight / weight.sum(0))
    state, entering = torch.zeros_like(writes[:1].sum(0)), []
    for write in writes:
        entering.append(state.abs().sum(-2).amax(-1).clamp(min=1))  # [B H]
        state = state * (log_a * chunk).exp()[:, None, None] + write
    grown = weight.flip(0).cumsum(0).sqrt()  # [C H]
    found = torch.maximum(inside, torch.stack(entering, 1)[:, :, None] * grown)
    return found.flatten(1, 2)[:, :T]
