"""On a GPU: the elementwise kernels against the token loop in float64, twice, with every gradient.

`python tests/gpu_walk.py FOLDER` writes FOLDER/walk_check.json and exits 1 if an error is too large or two runs differ.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recur import ScanOut, gated_scan, online_scan, selective_scan

LIMIT = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])


class Case(NamedTuple):
    """Sizes are B T V G N, or B T D; lengths are those of packed documents; `fixed` weights do not change in time."""

    rule: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    lengths: tuple[int, ...] = ()
    fixed: str = ""

    def inputs(self) -> list[Tensor]:
        """The tensors of the scan in order; the initial state is the last."""
        B, T, V = self.sizes[:3]
        rows = len(self.lengths) or B
        if self.rule in ("gated", "complex"):
            x, log, h = torch.randn(B, T, V), HARD[torch.randint(0, 7, (B, T, V))], torch.randn(rows, V)
            tensors = [x.to(self.dtype), log.to(self.dtype), h]
            if self.rule == "complex":
                turned = zip(tensors, (1, 20, 1), strict=True)
                tensors = [torch.complex(t, torch.randn_like(t) * scale) for t, scale in turned]
            return [t.cuda() for t in tensors]
        G, N = self.sizes[3:]
        x, rate, state = torch.randn(B, T, V), torch.rand(B, T, V), torch.randn(rows, V, N)
        k, q = (torch.randn(V, N) if w in self.fixed else torch.randn(B, T, G, N) for w in "kq")
        tokens = [t.to(self.dtype) for t in (x, rate, k, q)]
        if self.rule == "selective":
            tokens.insert(2, -torch.rand(V, N) * 8)
        return [t.cuda() for t in (*tokens, state)]

    def run(self, form: str, *tensors: Tensor) -> ScanOut:
        scan: Callable[..., ScanOut] = {"selective": selective_scan, "online": online_scan}.get(self.rule, gated_scan)
        cu = torch.tensor([0, *self.lengths], device="cuda").cumsum(0) if self.lengths else None
        *tokens, state = tensors
        return scan(*tokens, initial_state=state, cu_seqlens=cu, reverse=self.reverse, form=form)


def outputs(case: Case, form: str, tensors: list[Tensor]) -> list[Tensor]:
    """y, state, and the gradient of every input, the outputs weighed by fixed noise."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = case.run(form, *leaves)
    noise = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(t.shape, generator=noise, dtype=torch.float64, device="cuda") for t in results]
    loss = sum((t * w).sum().real for t, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, leaves)]


def checked(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = case.inputs()
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]
    got, again = outputs(case, "triton", tensors), outputs(case, "triton", tensors)
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    want = outputs(case, "recurrent", wide)
    errors = [((g.to(w.dtype) - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    ok = same and all(error < LIMIT[case.dtype] for error in errors)
    return {**case._asdict(), "dtype": str(case.dtype), "errors": errors, "same": same, "ok": ok}


def cases() -> list[Case]:
    """Every rule, dtype and direction, at sizes that are odd, segmented, wide and packed."""
    sizes = [(2, 300, 200, 1, 16), (3, 130, 66, 2, 7), (1, 257, 96, 3, 64), (1, 65, 40, 1, 256), (16, 129, 4096, 1, 16)]
    found = [
        Case(rule, size, dtype, i % 2 == 1)
        for dtype in LIMIT
        for rule in ("selective", "online")
        for i, size in enumerate(sizes if dtype == torch.float32 else sizes[:2])
    ]
    found += [Case(rule, (1, 50, 70, 1, N), reverse=N > 2) for rule in ("selective", "online") for N in (1, 2, 3, 4, 8)]
    packed = (0, 5, 0, 150, 64, 1, 0, 80)
    for reverse in (False, True):
        found += [Case(rule, (1, 300, 64, 2, 16), torch.float32, reverse, packed) for rule in ("selective", "online")]
        found += [
            Case("selective", (1, 300, 64, 2, 16), torch.float32, reverse, packed, fixed) for fixed in ("k", "q", "kq")
        ]
        found += [
            Case(rule, (1, 3000, 72), torch.float32, reverse, (0, 50, 0, 2700, 249, 1)) for rule in ("gated", "complex")
        ]
    scans = [(2, 1000, 70), (8, 513, 1024), (1, 2100, 32), (64, 65, 256)]
    found += [Case("gated", size, dtype, i % 2 == 1) for dtype in LIMIT for i, size in enumerate(scans)]
    return found + [Case("complex", size, reverse=i % 2 == 1) for i, size in enumerate(scans)]


def main() -> int:
    """In parallel, because most of the time goes to compiling."""
    rows = []
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for row in pool.map(checked, cases()):
            rows.append(row)
            if not row["ok"]:
                print("BAD", row["rule"], row["sizes"], row["dtype"], row["lengths"], row["fixed"], row["errors"])
    print(sum(row["ok"] for row in rows), "of", len(rows), "cases are right; the worst errors by dtype:")
    for dtype, limit in LIMIT.items():
        print(dtype, max(max(row["errors"]) for row in rows if row["dtype"] == str(dtype)), "limit", limit)
    Path(sys.argv[1], "walk_check.json").write_text(json.dumps(rows, indent=1))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
