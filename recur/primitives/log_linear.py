"""Log-linear attention: a state per level of a binary tree over the past, read with a weight per level."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.forms import ScanOut, document_of, first_state, state_count
from recur.primitives.operators import one_node, schema_of
from recur.shapes import ShapeError, accumulation_dtype, bind, readable


def log_linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weights: Tensor,
    *,
    initial_state: Tensor | None = None,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> ScanOut:
    """Linear attention whose weights also depend on how far back a token lies, in powers of two.

        y_t = sum_{s<=t} w_t[l(t, s)] exp(sum_{s<r<=t} log a_r) (q_t . k_s) v_s

    l(t, t) = 0, else l(t, s) is the bit length of (t xor s): the level of the Fenwick tree over 0 .. t that holds s.

    Args:
        q:             [B T G K] queries, G divides H.
        k:             [B T G K] keys.
        v:             [B T H V].
        log_decay:     [B T H] natural log of a.
        weights:       [B T H L] w; L levels reach 2^(L - 1) tokens.
        initial_state: [B L H K V] what each level holds before the first token; zeros when omitted.
        position:      [B] tokens seen before the first; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n L H K V].
        form:          "recurrent", the token loop with L states; "parallel", all pairs of tokens, from an empty state;
                       "chunked" and "auto" are "parallel" from an empty state and "recurrent" otherwise. In a graph
                       all but "recurrent" are one node with first derivatives.

    Returns: y [B T H V] of v's dtype; state [B L H K V].
    Raises: ShapeError if axes disagree, ValueError if a sequence is longer than the levels reach (on a CPU),
        NotImplementedError for another form.
    Cost: "recurrent" O(T L H K V) time and O(L H K V) memory; "parallel" O(T^2).
    Source: Guo et al. 2025, arXiv:2506.04761.

    >>> x, w = torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 3)
    >>> recur.primitives.log_linear.log_linear_scan(x, x, x, 0 * x[..., 0], w).y.flatten()  # weights of 1: a sum
    tensor([1., 2., 3., 4.])
    """
    sizes = bind(
        "log_linear_scan", q=(q, "B T G K"), k=(k, "B T G K"), v=(v, "B T H V"), log_decay=(log_decay, "B T H")
    )
    bind("log_linear_scan", v=(v, "B T H V"), weights=(weights, "B T H L"))
    H, G = sizes["H"], sizes["G"]
    if G == 0 or H % G:
        raise ShapeError(f"log_linear_scan: G must divide H, got G={G} (q) and H={H} (v)")
    if form not in ("auto", "recurrent", "chunked", "parallel"):
        raise NotImplementedError(
            f"log_linear_scan: form={form!r} is not available here; these are: recurrent, chunked, parallel"
        )
    if form == "parallel" and (initial_state is not None or position is not None):
        raise NotImplementedError(
            "log_linear_scan: form='parallel' begins with an empty state; form='recurrent' goes on"
        )
    if form == "auto":
        runs = "parallel" if initial_state is None and position is None else "recurrent"
        kernel.without("log_linear_scan", runs, v, "no kernel keeps the levels of a tree", "scan, which has one level")
    run = _run if form == "recurrent" else _node
    return ScanOut(*run(form, q, k, v, log_decay, weights, initial_state, position, cu_seqlens))


class _Inputs(NamedTuple):
    form: str
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    weights: Tensor
    initial_state: Tensor | None
    position: Tensor | None
    cu_seqlens: Tensor | None


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    """y [B T H V] of v's dtype and the state [n L H K V]."""
    form, q, k, v, log_decay, weights, initial_state, position, cu_seqlens = _Inputs(*inputs)
    B, T, H, V = v.shape
    K, L = q.shape[3], weights.shape[3]
    real = accumulation_dtype(q, k, v, log_decay, weights, initial_state)
    q, k = (x.to(real).repeat_interleave(H // q.shape[2], 2) for x in (q, k))
    v_wide, decay, w = v.to(real), log_decay.to(real), weights.to(real)
    rows = state_count(B, cu_seqlens)
    seen = torch.zeros(rows, dtype=torch.long, device=q.device) if position is None else position
    document = torch.arange(rows, device=q.device)[:, None].expand(rows, T)
    at = seen[:, None] + torch.arange(T, device=q.device)
    if cu_seqlens is not None:
        document = document_of(cu_seqlens, T)[None]
        at = (seen[document[0]] + torch.arange(T, device=q.device) - cu_seqlens[document[0]])[None]
    if readable(at) and at.numel() and int(at.max()) >= 2 ** (L - 1):
        raise ValueError(f"log_linear_scan: L={L} levels reach {2 ** (L - 1)} tokens, got {int(at.max()) + 1}")
    if form != "recurrent" and initial_state is None and position is None and T:
        y, state = _pairs(q, k, v_wide, decay, w, at, document, rows)
    else:
        start = first_state(v, (L, H, K, V), real, initial_state, cu_seqlens)
        y, state = _loop(q, k, v_wide, decay, w, at, document, start)
    return y.to(v.dtype), state


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    x = _Inputs(*inputs)
    B, _, H, V = x.v.shape
    state = (state_count(B, x.cu_seqlens), x.weights.shape[3], H, x.q.shape[3], V)
    real = accumulation_dtype(x.q, x.k, x.v, x.log_decay, x.weights, x.initial_state)
    return x.v.new_empty(x.v.shape), x.v.new_empty(state, dtype=real)


_node = one_node("recur::log_linear_scan", _run, _fake, schema=schema_of(_Inputs, outputs=2))


def _pairs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, w: Tensor, at: Tensor, document: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """All pairs of tokens; what each level holds at the end.

    What is not finite counts as 0, so that 0 times it reaches no other token, and y and states that see it are NaN.
    """
    L, seen = w.shape[3], (at[:, :, None] >= at[:, None]) & (document[:, :, None] == document[:, None])  # [B T S]
    own = ~(q.isfinite().all(-1) & w.isfinite().all(-1))  # [B T H]
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1) & decay.isfinite() & decay.exp().isfinite())
    q, w = (x.masked_fill(own[..., None], 0) for x in (q, w))
    k, v = (x.masked_fill(bad[..., None], 0) for x in (k, v))
    since = decay.masked_fill(bad, 0).cumsum(1)
    gap = (since[:, :, None] - since[:, None]).masked_fill(~seen[..., None], -torch.inf)
    scores = torch.einsum("bthk,bshk->btsh", q, k).masked_fill(~seen[..., None], 0) * gap.exp()
    level = bit_length(at[:, :, None] ^ at[:, None]).clamp(max=L - 1)
    weight = w.transpose(2, 3).gather(2, level[..., None].expand(*level.shape, w.shape[2]))  # [B T S H]
    lost = own | (torch.einsum("bts,bsh->bth", seen.to(k.dtype), bad.to(k.dtype)) > 0)
    y = torch.einsum("btsh,bshv->bthv", scores * weight, v).masked_fill(lost[..., None], torch.nan)
    # the levels as the last token of each row or document finds them
    last = torch.stack([torch.where(document == row, at, -1).flatten().argmax() for row in range(rows)])
    there = torch.stack([(document == row).any() for row in range(rows)])
    row, token = last // at.shape[1], last % at.shape[1]
    levels = torch.arange(L, device=q.device)  # not one_hot, which reads its argument from the host
    held = ((level[row, token][..., None] == levels) & (seen[row, token] & there[:, None])[..., None]).to(k.dtype)
    state = torch.einsum("nshk,nsh,nsl,nshv->nlhkv", k[row], gap[row, token].exp(), held, v[row])
    return y, state.masked_fill((lost[row, token] & there[:, None])[:, None, :, None, None], torch.nan)


