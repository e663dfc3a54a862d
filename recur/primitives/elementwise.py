"""Scans whose gate differs in every entry of a matrix state: Mamba's selective scan and Longhorn's online scan.

Both are S_t = A_t * S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t; see segments.py, in whose axes channels stand in their groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.diagonal import check_state
from recur.primitives.forms import ScanOut, check_packing, choose_form, first_state, right_to_left, unroll
from recur.primitives.operators import batched_at, operator, remember
from recur.primitives.segments import segments, update
from recur.shapes import (
    ShapeError,
    accumulation_dtype,
    bind,
    check_float,
    check_given,
    per_signature,
    readable,
    without_autocast,
)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    form: str = "auto",
) -> ScanOut:
    """Mamba's selective scan, a vector of N memories per channel.

        S_t[v, n] = exp(delta_t[v] A[v, n]) S_{t-1}[v, n] + delta_t[v] x_t[v] B_t[n]
        y_t[v] = sum_n C_t[n] S_t[v, n]

    Args:
        x: [B T V] what each token writes.
        delta: [B T V] step size, already positive; with 0 the token has no effect.
        A: [V N] log decay per unit of delta, negative.
        B: [B T N] | [B T G N] | [V N] weights of writing; channel v uses group v // (V/G).
        C: [B T N] | [B T G N] | [V N] weights of reading, with groups as B.
        initial_state: [B V N] S before the first token; zeros when omitted.
        cu_seqlens: [n+1] int borders of n documents lying in one row: B is 1 and states are [n V N].
        reverse: read from the last token to the first: initial_state enters after token T-1, state is S at token 0.
        form: "recurrent", the token loop; "chunked", segments that the backward computes again; "triton", the kernel;
            "auto" is "triton" for what that covers on a GPU and "chunked" for all else. In no form do NaN and infinity
            reach an earlier token.

    Returns: y [B T V] of x's dtype; state [B V N] float32 (float64 if an input is).
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError and NotImplementedError for forms.
    Cost: O(B T V N) time, memory for one segment and one state per segment. Defined by `selective_step`.
    Source: Gu and Dao 2023, arXiv:2312.00752.

    >>> x, delta = torch.ones(1, 3, 1), torch.ones(1, 3, 1)
    >>> A, ones = torch.tensor([[0.5]]).log(), torch.ones(1, 3, 1)
    >>> recur.selective_scan(x, delta, A, B=ones, C=ones).y.flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    weights, states = "B T N | B T G N | V N", "B V N" if cu_seqlens is None else "n V N"
    given = {"x": (x, "B T V"), "delta": (delta, "B T V"), "A": (A, "V N"), "B": (B, weights), "C": (C, weights)}
    sizes = _check("selective_scan", given, cu_seqlens, initial_state=(initial_state, states))
    return _scan("selective", form, sizes, (x, delta, A, B, C), initial_state, cu_seqlens, reverse)


def selective_step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """One token of `selective_scan`. `state` is overwritten; no gradient.

    Args:
        x: [B V] what the token writes.
        delta: [B V] step size, positive.
        A: [V N] log decay per unit of delta, negative.
        B: [B N] | [B G N] | [V N] weights of writing. Two axes are [B N] if the first has the size of the batch,
            else [V N].
        C: [B N] | [B G N] | [V N] weights of reading, with axes as B.
        state: [B V N] float32 (float64 if an input is), or bfloat16 (see `step`).

    Returns: y [B V] of x's dtype.   Raises: ShapeError, TypeError.   Cost: O(V N) a row, one launch on a GPU.

    >>> state, one, A = torch.zeros(1, 1, 1), torch.ones(1, 1), torch.tensor([[0.5]]).log()
    >>> [recur.selective_step(one, one, A, one, one, state).item() for _ in range(3)]
    [1.0, 1.5, 1.75]
    """
    check_given("selective_step", x=x, delta=delta, A=A, B=B, C=C, state=state)
    if x.ndim != 2:
        bind("selective_step", x=(x, "B V"))
    k, q = ("B N | B G N" if w.ndim != 2 or w.shape[0] == x.shape[0] else "V N" for w in (B, C))
    given = {"x": (x, "B V"), "delta": (delta, "B V"), "A": (A, "V N"), "B": (B, k), "C": (C, q)}
    sizes = _check("selective_step", given, None, state=(state, "B V N"))
    check_state("selective_step", state, accumulation_dtype(x, delta, A, B, C, state))
    B, C = (w if letters == "V N" else w[:, None] for w, letters in ((B, k), (C, q)))
    if kernel.takes_step(sizes["N"], state):
        return _launch("selective", sizes, state, x, delta, B, C, A)
    with torch.no_grad(), without_autocast(x):
        return _step("selective", sizes, (x[:, None], delta[:, None], A, B, C), state)


