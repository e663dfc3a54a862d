"""Compile a recorded launch of a Triton kernel for a GPU that is not here, and read what the assembler reports."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SHARED = {80: 166_912, 90: 232_448}  # bytes one program may have


class Recorder(list):
    """Stands for a kernel: keeps what it is launched with."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.append((args, kwargs))


def compile_launch(kernel: Any, args: tuple, kwargs: dict, capability: int) -> Any:
    """What a launch of `kernel` with these arguments would have compiled on a GPU of this capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False))
    options = {"num_warps": kwargs["num_warps"]}
    values.update({name: value for name, value in kwargs.items() if name in names})
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


def resources(kernel: Any) -> str:
    """Registers and stack (spilled bytes) as the assembler reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    os.unlink(file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return f"{registers} registers, {stack} bytes spilled, {kernel.metadata.shared} bytes shared"
