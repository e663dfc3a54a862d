"""The scan with a matrix state: the public functions of outer products, delta rules and everything between."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.chunked import chunked_scan
from recur.primitives.diagonal import check_state, number_of, state_number
from recur.primitives.forms import ScanOut, check_packing, choose_form, first_state, right_to_left, unroll
from recur.primitives.reference import wide_step
from recur.primitives.sub_tokens import sub_tokens
from recur.shapes import (
    ShapeError,
    accumulation_dtype,
    bind,
    check_float,
    check_given,
    check_number,
    per_signature,
    pick,
    without_autocast,
)


class Given(NamedTuple):
    """What a scan, or a step, is given beside a state."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    bonus: Tensor | None = None
    erase: Tensor | None = None
    remove: Tensor | None = None
    write: Tensor | None = None


def scan(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    erase: Tensor | None = None,
    erase_from: str = "decayed",
    remove: Tensor | None = None,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    form: str = "auto",
) -> ScanOut:
    """Scan with a matrix state S [K V] per head: what is written with key k is read with query q.

        S'  = A_t S_{t-1}                          A_t = exp(log_decay_t), one number, or one per row of S
        S_t = S' + k_t (w_t ⊙ v_t)ᵀ − b_t (Re(Ŝ)ᵀ e_t)ᵀ         e erase, b remove, w write; Ŝ is S', or S_{t-1}
        y_t = scale Re(S_t)ᵀ q_t, or with bonus y_t = scale Re(S_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t

    M writes per token happen one after another, m = 1 … M: decay before the first, read after the last, and a write
    erases from what the one before it left.

    Args:
        q: [B T G K] queries, G divides H and head h reads group h // (H/G); [B T R G K] reads R times per token.
        k: [B T G K] keys, or [B T M G K] for M writes per token; None ties them to the gate, k = 1 − exp(log_decay),
            then real and [H K] or [B T H K].
        v: [B T H V] | [B T M H V] values.
        log_decay: None | [H] | [H K] | [B T H] | [B T H K] natural log of the gate, real part <= 0 (−inf forgets),
            imaginary part in radians.
        beta: [B T H] | [B T M H] write strength of the delta rule: short for erase = beta k and write = beta.
        bonus: [H] | [H K] weight of the current token, read before the state is decayed and written; alone.
        erase: [B T G|H K] | [B T M G|H K] erase key e; nothing is erased when omitted.
        erase_from: "decayed", from A_t S_{t-1}, or "previous", from S_{t-1} (the first of several writes).
        remove: [B T G|H K] | [B T M G|H K] removal key b; k when omitted.
        write: [B T H] | [B T H V] | [B T M H] | [B T M H V] write gate w; 1 when omitted.
        initial_state: [B H K V] S before the first token; zeros when omitted.
        cu_seqlens: [n+1] int borders of n documents lying in one row: B is 1 and states are [n H K V].
        reverse: read from the last token to the first: initial_state enters after token T-1, state is S at token 0.
        scale: factor on y.
        form: "recurrent", the token loop; "chunked", matmuls inside chunks and a scan over them; "parallel", one chunk;
            "triton", the kernel; "auto" is "triton" for what it covers on a GPU and "chunked" for all else. With
            "triton", NaN and infinity may reach earlier tokens of their chunk of 64; in no other form an earlier token.

    Returns: y [B T H V], or [B T R H V], of v's dtype; state [B H K V] float32 (float64 if an input is), complex if
        log_decay is.
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError for arguments that exclude each other,
        NotImplementedError for forms.
    Cost: "chunked" O(T (C + K) (K + V)) per head with C = 64, and O(T (C + K V / C)) memory; twice that where something
        is erased, three times with a removal key; times M. In "triton" M writes and R reads are M + R − 1 tokens, twice
        as many writes with a removal key. Defined by `wide_step`.
    Source: Katharopoulos et al. 2020, arXiv:2006.16236; Yang et al. 2024, arXiv:2312.06635 and arXiv:2412.06464;
        Siems et al. 2025, arXiv:2502.10297; Peng et al. 2025, arXiv:2503.14456.

    >>> k = torch.nn.functional.normalize(torch.ones(1, 3, 1, 2), dim=-1)
    >>> v = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    >>> recur.scan(k, k, v, erase=k).y.flatten()  # each value replaces the one before it
    tensor([1.0000, 2.0000, 3.0000])
    """
    given = Given(q, k, v, log_decay, beta, bonus, erase, remove, write)
    options = erase_from, cu_seqlens is not None
    previous, real, number, wide = per_signature(
        _CHECKED, options, (*given, initial_state), lambda: _check_scan(given, initial_state, *options)
    )
    (B, T, H, V), K = (*v.shape[:2], *v.shape[-2:]), q.shape[-1]
    refusal = partial(kernel.refusal, number, K=K)
    form = choose_form("scan", form, ("recurrent", "chunked", "parallel", "triton"), kernel.device_of(v), refusal)
    check_packing("scan", cu_seqlens, B, T, initial_state)
    if T == 0:
        there = [x for x in given if x is not None]
        nothing = sum(x.real.sum() if x.is_complex() else x.sum() for x in there)  # keeps y in their graph
        initial = first_state(v, (H, K, V), number, initial_state, cu_seqlens)
        y = v.new_zeros(*q.shape[:-2], H, V)
        return ScanOut((y + nothing).to(v.dtype), initial.clone())
    if log_decay is not None and log_decay.ndim <= 2:
        given = given._replace(log_decay=log_decay[None, None])
    if form == "triton":
        if not wide:
            tensors: Any = given[:6]
            return kernel.scan(initial_state, cu_seqlens, *tensors, scale=scale, reverse=reverse)
        found, places = sub_tokens(*given, previous=previous, reverse=reverse)
        borders = cu_seqlens if cu_seqlens is None else cu_seqlens * places.length
        y, state = kernel.scan(initial_state, borders, *found, previous=previous, scale=scale, reverse=reverse)
        y = y if places.length == 1 and q.ndim == 4 else places.reads_of(y)
        return ScanOut(y if y.ndim == q.ndim else y.squeeze(2), state)
    with without_autocast(v):
        tokens = _tokens(real, given, scale)
        weight = None if bonus is None else bonus.to(real).reshape(H, -1)
        run = partial(_unrolled if form == "recurrent" else partial(chunked_scan, form), weight, previous)
        initial = first_state(v, (H, K, V), number, initial_state, cu_seqlens)
        y, state = (right_to_left(run) if reverse else run)(initial, cu_seqlens, **tokens)
    y = y if q.ndim == 5 else y.squeeze(2)
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
    erase: Tensor | None = None,
    erase_from: str = "decayed",
    remove: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """One token of `scan`. `state` is overwritten; no gradient.

    Args:
        q: [B G K] | [B R G K] as in `scan`.
        k: [B G K] | [B M G K], or None, tied.
        v: [B H V] | [B M H V].
        log_decay: None | [H] | [H K] | [B H] | [B H K]. Two axes are [B H] if their sizes are B and H, else [H K].
        state: [B H K V] float32 (float64 if an input is), complex if log_decay is; or bfloat16 where it would be
            float32: half the bytes, rounded after every token (0.6% of y and S where some 16 tokens are remembered).
        beta: [B H] | [B M H].
        bonus: [H] | [H K].
        erase: [B G|H K] | [B M G|H K].
        erase_from: "decayed" | "previous".
        remove: [B G|H K] | [B M G|H K].
        write: [B H] | [B H V] | [B M H] | [B M H V].
        scale: factor on y.

    Returns: y [B H V], or [B R H V], of v's dtype.   Raises: as `scan`.
    Cost: O(H K V) per row of the batch and write; on a GPU, for one write and one read of the plain and the delta rule,
        one launch that reads the state once and writes it once.

    >>> state = torch.zeros(1, 1, 2, 1)
    >>> k = torch.tensor([[[1.0, 0.0]]])
    >>> [recur.step(k, k, torch.full((1, 1, 1), x), None, state, erase=k).item() for x in (5.0, 7.0)]
    [5.0, 7.0]
    """
    given = Given(q, k, v, log_decay, beta, bonus, erase, remove, write)
    previous, real, number, lacks, token_decay = per_signature(
        _STEPPED, erase_from, (*given, state), lambda: _check_step(given, state, erase_from)
    )
    check_state("step", state, number)
    if log_decay is not None and not token_decay:
        given = given._replace(log_decay=log_decay[None])
    if kernel.takes_step(q.shape[-1], state, lacks):
        return _launch(given, state, scale)
    with torch.no_grad(), without_autocast(state):
        present = {name: x for name, x in given._asdict().items() if x is not None and name != "bonus"}
        tokens = _tokens(real, given._replace(**{name: x[:, None] for name, x in present.items()}), scale)
        weight = None if bonus is None else bonus.to(real).reshape(state.shape[1], -1)
        now = {name: token.squeeze(1) for name, token in tokens.items()}
        y, new = wide_step(state.to(number), **now, bonus=weight, previous=previous)
        state.copy_(new)
        return (y if q.ndim == 4 else y.squeeze(1)).to(v.dtype)