def online_scan(
    x: Tensor,
    rate: Tensor,
    k: Tensor,
    q: Tensor,
    *,
    diagonal: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    form: str = "auto",
) -> ScanOut:
    """Longhorn: each token is one proximal step of the regression "answer x when asked k", solved in closed form.

        eps_t = rate_t / (1 + rate_t |k_t|²), channel by channel;        y_t = S_t q_t
        diagonal:  S_t = (1 − eps_t k_t²ᵀ) * S_{t-1} + (eps_t x_t) k_tᵀ        entry by entry, the architecture
        exact:     S_t[v] = (I − eps_t[v] k_t k_tᵀ) S_{t-1}[v] + eps_t[v] x_t[v] k_t        row by row, the delta rule

    Args:
        x: [B T V] what the memory should answer.
        rate: [B T V] in [0, 1], weight of the token's error against keeping the memory.
        k: [B T N] | [B T G N] keys, of any norm; channel v uses group v // (V/G).
        q: [B T N] | [B T G N] queries, with groups as k.
        diagonal: keep only the diagonal of k kᵀ.
        initial_state: [B V N], as in `selective_scan`.
        cu_seqlens: [n+1] int, as in `selective_scan`.
        reverse: as in `selective_scan`.
        form: as in `selective_scan`; with diagonal=False as in `scan`.

    Returns: y [B T V] of x's dtype; state [B V N] float32 (float64 if an input is).
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError for rates and forms, NotImplementedError.
    Cost: as `selective_scan`; exact as `scan` with V heads of one value each. Defined by `online_step`.
    Source: Liu et al. 2024, arXiv:2407.14207.

    >>> x, rate, k = torch.ones(1, 3, 1), torch.ones(1, 3, 1), torch.ones(1, 3, 1)
    >>> recur.online_scan(x, rate, k, q=k).y.flatten()  # asked for the same key, it approaches x = 1
    tensor([0.5000, 0.7500, 0.8750])
    """
    keys, states = "B T N | B T G N", "B V N" if cu_seqlens is None else "n V N"
    given = {"x": (x, "B T V"), "rate": (rate, "B T V"), "k": (k, keys), "q": (q, keys)}
    sizes = _check("online_scan", given, cu_seqlens, initial_state=(initial_state, states))
    _check_rate("online_scan", rate)
    if diagonal:
        return _scan("online", form, sizes, (x, rate, k, q), initial_state, cu_seqlens, reverse)
    from recur.primitives.scan import scan  # here, because only this case needs it

    with without_autocast(x):
        query, key, value, beta = _delta(sizes, x, rate, k, q, initial_state)
        initial = None if initial_state is None else initial_state[..., None]
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "reverse": reverse, "form": form}
        y, state = scan(query, key, value, beta=beta, initial_state=initial, **options)
    return ScanOut(y[..., 0].to(x.dtype), state[..., 0])


def online_step(x: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Tensor, *, diagonal: bool = True) -> Tensor:
    """One token of `online_scan`. `state` is overwritten; no gradient.

    Args:
        x: [B V] what the memory should answer.
        rate: [B V] in [0, 1].
        k: [B N] | [B G N] key.
        q: [B N] | [B G N] query.
        state: [B V N] float32 (float64 if an input is) or bfloat16 (see `step`).
        diagonal: as in `online_scan`.

    Returns: y [B V] of x's dtype.   Raises: ShapeError, TypeError, ValueError for rates.   Cost: O(V N) a row.

    >>> state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
    >>> [recur.online_step(one, one, one, one, state).item() for _ in range(3)]
    [0.5, 0.75, 0.875]
    """
    keys = "B N | B G N"
    check_given("online_step", x=x, rate=rate, k=k, q=q, state=state)
    given = {"x": (x, "B V"), "rate": (rate, "B V"), "k": (k, keys), "q": (q, keys)}
    sizes = _check("online_step", given, None, state=(state, "B V N"))
    _check_rate("online_step", rate)
    check_state("online_step", state, accumulation_dtype(x, rate, k, q, state))
    x_t, rate_t, k_t, q_t = (token[:, None] for token in (x, rate, k, q))
    if kernel.takes_step(sizes["N"], state):
        return _launch("online" if diagonal else "exact", sizes, state, x, rate, k_t, q_t)
    with torch.no_grad(), without_autocast(x):
        if diagonal:
            return _step("online", sizes, (x_t, rate_t, k_t, q_t), state)
        from recur.primitives.scan import step  # here, because only this case needs it

        query, key, value, beta = (token[:, 0] for token in _delta(sizes, x_t, rate_t, k_t, q_t, state))
        return step(query, key, value, None, state[..., None], beta=beta)[..., 0].to(x.dtype)


