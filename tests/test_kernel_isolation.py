"""What is not finite in one document, or one row, of a kernel's inputs changes no number of another.

Inside a document the kernel is freer than the token loop. A scan with a matrix state multiplies chunks of 32 or 64
tokens as matrices, whose masked entries are 0: NaN or inf in v or beta reaches all tokens of its chunk, earlier ones
too, in its columns; in q, k or a gate it reaches all columns; from there on the state is NaN. Steps, elementwise and
diagonal scans keep it to the tokens after it; in packed diagonal scans a gate of exactly 0 also forgets a NaN.

Laws run in a process of their own, in Triton's interpreter: `TRITON_INTERPRET=1 python tests/test_kernel_isolation.py
LAW...`; gpu_laws.py runs them on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import Laws, run_laws
from torch import Tensor

import recur

LAWS = law = Laws()
T, H, G, K, V = 17, 2, 1, 3, 2
BORDERS, POISONED = [0, 3, 5, 5, 10, 11, 17], 3  # the document of tokens 5 to 10, which is all that may be lost


def isolated(run: Callable[..., recur.ScanOut], tensors: dict[str, Tensor], fixed: tuple[str, ...] = ()) -> None:
    """y, states and gradients of a scan of which one document, or row, is poisoned everywhere; weights `fixed` in time
    are not, nor are their gradients looked at: those are sums over all tokens."""
    for packed, reverse, value in ((True, False, math.nan), (True, True, math.inf), (False, False, math.inf)):
        poison(run, tensors, fixed, packed, reverse, value)


def poison(
    run: Callable[..., recur.ScanOut], tensors: dict[str, Tensor], fixed: tuple[str, ...], packed: bool, reverse: bool,
    value: float,
) -> None:  # fmt: skip
    cu = torch.tensor(BORDERS) if packed else None
    start, stop = BORDERS[POISONED : POISONED + 2]

    def mine(name: str, x: Tensor) -> Tensor:
        """What is poisoned of a tensor: of a state one document, of all others tokens; or a row."""
        if not packed:
            return x[1:2]
        return x[POISONED : POISONED + 1] if "state" in name else x[:, start:stop]

    inputs = {}
    for name, x in tensors.items():
        rows = (len(BORDERS) - 1 if name == "initial_state" else 1) if packed else 2
        inputs[name] = x.clone() if name in fixed else x.expand(rows, *x.shape[1:]).clone()

    def outputs(bad: float | None) -> dict[str, Tensor]:
        def given(name: str, x: Tensor) -> Tensor:
            x = x.clone()
            if bad is not None and name not in fixed:
                gate = name in ("log_decay", "delta", "rate")  # never +inf
                part = mine(name, x)
                part.copy_(torch.full_like(part, math.nan if gate else bad))
            return x

        leaves = {name: given(name, x).requires_grad_() for name, x in inputs.items()}
        out = run(**leaves, cu_seqlens=cu, reverse=reverse, form="triton")._asdict()
        torch.manual_seed(0)
        weights = [given(name, torch.randn(x.shape, dtype=x.dtype)) for name, x in out.items()]
        found = torch.autograd.grad(list(out.values()), list(leaves.values()), weights)
        return out | {f"d{name}": x for name, x in zip(leaves, found, strict=True) if name not in fixed}

    got, want = outputs(value), outputs(None)
    for name, x in got.items():
        assert not mine(name, x).isfinite().all(), f"{name}: {value} is lost"
        mine(name, x).copy_(mine(name, want[name]))
        at = (x != want[name]).nonzero()
        assert torch.equal(x, want[name]), (
            f"packed {packed}, reverse {reverse}: {value} reaches {name} at {at[:3].tolist()}"
        )


@law
def matrix_states() -> None:
    def tokens(*sizes: int) -> Tensor:
        return torch.randn(1, T, *sizes)

    def gates(*sizes: int) -> Tensor:
        return -torch.rand(1, T, *sizes)

    for gate, write in (
        (None, "plain"), ("head", "delta"), ("key", "delta"), ("key", "tied"), ("complex", "delta"), ("head", "bonus"),
    ):  # fmt: skip
        number = torch.complex64 if gate == "complex" else torch.float32
        tensors = {"q": tokens(G, K), "v": tokens(H, V), "initial_state": torch.randn(1, H, K, V, dtype=number)}
        if write != "tied":
            tensors["k"] = tokens(G, K) / 2
        if gate is not None:
            tensors["log_decay"] = gates(H) if gate == "head" else gates(H, K).to(number)
        if write == "delta":
            tensors["beta"] = torch.rand(1, T, H)
        if write == "bonus":
            tensors["bonus"] = torch.randn(H, K)

        def run(k: Tensor | None = None, **inputs: Any) -> recur.ScanOut:
            return recur.scan(k=k, **inputs)

        isolated(run, tensors, ("bonus",))


@law
def elementwise() -> None:
    x, rate, k, q = torch.randn(1, T, H), torch.rand(1, T, H), torch.randn(1, T, 1, K), torch.randn(1, T, 1, K)
    state = torch.randn(1, H, K)
    isolated(recur.online_scan, {"x": x, "rate": rate, "k": k, "q": q, "initial_state": state})
    tensors = {"x": x, "delta": rate, "A": -torch.rand(H, K), "B": k, "C": q, "initial_state": state}
    isolated(recur.selective_scan, tensors, ("A",))


@law
def diagonal() -> None:
    for number in (torch.float32, torch.complex64):
        x, log_decay, state = torch.randn(1, T, K), -torch.rand(1, T, K).to(number), torch.randn(1, K, dtype=number)
        isolated(recur.gated_scan, {"x": x, "log_decay": log_decay, "initial_state": state})


@law
def diagonal_in_a_chain() -> None:
    """Tiles of two rows of two tokens: most borders lie between programs."""
    from recur.kernels import diagonal as home

    def plan(B: int, T: int, D: int, **options: object) -> home.DiagonalPlan:
        return shipped(B, T, D, **options)._replace(ROWS=2, UNROLL=2, segments=-(-T // 4), length=4)

    shipped, home.plan_diagonal = home.plan_diagonal, plan
    diagonal()
    home.plan_diagonal = shipped


@pytest.mark.parametrize("names", [["matrix_states"], ["elementwise", "diagonal", "diagonal_in_a_chain"]])
def test_what_is_not_finite_stays_in_its_document(names: list[str]) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, names)


def test_every_law_is_run() -> None:
    assert len(LAWS) == 4


if __name__ == "__main__":
    from recur.kernels import elementwise

    elementwise.STRETCH = 8  # several stretches and segments in few tokens
    LAWS.main()
