"""What RetNet's parallel and chunkwise forms divide by, against their definitions token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recur import Mixer, presets
from recur.blocks import RetentionScale
from recur.primitives.retention import chunkwise_scale, parallel_scale
from recur.shapes import ShapeError

LOG_A = torch.tensor([-0.03, -0.4], dtype=torch.float64)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def score(q: Tensor, k: Tensor, a: float, begin: int, t: int, most: float = 5e4) -> tuple[float, float]:
    """s_t and c_t with sums from token `begin`; q, k [T K]."""
    s = sum(a ** (t - m) for m in range(begin, t + 1)) ** 0.5
    return s, min(max(sum(abs(float(q[t] @ k[m])) * a ** (t - m) for m in range(begin, t + 1)) / s, 1.0), most)


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])  # below the bound of 1, between, above that of 5e4
def test_the_parallel_scale_is_its_definition(scale: float) -> None:
    q, k = draw(2, 7, 2, 3, scale=scale), draw(2, 7, 2, 4, scale=scale)[..., :3]
    found = parallel_scale(q, k, LOG_A)
    for b, t, h in torch.cartesian_prod(torch.arange(2), torch.arange(7), torch.arange(2)).tolist():
        s, c = score(q[b, :, h], k[b, :, h], float(LOG_A[h].exp()), 0, t)
        assert float(found[b, t, h]) == pytest.approx(s * c, rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 20])
def test_the_chunkwise_scale_is_its_definition(chunk: int) -> None:
    q, k, v = draw(1, 11, 2, 3), draw(1, 11, 2, 4)[..., :3], draw(1, 11, 2, 5, scale=3.0)
    found = chunkwise_scale(q, k, v, LOG_A, chunk=chunk)
    for h in range(2):
        a = float(LOG_A[h].exp())
        total = sum(a**m for m in range(chunk))
        state = torch.zeros(3, 5, dtype=torch.float64)
        for t in range(11):
            begin = t - t % chunk
            if t == begin:
                entering = max(1.0, float(state.abs().sum(0).max()) / total)
            s, c = score(q[0, :, h], k[0, :, h], a, begin, t, most=float("inf"))
            assert float(found[0, t, h]) == pytest.approx(s * max(c, entering), rel=1e-12)
            state = a * state + torch.outer(k[0, t, h], v[0, t, h])


@pytest.mark.parametrize("chunk", [None, 4])
def test_no_token_sees_a_later_one(chunk: int | None) -> None:
    layer = Mixer(presets.retnet(heads=2, eps=1e-2, scale=(RetentionScale(chunk, eps=1e-2),)), 8).double()
    x = draw(1, 9, 8)
    changed = torch.cat([x[:, :6], 5 + x[:, 6:]], 1)
    assert torch.equal(layer(x).y[:, :6], layer(changed).y[:, :6])


def test_no_gradient_passes_and_shapes_are_checked() -> None:
    q = draw(1, 4, 2, 3).requires_grad_()
    assert not parallel_scale(q, q, LOG_A).requires_grad
    with pytest.raises(ShapeError, match="parallel_scale: q has H=2 but log_a has H=1"):
        parallel_scale(q, q, LOG_A[:1])
