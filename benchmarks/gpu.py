"""The matrix-state scan on a GPU: ours and every installed peer, in one process, on the shapes of the field.

    python benchmarks/gpu.py                      # all families and shapes
    python benchmarks/gpu.py --families keywise --shapes 8,2048,16,128,128 --seconds 300

Medians of triton's do_bench with the L2 flushed (`plain`: what a caller waits for; `graph`: one call replayed from a
CUDA graph, no host in it), forward without gradients and forward plus backward for all inputs, in bfloat16. Errors are
against the float64 token loop at T = 256. The floor is every input read once and every output written once at the copy
rate of this run, or the chunked algorithm's products at its matmul rate, whichever is longer.
Writes benchmarks/results/gpu.json and gpu.md. Peers: flash-linear-attention, where it can be imported.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import scan

RESULTS = Path(__file__).parent / "results"
SHAPES = [
    (8, 2048, 16, 128, 128),
    (1, 32768, 16, 128, 128),
    (4, 8192, 32, 64, 64),
    (2, 8192, 8, 256, 256),
    (1, 256, 16, 128, 128),
]
Run = Callable[[], Tensor]


def leaf(tensor: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return tensor.to(dtype).detach().requires_grad_()


def ours(q: Tensor, k: Tensor | None, v: Tensor, log_decay: Tensor | None) -> Tensor:
    return scan(q, k, v, log_decay, scale=q.shape[-1] ** -0.5, form="triton").y


def loop(q: Tensor, k: Tensor | None, v: Tensor, log_decay: Tensor | None) -> Tensor:
    return scan(q, k, v, log_decay, scale=q.shape[-1] ** -0.5, form="recurrent").y


def inputs(family: str, B: int, T: int, H: int, K: int, V: int) -> list[Tensor | None]:
    """q, k, v and what makes the gate; the gates are those of the figures this is compared with."""
    q, k, v = (torch.randn(B, T, H, D, device="cuda") for D in (K, K, V))
    gate = {
        "none": lambda: None,
        "constant": lambda: leaf(torch.log(1 - 2.0 ** (-5.0 - torch.arange(H, device="cuda"))), torch.float32),
        "scalar": lambda: leaf(F.logsigmoid(torch.randn(B, T, H, device="cuda") + 2), torch.float32),
        "keywise": lambda: leaf(F.logsigmoid(torch.randn(B, T, H, K, device="cuda")) / 16),
        "tied": lambda: leaf(F.logsigmoid(torch.randn(B, T, H, K, device="cuda") + 3)),
        "forgetful": lambda: leaf(F.logsigmoid(torch.randn(B, T, H, K, device="cuda"))),
    }[family]()
    return [leaf(q), None if family == "tied" else leaf(k), leaf(v), gate]


def peers(family: str) -> dict[str, Callable[..., Tensor]]:
    """Installed kernels for the same scan, as functions of the same tensors."""
    if importlib.util.find_spec("fla") is None:
        return {}
    import fla.ops.common.chunk_o as guard
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    guard.TRITON_ABOVE_3_7_1 = True  # its refusal of Hopper's backward; its gradients are checked below
    return {
        "none": {"fla chunk_linear_attn": lambda q, k, v, g: chunk_linear_attn(q, k, v, normalize=False)[0]},
        "constant": {"fla chunk_retention": lambda q, k, v, g: chunk_retention(q, k, v)[0]},
        "scalar": {"fla chunk_simple_gla": lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]},
        "keywise": {"fla chunk_gla": lambda q, k, v, g: chunk_gla(q, k, v, g)[0]},
        "tied": {"fla chunk_gla, k = 1 - f": lambda q, k, v, g: chunk_gla(q, 1 - g.exp(), v, g)[0]},
        "forgetful": {"fla chunk_gla": lambda q, k, v, g: chunk_gla(q, k, v, g)[0]},
    }[family]


def graphed(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    median = do_bench(graph.replay, warmup=20, rep=80, return_mode="median")
    del kept
    return median


def measure(run: Callable[..., Tensor], tensors: list[Tensor | None]) -> dict[str, float]:
    from triton.testing import do_bench

    leaves = [x for x in tensors if x is not None]
    start = time.perf_counter()
    dy = torch.randn_like(run(*tensors))

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*tensors), leaves, dy, allow_unused=True)

    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    figures = {"first_call_s": first, "peak_mib": peak}
    for name, call in (("forward", forward), ("both", both)):
        figures[f"{name}_ms"] = do_bench(call, warmup=20, rep=80, return_mode="median")
        figures[f"{name}_graph_ms"] = graphed(call)
    return figures


def errors(family: str, run: Callable[..., Tensor], shape: tuple[int, ...]) -> dict[str, float]:
    """Relative error of y and the worst gradient at T = 256."""
    B, _, H, K, V = shape
    tensors = inputs(family, min(B, 2), 256, H, K, V)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    y, want = run(*tensors), loop(*wide)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x for x in tensors if x is not None], dy, allow_unused=True)
    exact = torch.autograd.grad(want, [x for x in wide if x is not None], dy.double())
    off = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True) if g is not None]
    return {"y_error": ((y.double() - want).norm() / want.norm()).item(), "grad_error": max(off), "grad_errors": off}


def rates() -> tuple[float, float]:
    """Bytes a second of a copy and FLOP a second of a bfloat16 product, here and now."""
    from triton.testing import do_bench

    x, m = torch.empty(2**31, dtype=torch.uint8, device="cuda"), torch.randn(4096, 4096, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copy = do_bench(lambda: y.copy_(x), return_mode="median")
    product = do_bench(lambda: m @ m, return_mode="median")
    return 2 * x.numel() / copy * 1e3, 2 * 4096**3 / product * 1e3


def floors(tensors: list[Tensor | None], shape: tuple[int, ...], copy: float, product: float) -> dict[str, float]:
    B, T, H, K, V = shape
    read = sum(x.numel() * x.element_size() for x in tensors if x is not None)
    write, tokens = tensors[2].numel() * 2, B * T * H
    flops = tokens * (2 * 64 * (K + V) + 4 * K * V)
    more = tokens * (64 * (6 * K + 4 * V) + 10 * K * V)
    return {
        "forward_floor_ms": 1e3 * max((read + write) / copy, flops / product),
        "both_floor_ms": 1e3 * max((3 * read + 2 * write) / copy, (flops + more) / product),
    }


def table(records: list[dict]) -> str:
    columns = (
        "shape|gate|what|forward ms (graph)|× floor|forward+backward ms (graph)|× floor|peak MiB|error y|of gradients"
    )
    lines = ["| " + columns.replace("|", " | ") + " |", "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for r in records:
        cells = [str(tuple(r["shape"])), r["family"], r["what"]]
        if "failed" in r:
            cells += [r["failed"][:80].replace("|", "/"), *[""] * 6]
        else:
            for name in ("forward", "both"):
                graph = r[f"{name}_graph_ms"]
                cells += [f"{r[f'{name}_ms']:.3f} ({graph:.3f})", f"{graph / r[f'{name}_floor_ms']:.1f}"]
            cells += [f"{r['peak_mib']:.0f}", f"{r['y_error']:.1e}", f"{r['grad_error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["keywise", "scalar", "tied", "none", "constant", "forgetful"])
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new cases after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    begin, records = time.time(), []
    copy, product = rates()
    print(f"copy {copy / 1e9:.0f} GB/s, matmul {product / 1e12:.0f} TFLOP/s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for text in options.shapes:
        shape = tuple(int(size) for size in text.split(","))
        for family in options.families:
            for what, run in {"recur": ours, **peers(family)}.items():
                if time.time() - begin > options.seconds:
                    continue
                torch.manual_seed(0)
                record = {"shape": shape, "family": family, "what": what}
                try:
                    tensors = inputs(family, *shape)
                    record |= measure(run, tensors) | floors(tensors, shape, copy, product)
                    record |= errors(family, run, shape)
                except Exception as error:  # a peer that cannot run here is a result too
                    record["failed"] = f"{type(error).__name__}: {error}"
                tensors = None
                gc.collect()
                torch.cuda.empty_cache()
                records.append(record)
                print(json.dumps(record), flush=True)
                (options.out / "gpu.json").write_text(json.dumps(records, indent=1))
                (options.out / "gpu.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
