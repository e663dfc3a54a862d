"""The scan with constant poles (S4D, DSS, GSS), which therefore is also a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.chunks import Documents, Rows, cut
from recur.primitives.diagonal import LOG2_E, check_state, gate, linear_recurrence, number_of, state_number
from recur.primitives.forms import ScanOut, check_packing, choose_form, first_state, right_to_left, state_count, unroll
from recur.primitives.operators import one_node, operator, remember, schema_of
from recur.shapes import accumulation_dtype, bind, check_float, check_given, check_number, readable, without_autocast

CHUNK = 64  # fewest tokens per chunk; N/2 if that is more: then carrying N states costs what the chunk costs
TRANSFORM = 2**18  # numbers transformed at a time: what a cache holds


def fixed_scan(
    x: Tensor,
    log_decay: Tensor,
    readout: Tensor,
    *,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    form: str = "auto",
) -> ScanOut:
    """State space with constant poles, N memories per channel, each with a decay and a rotation of its own.

        S_t[v, n] = exp(log_decay[v, n]) S_{t-1}[v, n] + write[v, n] x_t[v]
        y_t[v] = Re sum_n readout[v, n] S_t[v, n]

    Args:
        x: [B T V] input.
        log_decay: [N] shared by all channels | [V N] the poles, real or complex; imaginary part in radians per token.
        readout: [V N] real or complex.
        write: [N] | [V N] real or complex; ones when omitted.
        initial_state: [B V N] S before the first token; zeros when omitted.
        cu_seqlens: [n+1] int borders of n documents lying in one row: B is 1 and states are [n V N].
        reverse: read from the last token to the first: initial_state enters after token T-1, state is S at token 0.
        form: "recurrent", the token loop; "parallel", convolution by FFT, not with cu_seqlens; "chunked", short
            convolutions inside chunks and a scan over them; "triton", the same with the scan by the diagonal kernel.
            "auto" is "parallel", or with cu_seqlens "triton" for what that covers on a GPU and "chunked" for all else.

    Returns: y [B T V] of x's dtype; state [B V N] float32 (float64 if an input is), complex if log_decay or write is.
    Raises: ShapeError if axes disagree, TypeError for dtypes, ValueError and NotImplementedError for forms.
    Cost: "parallel" O(T V N + B T V log T) for y, O(B T V N) for the state and for initial_state, all in matmuls, and
        O(T (B V + N)) memory; "chunked" O(B T V (N + log C)) with C = max(64, N/2), and B T V N / C memory. Phases of
        the poles' powers are reduced in float64, so that they hold for any length. Defined by `fixed_step`.
    Rounding: a transform rounds relative to its whole row, so "parallel" errs by up to eps log2(2T) |x|₂ |h|₁, h being
        the response, also where most of x comes later: in float32 a future 10,000 times louder leaves an output two
        or three digits. "chunked" confines that to the chunk, "recurrent" has none of it. NaN, infinity and numbers
        from 7e28 on (float32) make NaN of their own channel from their own token on, in every form.
        "parallel" is faster on a GPU too: N = 512 complex states take 8 N = 4096 operations per token and channel in a
        kernel that keeps them in registers; three transforms take 15 log2(2T), about 180, and move little more than x.
    Source: Gupta et al. 2022, arXiv:2203.14343; Mehta et al. 2022, arXiv:2206.13947.

    >>> pole, one = torch.tensor([0.5]).log(), torch.ones(1, 1)
    >>> recur.fixed_scan(torch.ones(1, 3, 1), pole, readout=one, form="recurrent").y.flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    poles, states = "N | V N", "B V N" if cu_seqlens is None else "n V N"
    check_given("fixed_scan", x=x, log_decay=log_decay, readout=readout)
    given = {"log_decay": (log_decay, poles), "readout": (readout, "V N"), "write": (write, poles)}
    sizes = bind("fixed_scan", x=(x, "B T V"), **given, initial_state=(initial_state, states))
    B, T, V, N = (sizes[letter] for letter in "BTVN")
    check_packing("fixed_scan", cu_seqlens, B, T, initial_state)
    forms = ("recurrent", "chunked", "triton", "parallel")[: 3 if cu_seqlens is not None else 4]
    if form == "auto" and cu_seqlens is None:
        form, why = "parallel", "no kernel computes the convolution by FFT, which costs less than stepping N states"
        kernel.without("fixed_scan", form, x, why, "form='triton', a scan over chunks by a kernel, where N is small")
    else:
        refusal = partial(kernel.refusal, accumulation_dtype(x, log_decay, readout, write, initial_state))
        form = choose_form("fixed_scan", form, forms, kernel.device_of(x), refusal)
    x_, log_decay, readout, write, number = _prepare(
        "fixed_scan", x, log_decay, readout, write, initial_state=initial_state
    )
    initial = None
    if initial_state is not None or form != "parallel" or T == 0:
        initial = first_state(x, (V, N), number, initial_state, cu_seqlens)
    if T == 0 and initial is not None:
        return ScanOut(x.clone(), initial.clone())
    run: Callable[..., ScanOut] = partial(_FORMS[form], log_decay, readout, write)
    with without_autocast(x):
        y, state = (right_to_left(run) if reverse else run)(initial, cu_seqlens, x=x_)
    return ScanOut(y.contiguous().to(x.dtype), state)  # what follows rounds by the layout it is given


