"""On a GPU: the elementwise kernels against a float64 token loop, and timings of a table of tile sizes.

`python tests/gpu_walk.py check` writes $OUT/walk_check.json and exits 1 if an error is too large;
`python tests/gpu_walk.py time` writes $OUT/walk_time.json.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from recur.kernels import walk
from torch import Tensor

COPY = 4.296e12  # bytes a second that a copy moves, read plus written, on the machine of the peers' figures
LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])
STATES = [(8, 2048, 4096), (1, 32768, 4096), (4, 8192, 2048)]  # B T V, N = 16
DIAGONALS = [(8, 2048, 2048), (1, 65536, 1024), (16, 8192, 1024), (32, 1024, 4096)]  # B T D


def inputs(rule: str, B: int, T: int, V: int, G: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    x, rate = torch.randn(B, T, V, device="cuda"), torch.rand(B, T, V, device="cuda")
    k, q = (torch.randn(B, T, G, N, device="cuda") for _ in range(2))
    tokens = [t.to(dtype) for t in (x, rate, k, q)]
    a = -torch.rand(V, N, device="cuda") * 8
    return [*tokens, *([a] if rule == "selective" else []), torch.randn(B, V, N, device="cuda")]


def kernel(rule: str, x: Tensor, rate: Tensor, k: Tensor, q: Tensor, *rest: Tensor, reverse: bool = False) -> Any:
    if rule == "selective":
        return walk.selective(x, rate, rest[0], k, q, rest[1], None, reverse)
    return walk.online(x, rate, k, q, rest[0], None, reverse)


def loop(rule: str, x: Tensor, rate: Tensor, k: Tensor, q: Tensor, *rest: Tensor, reverse: bool = False) -> Any:
    """The definition, token by token."""
    S, per = rest[-1], x.shape[2] // k.shape[2]
    k, q = (t.repeat_interleave(per, 2) for t in (k, q))
    ys: list[Tensor] = []
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        r, k_t = rate[:, t, :, None], k[:, t]
        if rule == "selective":
            A, u = (r * rest[0]).exp(), rate[:, t] * x[:, t]
        else:
            eps = r / (1 + r * k_t.square().sum(-1, keepdim=True))
            A, u = 1 - eps * k_t.square(), eps[..., 0] * x[:, t]
        S = A * S + u[..., None] * k_t
        ys.append((S * q[:, t]).sum(-1))
    return torch.stack(ys[:: -1 if reverse else 1], 1), S


def diagonal_loop(x: Tensor, log_decay: Tensor, h: Tensor, *, reverse: bool = False) -> Any:
    size = log_decay.real.exp() if log_decay.is_complex() else log_decay.exp()
    phase = log_decay.imag if log_decay.is_complex() else None
    a = size if phase is None else torch.complex(size * phase.cos(), size * phase.sin())
    ys: list[Tensor] = []
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        h = a[:, t] * h + x[:, t]
        ys.append(h)
    return torch.stack(ys[:: -1 if reverse else 1], 1), h


def outputs(scan: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = scan(*leaves)
    noise = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(t.shape, generator=noise, dtype=torch.float64, device="cuda") for t in results]
    loss = sum((t * w).sum().real for t, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, leaves)]


def errors(scan: Callable[..., Any], reference: Callable[..., Any], tensors: list[Tensor]) -> list[float]:
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]
    got, again, want = outputs(scan, tensors), outputs(scan, tensors), outputs(reference, wide)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    return [((g.to(w.dtype) - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]


SIZES = [(2, 300, 200, 1, 16), (3, 130, 66, 2, 7), (1, 257, 96, 3, 64), (1, 65, 40, 1, 256), (16, 129, 4096, 1, 16)]
DIAGONAL_SIZES = [(2, 1000, 70), (8, 513, 1024), (1, 2100, 32)]


def cases() -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    """Every rule, dtype and direction, at sizes that are odd, segmented and wide."""
    listed = [
        (rule, size, dtype, i % 2 == 1)
        for dtype in LIMIT
        for rule in ("selective", "online")
        for i, size in enumerate(SIZES if dtype == torch.float32 else SIZES[:2])
    ]
    listed += [("diagonal", size, dtype, i % 2 == 1) for dtype in LIMIT for i, size in enumerate(DIAGONAL_SIZES)]
    return listed + [("complex", size, torch.float32, i % 2 == 1) for i, size in enumerate(DIAGONAL_SIZES)]


def checked(case: tuple[str, tuple[int, ...], torch.dtype, bool]) -> dict[str, Any]:
    rule, size, dtype, reverse = case
    torch.manual_seed(0)
    if rule in ("selective", "online"):
        scan, reference = (partial(f, rule, reverse=reverse) for f in (kernel, loop))
        found = errors(scan, reference, inputs(rule, *size, dtype))
    else:
        x, log, h = torch.randn(size), HARD[torch.randint(0, 7, size)], torch.randn(size[0], size[2])
        tensors = [t.cuda() for t in (x.to(dtype), log.to(dtype), h)]
        if rule == "complex":
            tensors = [torch.complex(t, torch.randn_like(t) * s) for t, s in zip(tensors, (1, 20, 1), strict=True)]
        found = errors(
            lambda x, log, h: walk.diagonal(x, log, h, None, reverse), partial(diagonal_loop, reverse=reverse), tensors
        )
    ok = all(e < LIMIT[dtype] for e in found)
    return {"rule": rule, "size": size, "dtype": str(dtype), "reverse": reverse, "errors": found, "ok": ok}


def check() -> list[dict[str, Any]]:
    """In parallel, because most of the time goes to compiling."""
    rows = []
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        for row in pool.map(checked, cases()):
            rows.append(row)
            text = " ".join(f"{e:.1e}" for e in row["errors"])
            print("ok " if row["ok"] else "BAD", row["rule"], row["size"], row["dtype"], text, flush=True)
    return rows


# Timing


def state_plans() -> Iterator[tuple[int, int, int]]:
    """R, UNROLL and the fewest segments to try."""
    return itertools.product((2, 4), (2, 4, 8), (1, 2, 4, 8, 16, 32))


def diagonal_plans() -> Iterator[tuple[int, int, int, int]]:
    """Bytes a row, UNROLL, warps and segments to try."""
    return itertools.product((32, 64, 128), (4, 8), (1, 4, 8), (1, 4))


def use_state_plan(R: int, UNROLL: int, segments: int) -> None:
    def plan(B: int, T: int, V: int, G: int, N: int, **_: object) -> walk.Plan:
        length = triton.cdiv(triton.cdiv(T, walk.STRETCH), segments) * walk.STRETCH
        W = 32 // min(4, triton.next_power_of_2(N))
        tiles = triton.cdiv(V // G, R * W)
        return walk.Plan(R, triton.next_power_of_2(N), W, UNROLL, 1, tiles, triton.cdiv(T, length), length)

    walk.plan = plan


def use_diagonal_plan(row: int, UNROLL: int, warps: int, segments: int) -> None:
    def plan(B: int, T: int, D: int, *, itemsize: int = 2, **_: object) -> walk.DiagonalPlan:
        BLOCK_D = row // itemsize
        ROWS = 32 * warps * 16 // row
        span = ROWS * UNROLL
        length = triton.cdiv(triton.cdiv(T, span), segments) * span
        return walk.DiagonalPlan(ROWS, UNROLL, BLOCK_D, warps, triton.cdiv(D, BLOCK_D), triton.cdiv(T, length), length)

    walk.plan_diagonal = plan


def diagonal_inputs(B: int, T: int, D: int, kind: torch.dtype) -> list[Tensor]:
    x = torch.randn(B, T, D, device="cuda", dtype=kind)
    log = torch.nn.functional.logsigmoid(torch.randn(B, T, D, device="cuda"))
    return [x, torch.complex(log, torch.randn_like(log)) if kind.is_complex else log.to(kind)]


def diagonal(x: Tensor, log: Tensor) -> Any:
    return walk.diagonal(x, log, None, None, False)


def milliseconds(scan: Callable[..., Any], tensors: list[Tensor], *, backward: bool) -> float:
    """Median time of the forward alone, or of the backward alone."""
    bench = partial(triton.testing.do_bench, warmup=4, rep=16, return_mode="median")
    if not backward:
        with torch.no_grad():
            return bench(lambda: scan(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, _ = scan(*leaves)
    dy = torch.randn_like(y)
    return bench(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))


def warm(job: tuple[str, Any, tuple[Any, ...]]) -> str:
    """Compile for one plan, on a small problem, so that the timing process finds the kernels in the cache."""
    rule, dtype, plan = job
    try:
        if rule == "diagonal":
            use_diagonal_plan(*plan[:-1], 2)
            tensors, scan = diagonal_inputs(2, 4096, 256, dtype), diagonal
        else:
            use_state_plan(*plan[:-1], 2)
            tensors, scan = inputs(rule, 2, 256, 64, 1, 16, dtype)[:-1], partial(fresh, rule)
        for segments in (2, 1):
            (use_diagonal_plan if rule == "diagonal" else use_state_plan)(*plan[:-1], segments)
            with torch.no_grad():
                scan(*tensors)
            leaves = [t.detach().requires_grad_() for t in tensors]
            scan(*leaves)[0].abs().sum().backward()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {error}"[:300]
    return ""


def fresh(rule: str, *tensors: Tensor) -> Any:
    """From no state."""
    if rule == "selective":
        x, rate, k, q, a = tensors
        return walk.selective(x, rate, a, k, q, None, None, False)
    x, rate, k, q = tensors
    return walk.online(x, rate, k, q, None, None, False)


def sweep(
    scan: Callable[..., Any], tensors: list[Tensor], plans: list[tuple[Any, ...]], use: Callable[..., None]
) -> dict[str, list[Any]]:
    """The ten fastest plans, forward and backward, after the time that the shipped plan takes."""
    planners = walk.plan, walk.plan_diagonal
    result: dict[str, list[Any]] = {}
    for name, backward in (("fwd", False), ("bwd", True)):
        found: list[Any] = []
        shipped = milliseconds(scan, tensors, backward=backward)
        for plan in plans:
            use(*plan)
            try:
                found.append((round(milliseconds(scan, tensors, backward=backward), 4), *plan))
            except Exception as error:
                print("failed", name, plan, str(error)[:200], flush=True)
                torch.cuda.synchronize()
            walk.plan, walk.plan_diagonal = planners
        result[name] = [round(shipped, 4), *sorted(found)[:10]]
    return result


def time() -> list[dict[str, Any]]:
    states, diagonals = list(state_plans()), list(diagonal_plans())
    jobs = [(rule, torch.bfloat16, p) for rule in ("selective", "online") for p in states if p[-1] == 1]
    kinds = (torch.bfloat16, torch.float32, torch.complex64)
    jobs += [("diagonal", kind, p) for kind in kinds for p in diagonals if p[-1] == 1]
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for note in pool.map(warm, jobs):
            if note:
                print("warm:", note, flush=True)
    rows: list[dict[str, Any]] = []
    for rule, (B, T, V) in itertools.product(("selective", "online"), STATES):
        tensors = inputs(rule, B, T, V, 1, 16, torch.bfloat16)[:-1]
        result = sweep(partial(fresh, rule), tensors, states, use_state_plan)
        floor = [n * B * T * V * 2 / COPY * 1e3 for n in (3, 5)]
        rows.append({"rule": rule, "shape": (B, T, V, 16), "floor fwd, bwd": floor, **result})
        print(rule, (B, T, V), floor, {k: v[:5] for k, v in result.items()}, flush=True)
    for kind, (B, T, D) in itertools.product(kinds, DIAGONALS):
        tensors = diagonal_inputs(B, T, D, kind)
        result = sweep(diagonal, tensors, diagonals, use_diagonal_plan)
        floor = [n * B * T * D * tensors[0].element_size() / COPY * 1e3 for n in (3, 5)]
        rows.append({"rule": f"diagonal {kind}", "shape": (B, T, D), "floor fwd, bwd": floor, **result})
        print(kind, (B, T, D), floor, {k: v[:5] for k, v in result.items()}, flush=True)
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = {"check": check, "time": time}[sys.argv[1]]()
    Path(os.environ["OUT"], f"walk_{sys.argv[1]}.json").write_text(json.dumps(rows, indent=1))
    sys.exit(any(not row.get("ok", True) for row in rows))
