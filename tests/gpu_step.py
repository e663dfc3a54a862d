"""Steps on a GPU: `python tests/gpu_step.py check`, `... time`.

check runs the laws of test_kernel_step.py, which take every rule, gate, kind of key, bonus, group and state, bfloat16
and complex ones too, and captures `model.step` of every preset and of hybrids in a CUDA graph, whose replays must equal
eager steps; it prints the launches of a step and exits with 1 if anything is wrong. The step of each specialisation
is in gpu_scan.py and gpu_elementwise.py. time prints one JSON line per decode shape, the fastest tiles first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from recur.kernels import step as kernels
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import recur
from recur import LanguageModel, kernel, presets
from recur.blocks import Attention, Project, Rotary

ATTENTION = recur.Recipe(
    Project("x", q="H K", k="G K", v="G K"),
    Rotary("q k"),
    Attention(),
    Project("y", y="D"),
    axes={"H": 4, "G": 2, "K": "D/H"},
)


def models() -> dict[str, Any]:
    every = {name: getattr(presets, name)() for name in presets.names()}
    every = {name: recipe for name, recipe in every.items() if recipe.causal}
    return every | {"hybrid": [presets.retnet(), ATTENTION], "hybrid with longhorn": [presets.longhorn(), ATTENTION]}


def law(name: str) -> str:
    """One law of test_kernel_step, by the kernel."""
    import test_kernel_step as laws

    launches, original = [], kernel.step
    kernel.step = lambda rule, *args, **options: launches.append(rule) or original(rule, *args, **options)
    {**laws.LAWS, "drift": laws.test_a_bfloat16_state_drifts_little}[name]()
    assert launches or name == "the_operator_is_one_of_torch", "no kernel was launched"
    return f"{len(launches)} launches, rules {', '.join(sorted(set(launches)))}"


def graph(name: str, dtype: torch.dtype) -> str:
    """Twelve tokens eagerly and by replays of one capture: logits and states must be equal."""
    torch.manual_seed(0)
    lm = LanguageModel(models()[name], vocab_size=64, dim=256, depth=2, ffn="swiglu").to(dtype).eval()
    rows_of_ids = torch.randint(64, (12, 2))
    eager, fresh = lm.init_state(2, max_len=16), lm.init_state(2, max_len=16)
    want = torch.stack([lm.step(ids, eager) for ids in rows_of_ids])
    replayed, state = replay(lm, rows_of_ids, fresh)
    assert want.isfinite().all(), "not finite"
    assert torch.equal(replayed, want), f"logits off by {(replayed - want).abs().max():.1e}"
    assert all(map(torch.equal, tensors(state), tensors(eager))), "states differ"
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        lm.step(rows_of_ids[0], eager)
    return f"{sum(event.count for event in seen.key_averages())} launches a step of 2 layers"


def two_runs() -> str:
    states = [torch.randn(2, 16, 128, 128) for _ in range(2)]
    states[1].copy_(states[0])
    q, a = torch.randn(2, 16, 128), -torch.rand(2, 16, 128)
    ys = [recur.step(q, q, q, a, state) for state in states]
    assert torch.equal(*ys)
    assert torch.equal(*states)
    return "bit-identical"


def attempt(job: tuple[Callable[..., str], tuple[Any, ...]]) -> bool:
    run, arguments = job
    label = " ".join([run.__name__, *map(str, arguments)])
    torch.set_default_device("cuda")
    try:
        print("ok ", label, run(*arguments), flush=True)
    except Exception as error:
        print("BAD", label, f"{type(error).__name__}: {str(error)[:300]}", flush=True)
        return False
    return True


def check() -> bool:
    import test_kernel_step as laws

    jobs: list[Any] = [(law, (name,)) for name in (*laws.LAWS, "drift")] + [(two_runs, ())]
    jobs += [(graph, (name, dtype)) for name in models() for dtype in (torch.float32, torch.bfloat16)]
    # compiling takes longer than running, so the jobs share the processors of the host
    with torch.multiprocessing.get_context("spawn").Pool(14) as pool:
        good = pool.map(attempt, jobs, chunksize=1)
    print(f"{sum(good)} of {len(good)} good")
    return all(good)


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def replay(lm: LanguageModel, rows_of_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    first, ids = [leaf.clone() for leaf in tensors(state)], rows_of_ids[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            lm.step(ids, state)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        logits = lm.step(ids, state)
    for leaf, begin in zip(tensors(state), first, strict=True):
        leaf.copy_(begin)
    made = []
    for token in rows_of_ids:
        ids.copy_(token)
        captured.replay()
        made.append(logits.clone())
    return torch.stack(made), state


def shapes(batch: int) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """Steps in bfloat16 with a float32 state, and the bytes of that state."""
    q, k, v = (torch.randn(batch, 16, 128, dtype=torch.bfloat16) for _ in range(3))
    a, state = -torch.rand(batch, 16, 128, dtype=torch.bfloat16), torch.randn(batch, 16, 128, 128)
    scalar, beta = -torch.rand(batch, 16), torch.rand(batch, 16, dtype=torch.bfloat16)
    x, rate = torch.randn(batch, 4096).bfloat16(), torch.rand(batch, 4096).bfloat16()
    B, A, memory = torch.randn(batch, 16).bfloat16(), -torch.rand(4096, 16), torch.randn(batch, 4096, 16)
    half = state.bfloat16()
    calls = {
        "scalar": (lambda: recur.step(q, k, v, scalar, state), state),
        "key-wise": (lambda: recur.step(q, k, v, a, state), state),
        "key-wise, bfloat16 state": (lambda: recur.step(q, k, v, a, half), half),
        "gated delta": (lambda: recur.step(q, k, v, scalar, state, beta=beta), state),
        "mamba": (lambda: recur.selective_step(x, rate, A, B, B, memory), memory),
        "longhorn": (lambda: recur.online_step(x, rate, B, B, memory), memory),
    }
    return {name: (call, memory.numel() * memory.element_size()) for name, (call, memory) in calls.items()}


def graphed(call: Callable[[], Tensor], times: int = 20) -> float:
    """Microseconds of one call among many in a CUDA graph."""
    call()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(times):
            call()
    spent = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        stop.record()
        stop.synchronize()
        spent.append(start.elapsed_time(stop) / times * 1e3)
    return sorted(spent)[len(spent) // 2]


def copied() -> float:
    """Bytes a second, read plus written."""
    from triton.testing import do_bench

    x, y = torch.empty(2, 2**31, dtype=torch.uint8)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median") * 1e3


def plans(name: str) -> list[kernels.Plan]:
    rows, tiles = (16, ((64, 4), (128, 4), (256, 4), (256, 8))) if name in ("mamba", "longhorn") else (128, MATRIX)
    return [kernels.Plan(rows, *tile) for tile in tiles]


MATRIX = ((8, 2), (8, 4), (16, 4), (32, 4), (32, 8), (64, 8))  # BLOCK_V, warps


def warm(name: str) -> str:
    """Compile what `time` runs."""
    call, _ = shapes(2)[name]
    call()
    for plan in plans(name):
        kernels.plan = lambda plan=plan, **sizes: plan
        call()
    return "compiled"


def time() -> bool:
    from triton.testing import do_bench

    names = list(shapes(1))
    with torch.multiprocessing.get_context("spawn").Pool(len(names)) as pool:
        pool.map(attempt, [(warm, (name,)) for name in names], chunksize=1)
    copy = copied()
    print(json.dumps({"copy GB/s": round(copy / 1e9)}), flush=True)
    shipped = kernels.plan
    for batch in (1, 64, 256):
        for name, (call, size) in shapes(batch).items():
            plain, graph = do_bench(call, warmup=5, rep=25, return_mode="median") * 1e3, graphed(call)
            floor, found = 2 * size / copy * 1e6, []
            for tile in plans(name):
                kernels.plan = lambda tile=tile, **sizes: tile
                found.append((round(graphed(call), 2), *tile[1:]))
                kernels.plan = shipped
            row = {"batch": batch, "step": name, "floor us": floor, "plain us": plain, "graph us": graph}
            row |= {"graph / floor": graph / floor, "plain / floor": plain / floor}
            row = {key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()}
            print(json.dumps(row | {"us, BLOCK_V, warps": sorted(found)}), flush=True)
    return True


if __name__ == "__main__":
    torch.set_default_device("cuda")
    sys.exit(not {"check": check, "time": time}[sys.argv[1]]())
