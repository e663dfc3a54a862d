"""Gates: decays, rotations and output gates. Decays are natural logs, in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.operators import transformed
from recur.shapes import accumulation_dtype, bind, check_float, expect, pick


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). The gradients of torch's own softplus and elu lie in memory as a compiler does not expect."""
    return -F.logsigmoid(-x)


def elu(x: Tensor) -> Tensor:
    """x, and exp(x) - 1 where that is negative."""
    return torch.where(x > 0, x, x.clamp(max=0).expm1())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "elu": elu,
    "1+elu": lambda x: 1 + elu(x),
    "2+elu": lambda x: 2 + elu(x),
    "leak": F.leaky_relu,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "-exp": lambda x: -x.exp(),
    "softplus": softplus,
}


BOUND_LAWS = ("skip_first", "skip_last")


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The pointwise function of that name. Raises: ValueError listing the names there are.

    Args:
        name: such as "silu", "gelu", "sigmoid".

    >>> from recur.primitives.gates import activation
    >>> activation("relu2")(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return pick("activation", "name", name, ACTIVATIONS)


def biased(act: str, z: Tensor, bias: Tensor, *, form: str = "auto") -> Tensor:
    """A gate with a bias per channel: act(z + b).

    Args:
        act:  "sigmoid" or "softplus".
        z:    [B T *] logits.
        bias: [*], a bias per channel.
        form: "auto" or "triton": one kernel where `recur.kernel.fused` says so; any other name: torch.

    Returns: [B T *] float32 or wider.   Raises: ValueError for another act.   Cost: O(size).

    >>> from recur.primitives.gates import biased
    >>> biased("sigmoid", torch.zeros(1, 1, 2), torch.zeros(2))
    tensor([[[0.5000, 0.5000]]])
    """
    known: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softplus": softplus}
    fn = pick("biased", "act", act, known)
    lacks = None if z.shape[2:] == bias.shape else ("a bias that is not one per channel", "expand it to z's last axes")
    if kernel.fused(form, z, bias, of="biased", lacks=lacks, compiler=True):
        return kernel.activate(z, bias, act)
    return fn(z.to(accumulation_dtype(z, bias)) + bias)


def sigmoid_decay(z: Tensor, *, tau: float = 1.0, form: str = "auto") -> Tensor:
    """Log decay of a sigmoid gate: log a = log(sigmoid(z)) / tau, so a = sigmoid(z)^(1/tau) in (0, 1).

    Args:
        z:    [*] gate logits.
        tau:  how many tokens share one sigmoid of forgetting; 16 in GLA.
        form: as in `biased`.

    Returns: [*] natural log decay, float32 or wider.   Cost: O(size).   Source: Yang et al. 2023, arXiv:2312.06635.

    >>> from recur.primitives.gates import sigmoid_decay
    >>> sigmoid_decay(torch.zeros(1), tau=16).exp()  # 0.5 ** (1/16)
    tensor([0.9576])
    """
    check_float("sigmoid_decay", z=z)
    if kernel.fused(form, z, of="sigmoid_decay", compiler=True):
        return kernel.activate(z, None, "log_sigmoid", 1 / tau)
    log_a = F.logsigmoid(z.to(accumulation_dtype(z)))
    return log_a if tau == 1 else log_a / tau


def lower_bounded_decay(z: Tensor, bound: Tensor | None, *, form: str = "auto") -> tuple[Tensor, Tensor]:
    """A forget gate that never falls below its bound: a = g + (1 - g) sigmoid(z), and what it lets in, 1 - a.

    Args:
        z:     [*] gate logits.
        bound: broadcastable to z, g in [0, 1); None is 0.
        form:  as in `biased`.

    Returns: log a [*], float32 or wider, and 1 - a = (1 - g) sigmoid(-z) [*] in z's dtype; neither is formed by a
        difference.
    Cost: O(size).   Source: Qin et al. 2023, arXiv:2311.04823; Qin et al. 2024, arXiv:2404.07904.

    >>> from recur.primitives.gates import lower_bounded_decay
    >>> log_a, keep = lower_bounded_decay(torch.zeros(1), torch.tensor([0.5]))
    >>> log_a.exp(), keep
    (tensor([0.7500]), tensor([0.2500]))
    """
    check_float("lower_bounded_decay", z=z, bound=bound)
    per_channel = bound is None or (z.ndim > 2 and bound.numel() == z.shape[2:].numel() and bound.ndim <= z.ndim)
    lacks = None if per_channel else ("a bound that is not one per channel", "expand it to z's last axes")
    if kernel.fused(form, z, bound, of="lower_bounded_decay", lacks=lacks, compiler=True):
        return kernel.bounded(z, bound)
    given, dtype = z.dtype, accumulation_dtype(z, bound)
    z = z.to(dtype)
    free = F.logsigmoid(z)
    if bound is None:
        return free, torch.sigmoid(-z).to(given)
    bound = bound.to(dtype)
    bounded = bound > 0
    safe = torch.where(bounded, bound, 0.5)  # a bound of 0 must not reach log, whose gradient there is infinite
    log_a = torch.where(bounded, torch.logaddexp(safe.log(), torch.log1p(-safe) + free), free)
    return log_a, ((1 - bound) * torch.sigmoid(-z)).to(given)


def lower_bounds(logits: Tensor, *, law: str = "skip_first", layer: int | Tensor | None = None) -> Tensor:
    """Bounds that rise with depth from g_0 = 0, sums of P = softmax(logits) over the layers.

    "skip_first": g_l = sum_{1 <= j <= l} P_j.   "skip_last": g_l = sum_{0 <= j < l} P_j.   They differ once trained.

    Args:
        logits: [L *] one row per layer.
        law: "skip_first" or "skip_last".
        layer: the only row that is wanted; an integer tensor [] in graphs that several layers share.

    Returns: [L *] bounds in [0, 1), or [*] of one layer.   Raises: ValueError for another law.   Cost: O(size).
    Source: Qin et al. 2024, arXiv:2404.07904 (skip_first); Qin et al. 2023, arXiv:2311.04823 (skip_last).

    >>> from recur.primitives.gates import lower_bounds
    >>> lower_bounds(torch.ones(4, 1)).flatten()
    tensor([0.0000, 0.2500, 0.5000, 0.7500])
    """
    check_float("lower_bounds", logits=logits)
    if law not in BOUND_LAWS:
        raise ValueError(f"lower_bounds: law must be one of {', '.join(BOUND_LAWS)}, got {law!r}")
    share = logits.to(accumulation_dtype(logits)).softmax(0)
    first = int(law == "skip_first")
    if isinstance(layer, Tensor):
        at = torch.arange(len(share), device=share.device).reshape(-1, *[1] * (share.ndim - 1))
        return share.where((at >= first) & (at < first + layer), 0).sum(0)
    if layer is not None:
        return share[first : first + layer].sum(0)
    share = share[1:] if law == "skip_first" else share[:-1]
    return torch.cat([torch.zeros_like(logits[:1], dtype=share.dtype), share.cumsum(0)])


def decayed_mean(x: Tensor) -> Tensor:
    """The mean of exp(-s) for s from 0 to x: (1 - exp(-x)) / x, and 1 at 0.

    Args: x: [*] at least 0.   Returns: [*], without cancellation and with finite gradients at 0.   Cost: O(size).

    >>> decayed_mean(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.6321])
    """
    small = x < 1e-3
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 * (1 - x / 3 * (1 - x / 4)), -torch.expm1(-safe) / safe)


