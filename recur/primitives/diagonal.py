"""The diagonal recurrence h_t = a_t h_{t-1} + x_t, one number per channel; other elementwise scans stand on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.kernels.packing import document_starts
from recur.primitives.forms import ScanOut, check_packing, choose_form, first_state, right_to_left, unroll
from recur.primitives.operators import batched_at, operator, remember
from recur.shapes import (
    accumulation_dtype,
    bind,
    check_given,
    check_number,
    per_signature,
    readable,
    without_autocast,
)

SIDE_BY_SIDE = 65_536  # numbers that one call should update: fewer waste the call and a second thread
LOG2_E = math.log2(math.e)


def linear_recurrence(a: Tensor, x: Tensor, initial: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """First-order recurrence along axis 1: h_t = a_t h_{t-1} + x_t, every h_t returned.

    Args:
        a: decay, [B T *] of x's dtype; any axis may have size 1 and is then shared.
        x: [B T *] what each token writes, real or complex.
        initial: [B *] the state before the first token; zeros when omitted.
        starts: [T] bool, tokens at which h_t = x_t whatever h_{t-1} is, NaN and infinity included.

    Returns: h [B T *].
    Cost: T multiply-adds per channel, three times that where few channels are cut into chunks that run side by side.
    Gates are multiplied, never divided or subtracted in logs, so an exact 0 forgets exactly. Twice differentiable.

    >>> from recur.primitives.diagonal import linear_recurrence
    >>> linear_recurrence(torch.tensor(0.5).reshape(1, 1, 1), torch.ones(1, 4, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    return _recurrence(a, x, initial, starts, False)


def _run(a: Tensor, x: Tensor, initial: Tensor | None, starts: Tensor | None, adjoint: bool) -> Tensor:
    """The recurrence h, or its adjoint g_t = x_t + conj(a_{t+1}) g_{t+1}: each is the backward of the other.

    One operator, so that a compiler sees one node and not T of them.
    """
    return recur_backward(a, x, starts=starts) if adjoint else recur_forward(a, x, initial, starts=starts)


def _fake(a: Tensor, x: Tensor, initial: Tensor | None, starts: Tensor | None, adjoint: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool], output: Tensor) -> None:
    a, _, initial, starts, ctx.adjoint = inputs
    remember(ctx, a, initial, starts, output)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
    a, initial, starts, out = ctx.saved_tensors
    other = _recurrence(a, grad, None, starts, not ctx.adjoint)
    h, g = (other, out) if ctx.adjoint else (out, other)
    grad_a = grad_initial = None
    if ctx.needs_input_grad[0]:
        grad_a = _within(starts, _before(h, initial).conj() * g).sum_to_size(a.shape)
    if ctx.needs_input_grad[2]:
        grad_initial = _within(None if starts is None else starts[:1], a[:, :1].conj() * g[:, :1]).sum(1)
    return grad_a, other, grad_initial, None, None


def _tangent(ctx: Any, da: Tensor, dx: Tensor, dinitial: Tensor | None, *_: None) -> Tensor:
    """dh_t = a_t dh_{t-1} + (da_t h_{t-1} + dx_t): the same recurrence."""
    a, initial, starts, out = ctx.saved_tensors
    if ctx.adjoint:
        moved = F.pad(_within(starts, da.conj() * out)[:, 1:], (0, 0) * (out.ndim - 2) + (0, 1))
    else:
        moved = _within(starts, da * _before(out, initial))
    return _recurrence(a, dx + moved, dinitial, starts, ctx.adjoint)


def _within(starts: Tensor | None, links: Tensor) -> Tensor:
    """What has to do with the gates of tokens [B T *]: nothing at `starts` [T]."""
    return links if starts is None else links.masked_fill(like_batch(starts, links[0]), 0)


def _before(h: Tensor, initial: Tensor | None) -> Tensor:
    """h_{t-1} [B T *], `initial` or 0 before the first token."""
    first = torch.zeros_like(h[:, :1]) if initial is None else initial[:, None]
    return torch.cat([first, h], 1)[:, :-1]


_recurrence = operator(
    "recur::linear_recurrence",
    _run,
    fake=_fake,
    save=_save,
    backward=_gradients,
    jvp=_tangent,
    vmap=batched_at(2, 2, 1, None, None, out=2),
)


def recur_forward(
    a: Tensor, x: Tensor, initial: Tensor | None, out: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """h_t = x_t + a_t h_{t-1}, or x_t where `starts` [T] says so, without gradient; `out` may be x."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.shape[1] > 0:
        state = h[:, 0].copy_(x[:, 0])
        if initial is not None:
            state.add_(_past(a[:, 0] * initial, None if starts is None else starts[0]))
        _recur(_links(a, x, starts), x[:, 1:], h[:, 1:], state, 1, starts)
    return h


def recur_backward(a: Tensor, x: Tensor, out: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """g_t = x_t + conj(a_{t+1}) g_{t+1}, or x_t before a token of `starts` [T], without gradient; `out` may be x."""
    g = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.shape[1] > 0:
        if x.is_complex():  # conj(g_t) = conj(x_t) + a_{t+1} conj(g_{t+1}) needs no conjugate of a
            x = torch.conj_physical(x, out=g)
        _recur(_links(a, x, starts), x[:, :-1], g[:, :-1], g[:, -1].copy_(x[:, -1]), -1, starts)
        if x.is_complex():
            g.conj_physical_()
    return g


def _links(a: Tensor, x: Tensor, starts: Tensor | None) -> Tensor:
    """The gates a_1 ... a_{T-1} that join neighbouring tokens, 0 at `starts`."""
    links = a.expand(-1, x.shape[1], *a.shape[2:])[:, 1:]
    return links if starts is None else links.masked_fill(like_batch(starts[1:], x[0]), 0)


def _recur(a: Tensor, x: Tensor, out: Tensor, state: Tensor, order: int, starts: Tensor | None) -> None:
    """out <- x + a * (the out before it), from the left (order 1) or the right (order -1), after `state`.

    Where a token is too small to be worth a call, n chunks run side by side, each from the state that a first
    pass over all of them has found. n depends on shapes alone. What meets the gate of one of the tokens `starts` is
    replaced by 0, because 0 times NaN is NaN.
    """
    length = x.shape[1]
    n = max(1, min(math.isqrt(length), SIDE_BY_SIDE // max(1, state.numel())))
    C, rest = divmod(length, n)
    chunks, single = (slice(rest, None), slice(0, rest)) if order > 0 else (slice(0, n * C), slice(n * C, None))
    cut = None if starts is None else like_batch(starts[1:], x[0])[None]  # [1 T-1 1 ...]
    cuts = _side_by_side(cut, single, order, 1)
    for decay, write, target in _columns(order, 1, a[:, single], x[:, single], out[:, single]):
        state = torch.addcmul(write, decay, _past(state, next(cuts)), out=target)
    a, x, out = (t[:, chunks].unflatten(1, (n, C)) for t in (a, x, out))  # [B n C *]
    cut = None if cut is None else cut[:, chunks].unflatten(1, (n, C))
    state = state[:, None] if n == 1 else _enter_chunks(a, x, state, order, cut)
    cuts = _side_by_side(cut, slice(None), order, 2)
    for decay, write, target in _columns(order, 2, a, x, out):
        state = torch.addcmul(write, decay, _past(state, next(cuts)), out=target)


def _enter_chunks(a: Tensor, x: Tensor, state: Tensor, order: int, cut: Tensor | None) -> Tensor:
    """[B n *]: the state that enters each of the n chunks of a and x [B n C *]."""
    n = x.shape[1]
    entering = x.new_empty(x.shape[:2] + x.shape[3:])
    if order > 0:
        done, entered, first = slice(0, -1), slice(1, None), 0
    else:
        done, entered, first = slice(1, None), slice(0, -1), n - 1
    kept, written = torch.ones_like(a[:, done, 0]), entering[:, entered].zero_()
    cuts = _side_by_side(cut, done, order, 2)
    for decay, write in _columns(order, 2, a[:, done], x[:, done]):
        link = next(cuts)
        torch.addcmul(write, decay, _past(written, link), out=written)
        kept.mul_(decay)
    whole = None if cut is None else cut[:, done].any(2)  # [1 n-1 1 ...]
    kept = _past(kept, whole)
    entering[:, first] = state
    states, passes = entering.unbind(1)[::order], _side_by_side(whole, slice(None), order, 1)
    for before, after, factor in zip(states, states[1:], kept.unbind(1)[::order], strict=False):
        after.addcmul_(factor, _past(before, next(passes)))
    return entering


def _past(state: Tensor, cut: Tensor | None) -> Tensor:
    """The state, or 0 where nothing of it may pass."""
    return state if cut is None else state.masked_fill(cut, 0)


def _side_by_side(cut: Tensor | None, which: slice, order: int, axis: int) -> Iterator[Tensor | None]:
    """`cut` column by column, as `_columns` goes; None where there is none, as far as that can be seen."""
    if cut is None:
        return repeat(None)
    columns = cut[:, which].movedim(axis, 0)
    if not readable(columns):
        return iter(columns.unbind(0)[::order])
    some = columns.flatten(1).any(1).tolist()
    return iter([column if there else None for there, column in zip(some, columns.unbind(0), strict=True)][::order])


def _columns(order: int, axis: int, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Token by token along `axis`, from the left (order 1) or from the right (order -1)."""
    return zip(*(t.unbind(axis)[::order] for t in tensors), strict=True)


def gate(log_decay: Tensor) -> Tensor:
    """exp(log_decay), where a real part of -inf is an exact 0 with a zero gradient, whatever the phase.

    The complex exponential would make NaN of it; so would the polar form in its second derivative.
    """
    size = torch.exp2(log_decay.real * LOG2_E)  # exp2, because exp is many times slower on a CPU where it underflows
    if not log_decay.is_complex():
        return size
    phase = log_decay.imag
    return torch.complex(size * phase.cos(), size * phase.sin())


def enter_documents(a: Tensor, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """What the tokens x of one packed row write if each document starts from its own state.

    What a document's first token keeps of initial [n *] is written by it.
    """
    if initial is not None and x.shape[1] > 0:
        first = cu_seqlens[:-1].long().clamp(max=x.shape[1] - 1)
        filled = like_batch(cu_seqlens[1:] > cu_seqlens[:-1], initial)
        kept = a.expand(-1, x.shape[1], *a.shape[2:])[0, first] * torch.where(filled, initial, 0)
        x = x.index_add(1, first, kept[None])
    return x


def leave_documents(h: Tensor, initial: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """[n *]: the state h [1 T *] after each document's last token; an empty document hands on its initial state."""
    n = cu_seqlens.numel() - 1
    untouched = h.new_zeros(n, *h.shape[2:]) if initial is None else initial
    if h.shape[1] == 0:
        return untouched.clone()
    last = h[0, (cu_seqlens[1:].long() - 1).clamp(min=0)]
    return torch.where(like_batch(cu_seqlens[1:] > cu_seqlens[:-1], last), last, untouched)


def like_batch(flags: Tensor, tensor: Tensor) -> Tensor:
    """flags [n] with as many axes as tensor [n *]."""
    return flags.reshape(-1, *[1] * (tensor.ndim - 1))


def gated_scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    form: str = "auto",
) -> ScanOut:
    """Gated diagonal scan, one memory per channel: h_t = exp(log_decay_t) * h_{t-1} + x_t, y_t = h_t.

    Args:
        x: [B T *] what each token writes, input gate already applied; real or complex.
        log_decay: [B T *] | [*] natural log of the gate: real part <= 0 (-inf forgets), imaginary part in radians.
        initial_state: [B *] h before the first token; zeros when omitted.
        cu_seqlens: [n+1] int borders of n documents lying in one row: B is 1 and states are [n *].
        reverse: read from the last token to the first: initial_state enters after token T-1, state is h at token 0.
        form: "recurrent", the token loop; "chunked", chunks side by side, in place; "triton", the kernel; "auto"
            is "triton" for what that covers on a GPU and "chunked" for all else. In no form do NaN and infinity reach
            an earlier token.

    Returns: y [B T *] of x's dtype, or complex if the gate is; state [B *] float32 (float64 if an input is), complex if
        x or the gate is.
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError and NotImplementedError for forms.
    Cost: O(B T *) time; memory for x, the gates and y. Defined by `gated_step`.
    Source: Martin and Cundy 2018, arXiv:1709.04057; Katsch 2023, arXiv:2311.01927 (complex gates).

    >>> half = torch.tensor([0.5]).log()
    >>> recur.gated_scan(torch.ones(1, 4, 1), half).y.flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    gates, number = per_signature(
        _CHECKED,
        cu_seqlens is None,
        (x, log_decay, initial_state),
        lambda: _check(x, log_decay, initial_state, "B *" if cu_seqlens is None else "n *"),
    )
    check_packing("gated_scan", cu_seqlens, x.shape[0], x.shape[1], initial_state)
    refusal = partial(kernel.refusal, number)
    form = choose_form("gated_scan", form, ("recurrent", "chunked", "triton"), kernel.device_of(x), refusal)
    if form == "triton":
        return kernel.elementwise("diagonal", x, log_decay, initial_state, cu_seqlens=cu_seqlens, reverse=reverse)
    wide = log_decay.to(number_of(accumulation_dtype(x, log_decay, initial_state), log_decay))
    tokens = {"x": x.to(number), "log_decay": wide if gates == "B T *" else wide[None, None]}
    initial = None
    if initial_state is not None or form == "recurrent" or x.shape[1] == 0:
        initial = first_state(x, x.shape[2:], number, initial_state, cu_seqlens)
    if x.shape[1] == 0 and initial is not None:
        return ScanOut(tokens["x"] if number.is_complex else x, initial.clone())
    scan: Callable[..., ScanOut] = partial(unroll, _step) if form == "recurrent" else _chunked
    with without_autocast(x):
        y, state = (right_to_left(scan) if reverse else scan)(initial, cu_seqlens, **tokens)
    return ScanOut(y if y.is_complex() else y.to(x.dtype), state)


def gated_step(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One token of `gated_scan`: h = exp(log_decay) * h + x, y = h. `state` is overwritten; no gradient.

    Args:
        x: [B *] what the token writes.
        log_decay: [B *] | [*] natural log of the gate.
        state: [B *] float32 (float64 if an input is) or bfloat16, complex if x or the gate is.

    Returns: y [B *] of x's dtype, or complex if the gate is.   Raises: ShapeError, TypeError.   Cost: O(B *).

    >>> state, half = torch.zeros(1, 1), torch.tensor([0.5]).log()
    >>> [recur.gated_step(torch.ones(1, 1), half, state).item() for _ in range(3)]
    [1.0, 1.5, 1.75]
    """
    gates, number = per_signature(_STEPPED, None, (x, log_decay, state), lambda: _check_step(x, log_decay, state))
    check_state("gated_step", state, number)
    if kernel.takes_step(1, state):
        return _launch(x, log_decay[None] if gates == "*" else log_decay, state)
    with torch.no_grad(), without_autocast(x):
        wide = log_decay.to(number_of(accumulation_dtype(x, log_decay, state), log_decay))
        y, new = _step(state.to(number), x=x.to(number), log_decay=wide)
        state.copy_(new)
        return y if y.is_complex() else y.to(x.dtype)


def _launch(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """`gated_step` by the kernel, to which all channels are the columns of one row; log_decay [B|1 *]."""
    memory, columns = state.contiguous(), math.prod(x.shape[1:])
    x_, a = (tensor.reshape(len(tensor), 1, 1, columns) for tensor in (x, log_decay))
    y = kernel.step("outer", memory.view(len(x), 1, 1, columns), x_, log_decay=a)
    if memory is not state:
        state.copy_(memory)
    return y.view(x.shape)


def _step(state: Tensor, *, x: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    h = gate(log_decay) * state + x
    return h, h


def _chunked(initial: Tensor | None, cu_seqlens: Tensor | None, *, x: Tensor, log_decay: Tensor) -> ScanOut:
    h, state = recurrence(gate(log_decay).to(x.dtype), x, initial, cu_seqlens)
    return ScanOut(h, state.clone())  # a step may overwrite the state, which must not reach into y


def recurrence(a: Tensor, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> ScanOut:
    """`linear_recurrence` of at least one token, over documents if there are, and its last state [B *] or [n *]."""
    if cu_seqlens is None:
        h = linear_recurrence(a, x, initial)
        return ScanOut(h, h[:, -1])
    written, starts = enter_documents(a, x, initial, cu_seqlens), document_starts(cu_seqlens, x.shape[1])
    h = linear_recurrence(a, written, starts=starts)
    return ScanOut(h, leave_documents(h, initial, cu_seqlens))


def check_state(function: str, state: Tensor, number: torch.dtype) -> None:
    """Raise TypeError unless a step can overwrite `state` without rounding it, or rounds it to bfloat16 as asked;
    ValueError if entries of it share memory."""
    if 0 in state.stride() and any(n > 1 and not step for n, step in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(
            f"{function}: state is overwritten, so each entry must have memory of its own, got an expanded tensor of "
            f"shape {tuple(state.shape)} with strides {state.stride()}; pass state.clone()"
        )
    if state.dtype != number and (state.dtype, number) != (torch.bfloat16, torch.float32):
        raise TypeError(f"{function}: state must be {number} for these inputs, got {state.dtype}")


_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def number_of(real: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    """`real`, or the complex type of that width if any tensor is complex."""
    return _COMPLEX[real] if any(t is not None and t.is_complex() for t in tensors) else real


def state_number(
    function: str, real: torch.dtype, because: str, sources: tuple[Tensor | None, ...], **state: Tensor | None
) -> torch.dtype:
    """The dtype of a state that is complex if a source is. Raise TypeError for one that is, and would be cut."""
    number = number_of(real, *sources)
    for name, tensor in state.items():
        if tensor is not None and tensor.is_complex() and not number.is_complex:
            raise TypeError(f"{function}: {name} must be real because {because}, got {tensor.dtype}")
    return number


def _number(function: str, x: Tensor, log_decay: Tensor, **state: Tensor | None) -> torch.dtype:
    """What a gated scan computes in. Raises: TypeError."""
    check_number(function, x=x, log_decay=log_decay, **state)
    real = accumulation_dtype(x, log_decay, *state.values())
    return state_number(function, real, "x and log_decay are", (x, log_decay), **state)


_CHECKED: dict[Hashable, tuple[str, torch.dtype]] = {}


def _check(x: Tensor, log_decay: Tensor, initial_state: Tensor | None, states: str) -> tuple[str, torch.dtype]:
    """The axes of the gate, and what a gated scan computes in, once its arguments fit."""
    gates = _axes_of_gate(x, log_decay, "B T *")
    check_given("gated_scan", x=x, log_decay=log_decay)
    bind("gated_scan", x=(x, "B T *"), log_decay=(log_decay, gates), initial_state=(initial_state, states))
    return gates, _number("gated_scan", x, log_decay, initial_state=initial_state)


_STEPPED: dict[Hashable, tuple[str, torch.dtype]] = {}


def _check_step(x: Tensor, log_decay: Tensor, state: Tensor) -> tuple[str, torch.dtype]:
    """As `_check`."""
    gates = _axes_of_gate(x, log_decay, "B *")
    check_given("gated_step", x=x, log_decay=log_decay, state=state)
    bind("gated_step", x=(x, "B *"), log_decay=(log_decay, gates), state=(state, "B *"))
    return gates, _number("gated_step", x, log_decay, state=state)


def _axes_of_gate(x: Tensor, log_decay: Tensor, letters: str) -> str:
    """`letters`, or "*" alone when the gate lacks the axes before it and is shared by batch and time."""
    shared = x.ndim + 1 - len(letters.split()) if isinstance(x, Tensor) else 0
    return "*" if isinstance(log_decay, Tensor) and log_decay.ndim == shared else letters
