"""Steps on a GPU: `python tests/gpu_step.py check`, `... graph`, `... time`.

check runs the laws of test_kernel_step.py there, bfloat16 states included; graph captures `model.step` of every preset
and of hybrids in a CUDA graph, whose replays must equal eager steps, and prints the launches a step takes; time prints
one JSON line a decode shape, the fastest tiles first. check and graph exit with 1 if anything is wrong.
"""

from __future__ import annotations

import itertools
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


def check() -> bool:
    import test_kernel_step as laws

    launches, original = [], kernel.step
    kernel.step = lambda rule, *args, **options: launches.append(rule) or original(rule, *args, **options)
    good = True
    for name, law in {**laws.LAWS, "drift": laws.test_a_bfloat16_state_drifts_little}.items():
        try:
            law()
            print("ok ", name, flush=True)
        except Exception as error:
            good = False
            print("BAD", name, f"{type(error).__name__}: {str(error)[:300]}", flush=True)
    print({rule: launches.count(rule) for rule in sorted(set(launches))})
    states = [torch.randn(2, 16, 128, 128) for _ in range(2)]
    states[1].copy_(states[0])
    q, a = torch.randn(2, 16, 128), -torch.rand(2, 16, 128)
    ys = [recur.step(q, q, q, a, state) for state in states]
    return good and len(launches) > 0 and torch.equal(*ys) and torch.equal(*states)


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


def graph() -> bool:
    """Twelve tokens eagerly and by replays of one capture, logits and states; under bfloat16 weights too."""
    good = True
    for (name, recipe), dtype in itertools.product(models().items(), (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        try:
            lm = LanguageModel(recipe, vocab_size=64, dim=256, depth=2, ffn="swiglu").to(dtype).eval()
            texts = torch.randint(64, (12, 2))
            eager, fresh = lm.init_state(2, max_len=16), lm.init_state(2, max_len=16)
            want = torch.stack([lm.step(ids, eager) for ids in texts])
            replayed, state = replay(lm, texts, fresh)
            same = torch.equal(replayed, want) and all(map(torch.equal, tensors(state), tensors(eager)))
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                lm.step(texts[0], eager)
            launches = sum(event.count for event in seen.key_averages())
            good &= same and bool(want.isfinite().all())
            print("ok " if same else "BAD", name, str(dtype)[6:], f"{launches} launches a step, 2 layers", flush=True)
        except Exception as error:
            good = False
            print("BAD", name, str(dtype)[6:], f"{type(error).__name__}: {str(error)[:300]}", flush=True)
    return good


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def replay(lm: LanguageModel, texts: Tensor, state: Any) -> tuple[Tensor, Any]:
    first, ids = [leaf.clone() for leaf in tensors(state)], texts[0].clone()
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
    for token in texts:
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
    for _ in range(30):
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


def time() -> bool:
    from triton.testing import do_bench

    copy = copied()
    print(json.dumps({"copy GB/s": round(copy / 1e9)}))
    shipped = kernels.plan
    for batch in (1, 64, 256):
        for name, (call, size) in shapes(batch).items():
            plain, graph = do_bench(call, warmup=10, rep=40, return_mode="median") * 1e3, graphed(call)
            floor, found = 2 * size / copy * 1e6, []
            for block_v, warps in itertools.product((4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8)):
                block_k = 16 if name in ("mamba", "longhorn") else 128
                if 512 <= block_k * block_v <= 8192 and 2 <= block_k * block_v // warps // 32 <= 64:
                    tile = kernels.Plan(block_k, block_v, warps)
                    kernels.plan = lambda tile=tile, **sizes: tile
                    found.append((round(graphed(call), 2), block_v, warps))
                    kernels.plan = shipped
            row = {"batch": batch, "step": name, "floor us": floor, "plain us": plain, "graph us": graph}
            row |= {"graph / floor": graph / floor, "plain / floor": plain / floor}
            row = {key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()}
            print(json.dumps(row | {"us, BLOCK_V, warps": sorted(found)[:5]}), flush=True)
    return True


if __name__ == "__main__":
    torch.set_default_device("cuda")
    sys.exit(not {"check": check, "graph": graph, "time": time}[sys.argv[1]]())
