"""Find launch settings for the elementwise and diagonal kernels on this GPU.

    python benchmarks/elementwise.py --out FOLDER [--seconds 45] [--what states|diagonal|complex|fixed]...

Every candidate plan is compiled and compared with the token loop in float64 by many processes, then timed alone. Rows
are printed as they are measured, in milliseconds, and go to FOLDER/elementwise.json.
"""

from __future__ import annotations

import argparse
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
from recur.kernels import diagonal, elementwise
from torch import Tensor

from recur import fixed_scan, gated_scan, online_scan, selective_scan

COPY = 4.296e12  # bytes per second that a copy moves, read plus written, on the machine of the peers' figures
PLAN, PLAN_DIAGONAL = elementwise.plan, diagonal.plan_diagonal
SCANS: dict[str, Callable[..., Any]] = {"selective": selective_scan, "online": online_scan}
KINDS = {"bf16": torch.bfloat16, "complex": torch.complex64}

# Shapes B T V with N = 16 and the segments to try; R, UNROLL, AHEAD of forward and backward passes
STATES = {(8, 2048, 4096): (1, 4), (1, 32768, 4096): (16, 64)}
WALKS = {
    False: [(2, 4, True), (4, 4, True), (2, 8, False)],
    True: [(4, 4, False), (4, 2, True), (4, 2, False)],
}
# Shapes B T D, loops (1) or chains (2); bytes per row, bytes per thread, UNROLL, registers, stages
DIAGONALS = {(8, 2048, 2048): (1, 2), (1, 65536, 1024): (2,)}
ROWS = [(128, 16, 8, None, 3), (128, 8, 8, 168, 1), (64, 16, 8, None, 1), (128, 16, 4, None, 2), (128, 16, 4, 128, 1)]