def power_decay(r: Tensor, rate: Tensor, *, power: float = 8.0) -> tuple[Tensor, Tensor]:
    """A gate that is a power of a constant, and what it lets in: log a = -power rate sigmoid(r), sqrt(1 - a^2).

    Args:
        r:     [*] recurrence gate logits.
        rate:  broadcastable to r, at least 0: -log of the constant.
        power: how many times faster an open gate forgets.

    Returns: log a and sqrt(1 - a^2), each [*], float32 or wider; the second has no gradient where a is 1.
    Cost: O(size).   Source: De et al. 2024, arXiv:2402.19427.

    >>> from recur.primitives.gates import power_decay
    >>> log_a, keep = power_decay(torch.zeros(1), torch.tensor([0.25]))
    >>> log_a, keep
    (tensor([-1.]), tensor([0.9299]))
    """
    check_float("power_decay", r=r, rate=rate)
    dtype = accumulation_dtype(r, rate)
    log_a = -power * rate.to(dtype) * torch.sigmoid(r.to(dtype))
    return log_a, (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(dtype).tiny).sqrt()


def complex_gate(magnitude: Tensor, phase: Tensor) -> Tensor:
    """Complex log decay from a magnitude logit and an angle: log a = log(sigmoid(m)) + i phi.

    Args:
        magnitude: [*] logits m; |a| = sigmoid(m).
        phase:     [*] angle phi in radians by which each token rotates the state.

    Returns: [*] complex64 (complex128 for float64), real part <= 0.
    Cost: O(size); a scan with it costs as much as a real one twice as wide.
    Source: Katsch 2023, arXiv:2311.01927 (amplitude and phase law).

    >>> from recur.primitives.gates import complex_gate
    >>> complex_gate(torch.zeros(1), torch.tensor([1.0]))  # |a| = 0.5, one radian per token
    tensor([-0.6931+1.j])
    """
    bind("complex_gate", magnitude=(magnitude, "*"), phase=(phase, "*"))
    check_float("complex_gate", magnitude=magnitude, phase=phase)
    dtype = accumulation_dtype(magnitude, phase)
    return torch.complex(F.logsigmoid(magnitude.to(dtype)), phase.to(dtype))


