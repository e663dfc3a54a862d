"""Elementwise kernels against the float64 token loop, in Triton's interpreter, chosen before Triton is loaded.

Laws run in processes of their own: `TRITON_INTERPRET=1 python tests/test_kernel_walk.py LAW...`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])
EXACT = 2e-6  # float32 sums of a few hundred terms
HALF = 2e-3  # one rounding to float16 is 5e-4

LAWS: dict[str, Callable[[], None]] = {}


def law(check: Callable[[], None]) -> Callable[[], None]:
    LAWS[check.__name__] = check
    return check


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def gradients(scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None]) -> list[Tensor]:
    """y, state and the gradient of every input, the outputs weighed by fixed noise."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outputs = scan(*leaves)
    noise = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=noise, dtype=torch.float64) for t in outputs]
    loss = sum((t * w).sum().real for t, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


def widen(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def compare(name: str, kernel: Callable, loop: Callable, inputs: list[Tensor | None], limit: float = EXACT) -> None:
    got, want = gradients(kernel, inputs), gradients(loop, [widen(t) for t in inputs])
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.isfinite().all(), f"{name}: output {i} is not finite"
        error = (g.to(w.dtype) - w).norm() / w.norm().clamp_min(1e-30)
        assert error < limit, f"{name}: output {i} is off by {error:.1e}"


def selective(name: str, B: int, T: int, V: int, G: int, N: int, *, reverse: bool = False, **kind: object) -> None:
    """Rates of decay from 0 to those that forget within a token."""
    from recur.kernels import walk

    from recur import selective_scan

    a = -torch.tensor([0.0, 1e-9, 0.3, 5.0, 80.0, 700.0])[torch.randint(0, 6, (V, N))]
    inputs = [randn(B, T, V), torch.rand(B, T, V), a, randn(B, T, G, N), randn(B, T, G, N), randn(B, V, N)]
    run(
        name,
        lambda x, d, A, B, C, s=None: walk.selective(x, d, A, B, C, s, reverse),
        lambda x, d, A, B, C, s=None: selective_scan(x, d, A, B, C, initial_state=s, reverse=reverse, form="recurrent"),
        inputs,
        **kind,
    )


def online(name: str, B: int, T: int, V: int, G: int, N: int, *, reverse: bool = False, **kind: object) -> None:
    """Keys from tiny to so large that one token overwrites the slot; rates of exactly 0 and 1."""
    from recur.kernels import walk

    from recur import online_scan

    rate = torch.rand(B, T, V).where(torch.rand(B, T, V) < 0.7, torch.randint(0, 2, (B, T, V)).float())
    keys = randn(B, T, G, N) * torch.tensor([1e-3, 1.0, 1.0, 30.0])[torch.randint(0, 4, (B, T, 1, 1))]
    inputs = [randn(B, T, V), rate, keys, randn(B, T, G, N), randn(B, V, N)]
    run(
        name,
        lambda x, r, k, q, s=None: walk.online(x, r, k, q, s, reverse),
        lambda x, r, k, q, s=None: online_scan(x, r, k, q, initial_state=s, reverse=reverse, form="recurrent"),
        inputs,
        **kind,
    )


def diagonal(name: str, B: int, T: int, D: int, *, turn: bool = False, reverse: bool = False, **kind: object) -> None:
    from recur.kernels import walk

    from recur import gated_scan

    x, log, state = randn(B, T, D), HARD[torch.randint(0, 7, (B, T, D))], randn(B, D)
    if turn:
        x, log, state = (torch.complex(t, randn(*t.shape, scale=s)) for t, s in ((x, 1), (log, 20), (state, 1)))
    run(
        name,
        lambda x, log, s=None: walk.diagonal(x, log, s, reverse),
        lambda x, log, s=None: gated_scan(x, log, initial_state=s, reverse=reverse, form="recurrent"),
        [x, log, state],
        **kind,
    )


def run(
    name: str, kernel: Callable, loop: Callable, inputs: list[Tensor | None], *, half: bool = False, fresh: bool = False
) -> None:
    """With `half` in float16 but for the state, the last input; with `fresh` from no state at all."""
    if half:
        inputs = [t.half() for t in inputs[:-1]] + inputs[-1:]
    compare(name, kernel, loop, inputs[:-1] if fresh else inputs, HALF if half else EXACT)


@law
def selective_is_the_token_loop() -> None:
    selective("odd sizes", 1, 5, 7, 1, 3)
    selective("a stretch and a token, right to left", 1, 65, 3, 1, 4, reverse=True)
    selective("groups", 2, 2, 6, 3, 2)
    selective("one slot, fresh", 2, 17, 5, 1, 1, fresh=True)
    selective("many slots", 1, 15, 9, 1, 33)
    selective("float16", 1, 16, 20, 1, 16, half=True)


@law
def online_is_the_token_loop() -> None:
    online("odd sizes", 1, 5, 7, 1, 3)
    online("a stretch and a token, right to left", 1, 65, 3, 1, 4, reverse=True)
    online("groups", 2, 2, 6, 3, 2)
    online("one slot, fresh", 2, 17, 5, 1, 1, fresh=True)
    online("many slots", 1, 15, 9, 1, 33)
    online("float16", 1, 16, 20, 1, 16, half=True)


@law
def three_segments_are_the_token_loop() -> None:
    selective("130", 1, 130, 2, 1, 2)
    online("130, right to left", 1, 130, 2, 1, 2, reverse=True)


@law
def diagonal_is_the_token_loop() -> None:
    for T in (1, 2, 15, 16, 17, 63, 64, 65, 130):
        diagonal(f"T={T}", 2, T, 5, reverse=T % 2 == 0)
    diagonal("segments", 1, 300, 3)
    diagonal("fresh, float16", 1, 40, 3, fresh=True, half=True)


@law
def complex_diagonal_is_the_token_loop() -> None:
    for T in (1, 17, 64, 130):
        diagonal(f"T={T}", 2, T, 3, turn=True, reverse=T % 2 == 0)
    diagonal("segments, fresh", 1, 300, 2, turn=True, fresh=True)


@law
def nothing_to_scan_returns_the_state() -> None:
    from recur.kernels import walk

    x, k, a, state = randn(2, 0, 3), randn(2, 0, 4), -torch.rand(3, 4), randn(2, 3, 4)
    for y, last in (walk.selective(x, x, a, k, k, state, False), walk.online(x, x, k, k, state, False)):
        assert y.shape == x.shape
        assert torch.equal(last, state)
    y, last = walk.diagonal(x, x, state[..., 0], False)
    assert y.shape == x.shape
    assert torch.equal(last, state[..., 0])


@law
def a_reset_owes_its_gate_nothing() -> None:
    from recur.kernels import walk

    log = torch.full((1, 9, 3), -0.5)
    log[:, 4] = -math.inf
    x, log = randn(1, 9, 3).requires_grad_(), log.requires_grad_()
    y, _ = walk.diagonal(x, log, None, False)
    assert torch.equal(y[:, 4], x[:, 4])
    (dlog,) = torch.autograd.grad(y.sum(), log)
    assert dlog[:, 4].eq(0).all()


@law
def second_order_is_refused() -> None:
    from recur.kernels import walk

    x, k, log = randn(1, 3, 2).requires_grad_(), randn(1, 3, 2), -torch.rand(1, 3, 2)
    for y, _ in (walk.online(x, torch.rand(1, 3, 2), k, k, None, False), walk.diagonal(x, log, None, False)):
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            dx.sum().backward()


@law
def float64_and_wide_states_are_refused() -> None:
    from recur.kernels import walk

    x, k = randn(1, 3, 2), randn(1, 3, 300)
    with pytest.raises(NotImplementedError, match="chunked"):
        walk.diagonal(x.double(), x.double(), None, False)
    with pytest.raises(NotImplementedError, match="N must be at most 256"):
        walk.online(x, x, k, k, None, False)


SLOW = [name for name in LAWS if name.endswith("the_token_loop")]
QUICK = [name for name in LAWS if name not in SLOW]


@pytest.mark.parametrize("names", [*([name] for name in SLOW), QUICK], ids=[*SLOW, "quick"])
def test_laws(names: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *names],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_plan_cuts_time_only_where_the_machine_would_idle() -> None:
    from recur.kernels.walk import STRETCH, plan

    assert plan(64, 4096, 4096, 1, 16).segments == 1
    long = plan(1, 1 << 20, 1024, 1, 16)
    assert long.segments > 1
    assert long.length % STRETCH == 0
    assert (long.segments - 1) * long.length < 1 << 20 <= long.segments * long.length


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
    for name in sys.argv[1:]:
        LAWS[name]()
