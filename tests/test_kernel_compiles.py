"""Every program of every specialisation compiles for GPUs that are not here and fits; the hot ones do not spill.

Scans and steps run on CPU tensors with their kernels replaced by recorders, and what they would have launched is
compiled. `python tests/test_kernel_compiles.py` prints registers, spilled bytes and shared memory of every program.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import gpu_elementwise
import gpu_scan
import pytest
import torch
from specialisations import FAMILIES, Family
from tiers import quick

from recur import LanguageModel
from recur import kernel as public

triton = pytest.importorskip("triton")

SHARED = {80: 166_912, 90: 232_448}  # bytes one program may have
# Bytes per thread that programs of hot specialisations may spill; what is not named spills none. `gradients_exact` is
# not hot: it looks for chunks whose gates forget too much for matmuls, and mostly finds none.
SPILLS = {"gla gradients_exact": 1288, "hgrn2 gradients_exact": 1288, "rwkv5 gradients_exact": 1176}
SPILLS |= {"kda gradients_exact": 1256, "gated-delta-net2 gradients_exact": 1272, "rwkv7 gradients_exact": 1072}
Launch = tuple[Any, tuple, dict]
Pair = tuple[tuple[str, str], tuple[str, str]]


@contextmanager
def recorded(sm: int) -> Iterator[list[Launch]]:
    """What is launched meanwhile, by public functions that take CPU tensors for a GPU of this capability."""
    from recur.kernels import scan

    assert not scan.INTERPRETED, "unset TRITON_INTERPRET: kernels are compiled here"
    log: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert kwargs["enable_fp_fusion"], "its default changes with Triton's version, so launches must say it"
        log.append((kernel, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        patch.setattr(scan, "INTERPRETED", True)
        patch.setattr(scan, "capability", lambda device: sm)
        patch.setattr(public, "takes_step", lambda keys, state, lacks=None: lacks is None)
        yield log


def launches(case: Any, sm: int) -> list[Launch]:
    """Every launch of a scan with and without gradients, and of its step."""
    with recorded(sm) as log:
        tensors = case.inputs()
        case.run("triton", **tensors)
        gpu_scan.outputs(case, "triton", tensors)
    return log


TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
TYPES |= {torch.int64: "*i64", torch.float64: "*fp64"}


def compiled(launch: Launch, capability: int) -> Any:
    """The launch, compiled as it would be on a GPU of this capability; records of arguments are tuples of types."""
    kernel, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args, strict=False))
    stated = ("num_warps", "maxnreg", "enable_fp_fusion")
    options = {"num_warps": 4, **{name: kwargs[name] for name in stated if name in kwargs}}
    values.update({name: value for name, value in kwargs.items() if name in kernel.arg_names})
    signature, constants, hints = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...], constexpr: bool, specialised: bool) -> Any:
        if isinstance(value, tuple) and not constexpr:
            types = [describe(item, (*path, i), False, specialised) for i, item in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if constexpr or value is None or (isinstance(value, int) and value == 1 and specialised):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and specialised and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    for i, param in enumerate(kernel.params):
        value = values[param.name]
        signature[param.name] = describe(value, (i,), param.is_constexpr, not param.do_not_specialize)
    source = triton.compiler.ASTSource(kernel, signature, constants, hints)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


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


ROWS = [row for family in FAMILIES.values() for row in family.rows]
CASES = {
    f"{i} {row['name']} sm_{row['sm']}": (row, case)
    for i, (row, case) in enumerate(zip(ROWS, gpu_scan.listed() + gpu_elementwise.listed(), strict=True))
}


def possible(family: Family, pair: Pair) -> bool:
    """Whether there is a specialisation with these values."""
    choices = {axis: values.split() for axis, values in family.axes.items()} | {axis: [value] for axis, value in pair}
    return any(family.exists(dict(zip(choices, row, strict=True))) for row in product(*choices.values()))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_possible_pair_of_values_is_listed(family: Family) -> None:
    values = {axis: [(axis, value) for value in values.split()] for axis, values in family.axes.items()}
    every = {pair for a, b in combinations(values, 2) for pair in product(values[a], values[b])}
    pairs = [set(combinations([(axis, row[axis]) for axis in values], 2)) for row in family.rows]
    met = Counter(chain(*pairs))
    assert [pair for pair in every - set(met) if possible(family, pair)] == []
    assert set(met) <= every
    assert all(map(family.exists, family.rows))
    for row, own in zip(family.rows, pairs, strict=True):
        assert row["name"] != "-" or any(met[pair] == 1 for pair in own), f"{row} adds no pair"


def test_the_list_is_short() -> None:
    assert len(ROWS) <= 52


@pytest.mark.parametrize("name", quick(CASES, {name for name, (row, _) in CASES.items() if row["name"] != "-"}))
def test_programs_compile_and_fit(name: str) -> None:
    """Hot ones do not spill."""
    row, case = CASES[name]
    sm = int(row["sm"])
    found = launches(case, sm)
    kernels = [kernel.fn.__name__ for kernel, *_ in found]
    segments = {kwargs.get("segments", 1) for *_, kwargs in found}
    assert (max(segments) > 1 or "combine" in kernels) == (row["segments"] == "more"), kernels
    for kernel, launch in zip(kernels, found, strict=True):
        program = compiled(launch, sm)
        shared = program.metadata.shared
        assert shared <= SHARED[sm], f"{kernel} needs {shared} bytes of shared memory"
        registers, spilled, _ = resources(program)
        assert registers > 32 or spilled < 1024, f"the assembler gave up on {kernel}: it spills {spilled} bytes"
        if row["name"] != "-":
            known = SPILLS.get(f"{row['name']} {kernel}", 0)
            assert spilled <= known, f"{kernel} spills {spilled} bytes, not {known}, with {registers} registers"


def around(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Kernels around the scans as models call them, and at their widest: what to run, and the inputs' sum."""
    x, h, z = (torch.randn(2, 64, 4, 256).to(dtype).requires_grad_() for _ in range(3))
    w, d = torch.randn(256).to(dtype).requires_grad_(), torch.randn(4).requires_grad_()
    flat, cu, wide = {"width": 1024, "N": 1024}, torch.tensor([0, 5, 128]), torch.randn(1, 8, 8192).to(dtype)
    kinds = {"rms": None, "layer": torch.randn(256).to(dtype).requires_grad_(), "unit": None}
    for kind, bias in kinds.items():
        yield f"{kind} of heads", public.norm(x, weight=w, bias=bias, eps=1e-5, width=1024, N=256, kind=kind)
    yield "gate", public.norm(x, z=z, **flat, gate="before", act="silu")
    yield "gelu gate", public.norm(x, z=z, **flat, gate="before", act="gelu")
    yield "skip and gate", public.norm(x, z=z, u=h, skip=d, **flat, gate="before", act="silu")
    every = {"z": z, "u": h, "skip": d, "weight": torch.randn(1024).requires_grad_(), "eps": 1e-5, "act": "silu"}
    for gate in ("before", "after"):
        yield f"skip, norm, gate {gate}", public.norm(x, **every, **flat, kind="rms", gate=gate)
    eps = torch.rand(1, 64, 4, 1)
    yield "an eps per row", public.norm(x, eps=eps, z=z, width=1024, N=256, kind="rms", gate="after", act="silu")
    wide, full = wide.requires_grad_(), torch.randn(8192).to(dtype).requires_grad_()
    yield "widest row", public.norm(wide, weight=full, eps=1e-5, width=8192, N=8192, kind="rms")
    for fn in ("softplus", "sigmoid", "log_sigmoid"):
        yield fn, public.activate(z.flatten(2), None if fn == "log_sigmoid" else torch.randn(1024).requires_grad_(), fn)
    yield "bounded", sum(x.float() for x in public.bounded(z, torch.rand(4, 256).requires_grad_()))
    yield "polar", torch.view_as_real(public.polar(*z.unflatten(-1, (-1, 2)).unbind(-1)))
    yield "weigh", public.weigh(z.unflatten(-1, (4, 64)), torch.rand(2, 64, 4, 4).requires_grad_())
    for W, packed in ((4, False), (4, True), (8, False)):
        taps, state = torch.randn(1024, W).to(dtype).requires_grad_(), torch.randn(2, W - 1, 1024).requires_grad_()
        tokens = (x.flatten(2).flatten(0, 1)[None] if packed else x.flatten(2),)
        yield f"conv {W} {packed}", public.conv(tokens, taps, None, state, cu if packed else None, "silu")[0][0]
        yield (
            f"fresh conv {W} {packed}",
            public.conv(tokens, taps, taps[:, 0], None, cu if packed else None, "silu")[0][0],
        )
    for halves in (True, False):
        yield "rotation", public.rotate(x, torch.arange(64)[None], torch.rand(128).double(), halves)
    yield "cross-entropy", public.cross_entropy(x.detach().flatten(1), torch.tensor([3, -1])).requires_grad_()
    one, b = x[:, :, :1, :1], torch.rand(1, 1).requires_grad_()  # sizes of 1 are constants of the program
    for kind in ("rms", "layer", "l2", "unit"):
        yield f"{kind} of one", public.norm(one, z=one, u=one, skip=b[0], weight=b, eps=1e-5, width=1, N=1, kind=kind)
    yield "softplus of one", public.activate(one, b, "softplus")
    yield "bounded, one", sum(x.float() for x in public.bounded(one, b))
    yield "polar of one", torch.view_as_real(public.polar(one, one))
    yield "weigh one", public.weigh(one, one[..., 0])
    yield "conv of one", public.conv((one[..., 0],), b, None, None, None, "silu")[0][0]
    yield "rotation of one pair", public.rotate(x[:, :1, :1, :2], torch.arange(1)[None], torch.rand(1).double(), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sm", [80, 90])
def test_kernels_around_the_scans_compile_and_do_not_spill(sm: int, dtype: torch.dtype) -> None:
    names: list[str] = []
    with recorded(sm) as log:
        for name, y in around(dtype):
            y.sum().backward()
            names += [name] * (len(log) - len(names))
    assert len(log) > 40
    for name, launch in zip(names, log, strict=True):
        registers, spilled, shared = resources(compiled(launch, sm))
        assert spilled == 0, f"{name}: {launch[0].fn.__name__} spills {spilled} bytes, {registers} registers"
        assert shared <= SHARED[sm]


@pytest.mark.parametrize("name", ["gla", "hgrn2", "retnet", "mamba2", "mamba", "longhorn", "gated_delta_net", "llama"])
def test_the_kernel_of_a_step_compiles_and_does_not_spill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a few lines is composed for every recipe."""
    model = LanguageModel(name, vocab_size=8, dim=64, depth=1, ffn=None).bfloat16()
    monkeypatch.setattr(public, "steps_fused", lambda x: True)
    with recorded(90) as log:
        model.step(torch.zeros(2, dtype=torch.long), model.init_state(2, 16))
    composed = [launch for launch in log if launch[0].fn.__name__ == "layer"]
    assert composed
    assert all(resources(compiled(launch, 90))[1] == 0 for launch in composed)


if __name__ == "__main__":
    for name, (row, case) in CASES.items():
        for launch in launches(case, int(row["sm"])):
            print(name, launch[0].fn.__name__, resources(compiled(launch, int(row["sm"]))), flush=True)