def polar_gate(real: Tensor, imag: Tensor, *, form: str = "auto") -> Tensor:
    """Complex log decay read from one complex number c: a = sigmoid(|c|) c / |c|, so |a| lies in [0.5, 1).

    Args:
        real: [*] the real part of c.
        imag: [*] its imaginary part. At c = 0 the angle is 0 and so are both gradients.
        form: as in `biased`.

    Returns: [*] complex64 (complex128 for float64).   Cost: O(size).
    Source: the released PyTorch GateLoop, after Katsch 2023, arXiv:2311.01927.

    >>> from recur.primitives.gates import polar_gate
    >>> polar_gate(torch.zeros(1), torch.ones(1)).exp().imag  # c = i
    tensor([0.7311])
    """
    bind("polar_gate", real=(real, "*"), imag=(imag, "*"))
    check_float("polar_gate", real=real, imag=imag)
    if kernel.fused(form, real, imag, of="polar_gate", compiler=True):
        return kernel.polar(real, imag)
    dtype = accumulation_dtype(real, imag)
    c = torch.complex(real.to(dtype), imag.to(dtype))
    return complex_gate(c.abs(), c.angle())


def signed_gate(real: Tensor, imag: Tensor) -> Tensor:
    """The polar gate of the real part alone: a = sign(c_0) sigmoid(|c_0|), in (-1, -0.5] or [0.5, 1).

    Args:
        real: [*] the real part of c.
        imag: [*] not read.

    Returns: [*] complex log decay, its phase 0 or pi.   Source: the ablation of the released PyTorch GateLoop.

    >>> from recur.primitives.gates import signed_gate
    >>> signed_gate(torch.tensor([-1.0]), torch.zeros(1)).exp().real
    tensor([-0.7311])
    """
    bind("signed_gate", real=(real, "*"), imag=(imag, "*"))
    return complex_gate(real.abs(), torch.where(real < 0, math.pi, torch.zeros_like(real)))


def output_gate(y: Tensor, z: Tensor, *, act: str = "silu", form: str = "auto") -> Tensor:
    """Multiply the result by a gate from a second branch: y * act(z).

    Args:
        y:   [*] what the recurrence read.
        z:   [*] gate of the same shape.
        act: name of a pointwise function; "identity" multiplies as is.
        form: as in `biased`.

    Returns: [*] in y's dtype.   Raises: ShapeError if the shapes differ.   Cost: O(size).
    Source: Hua et al. 2022, arXiv:2202.10447 (gated attention unit); Mehta et al. 2022, arXiv:2206.13947.

    >>> from recur.primitives.gates import output_gate
    >>> output_gate(torch.tensor([2.0]), torch.zeros(1), act="sigmoid")
    tensor([1.])
    """
    bind("output_gate", y=(y, "*"), z=(z, "*"))
    fn = activation(act)
    if kernel.fused(form, y, z, of="output_gate", lacks=kernel.lacks_act(act), compiler=True):
        width = y.shape[min(2, y.ndim - 1) :].numel()
        return kernel.norm(y, z=z, width=width, N=width, gate="before", act=act)
    return y * fn(z).to(y.dtype)


def weigh(u: Tensor, w: Tensor, *, form: str = "auto") -> Tensor:
    """A number per head times its channels: w u.

    Args:
        u: [B T H P].
        w: [B T H], or any first axes of u.
        form: as in `biased`.

    Returns: [B T H P] in u's dtype.   Raises: ShapeError unless the axes of w are the first ones of u.

    >>> from recur.primitives.gates import weigh
    >>> weigh(torch.ones(1, 1, 2, 2), torch.tensor([[[2.0, 3.0]]])).flatten()
    tensor([2., 2., 3., 3.])
    """
    expect("weigh", "w", w, "the first axes of u", tuple(u.shape[: w.ndim]))
    P = u.shape[w.ndim :].numel()
    lacks = None if w.ndim > 2 and 0 < P <= 1024 else (f"w of {w.ndim} axes times P={P}", "w [B T H], P at most 1024")
    if kernel.fused(form, u, w, of="weigh", lacks=lacks, compiler=True):
        return kernel.weigh(u, w)
    return (u * w[(...,) + (None,) * (u.ndim - w.ndim)]).to(u.dtype)


def scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """The same value with `fraction` of the gradient: GateLoop's gate learns more slowly than the rest.

    Args:
        x: [*].
        fraction: of the gradient that passes.

    >>> from recur.primitives.gates import scale_gradient
    >>> x = torch.ones(1, requires_grad=True)
    >>> scale_gradient(x, 0.5).backward()
    >>> x.grad
    tensor([0.5000])
    """
    if torch.compiler.is_compiling() or transformed():
        return fraction * x + (1 - fraction) * x.detach()
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _ScaledGradient.apply(x, fraction)


class _ScaledGradient(torch.autograd.Function):
    """The formula has two products and a sum of what is the same value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction: float) -> Tensor:
        ctx.fraction = fraction
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.fraction, None