def _launch(given: Given, state: Tensor, scale: float) -> Tensor:
    """`step` by the kernel, with log_decay [B|1 H] | [B|1 H K]."""

    def matrix(x: Tensor | None) -> Tensor | None:
        """[B H] | [B H K] -> [B H 1|K 1]."""
        return None if x is None else (x if x.ndim == 3 else x.unsqueeze(-1)).unsqueeze(-1)

    q, k, v, log_decay, beta, bonus, *_ = given
    operands = {"q": matrix(q), "k": matrix(k), "log_decay": matrix(log_decay), "rate": matrix(beta)}
    operands["bonus"] = None if bonus is None else matrix(bonus[None])
    rule = "outer" if beta is None else "delta"
    return kernel.step(rule, state, v.unsqueeze(2), **operands, scale=scale, tied=k is None)


def _wide(given: Given, previous: bool, rank: int) -> tuple[str, str] | None:
    """What a step needs that its kernel lacks, by the name of the argument, and the remedy; None if nothing. q and v
    with one read and one write per token have this rank."""
    names = [name for name in ("erase", "remove", "write") if getattr(given, name) is not None]
    if previous and given.beta is not None:
        lacks = "erase_from='previous'"
    elif names:
        lacks = f"{names[0]}="
    elif given.v.ndim > rank:
        lacks = "several writes per token"
    elif given.q.ndim > rank:
        lacks = "several reads per token"
    else:
        return None
    return lacks, "the delta rule of beta=, with one write and one read per token, runs in it"