# Public functions: checks, groups, and what each family makes of its arguments


def _check(
    function: str,
    given: dict[str, tuple[Tensor, str]],
    cu_seqlens: Tensor | None,
    **state: tuple[Tensor | None, str],
) -> dict[str, Any]:
    """The sizes of all letters, once everything that must be given fits, and the state."""
    tensors = tuple(tensor for tensor, _ in (*given.values(), *state.values()))
    options = function, cu_seqlens is None, *(letters for _, letters in given.values())
    sizes: dict[str, Any] = per_signature(_CHECKED, options, tensors, lambda: _sizes(function, given, **state))
    if "T" in sizes and cu_seqlens is not None:
        check_packing(function, cu_seqlens, sizes["B"], sizes["T"], *(tensor for tensor, _ in state.values()))
    return sizes


_CHECKED: dict[Hashable, dict[str, Any]] = {}


def _sizes(function: str, given: dict[str, tuple[Tensor, str]], **state: tuple[Tensor | None, str]) -> dict[str, Any]:
    check_given(function, **{name: tensor for name, (tensor, _) in given.items()})
    sizes = bind(function, **given, **state)
    check_float(function, **{name: tensor for name, (tensor, _) in {**given, **state}.items()})
    V, G = sizes["V"], sizes.setdefault("G", 1)
    if G == 0 or V % G != 0:
        raise ShapeError(f"{function}: G must divide V, got G={G} and V={V}")
    sizes["W"] = V // G
    return sizes


def _check_rate(function: str, rate: Tensor) -> None:
    if readable(rate):
        low, high = (bound.item() for bound in rate.detach().aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"{function}: rate must lie in [0, 1] (take its sigmoid), got {low:.3g} to {high:.3g}")


def _channels(tensor: Tensor, sizes: dict[str, Any]) -> Tensor:
    """[B T V] -> [B T G 1 W]."""
    return tensor.reshape(*tensor.shape[:-1], sizes["G"], 1, sizes["W"])


def _slots(tensor: Tensor, sizes: dict[str, Any]) -> Tensor:
    """[B T N] | [B T G N] -> [B T G N 1], [V N] -> [1 1 G N W]; one group stays one."""
    if tensor.ndim == 2:
        return tensor.reshape(1, 1, sizes["G"], sizes["W"], sizes["N"]).mT
    return (tensor if tensor.ndim == 4 else tensor.unsqueeze(2)).unsqueeze(-1)


def _enter(state: Tensor, sizes: dict[str, Any]) -> Tensor:
    """[B V N] -> [B G N W]."""
    return state.reshape(state.shape[0], sizes["G"], sizes["W"], sizes["N"]).mT


def _leave(state: Tensor) -> Tensor:
    """[B G N W] -> [B V N]."""
    return state.transpose(2, 3).flatten(1, 2)


