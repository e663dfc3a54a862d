"""The scan with a matrix state: the public door of the outer-product expansion and of the delta rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.delta import delta_scan, delta_step
from recur.primitives.diagonal import check_state, number_of, state_number
from recur.primitives.forms import ScanOut, check_packing, choose_form, first_state, right_to_left, unroll
from recur.primitives.operators import one_node
from recur.primitives.outer import narrow_scan, outer_scan, outer_step
from recur.shapes import ShapeError, accumulation_dtype, bind, check_float, check_given, check_number, without_autocast

CHUNK = 64  # tokens a chunk, and twice what the delta rule takes: measured on a CPU


class Given(NamedTuple):
    """What a scan, or a step, is given beside a state."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None


def scan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    form: str = "auto",
) -> ScanOut:
    """Scan with a matrix state S [K V] a head: what is written with key k is read with query q.

        S_t = A_t S_{t-1} + k_t u_tᵀ        A_t = exp(log_decay_t), one number, or one a row of S
        u_t = v_t, or with beta u_t = beta_t (v_t − Re(A_t S_{t-1})ᵀ k_t)
        y_t = scale Re(S_t)ᵀ q_t, or with bonus y_t = scale Re(S_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t

    Args:
        q: [B T G K] queries, G divides H and head h reads group h // (H/G).
        k: [B T G K] keys; None ties them to the gate, k = 1 − exp(log_decay), then real and [H K] or [B T H K].
        v: [B T H V] values.
        log_decay: None | [H] | [H K] | [B T H] | [B T H K] natural log of the gate, real part <= 0 (−inf forgets),
            imaginary part in radians.
        beta: [B T H] write strength of the delta rule.
        bonus: [H] | [H K] weight of the current token, read before the state is decayed and written; not with beta.
        initial_state: [B H K V] S before the first token; zeros when omitted.
        cu_seqlens: [n+1] int borders of n documents lying in one row: B is 1 and states are [n H K V].
        reverse: read from the last token to the first: initial_state enters after token T-1, state is S at token 0.
        scale: factor on y.
        form: "recurrent", the token loop; "chunked", matmuls inside chunks and a scan over them; "parallel", one chunk;
            "triton", the kernel; "auto" is "triton" for what it covers on a GPU and "chunked" for all else.

    Returns: y [B T H V] of v's dtype; state [B H K V] float32 (float64 if an input is), complex if log_decay is.
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError for arguments that exclude each other,
        NotImplementedError for forms.
    Cost: "chunked" O(T (C + K) (K + V)) a head with C = 64, and O(T (C + K V / C)) memory. Defined by `outer_step` and
        `delta_step`.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236; Yang et al. 2024, arXiv:2312.06635 and arXiv:2412.06464.

    >>> k, v = torch.eye(3)[None, :, None], torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    >>> q = k[:, [0, 0, 1]]  # token 1 asks for key 0 again, token 2 for key 1
    >>> y, state = recur.scan(q, k, v)
    >>> y.flatten(), state.shape
    (tensor([1., 1., 2.]), torch.Size([1, 1, 3, 1]))
    """
    states = "B H K V" if cu_seqlens is None else "n H K V"
    given = Given(q, k, v, log_decay, beta, bonus)
    _check("scan", "B T", given, "H | H K | B T H | B T H K", initial_state=(initial_state, states))
    (B, T, H, V), K = v.shape, q.shape[3]
    real = accumulation_dtype(*given, initial_state)
    number = state_number("scan", real, "log_decay is not complex", (log_decay,), initial_state=initial_state)
    refusal = partial(kernel.refusal, number, v.device, K=K)
    form = choose_form("scan", form, ("recurrent", "chunked", "parallel", "triton"), v.device, refusal)
    check_packing("scan", cu_seqlens, B, T, initial_state)
    if T == 0:
        there = [x for x in given if x is not None]
        nothing = sum(x.real.sum() if x.is_complex() else x.sum() for x in there)  # keeps y in their graph
        initial = first_state(v, (H, K, V), number, initial_state, cu_seqlens)
        return ScanOut((v * nothing).to(v.dtype), initial.clone())
    if log_decay is not None and log_decay.ndim <= 2:
        given = given._replace(log_decay=log_decay[None, None])
    if form == "triton":
        return kernel.scan(initial_state, cu_seqlens, **given._asdict(), scale=scale, reverse=reverse)
    with without_autocast(v):
        tokens = _tokens(real, given, scale)
        weight = None if bonus is None else bonus.to(real).reshape(H, -1)
        run = _choose(form, "beta" in tokens, weight)
        initial = first_state(v, (H, K, V), number, initial_state, cu_seqlens)
        y, state = (right_to_left(run) if reverse else run)(initial, cu_seqlens, **tokens)
    return ScanOut(y.to(v.dtype), state)


