"""The elementwise kernels compile for GPUs that are not here, fit their shared memory, and the hot ones do not spill.

Operators run on CPU tensors with their kernels replaced by recorders, and what they would have launched is compiled.
`python tests/test_kernel_walk_compiles.py` prints registers, spilled bytes and shared memory of every launch.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

SHARED = {80: 166_912, 90: 232_448}  # bytes one program may have
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("_emit", "_adjoint", "_summary", "_diagonal")
NAMES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int64: "*i64"}


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
    """The launch, compiled as it would be on a GPU of this capability."""
    from recur.kernels import diagonal, walk
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(diagonal if name == "_diagonal" else walk, name)
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {option: values[option] for option in ("num_warps", "maxnreg") if option in values}
    signature, constants, hints = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        single = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or single:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], hints[(i,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> tuple[int, int, int]:
    """Registers, spilled bytes (the stack) and shared bytes, as the assembler reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None
    return int(found[1]), int(found[2]), kernel.metadata.shared


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
