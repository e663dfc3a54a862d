"""`generate` on a GPU by its graph: `python tests/gpu_generate.py [check | steps | time | time parts]`.

`check`: one line per recipe and way of sampling: by the graph, by the stream and by steps without a graph the tokens
must be the same. `steps`: logits and states of one kernel per layer against the parts one by one and the same in
float64, in three dtypes; many sequences of many tokens twice, which must agree bit for bit. `time` prints, for models
of 24 layers of 1024 channels in bfloat16, the milliseconds per token of `generate` as called beside those of its graph,
and the seconds of the first call; with `parts` where parts run one by one. Exits with 1 if two ways differ.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from itertools import pairwise
from typing import Any

import test_step_plan
import torch

from recur import LanguageModel, kernel, presets
from recur.blocks import generation

RECIPES: dict[str, Any] = {
    "gla": presets.gla(heads=2),
    "hgrn2": presets.hgrn2(heads=2),
    "retnet": presets.retnet(heads=2),
    "mamba": presets.mamba(),
    "mamba2": presets.mamba2(),
    "longhorn": presets.longhorn(),
    "rwkv": presets.rwkv(heads=2),
    "gated_delta_net": presets.gated_delta_net(heads=2),
    "mlstm": presets.mlstm(heads=2),
    "llama": presets.llama(heads=2),
    "hybrid": [presets.hgrn2(heads=2), presets.llama(heads=2)],
}
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}]


def check() -> bool:
    good = True
    ids, lengths = torch.randint(0, 256, (3, 40)), torch.tensor([40, 7, 21])
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        lm = LanguageModel(recipe, vocab_size=256, dim=128, depth=3)
        for options in SAMPLINGS:
            options = {**options, "seed": 5, "lengths": lengths, "eos": 3}
            with warnings.catch_warnings(record=True) as said:
                first, again = lm.generate(ids, 100, **options), lm.generate(ids, 100, **options)
            streamed = torch.stack(list(lm.stream(ids, 100, **options)), 1)
            captures, generation.has_graphs = generation.has_graphs, lambda device: False
            plain = lm.generate(ids, 100, **options)
            generation.has_graphs = captures
            new = torch.stack([row[n : n + streamed.shape[1]] for row, n in zip(plain, lengths, strict=True)]).cpu()
            same = torch.equal(first, again), torch.equal(first, plain), torch.equal(streamed, new)
            reasons = "; ".join(str(one.message) for one in said)
            print(f"{'good' if all(same) and not said else 'BAD '} {name} {options} {same} {reasons}", flush=True)
            good = good and all(same) and not said
    return good


def steps() -> bool:
    good = True
    for name, recipe in RECIPES.items():
        lm = test_step_plan.model(recipe, dim=256, depth=2)
        said = []
        try:
            for batch in (1, 3, 64):
                test_step_plan.same(lm, 40, torch.float32, torch.float16, torch.bfloat16, batch=batch)
            ids = torch.randint(7, (64, 200))
            runs = [test_step_plan.stepped(lm.bfloat16(), ids, True)[0] for _ in range(3)]
            assert all(torch.equal(run, runs[0]) for run in runs), "two runs differ"
        except AssertionError as error:
            said = [str(error)]
        print(f"{'BAD ' if said else 'good'} {name} {said}", flush=True)
        good = good and not said
    return good


def timed() -> bool:
    if sys.argv[2:] == ["parts"]:
        kernel.steps_fused = lambda x: False
    for name in ("gla", "hgrn2", "retnet", "gated_delta_net", "mamba2", "mamba", "longhorn", "llama"):
        recipe = getattr(presets, name)()
        deep, ffn = (48, None) if name in ("mamba2", "mamba", "longhorn") else (24, "swiglu")
        lm = LanguageModel(recipe, vocab_size=32000, dim=1024, depth=deep, ffn=ffn).bfloat16()
        for batch in (1, 64):
            ids, spent = torch.randint(0, 32000, (batch, 128)), []
            for new in (1, 257, 257, 257, 257):
                torch.cuda.synchronize()
                start = time.perf_counter()
                lm.generate(ids, new, temperature=0)
                torch.cuda.synchronize()
                spent.append(time.perf_counter() - start)
            loop = next(kept for kept in generation.Loop._kept[lm] if len(kept.token) == batch)  # the newest
            loop.at.zero_()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
            for event in events:
                event.record()
                loop.at.zero_()
                loop.graph.replay()
            torch.cuda.synchronize()
            graph = statistics.median(a.elapsed_time(b) for a, b in pairwise(events))
            called = statistics.median(spent[2:]) / 257 * 1e3
            print(
                f"{name} batch {batch}: {called:.3f} ms per token as called with its prompt, graph {graph:.3f} ms, "
                f"first call {spent[1]:.1f} s, peak {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB",
                flush=True,
            )
    return True


if __name__ == "__main__":
    torch.set_default_device("cuda")
    sys.exit(not {"check": check, "steps": steps, "time": timed}[(sys.argv[1:] or ["check"])[0]]())
