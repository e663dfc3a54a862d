"""Softmax attention with a forget gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recur import kernel
from recur.shapes import ShapeError, accumulation_dtype, bind


def forgetting_attention(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, *, window: int | None = None) -> Tensor:
    """Softmax attention whose scores decay with what lies between them.

        y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K) + sum_{s<r<=t} log f_r) v_s

    Args:
        q:          [B T H K], G divides H and head h reads group h // (H/G).
        k:          [B T G K].
        v:          [B T G V].
        log_forget: [B T H] natural log of the forget gate, at most 0.
        window:     how many tokens a query sees, its own included; all before it when omitted.

    Returns: y [B T H V] of v's dtype.   Raises: ShapeError if axes disagree.
    Cost: O(B H T^2 (K + V)) work, O(B H T^2) memory.   Source: Lin et al. 2025, arXiv:2503.02130.

    >>> x = torch.ones(1, 2, 1, 1)
    >>> v, log_forget = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.full((1, 2, 1), -1e9)
    >>> recur.primitives.attention.forgetting_attention(x, x, v, log_forget).flatten()
    tensor([1., 2.])
    """
    bind("forgetting_attention", k=(k, "B T G K"), v=(v, "B T G V"), q=(q, "B T H K"), log_forget=(log_forget, "B T H"))
    at = torch.arange(q.shape[1], device=q.device)
    since = log_forget.to(accumulation_dtype(log_forget)).cumsum(1)
    return forgetting_softmax(q, k, v, since, since, visible(at, at, window)[None])


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """[... T L] which keys at positions [... L] queries at positions [... T] may see."""
    seen = key[..., None, :] <= query[..., None]
    return seen if window is None else seen & (key[..., None, :] > query[..., None] - window)


def forgetting_softmax(q: Tensor, k: Tensor, v: Tensor, since: Tensor, since_key: Tensor, mask: Tensor) -> Tensor:
    """The same of queries [B T H K] over keys [B L G K], with running sums of log f [B T H], [B L H]; mask [B T L]."""
    why = "no kernel has attention with a forget gate, so that all scores are in memory"
    kernel.without("forgetting_attention", "torch", q, why, "Attention, or a scan with the same gate")
    H, G = q.shape[2], k.shape[2]
    if G == 0 or H % G:
        raise ShapeError(f"forgetting_attention: G must divide H, got G={G} (k) and H={H} (q)")
    real = accumulation_dtype(q, k, v, since)
    gap = (since[:, :, None] - since_key[:, None]).masked_fill(~mask[..., None], -math.inf)  # [B T L H]
    groups = q.to(real).unflatten(2, (G, H // G))
    scores = torch.einsum("btgrk,blgk->btlgr", groups, k.to(real)).flatten(3) / math.sqrt(q.shape[-1])
    weights = (scores + gap).softmax(2).unflatten(3, (G, H // G))
    return torch.einsum("btlgr,blgv->btgrv", weights, v.to(real)).flatten(2, 3).to(v.dtype)