def _loop(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, w: Tensor, at: Tensor, document: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after another; state [n L H K V]."""
    ys, L = [], w.shape[3]
    levels = torch.arange(L, device=q.device)
    for t in range(q.shape[1]):
        rows = document[:, t]
        mine = state.index_select(0, rows)
        mine = _merged(mine, at[:, t], levels) * decay[:, t].exp()[:, None, :, None, None]
        own = k[:, t, :, :, None] * v[:, t, :, None, :]
        mine = torch.cat([own[:, None], mine[:, 1:]], 1)
        ys.append(torch.einsum("blhkv,bhk,bhl->bhv", mine, q[:, t], w[:, t]))
        state = state.index_copy(0, rows, mine)
    return torch.stack(ys, 1) if ys else v, state


def _merged(state: Tensor, at: Tensor, levels: Tensor) -> Tensor:
    """What each level holds for the token at this position: the lowest ones join where one ends, in a new block."""
    zeros = bit_length(at & -at)  # one more than the trailing zeros of the position; 0 for the first token
    joined = levels < zeros[:, None]
    new = (levels == zeros[:, None]) & (zeros > 0)[:, None]
    shape = (*joined.shape, 1, 1, 1)
    total = (state * joined.view(shape)).sum(1, keepdim=True)
    kept = state * (~joined).view(shape)
    return torch.where(new.view(shape), kept + total, kept)


def bit_length(n: Tensor) -> Tensor:
    """Bits of integers below 2^52: 0 for 0, 1 for 1, 2 for 2 and 3, ..."""
    return torch.frexp(n.double()).exponent.long()
