"""Rotary positions: pairs of channels rotated by an angle proportional to the position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recur import kernel
from recur.shapes import accumulation_dtype


def rotary_frequencies(
    dim: int, *, base: float = 10000.0, inclusive: bool = False, device: torch.device | None = None
) -> Tensor:
    """[dim/2] radians per token: base^(-2j/dim); if inclusive base^(-j/(dim/2 - 1)), the last being 1/base.

    They are float32 numbers, found by the operations that published code uses, so that its angles are ours at any
    position; as float64, in which positions multiply them.

    Args:
        dim: K, even.
        base: of the powers.
        inclusive: whether the last frequency is 1/base exactly.
        device: of the result.

    >>> from recur.primitives.rotary import rotary_frequencies
    >>> rotary_frequencies(4)
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    if dim % 2:
        raise ValueError(f"rotary_frequencies: dim must be even, got {dim}")
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    exponent = torch.linspace(0, 1, dim // 2, **options) if inclusive else torch.arange(0, dim, 2, **options) / dim
    return (1.0 / base**exponent).double()


def rotate(
    x: Tensor, position: Tensor, frequencies: Tensor, *, layout: str = "interleaved", form: str = "auto"
) -> Tensor:
    """Rotate pair j of every head by the angle position * frequencies[j].

    Args:
        x:           [B T H K].
        position:    [B T] integer positions.
        frequencies: [P] radians per token, P at most K/2: the channels after the last pair stay as they are.
        layout:      "interleaved" pairs (2j, 2j+1), or "half" pairs (j, j + P).
        form:        "auto" takes one kernel on a GPU where torch.compile does not do better (recur.kernel.fused),
                     "recurrent", "chunked" and "parallel" the formula in torch.

    Returns: [B T H K] in x's dtype.   Raises: ValueError for another layout.
    Cost: O(B T H K).   Source: Su et al. 2021, arXiv:2104.09864.

    >>> from recur.primitives.rotary import rotate
    >>> x, quarter = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([torch.pi / 2])
    >>> rotate(x, torch.tensor([[1]]), quarter).round().long().flatten()
    tensor([0, 1])
    """
    if (paired := 2 * frequencies.shape[-1]) < x.shape[-1]:
        rotated = rotate(x[..., :paired], position, frequencies, layout=layout, form=form)
        return torch.cat([rotated, x[..., paired:]], -1)
    if layout not in ("interleaved", "half"):
        raise ValueError(f'rotate: layout must be "interleaved" or "half", got {layout!r}')
    whole = position.shape[0] in (1, x.shape[0]) and position.shape[1] == x.shape[1]
    lacks = ("frequencies that want a gradient", "detach them") if frequencies.requires_grad else None
    if whole and kernel.fused(form, x, of="rotate", lacks=lacks, compiler=True):
        return kernel.rotate(x, position, frequencies, layout == "half")
    dtype = accumulation_dtype(x)
    angle = (position[..., None].double() * frequencies).to(dtype)[:, :, None]  # [B T 1 K/2]
    cos, sin = angle.cos(), angle.sin()
    pairs = x.to(dtype).unflatten(-1, (-1, 2) if layout == "interleaved" else (2, -1))
    side = -1 if layout == "interleaved" else -2
    a, b = pairs.unbind(side)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], side).flatten(-2).to(x.dtype)