def step(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One token of `scan`. `state` is overwritten; no gradient.

    Args:
        q: [B G K] query, as in `scan`.
        k: [B G K] key; None ties it to the gate.
        v: [B H V] value.
        log_decay: None | [H] | [H K] | [B H] | [B H K]. Two axes are [B H] if their sizes are B and H, else [H K].
        state: [B H K V] float32 (float64 if an input is), complex if log_decay is; or bfloat16 where it would be
            float32: half the bytes, rounded after every token (0.6% of y and S where some 16 tokens are
            remembered).
        beta: [B H] write strength of the delta rule.
        bonus: [H] | [H K] weight of the current token, as in `scan`.
        scale: factor on y.

    Returns: y [B H V] of v's dtype.   Raises: as `scan`.
    Cost: O(H K V) a row; on a GPU one launch that reads the state once and writes it once.

    >>> state, half = torch.zeros(1, 1, 1, 1), torch.tensor([0.5]).log()
    >>> one = torch.ones(1, 1, 1)
    >>> [recur.step(one, one, one, half, state).item() for _ in range(3)]
    [1.0, 1.5, 1.75]
    """
    check_given("step", q=q, v=v, state=state)
    token_decay = log_decay is not None and (log_decay.ndim == 3 or log_decay.shape == v.shape[:2])
    decays = "H | B H | B H K" if token_decay else "H | H K"
    given = Given(q, k, v, log_decay, beta, bonus)
    _check("step", "B", given, decays, state=(state, "B H K V"))
    real = accumulation_dtype(*given, state)
    number = number_of(real, log_decay)
    check_state("step", state, number)
    if log_decay is not None and not token_decay:
        given = given._replace(log_decay=log_decay[None])
    if kernel.takes_step(q.shape[-1], state):
        return _launch(given, state, scale)
    with torch.no_grad(), without_autocast(state):
        present = {name: x for name, x in given._asdict().items() if x is not None and name != "bonus"}
        tokens = _tokens(real, given._replace(**{name: x[:, None] for name, x in present.items()}), scale)
        weight = None if bonus is None else bonus.to(real).reshape(state.shape[1], -1)
        advance = _step_of("beta" in tokens, weight)
        y, new = advance(state.to(number), **{name: token.squeeze(1) for name, token in tokens.items()})
        state.copy_(new)
        return y.to(v.dtype)


def _launch(given: Given, state: Tensor, scale: float) -> Tensor:
    """`step` by the kernel, with log_decay [B|1 H] | [B|1 H K]."""

    def matrix(x: Tensor | None) -> Tensor | None:
        """[B H] | [B H K] -> [B H 1|K 1]."""
        return None if x is None else (x if x.ndim == 3 else x.unsqueeze(-1)).unsqueeze(-1)

    q, k, v, log_decay, beta, bonus = given
    operands = {"q": matrix(q), "k": matrix(k), "log_decay": matrix(log_decay), "rate": matrix(beta)}
    operands["bonus"] = None if bonus is None else matrix(bonus[None])
    rule = "outer" if beta is None else "delta"
    return kernel.step(rule, state, v.unsqueeze(2), **operands, scale=scale, tied=k is None)


def _check(function: str, lead: str, given: Given, decays: str, **state: tuple[Tensor | None, str]) -> None:
    """Raise unless axes and dtypes fit and no two arguments exclude each other."""
    q, k, v, log_decay, beta, bonus = given
    sizes = bind(
        function,
        q=(q, f"{lead} G K"),
        k=(k, f"{lead} G K"),
        v=(v, f"{lead} H V"),
        log_decay=(log_decay, decays),
        beta=(beta, f"{lead} H"),
        bonus=(bonus, "H | H K"),
        **state,
    )
    check_float(function, q=q, k=k, v=v, beta=beta, bonus=bonus)
    check_number(function, log_decay=log_decay)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"{function}: G must divide H, got G={sizes['G']} (q) and H={sizes['H']} (v)")
    if beta is not None and bonus is not None:
        raise ValueError(f"{function}: bonus must be None with beta: the delta rule reads after the write, got both")
    if k is None and (log_decay is None or log_decay.is_complex() or log_decay.shape[-2:] != (sizes["H"], sizes["K"])):
        got = None if log_decay is None else f"{log_decay.dtype} {tuple(log_decay.shape)}"
        raise ValueError(
            f"{function}: k=None is 1 − exp(log_decay), so log_decay must be real and end in [H K]; "
            f"expected H={sizes['H']}, K={sizes['K']}, got {got}"
        )


def _tokens(real: torch.dtype, given: Given, scale: float) -> dict[str, Tensor]:
    """The tensors [B T ...] that every form takes, wide enough to sum in; log_decay [B|1 T|1 H K|1]."""
    q, k, v, log_decay, beta, _ = given
    tokens = {"q": q.to(real) if scale == 1.0 else q.to(real) * scale, "v": v.to(real)}
    if log_decay is not None:
        log_decay = log_decay.to(number_of(real, log_decay))
        tokens["log_decay"] = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
    tokens["k"] = -torch.expm1(tokens["log_decay"]).expand(*v.shape[:3], -1) if k is None else k.to(real)
    if beta is not None:
        tokens["beta"] = beta.to(real)
    return tokens


def _choose(form: str, delta: bool, bonus: Tensor | None) -> Callable[..., ScanOut]:
    """The scan `(initial, cu_seqlens, **tokens)`."""
    return partial(unroll, _step_of(delta, bonus)) if form == "recurrent" else partial(_by_chunks, form, bonus)


def _by_chunks(
    form: str,
    bonus: Tensor | None,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> ScanOut:
    return ScanOut(*_chunked(form, initial, cu_seqlens, q, k, v, log_decay, beta, bonus))


def _run_chunked(
    form: str,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan "chunked", or "parallel" in one chunk: y [B T H V] and the state."""
    _, T, _, K = k.shape
    whole = 1 << (T - 1).bit_length()
    size = whole if form == "parallel" else min(CHUNK if beta is None else max(1, CHUNK // 2), whole)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    if beta is not None:
        return delta_scan(initial, cu_seqlens, **given, beta=beta, chunk_size=size)
    if K == 1 and bonus is None and form == "chunked":
        return narrow_scan(initial, cu_seqlens, **given)
    return outer_scan(initial, cu_seqlens, **given, bonus=bonus, chunk_size=size)


def _fake_chunked(
    form: str,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), initial.new_empty(initial.shape)


_chunked = one_node("recur::chunked_scan", _run_chunked, _fake_chunked)


def _step_of(delta: bool, bonus: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    return delta_step if delta else partial(outer_step, bonus=bonus)
