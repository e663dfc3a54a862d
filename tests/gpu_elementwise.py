"""On a GPU: the elementwise kernels against the token loop in float64, twice, with every gradient.

`python tests/gpu_elementwise.py` prints one line per case and exits with 1 if an error is too large or two runs
differ. The specialisations of the elementwise kernels are among the cases, so every rule, dtype, direction, size of
state, fixed weight, border of documents and of segments meets every other.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import specialisations
import torch
from gpu_scan import DTYPES, HARD, main
from interpreted import widen
from torch import Tensor

import recur
from recur import ScanOut

LIMITS = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}  # as in gpu_scan.py


class Case(NamedTuple):
    """Sizes are B T V G N, or B T D; lengths are those of packed documents; `fixed` weights do not change in time."""

    rule: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    lengths: tuple[int, ...] = ()
    fixed: str = ""
    initial: bool = True

    def inputs(self) -> dict[str, Tensor]:
        """What the scan takes by name."""
        torch.manual_seed(0)
        B, T, V = self.sizes[:3]
        rows = len(self.lengths) or B
        if self.rule in ("gated", "complex"):
            hard = HARD.to(torch.get_default_device())[torch.randint(0, 7, (B, T, V))]
            tensors = {"x": torch.randn(B, T, V).to(self.dtype), "log_decay": hard.to(self.dtype)}
            tensors["initial_state"] = torch.randn(rows, V)
            if self.rule == "complex":
                rotated = zip(tensors.items(), (1, 20, 1), strict=True)
                tensors = {name: torch.complex(t, torch.randn_like(t) * scale) for (name, t), scale in rotated}
        else:
            G, N = self.sizes[3:]
            kq = [torch.randn(V, N) if w in self.fixed else torch.randn(B, T, G, N) for w in "kq"]
            tokens = [t.to(self.dtype) for t in (torch.randn(B, T, V), torch.rand(B, T, V), *kq)]
            names = ("x", "delta", "B", "C") if self.rule == "selective" else ("x", "rate", "k", "q")
            tensors = dict(zip(names, tokens, strict=True))
            if self.rule == "selective":
                tensors["A"] = -torch.rand(V, N) * 8
            tensors["initial_state"] = torch.randn(rows, V, N)
        return {name: t for name, t in tensors.items() if self.initial or name != "initial_state"}

    def run(self, form: str, **tensors: Tensor) -> ScanOut:
        scans = {"selective": recur.selective_scan, "online": recur.online_scan}
        cu = torch.tensor([0, *self.lengths]).cumsum(0) if self.lengths else None
        return scans.get(self.rule, recur.gated_scan)(**tensors, cu_seqlens=cu, reverse=self.reverse, form=form)

    def steps(self, **tensors: Tensor) -> dict[str, Tensor]:
        """y of the first token alone, of Longhorn also with the whole k kᵀ; the state as in gpu_scan.py."""
        B, T, *sizes = self.sizes
        x = {name: t[:, 0] if t.shape[:2] == (B, T) else t for name, t in tensors.items() if name != "initial_state"}
        dtype = torch.bfloat16 if self.initial else torch.float32
        state = torch.randn(B, *sizes[::2], dtype=torch.complex64 if self.rule == "complex" else dtype)
        state = widen(state) if x["x"].dtype in (torch.float64, torch.complex128) else state
        if self.rule == "online":
            whole = recur.online_step(**x, state=state.clone(), diagonal=False)
            return {"exact step": whole, "step": recur.online_step(**x, state=state)}
        return {"step": (recur.selective_step if self.rule == "selective" else recur.gated_step)(**x, state=state)}


def listed() -> list[Case]:
    """The specialisations of the elementwise scans and of the diagonal scan."""
    found = []
    for row in specialisations.ELEMENTWISE.rows + specialisations.DIAGONAL.rows:
        more, packed, matrix = row["segments"] == "more", row["rows"] == "packed", "rule" in row
        long, short = (200, 30) if matrix else (3000, 50 if row["D"] == "72" else 300)  # 50 are one tile of a chain
        T = long if more else short
        if matrix:
            groups = 1 if row["groups"] == "one" else 5 if row["V"] == "95" else 2
            sizes, rule = (int(row["V"]), groups, int(row["N"])), row["rule"]
        else:
            sizes, rule = (int(row["D"]),), "gated" if row["number"] == "real" else "complex"
        found.append(
            Case(
                rule,
                (1 if packed else 2 if more else 32 if matrix else 4, T, *sizes),  # 32: Mamba in tiles of many programs
                getattr(torch, row["dtype"]),
                reverse=row["way"] == "left",
                lengths=(0, 20, T - 20) if packed else (),
                fixed="".join(w for w in "kq" if row.get(w) == "fixed"),
                initial=row["states"] == "given",
            )
        )
    return found


def cases() -> list[Case]:
    """Every rule, dtype and direction, at sizes that are odd, segmented, wide and packed."""
    sizes = [(2, 300, 200, 1, 16), (3, 130, 66, 2, 7), (1, 257, 96, 3, 64), (1, 65, 40, 1, 256), (16, 129, 4096, 1, 16)]
    found = [
        Case(rule, size, dtype, i % 2 == 1)
        for dtype in DTYPES
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
    found += [Case("gated", size, dtype, i % 2 == 1) for dtype in DTYPES for i, size in enumerate(scans)]
    return found + [Case("complex", size, reverse=i % 2 == 1) for i, size in enumerate(scans)]


def replays() -> bool:
    """A chain in a CUDA graph gives the same bits at every replay."""
    x, log = torch.randn(1, 3000, 72, device="cuda"), -torch.rand(1, 3000, 72, device="cuda")
    want = recur.gated_scan(x, log, form="triton").y
    graph, good = torch.cuda.CUDAGraph(), True
    with torch.cuda.graph(graph):
        got = recur.gated_scan(x, log, form="triton").y
    for _ in range(3):
        got.zero_()
        graph.replay()
        good = good and torch.equal(got, want)
    print("ok " if good else "BAD", "a chain in a CUDA graph")
    return good


if __name__ == "__main__":
    failed = main(listed() + cases(), LIMITS)
    sys.exit(failed or not replays())
