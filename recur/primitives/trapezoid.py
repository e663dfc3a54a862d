"""Mamba-3's discretisation: decays and rotations that tokens bring, and the trapezoidal rule as two writes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recur import kernel
from recur.primitives.conv import token_shift
from recur.primitives.diagonal import gated_scan
from recur.primitives.forms import ScanOut
from recur.shapes import ShapeError, accumulation_dtype, bind, check_float, pick


def data_decay(rate: Tensor, step: Tensor, *, floor: float = 1e-4) -> Tensor:
    """Log decay from a rate of each token: log a = -max(f(r), floor) delta, f(r) = 1 + r, or 1 / (1 - r) below 0.

    Args:
        rate:  [*] r, any real.
        step:  [*] delta, positive.
        floor: the least rate.

    Returns: [*] natural log decay, float32 or wider.   Cost: O(size).   Source: Lahoti et al. 2026, arXiv:2603.15569.

    >>> recur.primitives.trapezoid.data_decay(torch.tensor([-1.0, 0.0, 2.0]), torch.ones(3))
    tensor([-0.5000, -1.0000, -3.0000])
    """
    check_float("data_decay", rate=rate, step=step)
    r = rate.to(accumulation_dtype(rate, step))
    f = r.clamp(min=0) + 1 / (1 - r.clamp(max=0))
    return -f.clamp(min=floor) * step


def accumulated_angle(
    angle: Tensor, step: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> ScanOut:
    """Angles that tokens add up: theta_t = theta_{t-1} + pi tanh(angle_t) delta_t.

    Args:
        angle:         [B T A], shared by heads, or [B T H A].
        step:          [B T H] delta.
        initial_state: [B H A] theta before the first token; zeros when omitted.
        cu_seqlens:    [n+1] document borders; states are then [n H A].

    Returns: y [B T H A], theta in [-pi, pi]; state [B H A]; float32, or float64 if an input is.
    Raises: ShapeError if axes disagree.
    Cost: O(B T H A); summed in float64, so that theta is exact to rounding after any number of tokens.
    Source: Lahoti et al. 2026, arXiv:2603.15569.

    >>> angle = torch.full((1, 4, 1), 9.0)  # half a rotation per token
    >>> theta, _ = recur.primitives.trapezoid.accumulated_angle(angle, torch.ones(1, 4, 1))
    >>> theta.cos().flatten()
    tensor([-1.,  1., -1.,  1.])
    """
    bind("accumulated_angle", angle=(angle, "B T A | B T H A"), step=(step, "B T H"))
    real = accumulation_dtype(angle, step, initial_state)
    angle = angle if angle.ndim == 4 else angle[:, :, None]
    added = math.pi * angle.to(real).tanh() * step.to(real)[..., None]
    still = added.new_zeros(added.shape[2:], dtype=torch.float64)
    before = None if initial_state is None else initial_state.double()
    kernel.without(
        "accumulated_angle", "chunked", angle, "no kernel adds angles in float64", "Rotary, whose angles are fixed"
    )
    options: dict[str, Any] = {"initial_state": before, "cu_seqlens": cu_seqlens, "form": "chunked"}
    theta, last = gated_scan(added.double(), still, **options)
    return ScanOut(*((x - 2 * math.pi * (x / (2 * math.pi)).round()).to(real) for x in (theta, last)))


def rotate_by(x: Tensor, theta: Tensor, *, layout: str = "interleaved") -> Tensor:
    """Rotate pair j of every head by theta[j]; pairs beyond the angles stay.

    Args:
        x:      [B T H K], or [B T R H K].
        theta:  [B T H A] radians, A <= K/2.
        layout: pairs (2j, 2j+1) "interleaved", or (j, j + K/2) "half".

    Returns: as x, in its dtype.   Raises: ShapeError for more angles than pairs, ValueError for another layout.
    Cost: O(size).   Source: Su et al. 2021, arXiv:2104.09864; Lahoti et al. 2026, arXiv:2603.15569.

    >>> x = torch.tensor([1.0, 0.0, 5.0]).view(1, 1, 1, 3)
    >>> recur.primitives.trapezoid.rotate_by(x, torch.full((1, 1, 1, 1), torch.pi)).flatten().round() + 0.0
    tensor([-1.,  0.,  5.])
    """
    A, K = theta.shape[-1], x.shape[-1]
    if 2 * A > K:
        raise ShapeError(f"rotate_by: theta must have at most K/2 angles, got A={A} and K={K}")
    apart = pick("rotate_by", "layout", layout, {"interleaved": False, "half": True})
    theta = theta if x.ndim == theta.ndim else theta[:, :, None]
    cos, sin, wide = theta.cos(), theta.sin(), x.to(accumulation_dtype(x, theta))
    if not apart:
        a, b = wide[..., : 2 * A].unflatten(-1, (A, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([rotated, wide[..., 2 * A :]], -1).to(x.dtype)
    a, a_rest, b, b_rest = wide.split([A, K // 2 - A, A, K - K // 2 - A], -1)
    return torch.cat([a * cos - b * sin, a_rest, b * cos + a * sin, b_rest], -1).to(x.dtype)


def trapezoid(
    k: Tensor,
    v: Tensor,
    trap: Tensor,
    step: Tensor,
    log_decay: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The trapezoidal rule as two writes per token: (1 - l) delta a k_{t-1} v_{t-1}ᵀ, then l delta k_t v_tᵀ.

    Args:
        k:             [B T H K], or [B T R H K] for R writes each.
        v:             [B T H V], or [B T R H V].
        trap:          [B T H] l before its sigmoid.
        step:          [B T H] delta.
        log_decay:     [B T H] log a.
        initial_state: k and v of the token before the first; zeros when omitted.
        cu_seqlens:    [n+1] document borders.

    Returns: keys [B T M H K] and values [B T M H V], M = 2 (or 2 R), for `recur.scan` with this decay; the last k, v.
    Raises: ShapeError if axes disagree.   Cost: O(size).   Source: Lahoti et al. 2026, arXiv:2603.15569.

    >>> x, ones = torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1)
    >>> keys, values, last = recur.primitives.trapezoid.trapezoid(x, x, 0 * ones, ones, 0 * ones)
    >>> keys.squeeze()  # the second token writes half of the first, and half of itself
    tensor([[0.0000, 0.5000],
            [0.5000, 0.5000]])
    """
    bind("trapezoid", trap=(trap, "B T H"), step=(step, "B T H"), log_decay=(log_decay, "B T H"))
    one = k.ndim == 4
    k, v = (x[:, :, None] if one else x for x in (k, v))
    bind("trapezoid", k=(k, "B T R H K"), v=(v, "B T R H V"), trap=(trap, "B T H"))
    given = (None, None) if initial_state is None else initial_state
    (k_before, k_last), (v_before, v_last) = (
        _before(x, state, cu_seqlens) for x, state in zip((k, v), given, strict=True)
    )
    real = accumulation_dtype(trap, step, log_decay)
    share, delta = trap.to(real).sigmoid(), step.to(real)
    old, new = ((weight[:, :, None, :, None]) for weight in ((1 - share) * delta * log_decay.exp(), share * delta))
    keys = torch.cat([(old * k_before).to(k.dtype), (new * k).to(k.dtype)], 2)
    return keys, torch.cat([v_before, v], 2), (k_last[:, 0], v_last[:, 0]) if one else (k_last, v_last)


def _before(x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B T R H *] of the token before, and that of the last [B R H *]."""
    flat = None if state is None else state.flatten(1)[:, None]
    shifted, last = token_shift(x.flatten(2), initial_state=flat, cu_seqlens=cu_seqlens)
    return shifted.view(x.shape), last[:, 0].unflatten(-1, x.shape[2:])