Checked = tuple[bool, torch.dtype, torch.dtype, bool]
_CHECKED: dict[Hashable, Checked] = {}


def _check_scan(given: Given, initial_state: Tensor | None, erase_from: str, packed: bool) -> Checked:
    """Of a call whose arguments fit: whether S_{t-1} is erased from, the dtypes of sums and states, whether it
    takes more than the plain and the delta rule."""
    states = "n H K V" if packed else "B H K V"
    decays = "H | H K | B T H | B T H K"
    previous = _check("scan", "B T", given, erase_from, decays, initial_state=(initial_state, states))
    real = accumulation_dtype(*given, initial_state)
    number = state_number("scan", real, "log_decay is not complex", (given.log_decay,), initial_state=initial_state)
    return previous, real, number, _wide(given, previous, rank=4) is not None


_STEPPED: dict[Hashable, tuple[Any, ...]] = {}


def _check_step(given: Given, state: Tensor, erase_from: str) -> tuple[Any, ...]:
    """As `_check_scan`, but what the kernel lacks; and whether there is a decay per token."""
    q, _, v, log_decay, *_ = given
    check_given("step", q=q, v=v, state=state)
    token_decay = log_decay is not None and (log_decay.ndim == 3 or log_decay.shape == (v.shape[0], *v.shape[-2:-1]))
    decays = "H | B H | B H K" if token_decay else "H | H K"
    previous = _check("step", "B", given, erase_from, decays, state=(state, "B H K V"))
    real = accumulation_dtype(*given, state)
    return previous, real, number_of(real, log_decay), _wide(given, previous, rank=3), token_decay


