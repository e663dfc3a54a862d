"""The outer-product state expansion: a decaying sum of k vᵀ, read by q."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import carry, cut
from recur.primitives.diagonal import gated_scan
from recur.primitives.forms import ScanOut
from recur.primitives.operators import add_to
from recur.primitives.reference import to_heads
from recur.primitives.within import joined, lay_out, lower_product, stacked, turned, within


def outer_scan(
    initial: Tensor,
    cu_seqlens: Tensor | None,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    chunk_size: int,
) -> ScanOut:
    """All tokens in chunks of chunk_size, a power of two: S_t = A_t S_{t-1} + k_t v_tᵀ, y_t = Re(S_t)ᵀ q_t.

    Args: as `wide_step` with an axis T, which is 1 for a log_decay that does not change; initial [B H K V], or
        [n H K V] for the n documents of cu_seqlens.
    Returns: y [B T H V]; state like initial.
    Cost: matmuls of chunk_size * (K + V) + 2 K V a token and head. Memory: scores C T and states 2 T K V / C a head.
    Source: Yang et al. 2024, arXiv:2312.06635; Dao and Gu 2024, arXiv:2405.21060; Katsch 2023, arXiv:2311.01927.
    """
    G, K = q.shape[2], q.shape[3]
    chunks = cut(v.shape[1], chunk_size, cu_seqlens)
    q, k, v = (lay_out(chunks, x, G) for x in (q, k, v))
    log_decay = None if log_decay is None else lay_out(chunks, log_decay, G)
    plain_q, plain_k = q, k
    if bonus is not None:  # what a token reads before its write, the token before it can read after its own
        q = F.pad(q[..., 1:, :], (0, 0, 0, 1))
    q, k, log_decay, turn = turned(q, k, log_decay)
    (scores,), (q,), k, total = within((q,), k, log_decay)
    if bonus is not None:
        first = F.pad(plain_q[..., :1, :], (0, q.shape[-1] - K)).expand(*q.shape[:-2], 1, -1)
        scores, q = F.pad(scores[..., :-1, :], (0, 0, 1, 0)), torch.cat([first, q[..., :-1, :]], -2)
    decay, write = total[..., :K, None], k.mT @ v
    if turn is not None:
        decay, write = decay * turn[..., None], joined(write) * turn[..., None]
    decay = decay.expand(chunks.n, *decay.shape[1:])
    entering, state = carry(chunks, decay, write, rearrange(initial, "B (G r) K V -> B G r K V", G=G))
    y = add_to(lower_product(scores, v), q @ (entering if turn is None else stacked(entering)))
    if bonus is not None:
        y = y + (plain_q * rearrange(bonus, "(G r) K -> G r 1 K", G=G) * plain_k).sum(-1, keepdim=True) * v
    y = chunks.merge(rearrange(y, "n B G r C V -> B n C (G r) V"))
    return ScanOut(y, rearrange(state, "B G r K V -> B (G r) K V"))


def narrow_scan(
    initial: Tensor, cu_seqlens: Tensor | None, *, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None
) -> ScanOut:
    """`outer_scan` for K = 1, where the state is a vector and the scan is diagonal: y_t = q_t Re(h_t)."""
    x = to_heads(k, v.shape[2]) * v
    log_decay = x.new_zeros(()) if log_decay is None else log_decay
    h, state = gated_scan(x, log_decay.expand_as(x), initial_state=initial.squeeze(2), cu_seqlens=cu_seqlens)
    return ScanOut(to_heads(q, v.shape[2]) * h.real, state.unsqueeze(2))
