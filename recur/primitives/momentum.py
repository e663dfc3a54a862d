"""The delta rule with momentum: two matrices per head, of which one is the other's velocity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.forms import ScanOut, first_state, state_count, unroll
from recur.primitives.operators import one_node, schema_of
from recur.shapes import accumulation_dtype, bind


def momentum_scan(
    q: Tensor,
    k: Tensor,
    p: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor,
    step: Tensor,
    rate: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    form: str = "auto",
) -> ScanOut:
    """Gradient descent with momentum on the error of what p reads: a token loop.

        M_t = m_t M_{t-1} − eta_t k_t (v_t − S_{t-1}ᵀ p_t)ᵀ,  S_t = a_t S_{t-1} − beta_t M_t,  y_t = scale S_tᵀ q_t

    Args:
        q:             [B T H K] queries.
        k:             [B T H K] keys under which the error is written.
        p:             [B T H K] keys that read what the error is of.
        v:             [B T H V].
        log_decay:     [B T H] log a.
        log_momentum:  [B T H] log m.
        step:          [B T H] beta.
        rate:          [B T H] eta.
        initial_state: [B 2 H K V] S and M; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n 2 H K V].
        scale:         factor on y.
        form:          "recurrent", the token loop; "chunked" and "auto", the same loop, in a graph as one node with
                       first derivatives.

    Returns: y [B T H V]; state [B 2 H K V].
    Raises: ShapeError if axes disagree, NotImplementedError for another form.
    Cost: T steps, each O(H K V): an error stays in M for many tokens, so this is not a wide step.

    >>> x, ones = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1)
    >>> forgotten = torch.full_like(ones, -torch.inf)  # momentum 0 is the delta rule
    >>> v = torch.tensor([5.0, 7.0, 2.0]).view(1, 3, 1, 1)
    >>> recur.primitives.momentum.momentum_scan(x, x, x, v, 0 * ones, forgotten, ones, ones).y.flatten()
    tensor([5., 7., 2.])
    """
    numbers = {"log_decay": log_decay, "log_momentum": log_momentum, "step": step, "rate": rate}
    vectors = {"q": q, "k": k, "p": p}
    letters = {name: (x, "B T H") for name, x in numbers.items()} | {n: (x, "B T H K") for n, x in vectors.items()}
    bind("momentum_scan", v=(v, "B T H V"), **letters)
    if form not in ("auto", "recurrent", "chunked"):
        raise NotImplementedError(f"momentum_scan: form={form!r} is not available here; these are: recurrent, chunked")
    if form == "auto":
        kernel.without("momentum_scan", "recurrent", v, "no kernel keeps a momentum", "scan(beta=), which has none")
    loop = _loop if form == "recurrent" else _node
    tokens = (q, k, p, v, log_decay, log_momentum, step, rate)
    return ScanOut(*loop(*tokens, initial_state, cu_seqlens, scale))


def momentum_step(state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One token, pure: y [B H V] and the state [B 2 H K V]."""
    q, k, p, v, log_decay, log_momentum, step, rate = (tokens[name] for name in TOKENS)
    S, M = state.unbind(1)
    error = v - torch.einsum("bhkv,bhk->bhv", S, p)
    M = log_momentum.exp()[..., None, None] * M - (rate[..., None] * k)[..., None] * error[..., None, :]
    S = log_decay.exp()[..., None, None] * S - step[..., None, None] * M
    return torch.einsum("bhkv,bhk->bhv", S, q), torch.stack([S, M], 1)


class _Inputs(NamedTuple):
    """What the scan takes: the tokens of `momentum_step`, and the rest."""

    q: Tensor
    k: Tensor
    p: Tensor
    v: Tensor
    log_decay: Tensor
    log_momentum: Tensor
    step: Tensor
    rate: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float


TOKENS = _Inputs._fields[:8]


def _loop(*inputs: Any) -> tuple[Tensor, Tensor]:
    """One token after another: y [B T H V] of v's dtype and the state [n 2 H K V]."""
    x = _Inputs(*inputs)
    real, v = accumulation_dtype(*x[:-2]), x.v
    start = first_state(v, (2, v.shape[2], x.q.shape[3], v.shape[3]), real, x.initial_state, x.cu_seqlens)
    if v.shape[1] == 0:
        return v, start
    tokens: dict[str, Any] = {name: getattr(x, name).to(real) for name in TOKENS}
    y, state = unroll(momentum_step, start, x.cu_seqlens, **{**tokens, "q": tokens["q"] * x.scale})
    return y.to(v.dtype), state


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    x = _Inputs(*inputs)
    B, _, H, V = x.v.shape
    state = (state_count(B, x.cu_seqlens), 2, H, x.q.shape[3], V)
    return x.v.new_empty(x.v.shape), x.v.new_empty(state, dtype=accumulation_dtype(*x[:-2]))


_node = one_node("recur::momentum_scan", _loop, _fake, schema=schema_of(_Inputs, outputs=2))
