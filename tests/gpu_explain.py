"""`recur.explain` beside a profiler on a GPU: `python tests/gpu_explain.py [PART OF A NAME...]`.

One line per model: kernels of ours that the profiler saw and that were named, those of torch and operators, the peak.
Exits with 1 where a kernel of ours differs, where torch launched fewer kernels than 0.8 per operator, or where the peak
is more than a tenth off.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recur import LanguageModel
from recur.explain import explain

NAMES = (
    "gla:heads=4",
    "hgrn2:heads=8",
    "gated_delta_net",
    "retnet",
    "mamba2",
    "mamba",
    "longhorn",
    "gateloop",
    "llama",
)
BATCH, LENGTH = 4, 1024


def seen(run: Callable[[], Any]) -> Counter[str]:
    """Kernels on the device by name, copies and fills left out."""
    run()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return Counter(event.name for event in events if not event.name.startswith(("Memcpy", "Memset")))


def main(words: list[str]) -> int:
    failed = tried = 0
    for name in NAMES:
        if words and not any(word in name for word in words):
            continue
        tried += 1
        torch.manual_seed(0)
        model = LanguageModel(name, vocab_size=1000, dim=512, depth=2, ffn="swiglu").to("cuda", torch.bfloat16)
        ids = torch.randint(1000, (BATCH, LENGTH), device="cuda")

        def train(model: LanguageModel = model, ids: torch.Tensor = ids) -> None:
            model.zero_grad(set_to_none=True)
            model(ids, targets=ids).backward()

        found = explain(model, batch=BATCH, length=LENGTH)
        phases = [found.phase("forward"), found.phase("backward")]
        launches = seen(train)
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - found.memory["weights"] - ids.nbytes
        torch.cuda.reset_peak_memory_stats()
        train()
        peak = torch.cuda.max_memory_allocated() - before
        named: Counter[str] = Counter()
        for phase in phases:
            for kernel, count in phase.kernels.items():
                named[kernel.partition(".")[2]] += count
        own = Counter({k: n for k, n in ((k.lstrip("_"), n) for k, n in launches.items()) if k in named})
        torches = sum(launches.values()) - sum(own.values())
        operators = sum(phase.operators.total() for phase in phases)
        off = peak / found.memory["peak"] - 1
        good = own == named and torches >= 0.8 * operators and abs(off) < 0.1
        failed += not good
        print(
            f"{name:<18} ours {sum(own.values())} named {sum(named.values())}  torch {torches} operators {operators}  "
            f"peak {peak >> 20} MiB, {off:+.1%}  {'' if good else 'FAILED'} {dict((own - named) + (named - own))}"
        )
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
