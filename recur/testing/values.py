"""Checks of values on any device; the public functions cannot read values without stalling a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_inputs(
    *,
    log_decay: Tensor | None = None,
    rate: Tensor | None = None,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    ids: Tensor | None = None,
    vocab_size: int | None = None,
    **finite: Tensor | None,
) -> None:
    """Look at the values of a scan's or model's inputs, wherever they lie; copies one number a check from a GPU.

    Args:
        log_decay: real part <= 0; -inf is allowed, NaN and an infinite phase are not.
        rate: within (0, 1).
        delta: positive and finite.
        A: negative.
        cu_seqlens: rises from 0, to `length` if that is given, without falling.
        length: T, where the last of cu_seqlens must be it.
        ids: within 0 .. vocab_size - 1.
        vocab_size: number of tokens.
        finite: any further tensors by name (q, k, v, x, beta, state ...): finite numbers.

    Raises: ValueError naming the argument, the rule, the first offender and where it is.

    >>> recur.testing.check_inputs(log_decay=torch.tensor([-1.0, 0.5]))
    Traceback (most recent call last):
    ValueError: check_inputs: log_decay must be <= 0, got 0.5 at [1]
    """
    if log_decay is not None:
        real, phase = (log_decay.real, log_decay.imag) if log_decay.is_complex() else (log_decay, None)
        _all("log_decay", "<= 0 in its real part" if log_decay.is_complex() else "<= 0", real <= 0, log_decay)
        if phase is not None:
            _all("log_decay", "finite in its imaginary part", torch.isfinite(phase), log_decay)
    if rate is not None:
        _all("rate", "within (0, 1)", (rate > 0) & (rate < 1), rate)
    if delta is not None:
        _all("delta", "positive and finite", (delta > 0) & torch.isfinite(delta), delta)
    if A is not None:
        _all("A", "negative", A < 0, A)
    if ids is not None:
        if vocab_size is None:
            raise TypeError("check_inputs: vocab_size must be given with ids, got None")
        _all("ids", f"within 0 .. {vocab_size - 1}", (ids >= 0) & (ids < vocab_size), ids)
    if cu_seqlens is not None:
        _borders(cu_seqlens, length)
    for name, tensor in finite.items():
        if tensor is not None:
            _all(name, "finite", torch.isfinite(tensor), tensor)


def _borders(cu_seqlens: Tensor, length: int | None) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"check_inputs: cu_seqlens must be [n+1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens[0] != 0:
        raise ValueError(f"check_inputs: cu_seqlens must start with 0, got {cu_seqlens[0].item()}")
    _all("cu_seqlens", "rising", torch.cat([cu_seqlens[:1] == 0, cu_seqlens.diff() >= 0]), cu_seqlens)
    if length is not None and cu_seqlens[-1] != length:
        raise ValueError(f"check_inputs: cu_seqlens must end with T={length}, got {cu_seqlens[-1].item()}")


def _all(name: str, rule: str, holds: Tensor, tensor: Tensor) -> None:
    if not bool(holds.all()):
        at = tuple((~holds).nonzero()[0].tolist())
        value: Any = tensor[at].item()
        raise ValueError(f"check_inputs: {name} must be {rule}, got {value} at {list(at)}")
