"""The separable kernel compiles for GPUs that are not here and fits their shared memory.

The launcher runs on CPU tensors with its kernels replaced by a recorder, and what it would have launched is compiled.
`python tests/test_kernel_compiles.py` prints the whole list with registers, spilled bytes and shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from compiling import SHARED, Recorder, compile_launch, resources


class Case(NamedTuple):
    """A scan whose walks are compiled: walk 0 is y, 1 dq, 2 dv, 3 dk; with segments summaries come before 0 and 1."""

    dtype: torch.dtype
    decay: str | None
    K: int
    V: int
    walks: tuple[int, ...] = (0, 1, 2, 3)
    tied: bool = False
    T: int = 64


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUICK = [
    (90, Case(BF16, "B T H K", 64, 64)),
    (90, Case(BF16, "B T H", 64, 64, (0, 3))),
    (80, Case(BF16, None, 64, 64, (0, 2))),
]
WHOLE = [
    (90, Case(BF16, "B T H K", 128, 128)),
    (90, Case(BF16, "B T H", 128, 128)),
    (90, Case(BF16, "H", 128, 64, (0, 1))),
    (90, Case(BF16, None, 128, 128, (0, 2))),
    (90, Case(BF16, "B T H K", 64, 128, tied=True)),
    (90, Case(BF16, "B T H K", 256, 256, (0, 3))),
    (90, Case(BF16, "B T H K", 128, 128, (0, 3), T=4096)),
    (90, Case(FP16, "B T H K", 64, 64, (0, 1))),
    (90, Case(FP16, "B T H", 256, 64, (0, 3))),
    (90, Case(FP32, "B T H K", 32, 64, (0, 3))),
    (90, Case(FP32, "H K", 256, 256, (0,))),
    (80, Case(BF16, "B T H K", 128, 128, (0, 3))),
    (80, Case(BF16, "B T H", 128, 128, (1, 2))),
    (80, Case(FP32, "B T H", 64, 32, (0, 1))),
    (80, Case(BF16, "B T H K", 256, 256, (0,))),
]


def launches(case: Case) -> list[tuple[tuple, dict]]:
    """Arguments of every walk of one forward and backward."""
    from recur.kernels import chunk_scan as kernels

    sizes = {"B": 1, "T": case.T, "H": 16, "K": case.K}
    q, v = torch.empty(1, case.T, 16, case.K, dtype=case.dtype), torch.empty(1, case.T, 16, case.V, dtype=case.dtype)
    a = None
    if case.decay is not None:
        gate = case.dtype if case.decay.endswith("K") else torch.float32
        a = torch.empty(*(sizes[axis] for axis in case.decay.split()), dtype=gate)
        a = a if a.ndim > 2 else a[None, None]
        a = a if a.ndim == 4 else a.unsqueeze(-1)
    k = None if case.tied else q
    recorder, originals, describe = Recorder(), (kernels._walk, kernels._combine), kernels.plan
    kernels._walk, kernels._combine = recorder, Recorder()
    kernels.plan = lambda **sizes: describe(**{**sizes, "processors": 132})
    try:
        state = torch.zeros(1, 16, case.K, case.V)
        y, final = kernels.chunk_scan(q, k, v, a, state, None, 0.5)
        kernels.chunk_scan_backward(torch.empty_like(y), torch.zeros_like(final), q, k, v, a, state, None, final, 0.5)
    finally:
        (kernels._walk, kernels._combine), kernels.plan = originals, describe
    return list(recorder)


@pytest.mark.parametrize(
    ("capability", "case"), QUICK, ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else f"sm{x}"
)
def test_walks_compile_and_fit(capability: int, case: Case) -> None:
    triton = pytest.importorskip("triton")
    from recur.kernels import chunk_scan as kernels

    if not isinstance(kernels._walk, triton.JITFunction):
        pytest.skip("Triton was loaded as an interpreter")
    recorded = launches(case)
    for walk in case.walks:
        shared = compile_launch(kernels._walk, *recorded[walk], capability).metadata.shared
        assert shared <= SHARED[capability], f"walk {walk} of {case} needs {shared} bytes of shared memory"


if __name__ == "__main__":
    from recur.kernels import chunk_scan as kernels

    for capability, case in QUICK + WHOLE:
        recorded = launches(case)
        for walk in case.walks:
            print(
                f"sm_{capability}",
                *case[:4],
                f"walk {walk}:",
                resources(compile_launch(kernels._walk, *recorded[walk], capability)),
                flush=True,
            )
