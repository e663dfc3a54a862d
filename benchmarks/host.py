"""Host time of a call: how many times as long as x + x of small tensors it keeps Python, without a GPU.

    python benchmarks/host.py --out benchmarks/results
    python benchmarks/host.py --only "scan, one gate per head" --profile

A scan in form="triton" is called with launches stubbed out: what is measured are its checks, its plan, its allocations
and the arguments of its launches, not Triton's own launcher. A layer runs in plain PyTorch on a CPU, on so few numbers
that Python decides. Every call is followed by one x + x, and medians of the
thread's time are compared. Writes host.json and host.md to --out.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

import recur
from recur import Mixer, presets

Call = Callable[[], Any]
LAYERS = {
    "gla": lambda: presets.gla(heads=4),
    "mamba": presets.mamba,
    "longhorn": presets.longhorn,
    "hgrn2": lambda: presets.hgrn2(heads=4),
}


@contextmanager
def stubbed() -> Iterator[None]:
    """Kernels are taken, and launched into nothing."""
    from recur.kernels import scan

    def get(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **options: None

    launch = patch.object(triton.runtime.jit.KernelInterface, "__getitem__", get)
    with patch.object(scan, "INTERPRETED", True), launch:
        yield


def scans() -> dict[str, Call]:
    """Scans with launches stubbed out, values never looked at."""
    B, T, H, K = 1, 64, 4, 32

    def new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.rand(shape).to(dtype).requires_grad_(grad)

    def log(*shape: int, grad: bool = False) -> Tensor:
        return (-torch.rand(shape)).requires_grad_(grad)

    half = torch.bfloat16
    q, k, v = (new(B, T, H, K) for _ in range(3))
    low, few, wide = new(B, T, H, K, dtype=half), new(B, T, 2, K, dtype=half), new(B, T, H, K, dtype=half)
    dq, dk, dv = (new(B, T, H, K, grad=True) for _ in range(3))
    head, key, dkey = log(B, T, H), log(B, T, H, K), log(B, T, H, K, grad=True)
    beta, state, cu = new(B, T, H), torch.zeros(B, H, K, K), torch.tensor([0, 20, 64])
    complex_gates = torch.polar(key.exp(), key).log()
    x, delta, few_x = new(B, T, K), new(B, T, K), new(B, T, 8)
    dx, ddelta = new(B, T, K, grad=True), new(B, T, K, grad=True)
    A, channels, poles, readout = log(K, 8), log(B, T, K), log(8), new(K, 8)

    def scan(*given: Any, **options: Any) -> Call:
        return lambda: recur.scan(*given, form="triton", **options)

    return {
        "scan": scan(q, k, v),
        "scan, one gate per head": scan(q, k, v, head),
        "scan, one gate per key channel": scan(q, k, v, key),
        "scan, with gradient": scan(dq, dk, dv, dkey),
        "scan, packed": scan(q, k, v, key, cu_seqlens=cu),
        "scan, bfloat16 with groups and a state": scan(few, few, wide, head, initial_state=state),
        "scan, delta rule": scan(low, low, wide, head, beta=beta),
        "scan, complex gates": scan(q, k, v, complex_gates),
        "gated_scan": lambda: recur.gated_scan(x, channels, form="triton"),
        "gated_scan, with gradient": lambda: recur.gated_scan(dx, channels, form="triton"),
        "selective_scan": lambda: recur.selective_scan(x, delta, A, few_x, few_x, form="triton"),
        "selective_scan, with gradient": lambda: recur.selective_scan(dx, ddelta, A, few_x, few_x, form="triton"),
        "online_scan": lambda: recur.online_scan(x, delta, few_x, few_x, form="triton"),
        "fixed_scan": lambda: recur.fixed_scan(x, poles, readout, form="triton"),
    }


def layers() -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, recipe in LAYERS.items():
        layer = Mixer(recipe(), 32)
        x, state = torch.rand(1, 4, 32), layer.init_state(1)
        found[f"{name}, whole"] = lambda layer=layer, x=x: layer(x)
        found[f"{name}, step"] = lambda layer=layer, x=x, state=state: layer.step(x[:, 0], state)
    return found


def measured(call: Call, rounds: int) -> tuple[float, float]:
    """Microseconds of a call, and its ratio to x + x: medians, alternating, so that neither finds caches as
    only itself leaves them."""
    x = torch.ones(4)
    own, unit = [], []
    for _ in range(20):
        call()
    for _ in range(rounds):
        clock = [time.thread_time_ns(), time.thread_time_ns()]  # reading it takes time too
        call()
        clock.append(time.thread_time_ns())
        x + x
        clock.append(time.thread_time_ns())
        empty, mine, sum_ = (after - before for before, after in pairwise(clock))
        own.append(mine - empty)
        unit.append(sum_ - empty)
    return round(median(own) / 1e3, 1), round(median(own) / median(unit), 1)


def profiled(call: Call) -> None:
    """The functions that take longest."""
    seen = cProfile.Profile()
    seen.enable()
    for _ in range(1000):
        call()
    seen.disable()
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin so")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=Path, help="folder for host.json and host.md")
    o = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, tuple[float, float]] = {}
    for calls, around in ((scans(), stubbed), (layers(), nullcontext)):
        for name, call in calls.items():
            if not name.startswith(tuple(o.only)):
                continue
            with around():
                found[name] = measured(call, o.rounds)
                print("{:<42}{:>9} us{:>8}".format(name, *found[name]), flush=True)
                if o.profile:
                    profiled(call)
    if o.out is not None:
        records = {name: {"us": us, "times x + x": ratio} for name, (us, ratio) in found.items()}
        rows = "".join(f"| {name} | {us} | {ratio} |\n" for name, (us, ratio) in found.items())
        head = f"torch {torch.__version__}, one CPU core\n\n| call | us | times x + x |\n|---|--:|--:|\n"
        o.out.mkdir(parents=True, exist_ok=True)
        (o.out / "host.json").write_text(json.dumps({"torch": torch.__version__, "calls": records}, indent=1) + "\n")
        (o.out / "host.md").write_text(head + rows)


if __name__ == "__main__":
    main()