def _selective(sizes: dict[str, Any], x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
    """u, k, q and what the gate is made of: delta and A."""
    made = {"u": _channels(delta * x, sizes), "k": _slots(B, sizes), "q": _slots(C, sizes)}
    return {**made, "delta": _channels(delta, sizes), "A": _slots(A, sizes)}


def _online(sizes: dict[str, Any], x: Tensor, rate: Tensor, k: Tensor, q: Tensor) -> dict[str, Tensor]:
    """u, k, q and what the gate 1 − eps k_n² is made of: the rate and k_n²."""
    x, rate = _channels(x, sizes), _channels(rate, sizes)
    k, q = _slots(k, sizes), _slots(q, sizes)
    square = k.square()
    eps = _step_size(rate, square.sum(-2, keepdim=True))
    return {"u": eps * x, "k": k, "q": q, "rate": rate, "square": square}


_TOKENS: dict[str, Callable[..., dict[str, Tensor]]] = {"selective": _selective, "online": _online}


def _tokens(family: str, sizes: dict[str, Any], inputs: tuple[Tensor, ...], state: Tensor | None) -> dict[str, Tensor]:
    """What every form takes, wide enough to sum in."""
    real = accumulation_dtype(*inputs, state)
    return _TOKENS[family](sizes, *(tensor.to(real) for tensor in inputs))


# rate and norm |k|² -> eps = rate / (1 + rate norm). Its derivative by the rate, 1 / (1 + rate norm)², is not the
# difference of two numbers that long keys make equal.


def _run_size(rate: Tensor, norm: Tensor) -> Tensor:
    return rate / (1 + rate * norm)


def _fake_size(rate: Tensor, norm: Tensor) -> Tensor:
    return rate.new_empty(torch.broadcast_shapes(rate.shape, norm.shape))


def _save_size(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    remember(ctx, *inputs)


def _gradients_size(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    rate, norm = ctx.saved_tensors
    slope = grad / (1 + rate * norm).square()
    return slope.sum_to_size(rate.shape), -(slope * rate.square()).sum_to_size(norm.shape)


def _tangent_size(ctx: Any, drate: Tensor, dnorm: Tensor) -> Tensor:
    rate, norm = ctx.saved_tensors
    return (drate - rate.square() * dnorm) / (1 + rate * norm).square()


_step_size = operator(
    "recur::step_size",
    _run_size,
    fake=_fake_size,
    save=_save_size,
    backward=_gradients_size,
    jvp=_tangent_size,
    vmap=batched_at(0, 0, out=0),
)


def _delta(
    sizes: dict[str, Any], x: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k [B T G N], v [B T V 1] and beta [B T V] of the delta rule with one head per channel."""
    real = accumulation_dtype(x, rate, k, q, state)
    x, rate = x.to(real), rate.to(real)
    k, q = (_slots(tensor.to(real), sizes)[..., 0] for tensor in (k, q))
    norm = k.square().sum(-1).repeat_interleave(sizes["V"] // k.shape[2], dim=2)
    k, q = (tensor.expand(-1, -1, sizes["G"], -1) for tensor in (k, q))
    return q, k, x[..., None], _step_size(rate, norm)


# Forms


def _launch(
    rule: str,
    sizes: dict[str, Any],
    state: Tensor,
    x: Tensor,
    rate: Tensor,
    k: Tensor,
    q: Tensor,
    log_decay: Tensor | None = None,
) -> Tensor:
    """A step by the kernel: x, rate [B V]; k, q [B 1 N] | [B 1 G N] | [V N]; log_decay [V N]."""
    q, k = (_slots(weights, sizes)[:, 0] for weights in (q, k))
    log_decay = None if log_decay is None else _slots(log_decay, sizes)[:, 0]
    x, rate = _channels(x, sizes), _channels(rate, sizes)
    return kernel.step(rule, _enter(state, sizes), x, q=q, k=k, log_decay=log_decay, rate=rate).flatten(1)


def _step(family: str, sizes: dict[str, Any], inputs: tuple[Tensor, ...], state: Tensor) -> Tensor:
    """A step of inputs [B 1 ...] in torch."""
    tokens = _tokens(family, sizes, inputs, state)
    entered = _enter(state, sizes).to(tokens["u"].dtype)
    y, S = update(family, entered, **{name: token[:, 0] for name, token in tokens.items()})
    state.copy_(_leave(S))
    return y.flatten(1).to(inputs[0].dtype)


def _scan(
    family: str,
    form: str,
    sizes: dict[str, Any],
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> ScanOut:
    """y [B T V] and the state [B V N]."""
    x, V, N = inputs[0], sizes["V"], sizes["N"]
    refusal = partial(kernel.refusal, accumulation_dtype(*inputs, initial_state), N=N)
    form = choose_form(f"{family}_scan", form, ("recurrent", "chunked", "triton"), kernel.device_of(x), refusal)
    if form == "triton":
        return kernel.elementwise(family, *inputs, initial_state, cu_seqlens=cu_seqlens, reverse=reverse)
    with without_autocast(x):
        tokens = _tokens(family, sizes, inputs, initial_state)
        initial = None
        if initial_state is not None or form == "recurrent" or sizes["T"] == 0:
            initial = first_state(x, (V, N), tokens["u"].dtype, initial_state, cu_seqlens)
        if sizes["T"] == 0 and initial is not None:
            return ScanOut(tokens["u"].flatten(2).to(x.dtype), initial.clone())
        entered = None if initial is None else _enter(initial, sizes).contiguous()
        recurrent = partial(unroll, partial(update, family))
        run: Callable[..., ScanOut] = recurrent if form == "recurrent" else partial(segments, family)
        y, state = (right_to_left(run) if reverse else run)(entered, cu_seqlens, **tokens)
    return ScanOut(y.flatten(2).to(x.dtype), _leave(state))
