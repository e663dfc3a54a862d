"""Scans whose decay lies on the value side, a gate per column of the state: slots of attention, and Oja's rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recur.primitives.conv import token_shift
from recur.primitives.forms import ScanOut, mirror
from recur.primitives.scan import scan
from recur.shapes import ShapeError, accumulation_dtype, bind


def column_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    form: str = "auto",
) -> ScanOut:
    """The plain scan with a gate per value channel: S_t = S_{t-1} diag(a_t) + k_t v_tᵀ, y_t = scale S_tᵀ q_t.

    Columns do not meet, so each is a head of `recur.scan` with one value channel.

    Args:
        q:             [B T H K], or [B T R H K] for R reads per token.
        k:             [B T H K].
        v:             [B T H V].
        log_decay:     [B T H V] natural log of the gates.
        initial_state: [B H K V]; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n H K V].
        scale:         factor on y.
        form:          as in `recur.scan`.

    Returns: y [B T H V], or [B T R H V]; state [B H K V].   Raises: as `recur.scan`.
    Cost: that of H V heads of K channels and one value.

    >>> x = torch.ones(1, 2, 1, 1)
    >>> recur.primitives.columns.column_scan(x, x, x, x.log() - 1e9).y.flatten()  # each token forgets the past
    tensor([1., 1.])
    """
    sizes = bind("column_scan", k=(k, "B T H K"), v=(v, "B T H V"), log_decay=(log_decay, "B T H V"))
    columns = None if initial_state is None else initial_state.mT.flatten(1, 2)[..., None]
    options: dict[str, Any] = {"initial_state": columns, "cu_seqlens": cu_seqlens, "scale": scale, "form": form}
    y, state = scan(q, k, v.flatten(2)[..., None], log_decay.flatten(2), **options)
    shape = (sizes["H"], sizes["V"])
    return ScanOut(y[..., 0].unflatten(-1, shape), state[..., 0].unflatten(1, shape).mT)


def slot_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    log_decay: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    form: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention over M slots that tokens fill: p_t = softmax(scale P_tᵀ q_t), y_t = R_tᵀ p_t.

        P_t = P_{t-1} diag(a_t) + k_t s_tᵀ          keys of the slots [K M]
        R_t = diag(a_t) R_{t-1} + s_t v_tᵀ          values of the slots [M V]

    Args:
        q:             [B T H K] queries, G divides H and head h reads group h // (H/G).
        k:             [B T G K].
        v:             [B T G V].
        write:         [B T G M] s, how much of the token each slot takes.
        log_decay:     [B T G M] natural log of how much each slot keeps.
        initial_state: P [B G K M] and R [B G M V]; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n G ...].
        scale:         factor on the scores.
        form:          as in `recur.scan`.

    Returns: y [B T H V]; P and R after the last token.   Raises: ShapeError if axes disagree, and as `recur.scan`.
    Cost: that of two scans.   Source: Zhang et al. 2024, arXiv:2409.07146.

    >>> x = torch.ones(1, 3, 1, 2)
    >>> v = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    >>> recur.primitives.columns.slot_scan(x, x, v, x, torch.full_like(x, -torch.inf))[0].flatten()  # nothing kept
    tensor([1., 2., 3.])
    """
    bind("slot_scan", k=(k, "B T G K"), v=(v, "B T G V"), write=(write, "B T G M"), log_decay=(log_decay, "B T G M"))
    H, G = q.shape[2], k.shape[2]
    if H % G:
        raise ShapeError(f"slot_scan: G must divide H, got G={G} (k) and H={H} (q)")
    keys, values = (None, None) if initial_state is None else initial_state
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "form": form}
    reads = q.unflatten(2, (G, H // G)).transpose(2, 3)  # [B T R G K]: the heads of a group
    scores, keys = column_scan(reads, k, write, log_decay, initial_state=keys, scale=scale, **options)
    p = scores.to(accumulation_dtype(scores)).softmax(-1)
    y, values = scan(p, write, v, log_decay, initial_state=values, **options)
    return y.transpose(2, 3).flatten(2, 3), (keys, values)


def slot_gates(logits: Tensor, *, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Writes and decays of slots whose weights are normalised over time: z = logcumsumexp(s), exp(s - z), z_{t-1} - z.

    Args: logits: [B T G M] s; initial_state: [B G M] z before the first token, whose decay is 1 when omitted.
    Returns: write [B T G M], log_decay [B T G M], the last z.   Source: Peng et al. 2022, arXiv:2110.02488.
    """
    s = logits.to(accumulation_dtype(logits))
    joined = s if initial_state is None else torch.cat([initial_state[:, None].to(s.dtype), s], 1)
    z = joined.logcumsumexp(1)
    before = torch.cat([z[:, :1], z[:, :-1]], 1) if initial_state is None else z[:, :-1]
    z = z if initial_state is None else z[:, 1:]
    return (s - z).exp(), before - z, z[:, -1]


def oja_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    form: str = "auto",
) -> ScanOut:
    """Oja's rule with gates: a delta rule of transposed roles, whose error is in the keys, not in the values.

        S' = S_{t-1} diag(a_t),  S_t = S' + beta_t (k_t − S' v_t) v_tᵀ,  y_t = scale S_tᵀ q_t

    The errors u_t = beta_t (k_t − S' v_t) come from a delta rule on the transposed state, whose query is the value of
    the next token, decayed as that token will; they are then what `column_scan` writes.

    Args:
        q:             [B T H K] queries.
        k:             [B T H K] keys.
        v:             [B T H V], of length 1 or less, for the rule to be stable.
        log_decay:     [B T H V] natural log of the gates.
        beta:          [B T H].
        initial_state: [B H K V]; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n H K V].
        scale:         factor on y.
        form:          as in `recur.scan`.

    Returns: y [B T H V]; state [B H K V].   Raises: as `recur.scan`.   Cost: that of two scans.
    Source: Oja 1982, doi:10.1007/BF00275687; its gated form is in released code.

    >>> x = torch.ones(1, 2, 1, 1)
    >>> k = torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    >>> recur.primitives.columns.oja_scan(x, k, x, 0 * x, x[..., 0]).y.flatten()  # each key replaces the one before it
    tensor([5., 7.])
    """
    sizes = bind("oja_scan", q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T H V"), log_decay=(log_decay, "B T H V"))
    real = accumulation_dtype(q, k, v, log_decay, beta, initial_state)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "form": form}
    reads = log_decay.to(real).exp() * v.to(real)  # S' v_t, read in S_{t-1}
    T, borders = v.shape[1], mirror(cu_seqlens, v.shape[1])
    ahead = token_shift(reads.flatten(2).flip(1), cu_seqlens=borders).y.flip(1).view(reads.shape)
    start = None if initial_state is None else initial_state.mT
    found, _ = scan(ahead, v, k.to(real), log_decay, beta=beta, initial_state=start, **options)
    first = None
    if initial_state is not None and T:
        at = reads[:, 0] if cu_seqlens is None else reads[0, cu_seqlens[:-1].clamp(max=T - 1).long()]
        first = torch.einsum("bhkv,bhv->bhk", initial_state.to(real), at).flatten(1)[:, None]
    found = token_shift(found.flatten(2), initial_state=first, cu_seqlens=cu_seqlens).y.unflatten(2, (sizes["H"], -1))
    errors = beta.to(real)[..., None] * (k.to(real) - found)
    y, state = column_scan(q, errors, v, log_decay, initial_state=initial_state, scale=scale, **options)
    return ScanOut(y, state)