def _check(
    function: str, lead: str, given: Given, erase_from: str, decays: str, **state: tuple[Tensor | None, str]
) -> bool:
    """Raise unless axes and dtypes fit and no two arguments exclude each other. Returns: whether S_{t-1} is erased
    from."""
    q, k, v, log_decay, beta, bonus, erase, remove, write = given
    rank = len(lead.split()) + 2
    writes = f"{lead} M" if isinstance(k, Tensor) and k.ndim == rank + 1 else lead
    reads = f"{lead} R" if isinstance(q, Tensor) and q.ndim == rank + 1 else lead
    sizes = bind(
        function,
        q=(q, f"{reads} G K"),
        k=(k, f"{writes} G K"),
        v=(v, f"{writes} H V"),
        log_decay=(log_decay, decays),
        beta=(beta, f"{writes} H"),
        bonus=(bonus, "H | H K"),
        erase=(erase, f"{writes} G K | {writes} H K"),
        remove=(remove, f"{writes} G K | {writes} H K"),
        write=(write, f"{writes} H | {writes} H V"),
        **state,
    )
    check_float(function, q=q, k=k, v=v, beta=beta, bonus=bonus, erase=erase, remove=remove, write=write)
    check_number(function, log_decay=log_decay)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"{function}: G must divide H, got G={sizes['G']} (q) and H={sizes['H']} (v)")
    if sizes.get("M", 1) == 0 or sizes.get("R", 1) == 0:
        got = f"M={sizes.get('M', 1)} (k) and R={sizes.get('R', 1)} (q)"
        raise ShapeError(f"{function}: a token must be written and read at least once, got {got}")
    previous = pick(function, "erase_from", erase_from, {"decayed": False, "previous": True})
    excluded: dict[str, Any] = {"beta": beta, "erase": erase, "remove": remove, "write": write}
    excluded |= {"several writes per token": writes != lead or None, "several reads per token": reads != lead or None}
    if bonus is not None:
        for name, x in excluded.items():
            if x is not None:
                raise ValueError(f"{function}: bonus must be None with {name}: it is read before the write, got both")
    for name in ("erase", "write"):
        if beta is not None and excluded[name] is not None:
            raise ValueError(
                f"{function}: beta must be None with {name}: it stands for erase = beta k and write = beta, got both"
            )
    if remove is not None and beta is None and erase is None:
        raise ValueError(f"{function}: remove must be None without erase or beta: nothing is read to be removed")
    if k is None and (log_decay is None or log_decay.is_complex() or log_decay.shape[-2:] != (sizes["H"], sizes["K"])):
        got = "None" if log_decay is None else f"{log_decay.dtype} {tuple(log_decay.shape)}"
        raise ValueError(
            f"{function}: k=None is 1 − exp(log_decay), so log_decay must be real and end in [H K]; "
            f"expected H={sizes['H']}, K={sizes['K']}, got {got}"
        )
    return previous


def _tokens(real: torch.dtype, given: Given, scale: float) -> dict[str, Tensor]:
    """The tensors that every form takes, wide enough to sum in: q [B T R G K]; k, erase, remove [B T M G|H K];
    v, write [B T M H V|1]; beta [B T M H]; log_decay [B|1 T|1 H K|1]."""
    q, k, v, log_decay, beta, _, erase, remove, write = given

    def several(x: Tensor, axes: int = 5) -> Tensor:
        """With an axis M or R."""
        return (x if x.ndim == axes else x.unsqueeze(2)).to(real)

    tokens = {"q": several(q) if scale == 1.0 else several(q) * scale, "v": several(v)}
    axes = v.ndim  # with M, if there is one
    if log_decay is not None:
        log_decay = log_decay.to(number_of(real, log_decay))
        tokens["log_decay"] = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
    if k is None:
        tokens["k"] = -torch.expm1(tokens["log_decay"]).expand(*v.shape[:3], -1).unsqueeze(2)
    else:
        tokens["k"] = several(k)
    if beta is not None:
        tokens["beta"] = several(beta, 4)
    if write is not None:
        tokens["write"] = several(write if write.ndim == axes else write.unsqueeze(-1))
    for name, x in (("erase", erase), ("remove", remove)):
        if x is not None:
            tokens[name] = several(x)
    return tokens


def _unrolled(
    bonus: Tensor | None, previous: bool, initial: Tensor, cu_seqlens: Tensor | None, **tokens: Tensor
) -> ScanOut:
    return unroll(partial(wide_step, bonus=bonus, previous=previous), initial, cu_seqlens, **tokens)
