"""A training step of whole language models on a GPU: tokens per second, launches, GPU time, peak memory.

    python benchmarks/models.py --check --out benchmarks/results
    python benchmarks/models.py --models gla mamba2 --compile layers

Models have 24 layers of 1024 channels (48 without feed-forward), bfloat16 weights, a vocabulary of 32,000 and a batch
of 8 x 2048 tokens, trained by fused AdamW. A step is timed on the host, the best of three runs of six steps; launches,
GPU time and the longest kernels are those of one forward and backward under torch's profiler; the peak is what torch
had allocated. flash-linear-attention's models are measured beside ours where it is installed. "layers" is a model whose
layers share one compiled graph (compile_layers), "compiled" one that is compiled whole. --check first runs
tests/gpu_glue.py, which compares the kernels around the scans with their formulas. Writes models.json and models.md to
--out after every model.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur import LanguageModel, presets

OURS: dict[str, Callable[[], Any]] = {
    "gla": lambda: presets.gla(heads=4),
    "hgrn2": lambda: presets.hgrn2(heads=8),
    "gated_delta_net": lambda: presets.gated_delta_net(heads=8),
    "gated_delta_net_wide": lambda: presets.gated_delta_net(heads=4),  # heads of 256 x 512, as fla's
    "retnet": lambda: presets.retnet(heads=4),
    "mamba2": presets.mamba2,
    "mamba": presets.mamba,
    "longhorn": presets.longhorn,
    "llama": lambda: presets.llama(heads=16),
}
ALONE = ("mamba2", "mamba", "longhorn")  # twice the layers, no feed-forward
PEERS = {"gla": "GLA", "hgrn2": "HGRN2", "gated_delta_net_wide": "GatedDeltaNet", "retnet": "RetNet"}
PEER_OPTIONS = {
    "gla": {"num_heads": 4},
    "hgrn2": {"num_heads": 8, "expand_ratio": 128},
    "gated_delta_net_wide": {"num_heads": 4, "head_dim": 256, "expand_v": 2},
    "retnet": {"num_heads": 4},
}


def ours(name: str, o: argparse.Namespace) -> LanguageModel:
    depth, ffn = (2 * o.layers, None) if name in ALONE else (o.layers, "swiglu")
    return LanguageModel(OURS[name](), vocab_size=o.vocabulary, dim=o.dim, depth=depth, ffn=ffn, tie=False)


def fla(name: str, o: argparse.Namespace) -> nn.Module:
    import fla.models
    import fla.ops.common.chunk_o as guard

    guard.TRITON_ABOVE_3_7_1 = True  # its refusal of Hopper's gated backward
    kind = PEERS[name]
    sizes = {"hidden_size": o.dim, "num_hidden_layers": o.layers, "vocab_size": o.vocabulary}
    config = getattr(fla.models, f"{kind}Config")(**sizes, **PEER_OPTIONS[name])
    model: nn.Module = getattr(fla.models, f"{kind}ForCausalLM")(config)
    return model


def measure(model: nn.Module, loss_of: Callable[[Tensor], Tensor], o: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and profile of training steps."""
    ids, gpu = torch.randint(o.vocabulary, (o.batch, o.length), device=o.device), o.device == "cuda"
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu)

    def step() -> Tensor:
        loss = loss_of(ids)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(steps: int) -> tuple[float, Tensor]:
        begin = time.perf_counter()
        losses = [step() for _ in range(steps)]
        loss = losses[-1].cpu()  # waits
        return (time.perf_counter() - begin) / steps, loss

    first, _ = timed(3)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = [timed(6 if gpu else 1) for _ in range(3)]
    seconds, loss = min(runs, key=lambda run: run[0])
    parameters = sum(p.numel() for p in model.parameters())
    record = {
        "parameters_m": round(parameters / 1e6, 1),
        "first_steps_s": round(3 * first, 1),
        "step_ms": round(1e3 * seconds, 2),
        "tokens_per_s": round(ids.numel() / seconds),
        "tflops": round(6 * parameters * ids.numel() / seconds / 1e12, 1),
        "loss": round(float(loss), 3),
    }
    if gpu:
        record["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        record |= profiled(lambda: loss_of(ids).backward())
    return record


def profiled(run: Callable[[], None]) -> dict[str, Any]:
    """Launches and GPU time of one run, and its longest kernels: name, launches, ms."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = [event for event in kernels if event.self_device_time_total > 0]
    top = [[event.key[:80], event.count, round(event.self_device_time_total / 1e3, 3)] for event in kernels[:25]]
    total = sum(event.self_device_time_total for event in kernels)
    return {"launches": sum(event.count for event in kernels), "gpu_ms": round(total / 1e3, 2), "kernels": top}


def record_of(name: str, what: str, o: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if o.device == "cuda" else torch.float32
    try:
        with torch.device(o.device):
            model = (fla if what == "fla" else ours)(name, o)
        model = model.to(dtype).train()
        if what == "fla":
            return {"model": name, "what": what, **measure(model, lambda ids: model(input_ids=ids, labels=ids).loss, o)}
        torch.compiler.reset()  # each starts as a process of its own would
        if what == "layers":
            model.compile_layers()
        loss_of = torch.compile(model.loss) if what == "compiled" else model.loss
        return {"model": name, "what": what, **measure(model, loss_of, o)}
    except Exception as failure:
        return {"model": name, "what": what, "failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    finally:
        model = loss_of = None
        gc.collect()
        if o.device == "cuda":
            torch.cuda.empty_cache()


def table(found: dict[str, Any]) -> str:
    columns = {"parameters_m": "parameters M", "tokens_per_s": "tokens/s", "step_ms": "step ms", "gpu_ms": "GPU ms"}
    columns |= {"launches": "launches", "peak_mib": "peak MiB", "tflops": "TFLOP/s", "first_steps_s": "first 3 steps s"}
    lines = [f"{found['device']}, torch {found['torch']}; {found['sizes']}", ""]
    lines += [f"| model | what | {' | '.join(columns.values())} |", "|---|---" + "|--:" * len(columns) + "|"]
    for r in found["records"]:
        cells = (
            [str(r.get(name, "")) for name in columns] if "failed" not in r else [r["failed"][:80].replace("|", "/")]
        )
        lines.append(f"| {r['model']} | {r['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=OURS, default=list(OURS), metavar="NAME")
    parser.add_argument("--what", nargs="+", choices=("recur", "layers", "compiled", "fla"), default=["recur", "fla"])
    parser.add_argument("--compile", choices=("layers", "whole"), help="instead of --what: eager, then compiled so")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, number in (("batch", 8), ("length", 2048), ("dim", 1024), ("layers", 24), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--check", action="store_true", help="run tests/gpu_glue.py first")
    parser.add_argument("--out", type=Path, help="folder for models.json and models.md")
    o = parser.parse_args()
    if o.compile is not None:
        o.what = ["recur", "layers" if o.compile == "layers" else "compiled"]
    return o


def main() -> int:
    o, begin = options(), time.time()
    failed = 0
    if o.check:
        script = Path(__file__).parents[1] / "tests" / "gpu_glue.py"
        failed = subprocess.run([sys.executable, script], cwd=script.parent, check=False).returncode
    name = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    sizes = f"{o.batch} x {o.length} tokens, D = {o.dim}, {o.layers} layers, vocabulary {o.vocabulary}"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "sizes": sizes, "records": []}
    for model in o.models:
        for what in o.what:
            if time.time() - begin > o.seconds or (what == "fla" and (model not in PEERS or find_spec("fla") is None)):
                continue
            found["records"].append(record_of(model, what, o))
            print(json.dumps(found["records"][-1]), flush=True)
            if o.out is not None:
                o.out.mkdir(parents=True, exist_ok=True)
                (o.out / "models.json").write_text(json.dumps(found, indent=1))
                (o.out / "models.md").write_text(table(found))
    print(table(found))
    return failed


if __name__ == "__main__":
    sys.exit(main())