def fixed_step(x: Tensor, log_decay: Tensor, readout: Tensor, state: Tensor, *, write: Tensor | None = None) -> Tensor:
    """One token of `fixed_scan`. `state` is overwritten; no gradient.

    Args:
        x: [B V] input.
        log_decay: [N] | [V N] the poles.
        readout: [V N] real or complex.
        state: [B V N] float32 (float64 if an input is), complex if log_decay or write is.
        write: [N] | [V N], ones when omitted.

    Returns: y [B V] of x's dtype.   Raises: ShapeError, TypeError.   Cost: O(V N) a row.

    >>> state, pole, one = torch.zeros(1, 1, 1), torch.tensor([0.5]).log(), torch.ones(1, 1)
    >>> [recur.fixed_step(one, pole, one, state).item() for _ in range(3)]
    [1.0, 1.5, 1.75]
    """
    poles = "N | V N"
    check_given("fixed_step", x=x, log_decay=log_decay, readout=readout, state=state)
    given = {"log_decay": (log_decay, poles), "readout": (readout, "V N"), "write": (write, poles)}
    bind("fixed_step", x=(x, "B V"), **given, state=(state, "B V N"))
    x_, log_decay, readout, write, number = _prepare("fixed_step", x, log_decay, readout, write, state=state)
    check_state("fixed_step", state, number)
    if kernel.takes_step(state.shape[2], state):
        q, k, a = (tensor.mT[None, None] for tensor in (readout, write, log_decay))
        return kernel.step("outer", state.mT[:, None], x[:, None, None], q=q, k=k, log_decay=a)[:, 0]
    with torch.no_grad(), without_autocast(x):
        y, new = _update(gate(log_decay), readout, write, state.to(number), x=x_)
        state.copy_(new)
        return y.to(x.dtype)


