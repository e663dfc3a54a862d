"""Layouts of a state and of its tokens: complex numbers as real rows, groups as heads."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor


def as_complex(state: Tensor) -> Tensor:
    """Real above imaginary part [... 2K V] -> complex [... K V]."""
    return torch.complex(*state.chunk(2, -2))


def as_real(state: Tensor) -> Tensor:
    """Complex [... K V] -> real above imaginary part [... 2K V]."""
    return torch.cat([state.real, state.imag], -2)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[... G K] -> [... H K]: every head its group's."""
    return x if x.shape[-2] == heads else repeat(x, "... G K -> ... (G r) K", r=heads // x.shape[-2])
