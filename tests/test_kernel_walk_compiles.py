"""The elementwise kernels compile for GPUs that are not here, fit their shared memory, and the hot ones do not spill.

Operators run on CPU tensors with their kernels replaced by recorders, and what they would have launched is compiled.
`python tests/test_kernel_walk_compiles.py` prints registers, spilled bytes and shared memory of every launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_kernel_compiles import BF16, FP16, FP32, SHARED, compile_launch, resources

triton = pytest.importorskip("triton")

KERNELS = ("_emit", "_adjoint", "_summary", "_diagonal")


class Case(NamedTuple):
    """A scan whose launches of some kernels are compiled; V is 4096, or 96 where that differs in kind."""

    capability: int
    rule: str
    dtype: torch.dtype
    kernels: tuple[str, ...]
    N: int = 16
    V: int = 4096
    T: int = 256
    B: int = 8
    fixed: str = ""
    packed: bool = False
    hot: bool = False


CASES = [
    Case(90, "selective", BF16, ("_emit", "_adjoint"), hot=True),
    Case(90, "online", BF16, ("_emit", "_adjoint"), hot=True),
    Case(80, "selective", FP16, ("_adjoint",), N=3, V=95, B=1, fixed="kq", packed=True),
    Case(90, "selective", FP32, ("_emit", "_summary"), N=256, V=96, B=1, fixed="k"),
    Case(80, "online", FP32, ("_emit", "_summary"), N=6, V=96, B=1, packed=True),
    Case(90, "online", BF16, ("_adjoint",), N=256, V=96, B=1, fixed="q"),
    Case(90, "gated", BF16, ("_diagonal",), hot=True),
    Case(80, "gated", FP32, ("_diagonal",), T=1000, V=72, B=1, packed=True),
    Case(90, "complex", FP32, ("_diagonal",), hot=True),
]


class Recorder(list):
    """Stands for a kernel: keeps what it is launched with."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.append((args, kwargs))


def launches(case: Case) -> list[tuple[str, tuple, dict]]:
    """Kernel and arguments of what one forward and backward launches of the kernels of the case."""
    from recur.kernels import diagonal, walk

    B, T, V, N = case.B, case.T, case.V, case.N
    homes = {
        name: home for home in (diagonal, walk) for name in (*KERNELS, "_combine", "_others") if hasattr(home, name)
    }
    originals = {name: getattr(home, name) for name, home in homes.items()}
    recorders = {name: Recorder() for name in homes}
    cu = torch.tensor([0, T // 2, T]) if case.packed else None
    x, rate = (torch.zeros(B, T, V, dtype=case.dtype) for _ in range(2))
    k, q = (torch.zeros(*((V, N) if w in case.fixed else (B, T, 1, N)), dtype=case.dtype) for w in "kq")
    try:
        for name, recorder in recorders.items():
            setattr(homes[name], name, recorder)
        if case.rule in ("selective", "online"):
            a = torch.zeros(V, N) if case.rule == "selective" else None
            y, _, kept = walk._walk(x, rate, a, k, q, None, cu, False, True)
            walk._walk_adjoint(torch.zeros_like(y), None, x, rate, a, k, q, None, cu, kept, False)
        else:
            turn = case.rule == "complex"
            y, _ = diagonal._diagonal_scan(x, rate, None, cu, turn, False)
            diagonal._diagonal_adjoint(torch.zeros_like(y), None, rate, y, None, cu, turn, False)
    finally:
        for name, original in originals.items():
            setattr(homes[name], name, original)
    return [(name, *launch) for name in case.kernels for launch in list(recorders[name])[:2]]


def compiled(name: str, args: tuple, kwargs: dict, capability: int) -> Any:
    from recur.kernels import diagonal, walk

    return compile_launch(getattr(diagonal if name == "_diagonal" else walk, name), args, kwargs, capability)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"sm{case.capability}-{case.rule}-{case.dtype}-N{case.N}")
def test_launches_compile_fit_and_do_not_spill(case: Case) -> None:
    from recur.kernels import walk

    if not isinstance(walk._emit, triton.JITFunction):
        pytest.skip("Triton was loaded as an interpreter")
    for name, args, kwargs in launches(case):
        registers, spilled, shared = resources(compiled(name, args, kwargs, case.capability))
        assert shared <= SHARED[case.capability], f"{name} of {case} needs {shared} bytes of shared memory"
        assert not case.hot or spilled == 0, f"{name} of {case} spills {spilled} bytes with {registers} registers"


if __name__ == "__main__":
    for case in CASES:
        for name, args, kwargs in launches(case):
            print(case[:3], name, resources(compiled(name, args, kwargs, case.capability)), flush=True)
