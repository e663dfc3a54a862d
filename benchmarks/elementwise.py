"""Find launch settings for the elementwise and diagonal kernels on this GPU.

    python benchmarks/elementwise.py --out FOLDER [--seconds 100] [--what states|diagonal|complex|fixed]...

Every candidate plan is compiled by many processes, checked against the token loop in float64, and timed alone. The best
are printed beside the shipped plan, in milliseconds; all go to FOLDER/elementwise.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from recur.kernels import walk
from torch import Tensor

from recur import fixed_scan, gated_scan, online_scan, selective_scan

COPY = 4.296e12  # bytes a second that a copy moves, read plus written, on the machine of the peers' figures
STATES = [(8, 2048, 4096), (1, 32768, 4096), (4, 8192, 2048)]  # B T V, N = 16
DIAGONALS = [(8, 2048, 2048), (1, 65536, 1024), (16, 8192, 1024), (32, 1024, 4096)]  # B T D
PLAN, PLAN_DIAGONAL = walk.plan, walk.plan_diagonal

# R, W, UNROLL, registers: of walks left to right, and right to left
FORWARD = [(2, 8, 4, 255), (2, 8, 4, 96), (2, 8, 8, 128), (4, 8, 4, 255), (4, 8, 4, 128), (4, 8, 2, 96), (8, 8, 2, 168)]
FORWARD += [(1, 32, 4, 128), (2, 32, 2, 168), (2, 16, 4, 128)]
BACKWARD = [(2, 8, 4, 255), (2, 8, 4, 168), (2, 8, 4, 128), (2, 8, 2, 128), (2, 8, 2, 96), (2, 8, 8, 255)]
BACKWARD += [(4, 8, 2, 255), (4, 8, 2, 168), (4, 8, 4, 255), (4, 8, 1, 168), (8, 8, 2, 255), (8, 8, 1, 255)]
SEGMENTS = (1, 2, 4, 8, 16, 32)
# bytes a row, bytes a thread, UNROLL, warps
ROWS = [*itertools.product((64, 128), (8, 16), (4, 8), (4, 8)), (32, 8, 8, 8), (32, 16, 8, 8), (256, 16, 4, 4)]


def use(tile: tuple[int, ...], segments: int) -> None:
    """Make walks take this plan."""

    def plan(B: int, T: int, V: int, G: int, N: int, **options: Any) -> walk.Plan:
        R, W, UNROLL, registers = tile
        length = triton.cdiv(triton.cdiv(T, walk.STRETCH), segments) * walk.STRETCH
        shipped = PLAN(B, T, V, G, N, **options)._asdict()
        tiles = triton.cdiv(V // G, R * W)
        found = {"R": R, "W": W, "UNROLL": UNROLL, "registers": registers, "tiles": tiles, "length": length}
        return walk.Plan(**{**shipped, **found, "segments": triton.cdiv(T, length)})

    walk.plan = plan


def use_diagonal(tile: tuple[int, ...], segments: int) -> None:
    def plan(B: int, T: int, D: int, *, itemsize: int = 2, **options: Any) -> walk.DiagonalPlan:
        row, thread, UNROLL, warps = tile
        BLOCK_D, ROWS = row // itemsize, 32 * warps * thread // row
        length = triton.cdiv(triton.cdiv(T, ROWS * UNROLL), segments) * ROWS * UNROLL
        tiles = triton.cdiv(D, BLOCK_D)
        return walk.DiagonalPlan(ROWS, UNROLL, BLOCK_D, warps, tiles, triton.cdiv(T, length), length)

    walk.plan_diagonal = plan


def state_inputs(rule: str, B: int, T: int, V: int, N: int = 16) -> list[Tensor]:
    x, rate = torch.randn(B, T, V, device="cuda"), torch.rand(B, T, V, device="cuda")
    k, q = (torch.randn(B, T, N, device="cuda") for _ in range(2))
    tokens = [t.bfloat16() for t in (x, rate, k, q)]
    return [*tokens[:2], -torch.rand(V, N, device="cuda") * 8, *tokens[2:]] if rule == "selective" else tokens


def diagonal_inputs(kind: torch.dtype, B: int, T: int, D: int) -> list[Tensor]:
    x = torch.randn(B, T, D, device="cuda", dtype=kind)
    log = torch.nn.functional.logsigmoid(torch.randn(B, T, D, device="cuda"))
    return [x, torch.complex(log, torch.randn_like(log)) if kind.is_complex else log.to(kind)]


def scan_of(rule: str) -> Callable[..., Any]:
    return {"selective": selective_scan, "online": online_scan}.get(rule, gated_scan)


def make(rule: str, *shape: int) -> list[Tensor]:
    if rule in ("selective", "online"):
        return state_inputs(rule, *shape)
    return diagonal_inputs({"complex": torch.complex64, "bf16": torch.bfloat16, "fp32": torch.float32}[rule], *shape)


def outputs(scan: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def warm(job: tuple[str, tuple[int, ...]]) -> tuple[Any, float]:
    """Compile for one plan on a small problem and compare with the token loop: the largest relative error."""
    rule, tile = job
    torch.manual_seed(0)
    shape = (2, 256, 64) if rule in ("selective", "online") else (2, 2048, 256)
    tensors, worst = make(rule, *shape), 0.0
    try:
        short = [t if t.shape[0] != 2 else t[:, :192].contiguous() for t in tensors]
        wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in short]
        want = outputs(partial(scan_of(rule), form="recurrent"), wide)
        for segments in (2, 1):
            (use if rule in ("selective", "online") else use_diagonal)(tile, segments)
            for inputs in (tensors, short):
                with torch.no_grad():
                    scan_of(rule)(*inputs, form="triton")
                got = outputs(partial(scan_of(rule), form="triton"), inputs)
            errors = [((g.to(w.dtype) - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
            worst = max(worst, *errors)
    except Exception as error:
        return f"{job}: {error}"[:200], float("inf")
    return job, worst


def milliseconds(rule: str, tensors: list[Tensor], *, backward: bool) -> float:
    """Median time of the forward alone, without gradient, or of the backward alone."""
    bench = partial(triton.testing.do_bench, warmup=3, rep=12, return_mode="median")
    scan = partial(scan_of(rule), form="triton")
    if not backward:
        with torch.no_grad():
            return float(bench(lambda: scan(*tensors)))
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*leaves)
    dy = torch.randn_like(y)
    return float(bench(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)))


def sweep(
    rule: str, shape: tuple[int, ...], tiles: dict[bool, list[tuple[int, ...]]], seconds: float
) -> dict[str, Any]:
    """Shipped plan and the best of the candidates with their segments, forward and backward."""
    tensors = make(rule, *shape)
    states = rule in ("selective", "online")
    itemsize = tensors[0].element_size()
    result: dict[str, Any] = {"rule": rule, "shape": shape}
    result["floor"] = [n * tensors[0].numel() * itemsize / COPY * 1e3 for n in (3, 5)]
    programs = shape[0] * shape[2] // (32 if states else max(1, 128 // itemsize))
    enough = [n for n in SEGMENTS if n == 1 or programs * n <= 132 * 128]
    for backward in (False, True):
        walk.plan, walk.plan_diagonal = PLAN, PLAN_DIAGONAL
        shipped, found = milliseconds(rule, tensors, backward=backward), []
        stop = time.monotonic() + seconds * (0.6 if backward else 0.4)
        for tile, segments in itertools.product(tiles[backward], enough if states else enough[:3]):
            if time.monotonic() < stop:
                (use if states else use_diagonal)(tile, segments)
                found.append((round(milliseconds(rule, tensors, backward=backward), 4), *tile, segments))
        name = "bwd" if backward else "fwd"
        result[name] = {"shipped": round(shipped, 4), "best": sorted(found)[:12], "tried": len(found)}
    walk.plan, walk.plan_diagonal = PLAN, PLAN_DIAGONAL
    return result


def fixed(B: int, T: int, V: int, N: int) -> dict[str, Any]:
    """Constant complex poles shared by all channels: every form, forward and backward."""
    x, readout = torch.randn(B, T, V, device="cuda"), torch.randn(V, N, device="cuda", dtype=torch.complex64)
    log = torch.complex(-torch.rand(N, device="cuda"), torch.randn(N, device="cuda"))
    leaves = [t.requires_grad_() for t in (x, log, readout)]
    row: dict[str, Any] = {"rule": "fixed", "shape": (B, T, V, N)}
    bench = partial(triton.testing.do_bench, warmup=3, rep=12, return_mode="median")
    for form in ("parallel", "chunked", "triton"):
        with torch.no_grad():
            forward = bench(partial(fixed_scan, x, log, readout, form=form))
        y, _ = fixed_scan(x, log, readout, form=form)
        dy = torch.randn_like(y)
        row[form] = forward, bench(partial(torch.autograd.grad, y, leaves, dy, retain_graph=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--what", action="append", choices=("states", "diagonal", "complex", "fixed"))
    options = parser.parse_args()
    start, what = time.monotonic(), options.what or ["states", "diagonal", "complex", "fixed"]
    work: list[tuple[str, list[tuple[int, ...]], dict[bool, list[tuple[int, ...]]]]] = []
    if "states" in what:
        work += [(rule, STATES, {False: FORWARD, True: BACKWARD}) for rule in ("selective", "online")]
    work += [("bf16", DIAGONALS, {False: ROWS, True: ROWS})] if "diagonal" in what else []
    work += [("complex", DIAGONALS, {False: ROWS, True: ROWS})] if "complex" in what else []
    jobs = list(dict.fromkeys((rule, tile) for rule, _, tiles in work for way in tiles for tile in tiles[way]))
    wrong = set()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for job, error in pool.map(warm, jobs):
            if not error < 2e-2:
                print("left out:", job, error, flush=True)
                wrong.add(job)
    for rule, _, tiles in work:
        for way in tiles:
            tiles[way] = [tile for tile in tiles[way] if (rule, tile) not in wrong]
    print(f"compiled and checked {len(jobs)} plans in {time.monotonic() - start:.0f} s", flush=True)
    found = [fixed(*shape) for shape in ((8, 2048, 512, 512), (1, 32768, 512, 512)) if "fixed" in what]
    for row in found:
        print(row, flush=True)
    pairs = [(rule, shape, tiles) for rule, shapes, tiles in work for shape in shapes]
    for i, (rule, shape, tiles) in enumerate(pairs):
        share = max(3.0, (start + options.seconds - time.monotonic()) / (len(pairs) - i))
        row = sweep(rule, shape, tiles, share)
        found.append(row)
        Path(options.out, "elementwise.json").write_text(json.dumps(found, indent=1))
        for way in ("fwd", "bwd"):
            best = "  ".join(str(x) for x in row[way]["best"][:4])
            print(rule, shape, way, "shipped", row[way]["shipped"], "best", best, f"({row[way]['tried']})", flush=True)


if __name__ == "__main__":
    main()