def use(tile: tuple[int, ...], segments: int, backward: bool) -> None:
    """Make passes in this direction take this plan, and the others the shipped one."""
    R, UNROLL, AHEAD = tile

    def plan(B: int, T: int, V: int, G: int, N: int, **options: Any) -> elementwise.Plan:
        shipped = PLAN(B, T, V, G, N, **options)
        if options.get("backward", False) != backward:
            return shipped
        length = triton.cdiv(triton.cdiv(T, elementwise.STRETCH), segments) * elementwise.STRETCH
        cut = {"tiles": triton.cdiv(V // G, R * shipped.W), "segments": triton.cdiv(T, length), "length": length}
        return shipped._replace(R=R, UNROLL=UNROLL, AHEAD=AHEAD, **cut)

    elementwise.plan = plan


def use_diagonal(tile: tuple[Any, ...], segments: int, backward: bool) -> None:
    row, thread, UNROLL, registers, stages = tile

    def plan(B: int, T: int, D: int, *, itemsize: int = 2, **options: Any) -> diagonal.DiagonalPlan:
        BLOCK_D, ROWS = row // min(itemsize, 4), 32 * diagonal.WARPS * thread // row
        length = T if segments == 1 else ROWS * UNROLL
        cut = triton.cdiv(D, BLOCK_D), triton.cdiv(T, length), length
        return diagonal.DiagonalPlan(ROWS, UNROLL, BLOCK_D, registers, stages, *cut)

    diagonal.plan_diagonal = plan


def make(rule: str, B: int, T: int, V: int) -> list[Tensor]:
    rand = partial(torch.randn, device="cuda")
    if rule in KINDS:
        log = torch.nn.functional.logsigmoid(rand(B, T, V))
        kind = KINDS[rule]
        return [rand(B, T, V, dtype=kind), torch.complex(log, rand(B, T, V)) if kind.is_complex else log.to(kind)]
    x, rate, k, q = rand(B, T, V), torch.rand(B, T, V, device="cuda"), rand(B, T, 16), rand(B, T, 16)
    tokens = [t.bfloat16() for t in (x, rate, k, q)]
    return [*tokens[:2], -torch.rand(V, 16, device="cuda") * 8, *tokens[2:]] if rule == "selective" else tokens


def outputs(scan: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def warm(job: tuple[str, bool, tuple[Any, ...]]) -> tuple[Any, float]:
    """Compile for one plan on a small problem and compare with the token loop: the largest relative error."""
    rule, backward, tile = job
    torch.manual_seed(0)
    scan, worst = SCANS.get(rule, gated_scan), 0.0
    try:
        tensors = make(rule, 2, 130 if rule in SCANS else 300, 64)
        wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]
        want = outputs(partial(scan, form="recurrent"), wide)
        for segments in (2, 1):
            (use if rule in SCANS else use_diagonal)(tile, segments, backward)
            with torch.no_grad():
                scan(*tensors, form="triton")
            got = outputs(partial(scan, form="triton"), tensors)
            worst = max(
                worst, *(((g.to(w.dtype) - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
            )
    except Exception as error:
        return (*job, str(error)[:200]), float("inf")
    return job, worst


def milliseconds(rule: str, tensors: list[Tensor], *, backward: bool) -> float:
    """Median time of the forward alone, without gradient, or of the backward alone."""
    bench = partial(triton.testing.do_bench, warmup=3, rep=12, return_mode="median")
    scan = partial(SCANS.get(rule, gated_scan), form="triton")
    if not backward:
        with torch.no_grad():
            return float(bench(lambda: scan(*tensors)))
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*leaves)
    dy = torch.randn_like(y)
    return float(bench(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)))


def sweep(
    rule: str, shape: tuple[int, ...], segments: tuple[int, ...], tiles: list[tuple[Any, ...]], backward: bool
) -> dict[str, Any]:
    """The shipped plan and the candidates, the fastest first."""
    elementwise.plan, diagonal.plan_diagonal = PLAN, PLAN_DIAGONAL
    tensors = make(rule, *shape)
    shipped, found = milliseconds(rule, tensors, backward=backward), []
    for tile in tiles:
        for n in segments:
            (use if rule in SCANS else use_diagonal)(tile, n, backward)
            found.append((round(milliseconds(rule, tensors, backward=backward), 4), *tile, n))
    floor = (5 if backward else 3) * tensors[0].numel() * tensors[0].element_size() / COPY * 1e3
    way = "bwd" if backward else "fwd"
    return {
        "rule": rule,
        "shape": shape,
        "way": way,
        "floor": floor,
        "shipped": shipped,
        "found": sorted(found, key=lambda row: row[0]),
    }


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
    parser.add_argument("--seconds", type=float, default=45, help="nothing new is begun after these")
    parser.add_argument("--what", action="append", choices=("states", "diagonal", "complex", "fixed"))
    options = parser.parse_args()
    start, what = time.monotonic(), options.what or ["states", "diagonal", "complex", "fixed"]
    rules = [("selective", STATES, WALKS), ("online", STATES, WALKS)] if "states" in what else []
    both = {False: ROWS, True: ROWS}
    rules += [(rule, DIAGONALS, both) for rule, name in (("bf16", "diagonal"), ("complex", "complex")) if name in what]
    jobs = [(rule, way, tile) for way in (True, False) for rule, _, tiles in rules for tile in tiles[way]]
    jobs = [job for job in jobs if job[0] in SCANS or job[1]]  # the plan of a diagonal scan is one for both ways
    right = set()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for job, error in pool.map(warm, jobs):
            if error < 2e-2:
                right.add(job)
            else:
                print("left out:", job, error, flush=True)
    print(f"compiled and checked {len(jobs)} plans in {time.monotonic() - start:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []

    def keep(measure: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - start < options.seconds:
            rows.append(measure())
            print(*rows[-1].values(), flush=True)
            Path(options.out, "elementwise.json").write_text(json.dumps(rows, indent=1))

    for i in range(2):  # the first shape of every rule before the second of any
        for rule, shapes, tiles in rules:
            shape, segments = list(shapes.items())[i]
            for way in (False, True):
                good = [tile for tile in tiles[way] if (rule, way or rule not in SCANS, tile) in right]
                keep(partial(sweep, rule, shape, segments, good, way))
    if "fixed" in what:
        keep(partial(fixed, 8, 2048, 512, 512))


if __name__ == "__main__":
    main()