def _prepare(
    function: str, x: Tensor, log_decay: Tensor, readout: Tensor, write: Tensor | None, **state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """x, poles [1|V N], readout and write [1|V N] in what the scan computes in, and the dtype of its state."""
    if write is None:
        write = x.new_ones(1)
    check_float(function, x=x)
    check_number(function, log_decay=log_decay, readout=readout, write=write, **state)
    real = accumulation_dtype(x, log_decay, readout, write, *state.values())
    number = state_number(function, real, "log_decay and write are", (log_decay, write), **state)
    log_decay, readout, write = (tensor.to(number_of(real, tensor)) for tensor in (log_decay, readout, write))
    return x.to(real), _two_axes(log_decay), readout, _two_axes(write), number


def _two_axes(tensor: Tensor) -> Tensor:
    """[N] -> [1 N]: one row for all channels."""
    return tensor if tensor.ndim == 2 else tensor[None]


# Forms. P is V, or 1 where the poles are shared


def _update(a: Tensor, readout: Tensor, write: Tensor, S: Tensor, *, x: Tensor) -> tuple[Tensor, Tensor]:
    """One token, which defines the scan."""
    S = a * S + write * x[..., None]
    return (readout * S).sum(-1).real, S


def _recurrent(
    log_decay: Tensor, readout: Tensor, write: Tensor, initial: Tensor, cu_seqlens: Tensor | None, *, x: Tensor
) -> ScanOut:
    return unroll(partial(_update, gate(log_decay), readout, write), initial, cu_seqlens, x=x)


def _parallel(
    log_decay: Tensor, readout: Tensor, write: Tensor, initial: Tensor | None, cu_seqlens: None, *, x: Tensor
) -> ScanOut:
    """The powers exp(z l) are products of coarse and fine ones, l = i C + j, so few exponentials and one matmul."""
    T, V = x.shape[1:]
    R = max(1, round(math.sqrt(T * log_decay.shape[0] / max(1, V))))
    C = -(-T // R)
    lags = torch.arange(max(R, C), device=x.device)
    coarse, fine = _powers(log_decay, lags[:R] * C), _powers(log_decay, lags[:C])  # [P R N], [P C N]

    def over_time(weights: Tensor) -> Tensor:
        """Re sum_n weights[n] exp(z_n l): [... V N] -> [... V T]."""
        each = _real_product(weights[..., None, :] * coarse, fine)
        return each.flatten(-2)[..., :T]

    y = _convolve(x.mT, over_time(readout * write)[None], x.mT.shape)
    recent = F.pad(x.mT.flip(-1), (0, R * C - T)).unflatten(-1, (R, C))  # [B V R C], the last token first
    state = write * (coarse * _mix(recent, fine)).sum(-2)
    if initial is not None:
        y = y + over_time(readout * gate(log_decay) * initial)
        state = state + _powers(log_decay, lags.new_full((1,), T))[:, 0] * initial
    return ScanOut(y.mT, state)


def _chunked(
    recurrence: Callable[[Tensor, Tensor, Rows | Documents], Tensor],
    log_decay: Tensor,
    readout: Tensor,
    write: Tensor,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    *,
    x: Tensor,
) -> ScanOut:
    """Convolutions inside chunks, the states entering chunks by a recurrence over their ends."""
    T = x.shape[1]
    C = min(T, max(CHUNK, readout.shape[1] // 2))
    chunks = cut(T, C, cu_seqlens)
    powers = _powers(log_decay, torch.arange(C + 1, device=x.device))  # [P C+1 N]
    fine, decay = powers[:, :-1], powers[:, -1].to(initial.dtype)

    x_ = chunks.split(x).permute(1, 0, 3, 2)  # [n B V C]
    written = write * _mix(x_.flip(-1)[..., None, :], fine)[..., 0, :]
    kept = decay[None, None].expand(chunks.n, -1, -1, -1)
    delayed = chunks.delay(kept)[None], chunks.delay(written, initial)[None]
    entering = recurrence(*delayed, chunks)[0]  # [n B V N]

    weights = _real_product((readout * write)[:, None], fine)[:, 0]  # [V C]
    y = _convolve(x_, weights[None, None], x_.shape)
    y = y + _real_product((readout * entering)[..., None, :], powers[:, 1:])[..., 0, :]
    y = chunks.merge(y.permute(1, 0, 3, 2))

    tail, length = _last_tokens(x, C, cu_seqlens)
    final = write * _mix(tail.transpose(1, 2)[..., None, :], fine)[..., 0, :]
    final = final + powers[:, length].transpose(0, 1) * chunks.last(entering)
    return ScanOut(y, chunks.settle(final, initial))


def _by_loop(a: Tensor, x: Tensor, chunks: Rows | Documents) -> Tensor:
    """`linear_recurrence` along chunks, which starts anew where a document does."""
    return linear_recurrence(a, x, starts=chunks.first)


def _by_kernel(a: Tensor, x: Tensor, chunks: Rows | Documents) -> Tensor:
    """The same by the diagonal kernel, which takes logs; a gate of 0 has none, and its gradient is 0."""
    alive = a != 0
    log = torch.where(alive, torch.where(alive, a, 1).log(), -math.inf)
    return kernel.elementwise("diagonal", x, log, None, cu_seqlens=chunks.borders, reverse=False).y


class _Inputs(NamedTuple):
    """What a form takes that is one node in a graph."""

    form: str
    log_decay: Tensor
    readout: Tensor
    write: Tensor
    initial: Tensor | None
    cu_seqlens: Tensor | None
    x: Tensor


def _run_by_form(form: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """The scan "parallel" or "chunked": y [B T V] and the state."""
    run: Callable[..., ScanOut] = _parallel if form == "parallel" else partial(_chunked, _by_loop)
    return run(*inputs[:-1], x=inputs[-1])


def _fake_by_form(*inputs: Any) -> tuple[Tensor, Tensor]:
    _, log_decay, readout, write, _, cu_seqlens, x = _Inputs(*inputs)
    states = (state_count(x.shape[0], cu_seqlens), *readout.shape)
    return x.new_empty(x.shape), x.new_empty(states, dtype=number_of(x.dtype, log_decay, write))


_by_form = one_node("recur::fixed_scan", _run_by_form, _fake_by_form, schema=schema_of(_Inputs, outputs=2))


def _in_one_node(form: str, *inputs: Any, x: Tensor) -> ScanOut:
    return ScanOut(*_by_form(form, *inputs, x))


_FORMS: dict[str, Callable[..., ScanOut]] = {
    "recurrent": _recurrent,
    "parallel": partial(_in_one_node, "parallel"),
    "chunked": partial(_in_one_node, "chunked"),
    "triton": partial(_chunked, _by_kernel),
}


def _last_tokens(x: Tensor, C: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n C V]: the tokens of the last chunk of every row or document, the last one first, then zeros; [n]: how many."""
    if cu_seqlens is None:
        length = (x.shape[1] - 1) % C + 1
        tail = F.pad(x[:, x.shape[1] - length :].flip(1), (0, 0, 0, C - length))
        return tail, torch.full((1,), length, device=x.device)
    ends = cu_seqlens[1:].long()
    count = (ends - cu_seqlens[:-1] - 1) % C + 1
    lag = torch.arange(C, device=x.device)
    tail = x[0].index_select(0, (ends[:, None] - 1 - lag).clamp(min=0).flatten()).unflatten(0, (-1, C))
    return torch.where((lag < count[:, None])[..., None], tail, 0), count


def _powers(log_decay: Tensor, exponents: Tensor) -> Tensor:
    """exp(z l) [P L N] of the poles z [P N] at integers l [L]. A power 0 is 1, also of exp(-inf)."""
    real = log_decay.real.dtype
    logs = torch.where(exponents[:, None] == 0, 0, log_decay.real[:, None] * exponents.to(real)[:, None])
    size = torch.exp2(logs * LOG2_E)
    if not log_decay.is_complex():
        return size
    # a phase of many turns has lost its digits in float32
    angle = log_decay.imag.double()[:, None] * exponents[:, None]
    phase = torch.remainder(angle, 2 * math.pi).to(real)
    return torch.complex(size * phase.cos(), size * phase.sin())


def _numbers(tensor: Tensor) -> Tensor:
    """Complex [... N] as real [... 2N]."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2) if tensor.is_complex() else tensor


def _real_product(left: Tensor, right: Tensor) -> Tensor:
    """Re sum_n left[..., V R n] right[P C n]: [... V R C], as one real matmul."""
    if not right.is_complex():
        left = left.real
    elif not left.is_complex():
        right = right.real
    if right.is_complex():
        right = torch.complex(right.real, -right.imag)  # a lazy conj() is what vmap cannot differentiate
    return _matmul(_numbers(left), _numbers(right).mT)


def _mix(x: Tensor, right: Tensor) -> Tensor:
    """sum_c x[..., V R c] right[P c N], x real: [... V R N]."""
    product = _matmul(x, _numbers(right))
    return torch.view_as_complex(product.unflatten(-1, (-1, 2))) if right.is_complex() else product


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [... V R k], right [P k m] -> [... V R m]; poles shared by all channels are one matrix."""
    return left @ right[0] if right.shape[0] == 1 else torch.einsum("...vrk,vkm->...vrm", left, right)


def tap_conv(u: Tensor, tap: Tensor) -> Tensor:
    """Causal convolution with as many taps as there are tokens: y_t = sum_{s<=t} tap_s u_{t-s}.

    Args: u, tap: [B T V].
    Returns: y [B T V] of u's dtype.   Raises: ShapeError.   Cost: O(B V T log T), by FFT in float32 or wider.
    """
    bind("tap_conv", u=(u, "B T V"), tap=(tap, "B T V"))
    if u.shape[1] == 0:
        return u
    dtype = accumulation_dtype(u, tap)
    kernel.without("tap_conv", "torch", u, "no kernel has as many taps as tokens", "causal_conv, with at most 8 taps")
    return _convolve(u.to(dtype).mT, tap.to(dtype).mT, u.mT.shape).mT.to(u.dtype)


def _run(a: Tensor, b: Tensor, shape: list[int]) -> Tensor:
    """Causal convolution along the last axis, summed to `shape`: c_t = sum_s a_{t-s} b_s.

    With its own gradient, because autograd would take complex transforms of twice the work for those of real signals.
    A transform spreads what is not finite over the whole row, so it is left out and makes NaN from its own lag on;
    so are numbers whose spectrum could overflow, which is from 7e28 on in float32.
    """
    V, T = shape[-2:]
    n = _fast_length(2 * T)
    some = max(1, V * TRANSFORM * T // (n * max(a.numel(), b.numel(), 1)))
    out = a.new_empty(shape)
    for start in range(0, V, some):
        channels = slice(start, start + some)
        (left, beyond), (right, past) = _in_range(a[..., channels, :]), _in_range(b[..., channels, :])
        product = torch.fft.rfft(left, n) * torch.fft.rfft(right, n)
        part = out[..., channels, :]
        part.copy_(torch.fft.irfft(product.sum_to_size(*part.shape[:-1], product.shape[-1]), n)[..., :T])
        for lost in (beyond, past):
            if lost is not None:
                part.add_(lost.expand(*product.shape[:-1], T).sum_to_size(part.shape))
    return out


def _in_range(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [... T] with 0 for what a transform cannot take, and 0 or, from the first such number on, NaN; None if x is."""
    limit = torch.finfo(x.dtype).max ** 0.75
    if readable(x) and bool(x.abs().amax() < limit):
        return x, None
    good = x.abs() < limit
    return torch.where(good, x, 0), torch.where(good, 0, math.nan).to(x.dtype).cumsum(-1)


def _fake(a: Tensor, b: Tensor, shape: list[int]) -> Tensor:
    return a.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, list[int]], output: Tensor) -> None:
    a, b, ctx.shape = inputs
    remember(ctx, a, b)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Read from its end, the gradient to one factor is the convolution of grad, read from its end, with the other."""
    a, b = ctx.saved_tensors
    grad = grad.flip(-1)
    wanted = ctx.needs_input_grad
    grad_a = _convolve(grad, b, a.shape).flip(-1) if wanted[0] else None
    grad_b = _convolve(grad, a, b.shape).flip(-1) if wanted[1] else None
    return grad_a, grad_b, None


def _tangent(ctx: Any, da: Tensor, db: Tensor, _: None) -> Tensor:
    a, b = ctx.saved_tensors
    return _convolve(da, b, ctx.shape) + _convolve(a, db, ctx.shape)


def _vmap(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    a, b = (x[None] if dim is None else x.movedim(dim, 0) for x, dim in zip(inputs[:2], in_dims, strict=False))
    return call(a, b, [size, *inputs[2]]), 0


_convolve = operator("recur::convolve", _run, fake=_fake, save=_save, backward=_gradients, jvp=_tangent, vmap=_vmap)


def _fast_length(length: int) -> int:
    """The least 2^i times 1, 3, 5, 9 or 15 that is not below `length`: transforms of such lengths are fast."""
    return min(odd << max(0, -(-length // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))
