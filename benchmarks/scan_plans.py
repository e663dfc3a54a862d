"""Which tiles suit each kernel of the matrix-state scan: every launch timed by itself under several settings.

    python benchmarks/scan_plans.py --out results                     # every family and setting
    python benchmarks/scan_plans.py --families key --seconds 60
    python benchmarks/scan_plans.py --segments 1 2 4 8 16 --shapes 1,32768,16,128,128 --gates 2 8 0

Medians of triton's do_bench with the L2 flushed, in ms. Settings are compiled first, side by side. Writes
scan_plans.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [(8, 2048, 16, 128, 128), (4, 8192, 32, 64, 64)]
SETTINGS = list(itertools.product((64,), (4, 8), (1, 2, 3)))  # block, warps, stages
FAMILIES = ("none", "one", "key", "delta", "gated_delta", "kda")


def inputs(family: str, B: int, T: int, H: int, K: int, V: int) -> list[Tensor | None]:
    """q, k, v, log_decay [B T H K|1], beta."""
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for D in (K, K, V))
    a = beta = None
    if family in ("one", "gated_delta"):
        a = F.logsigmoid(torch.randn(B, T, H, 1, device="cuda") + 2)
    if family in ("key", "kda"):
        a = (F.logsigmoid(torch.randn(B, T, H, K, device="cuda")) / 16).bfloat16()
    if family in ("delta", "gated_delta", "kda"):
        k, beta = F.normalize(k.float(), dim=-1).bfloat16(), torch.rand(B, T, H, device="cuda")
    return [q, k, v, a, beta]


def lay(family: str, shape: tuple[int, ...], setting: tuple[int, int, int]) -> dict:
    """Every launch of a forward and backward as a function, under one setting of all kernels."""
    from recur.kernels import scan

    K, V = shape[3:]
    scan._STATE_TILES[torch.bfloat16][max(64, K)] = ((setting,) * 2,) * 3
    scan._INPUT_TILES[torch.bfloat16][max(64, V)] = setting
    scan._LAYOUTS.clear()
    q, k, v, a, beta = inputs(family, *shape)
    x = scan.Tensors(q=q, v=v, k=k, log_decay=a, beta=beta)
    run = scan._Launcher(x, K**-0.5, False, False, False)
    new, delta = torch.empty_like, beta is not None
    y, states, dstates, dy = new(v), run.chunk_states(), run.chunk_states(), torch.randn_like(v)
    error, dv, dq, dk = new(v), new(v), new(q), new(k)
    options = {"error": error, "dbeta": run.new(2, *v.shape[:3])} if delta else {}
    kept = scan.scan_forward(*x, K**-0.5, False, False, False, True)[2]
    entry, back = run.entering(None), run.entering(None, dy=dy)
    run.forward(entry, chunk_states=states, error=options.get("error"))
    run.backward_states(back, dy, dv, dstates, **options)
    dgate = None if a is None else new(a) if family in ("key", "kda") else run.new(4, *a.shape[:3])
    return {
        "prepare": lambda: scan._Launcher(x, K**-0.5, False, False, False),
        "forward": lambda: run.forward(entry, y=y),
        "chunk_states": lambda: run.forward(entry, chunk_states=states, error=options.get("error")),
        "backward_states": lambda: run.backward_states(back, dy, dv, dstates, **options),
        "backward_inputs": lambda: run.backward_inputs(
            error if delta else v, dy, dv, states, dstates, dq, dk, dgate, None
        ),
        "forward_all": lambda: scan.scan_forward(*x, K**-0.5, False, False, False, True),
        "backward_all": lambda: scan.scan_backward(dy, None, *x, K**-0.5, False, False, False, kept),
    }


def segments(family: str, shape: tuple[int, ...], n: int, shift: float) -> dict[str, float]:
    """Milliseconds of a forward and a backward in n segments, in a CUDA graph, with gates that forget the more slowly
    the larger `shift` (2: 15 bits per chunk of 64 tokens, 8: 0.05), and what part of the borders has a warm-up."""
    from recur.kernels import scan
    from triton.testing import do_bench_cudagraph

    planned = scan.plan

    def plan(**sizes: Any) -> scan.Plan:
        found = planned(**sizes)
        span = found.chunk * -(-sizes["T"] // (found.chunk * n))
        return found._replace(segments=-(-sizes["T"] // span), span=span)

    q, k, v, a, beta = inputs(family, *shape)
    if a is not None:
        a = F.logsigmoid(torch.randn_like(a) + shift)
    scan.plan = plan
    try:
        x, options = scan.Tensors(q=q, v=v, k=k, log_decay=a, beta=beta), (shape[3] ** -0.5, False, False, False)
        warm = scan._Launcher(x, *options).warm
        kept, dy = scan.scan_forward(*x, *options, True)[2], torch.randn_like(v)
        calls = {
            "forward": lambda: scan.scan_forward(*x, *options, True),
            "backward": lambda: scan.scan_backward(dy, None, *x, *options, kept),
        }
        found = {name: round(do_bench_cudagraph(call, rep=60, return_mode="median"), 4) for name, call in calls.items()}
    finally:
        scan.plan = planned
    return found | {"warm": 0.0 if warm is None else round((warm[:, 1:] >= 0).float().mean().item(), 3)}


def compile_one(case: tuple) -> None:
    family, shape, setting = case
    try:
        for call in lay(family, (1, 128, *shape[2:]), setting).values():
            call()
        torch.cuda.synchronize()
    except Exception as error:
        print("compile", case, repr(error)[:120], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--settings", nargs="+", help="block,warps,stages ...")
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--segments", nargs="+", type=int, help="time whole scans in so many segments, nothing else")
    parser.add_argument("--gates", nargs="+", type=float, default=[2.0, 8.0], help="with these shifts of the gates")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    from triton.testing import do_bench

    settings = [tuple(map(int, s.split(","))) for s in options.settings] if options.settings else SETTINGS
    shapes = [tuple(map(int, s.split(","))) for s in options.shapes] if options.shapes else SHAPES
    begin = time.time()
    if options.segments:
        for shape, family, shift, n in itertools.product(shapes, options.families, options.gates, options.segments):
            row = {"family": family, "shape": shape, "gates": shift, "segments": n}
            print(json.dumps(row | segments(family, shape, n, shift)), flush=True)
        return
    cases = [(f, s, c) for s in shapes for f in options.families for c in settings if c[0] <= max(64, s[3])]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_one, cases, chunksize=1)
    print(f"compiled {len(cases)} in {time.time() - begin:.0f} s", flush=True)
    records = []
    for family, shape, setting in cases:
        if time.time() - begin > options.seconds:
            break
        record = {"family": family, "shape": shape, "setting": setting}
        try:
            for name, call in lay(family, shape, setting).items():
                record[name] = round(do_bench(call, warmup=4, rep=20, return_mode="median"), 4)
        except Exception as error:
            record["failed"] = repr(error)[:100]
        records.append(record)
        print(json.dumps(record), flush=True)
        torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scan_plans.json").write_text("\n".join(json.dumps(record) for record in records))


if __name__ == "__main__":
    main()
