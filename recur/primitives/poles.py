"""Fixed poles of state space models: discretisation of a constant complex decay."""

from __future__ import annotations

import torch
from torch import Tensor

from recur.shapes import accumulation_dtype, bind


def poles(log_rate: Tensor, frequency: Tensor) -> Tensor:
    """Complex log decay of constant poles: -exp(rho) + i omega.

    Args:
        log_rate: [* N] rho, any real number.
        frequency: [* N] omega in radians per token.

    Returns: [* N] complex64 (complex128 for float64).   Source: Gupta et al. 2022, arXiv:2203.14343.

    >>> from recur.primitives.poles import poles
    >>> poles(torch.zeros(1), torch.tensor([2.0]))
    tensor([-1.+2.j])
    """
    bind("poles", log_rate=(log_rate, "*"), frequency=(frequency, "*"))
    dtype = accumulation_dtype(log_rate, frequency)
    return torch.complex(-log_rate.to(dtype).exp(), frequency.to(dtype))


def zero_order_hold(log_decay: Tensor) -> Tensor:
    """(exp(z) - 1) / z, the weight of an input held for one step under the pole z; 1 at z = 0.

    exp(z) - 1 is formed without cancellation and small z by its series, so slow modes keep all their digits.

    Args:
        log_decay: [*] real or complex z.

    Returns: [*] of the same dtype.

    >>> from recur.primitives.poles import zero_order_hold
    >>> zero_order_hold(torch.tensor([0.0, -1.0]))
    tensor([1.0000, 0.6321])
    """
    z = log_decay if log_decay.is_complex() else torch.complex(log_decay, torch.zeros_like(log_decay))
    small = z.real.square() + z.imag.square() < 1e-4
    away = torch.where(small, torch.ones_like(z), z)  # no division by 0, in the gradient neither
    grow, half = away.real.exp(), (away.imag / 2).sin()
    expm1 = torch.complex(torch.expm1(away.real) * away.imag.cos() - 2 * half.square(), grow * away.imag.sin())
    near = torch.where(small, z, torch.zeros_like(z))
    series = torch.ones_like(near)
    for order in range(8, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ... )): |z| < 1e-2, so order 8 is below 1e-20
        series = 1 + near / order * series
    weight = torch.where(small, series, expm1 / away)
    return weight if log_decay.is_complex() else weight.real
