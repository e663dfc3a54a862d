"""The separable kernel compiles for GPUs that are not here and fits their shared memory.

The launcher runs on CPU tensors with its kernels replaced by a recorder, and what it would have launched is compiled.
`python tests/test_kernel_compiles.py` prints the whole list with registers, spilled bytes and shared memory.
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

SHARED = {80: 166_912, 90: 232_448}  # bytes one program may have


class Case(NamedTuple):
    """A scan, forward and backward, and which of its launches are compiled."""

    dtype: torch.dtype
    decay: str | None
    K: int
    V: int
    launches: tuple[str, ...] = ("pace", "prepare", "exact", "solve", "forward", "adjoint", "gradient", "repair")
    beta: bool = False
    bonus: bool = False
    tied: bool = False
    T: int = 64


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUICK = [
    (90, Case(BF16, "B T H K", 64, 64, ("prepare", "forward", "adjoint", "gradient"))),
    (90, Case(BF16, "B T H", 64, 64, ("forward", "gradient"))),
    (80, Case(BF16, None, 64, 64, ("forward", "adjoint"))),
    (90, Case(BF16, "B T H", 128, 128, ("pace", "prepare", "solve", "forward", "adjoint", "gradient"), beta=True)),
    (80, Case(BF16, "B T H K", 64, 64, ("prepare", "forward", "gradient", "repair"), bonus=True)),
    (90, Case(FP16, "B T H", 64, 64, ("forward", "gradient"))),
    (80, Case(FP32, "B T H K", 64, 64, ("forward", "adjoint"), tied=True)),
    (90, Case(BF16, "H K", 128, 128, ("forward", "combine"), T=4096)),
]
WHOLE = [
    (90, Case(BF16, "B T H K", 128, 128)),
    (90, Case(BF16, "B T H", 128, 128)),
    (90, Case(BF16, None, 128, 128)),
    (90, Case(BF16, None, 128, 128, beta=True)),
    (90, Case(BF16, "B T H", 128, 128, beta=True)),
    (90, Case(BF16, "B T H K", 128, 128, beta=True)),
    (90, Case(BF16, "B T H K", 64, 64, bonus=True)),
    (90, Case(BF16, "B T H K", 64, 128, tied=True)),
    (90, Case(BF16, "B T H K", 256, 256)),
    (90, Case(BF16, "B T H", 256, 256, beta=True)),
    (90, Case(BF16, "B T H K", 128, 128, ("forward", "combine"), T=4096)),
    (90, Case(FP16, "B T H K", 64, 64)),
    (90, Case(FP16, "B T H", 256, 64)),
    (90, Case(FP32, "B T H K", 32, 64)),
    (90, Case(FP32, "H K", 256, 256)),
    (90, Case(FP32, "B T H", 128, 128, beta=True)),
    (80, Case(BF16, "B T H K", 128, 128)),
    (80, Case(BF16, "B T H", 128, 128, beta=True)),
    (80, Case(FP32, "B T H", 64, 32)),
    (80, Case(BF16, "B T H K", 256, 256)),
]
NAMES = ("pace", "prepare", "exact", "solve", "forward", "combine", "adjoint", "gradient", "repair")


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, name: str, kernel: Any, log: list) -> None:
        self.name, self.kernel, self.log = name, kernel, log

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.log.append((self.name, self.kernel, args, kwargs))


def launches(case: Case) -> list[tuple[str, Any, tuple, dict]]:
    """Every launch of one forward and backward: name, kernel, arguments."""
    from recur.kernels import chunk_scan as kernels
    from recur.kernels import scan

    sizes = {"B": 1, "T": case.T, "H": 16, "K": case.K}
    q, v = torch.empty(1, case.T, 16, case.K, dtype=case.dtype), torch.empty(1, case.T, 16, case.V, dtype=case.dtype)
    a = None
    if case.decay is not None:
        gate = case.dtype if case.decay.endswith("K") else torch.float32
        a = torch.empty(*(sizes[axis] for axis in case.decay.split()), dtype=gate)
        a = a if a.ndim > 2 else a[None, None]
        a = a if a.ndim == 4 else a.unsqueeze(-1)
    beta = torch.empty(1, case.T, 16) if case.beta else None
    bonus = torch.empty(16, case.K) if case.bonus else None
    log: list = []
    originals, describe = {name: getattr(kernels, name) for name in NAMES}, scan.plan
    for name, kernel in originals.items():
        setattr(kernels, name, Recorder(name, kernel, log))
    scan.plan = lambda **sizes: describe(**{**sizes, "processors": 132})
    try:
        inputs = (q, None if case.tied else q, v, a, beta, bonus, torch.zeros(1, 16, case.K, case.V), None, 0.5, False)
        y, final, *kept = scan.scan_forward(*inputs, True)
        scan.scan_backward(torch.empty_like(y), torch.zeros_like(final), *inputs, *kept)
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)
        scan.plan = describe
    return log


def compile_launch(kernel: Any, args: tuple, kwargs: dict, capability: int) -> Any:
    """The launch, compiled as it would be on a GPU of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    types[torch.int64] = "*i64"
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {"num_warps": 4, **{name: kwargs[name] for name in ("num_warps", "maxnreg") if name in kwargs}}
    values.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    signature, constants, hints = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or one:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], hints[(i,)] = types[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "case"), QUICK, ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else f"sm{x}"
)
def test_launches_compile_and_fit(capability: int, case: Case) -> None:
    pytest.importorskip("triton")
    from recur.kernels import scan

    if scan.INTERPRETED:
        pytest.skip("Triton was loaded as an interpreter")
    for name, *launch in launches(case):
        if name in case.launches:
            shared = compile_launch(*launch, capability).metadata.shared
            assert shared <= SHARED[capability], f"{name} of {case} needs {shared} bytes of shared memory"


def resources(kernel: Any) -> tuple[int, int, int]:
    """Registers, spilled bytes (the stack) and shared bytes, as the assembler reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    os.unlink(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None
    return int(found[1]), int(found[2]), kernel.metadata.shared


def report(capability: int, case: Case) -> None:
    """Print what every launch needs."""
    for name, *launch in launches(case):
        if name in case.launches:
            registers, spilled, shared = resources(compile_launch(*launch, capability))
            needs = f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared"
            print(
                f"sm_{capability}", *case[:4], "beta" * case.beta, "bonus" * case.bonus, f"{name}: {needs}", flush=True
            )


if __name__ == "__main__":
    for row in QUICK + WHOLE:
        report(*row)
