"""One token by the kernel against the same step in float64, in Triton's interpreter.

Laws run in a process of their own: `TRITON_INTERPRET=1 python tests/test_kernel_step.py LAW...`. There the public steps
take the kernel on a CPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import Laws, allowed, off_by, run_laws, widen
from torch import Tensor

import recur
from recur import kernel

HARD = (0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf)

LAWS = law = Laws()


def compare(step: Callable[..., Tensor], state: Tensor, *inputs: Tensor | None, **options: Any) -> None:
    """y and the overwritten state, which is given by its place among the inputs: None stands for it."""
    exact, mine = widen(state).clone(), state.clone(memory_format=torch.preserve_format)
    want = step(*(exact if x is None else widen(x) for x in inputs), **{k: widen(x) for k, x in options.items()})
    got = step(*(mine if x is None else x for x in inputs), **options)
    for name, g, w in (("y", got, want), ("state", mine, exact)):
        assert g.isfinite().all(), f"{step.__name__}: {name} is not finite"
        error, limit = off_by(g, w), allowed(w, (), [g, *inputs])
        assert error <= limit, f"{step.__name__}: {name} of {tuple(g.shape)} is off by {error:.1e}"


def decays(*shape: int, kind: str = "mild") -> Tensor:
    if kind == "complex":
        return torch.complex(-torch.rand(shape), 3 * torch.randn(shape))
    return torch.tensor(HARD)[torch.randint(len(HARD), shape)] if kind == "hard" else -torch.rand(shape)


def outer(
    B: int, H: int, G: int, K: int, V: int, gate: tuple[int, ...] | None, kind: str = "mild", **options: Any
) -> None:
    torch.manual_seed(K + V)
    wide = torch.randn(B, 2 * G * K + H * V)  # q, k and v are views of one projection
    q, k, v = wide.split([G * K, G * K, H * V], -1)
    q, k, v = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)) / K**0.5, v.unflatten(-1, (H, V))
    log_a = None if gate is None else decays(*gate, kind=kind)
    state = torch.randn(B, H, K, V, dtype=torch.complex64 if kind == "complex" else torch.float32)
    tied = options.pop("tied", False)

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, **options: Any) -> Tensor:
        return recur.step(q, None if tied else k, v, log_a, state, scale=0.7, **options)

    options = {name: x(B, H, K) for name, x in options.items()}
    if log_a is None:
        compare(lambda s, q, k, v, **o: step(s, q, k, v, None, **o), state, None, q, k, v, **options)
    else:
        compare(step, state, None, q, k, v, log_a, **options)


def beta(B: int, H: int, K: int) -> Tensor:
    return torch.rand(B, H)


@law
def matrix_states() -> None:
    for B, H, G, K, V in ((2, 4, 2, 5, 35), (1, 2, 1, 64, 64), (3, 2, 2, 1, 7), (1, 1, 1, 130, 3), (2, 3, 1, 16, 1)):
        for gate in (None, (H,), (H, K), (B, H), (B, H, K)):
            outer(B, H, G, K, V, gate)
        outer(B, H, G, K, V, (B, H, K), "hard")
        outer(B, H, G, K, V, (B, H, K), "complex")
        outer(B, H, G, K, V, (B, H), "complex")
    outer(1, 1, 1, 1100, 3, (1, 1, 1100), beta=beta)


@law
def delta_bonus_and_tied_keys() -> None:
    for gate, kind in ((None, "mild"), ((2, 4), "mild"), ((2, 4, 5), "hard"), ((2, 4, 5), "complex")):
        outer(2, 4, 2, 5, 19, gate, kind, beta=beta)
    for gate in (None, (2, 4), (2, 4, 5)):
        outer(2, 4, 2, 5, 19, gate, bonus=lambda B, H, K: torch.randn(H, K))
        outer(2, 4, 4, 5, 19, gate, bonus=lambda B, H, K: torch.randn(H))
    outer(2, 4, 2, 5, 19, (2, 4, 5), "complex", bonus=lambda B, H, K: torch.randn(H, K))
    outer(2, 4, 4, 5, 19, (2, 4, 5), "hard", tied=True)
    outer(2, 4, 1, 5, 19, (4, 5), tied=True, beta=beta)


@law
def states_of_channels() -> None:
    for B, V, G, N in ((2, 12, 1, 4), (3, 8, 2, 16), (1, 40, 1, 33), (2, 3, 3, 1)):
        torch.manual_seed(V)
        x, rate, state = torch.randn(B, V), torch.rand(B, V), torch.randn(B, V, N)
        k, q = torch.randn(B, G, N), torch.randn(B, N) if G == 1 else torch.randn(B, G, N)
        for diagonal in (True, False):
            compare(recur.online_step, state, x, rate, k, q, None, diagonal=diagonal)
        A = -torch.rand(V, N)
        compare(recur.selective_step, state, x, rate, A, k, q, None)
        if V != B:
            compare(recur.selective_step, state, x, rate, A, torch.randn(V, N), q, None)
        poles, readout = decays(V, N, kind="complex"), torch.randn(V, N, dtype=torch.complex64)
        compare(recur.fixed_step, state.to(torch.complex64), x, poles, readout, None)
        write = torch.randn(N, dtype=torch.complex64)
        compare(recur.fixed_step, state.to(torch.complex64), x, poles[0], readout, None, write=write)
        compare(recur.fixed_step, state, x, decays(N), readout.real.clone(), None, write=write.real.clone())


@law
def diagonal_states() -> None:
    for shape in ((3,), (2, 35), (2, 3, 700)):
        torch.manual_seed(len(shape))
        x, state = torch.randn(shape), torch.randn(shape)
        for gate in (decays(*shape), decays(*shape, kind="hard"), decays(*shape[1:])):
            compare(recur.gated_step, state, x, gate, None)
        rotated = decays(*shape, kind="complex")
        compare(recur.gated_step, state.to(torch.complex64), x, rotated, None)
        compare(recur.gated_step, state.to(torch.complex64), x.to(torch.complex64), rotated.conj(), None)
        compare(recur.gated_step, state.to(torch.complex64), x.to(torch.complex64), decays(*shape), None)
    compare(recur.gated_step, torch.randn(5, 2).T, torch.randn(2, 5), decays(2, 5), None)


@law
def any_view_and_dtype() -> None:
    torch.manual_seed(0)
    pool = torch.randn(3, 2, 5, 9, 4)
    q, k, v, a = (torch.randn(2, 3, D) for D in (5, 5, 9, 5))
    for dtype in (torch.bfloat16, torch.float16):
        small = [x.to(dtype) for x in (q, k, v, -a.abs())]
        for state in (pool[..., 1].transpose(0, 1), torch.randn(2, 3, 9, 5).mT, torch.randn(2, 3, 5, 9).bfloat16()):
            compare(recur.step, state, *small, None)
    empty = torch.empty(0, 3, 5, 9)
    assert recur.step(q[:0], k[:0], v[:0], None, empty).shape == (0, 3, 9)
    assert recur.gated_step(q[:0], a[:0], torch.empty(0, 3, 5)).shape == (0, 3, 5)


@law
def the_operator_is_one_of_torch() -> None:
    from recur.kernels.step import step

    state, q = torch.randn(2, 3, 5, 9), torch.randn(2, 3, 5, 1)
    v, a = torch.randn(2, 3, 1, 9), decays(2, 3, 5, 1)
    wide, rotated, channels = state.to(torch.complex64), decays(2, 3, 5, 1, kind="complex"), v[:, :1]
    memory, transposed = torch.randn(2, 1, 1, 9).to(torch.complex64), torch.randn(2, 3, 9, 5).mT
    for case in (
        (state, q, q.clone(), v, a, torch.rand(2, 3, 1, 1), None, 0.5, "delta", False),
        (wide, q, q.clone(), v, rotated, None, None, 1.0, "outer", False),
        (memory, None, None, channels, decays(1, 1, 1, 9), None, None, 1.0, "outer", False),
        (transposed, q, None, v, a, None, None, 1.0, "outer", True),
    ):
        torch.library.opcheck(torch.ops.recur.step.default, case)
    version = state._version
    step(state, q, q, v, a, None, None, 1.0, "outer", False)
    assert state._version > version  # a backward that has saved it will notice


GROUPS = [
    ["matrix_states"],
    ["delta_bonus_and_tied_keys", "states_of_channels", "diagonal_states", "any_view_and_dtype"],
    ["the_operator_is_one_of_torch"],
]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_kernel_agrees_with_the_step_in_float64(names: list[str]) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, names)


def test_a_bfloat16_state_drifts_little() -> None:
    """A thousand tokens of slow gates (about 16 are remembered well): rounding every state costs 0.6 percent."""
    torch.manual_seed(0)
    exact, rounded = (torch.zeros(1, 2, 16, 16, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for _ in range(1000):
        q, k, v = (torch.randn(1, 2, 16) for _ in range(3))
        log_a = torch.nn.functional.logsigmoid(torch.randn(1, 2, 16)) / 16
        y, want = recur.step(q, k, v, log_a, rounded), recur.step(*map(widen, (q, k, v, log_a, exact)))
    for got, true in ((y, want), (rounded, exact)):
        assert 1e-3 < (got - true).norm() / true.norm() < 1e-2


def test_plan_fills_the_machine() -> None:
    """Two programs per processor where columns suffice; tiles of at most 4096 numbers, twice that for many states."""
    pytest.importorskip("triton")
    from recur.kernels.step import plan

    assert plan(states=16, K=128, V=128) == (128, 16, 4)  # 128 programs, as many as there can be
    assert plan(states=1024, K=128, V=128) == (128, 32, 4)
    assert plan(states=4096, K=128, V=128) == (128, 64, 8)
    assert plan(states=64, K=16, V=4096) == (16, 128, 4)
    assert plan(states=256, K=16, V=4096) == (16, 256, 8)
    assert plan(states=1024, K=128, V=128, planes=2) == (128, 32, 8)
    assert plan(states=1, K=1, V=3) == (1, 4, 1)


@pytest.mark.filterwarnings("ignore::recur.SlowPath")
def test_what_a_step_covers_is_counted_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows per key of a complex state."""
    monkeypatch.setattr(kernel, "TRITON", kernel.OLDEST)
    for dtype, keys in ((torch.float32, 2048), (torch.bfloat16, 2048), (torch.complex64, 1024), (torch.float64, 0)):
        state = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert keys == 0 or kernel.takes_step(keys, state)
        assert not kernel.takes_step(keys + 1, state)


def test_every_law_is_run() -> None:
    assert sorted(LAWS) == sorted(name for names in GROUPS for name in names)


if __name__ == "__main__":

    def takes_step(rows: int, state: Tensor, lacks: tuple[str, str] | None = None) -> bool:
        return lacks is None and state.dtype not in kernel.WIDE

    kernel.takes_step = takes_step
    LAWS.main()
