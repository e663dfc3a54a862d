"""A training step of whole language models on a GPU: tokens per second, launches, GPU time, peak memory.

    python benchmarks/models.py --check --out benchmarks/results
    python benchmarks/models.py --models gla mamba2 --compile layers
    python benchmarks/models.py --models gla gated_delta_net_wide --dim 2048  # 1.3B

Models have 24 layers of 1024 channels (48 without feed-forward), bfloat16 weights, a vocabulary of 32,000 and a batch
of 8 x 2048 tokens, trained by fused AdamW. A step is timed on the host, the best of three runs of six steps; launches,
GPU time and the longest kernels are those of one forward and backward under torch's profiler; the peak is what torch
had allocated; MFU is 6 N FLOPs per token against the card's dense peak in bfloat16. flash-linear-attention's models are
measured beside ours where it is installed, with few candidates for its autotuner. "layers" is a model whose layers
share one compiled graph (compile_layers), "compiled" one that is compiled whole, "autocast" one with float32 weights
under autocast, "fla_autocast" the peer so.

Every model has a process of its own, which has --model-seconds; what it has measured by then is kept. --check first
runs tests/gpu_glue.py, which compares the kernels around the scans with their formulas. Writes models.json, models.md
and models.png to --out after every measurement, beside what these files hold of other models and sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from gpu import fewer_candidates
from torch import Tensor, nn

from recur import LanguageModel, presets

OURS: dict[str, Callable[[int], Any]] = {  # of D: the sizes of heads stay
    "gla": lambda D: presets.gla(heads=4),
    "hgrn2": lambda D: presets.hgrn2(heads=heads(D, 128)),
    "retnet": lambda D: presets.retnet(heads=heads(D, 256)),
    "dense_retnet": lambda D: presets.dense_retnet(),
    "gated_delta_net": lambda D: presets.gated_delta_net(heads=heads(D, 128)),
    "gated_delta_net_wide": lambda D: presets.gated_delta_net(heads=heads(D, 256)),  # of 256 x 512, as fla's
    "mamba2": lambda D: presets.mamba2(),
    "mamba": lambda D: presets.mamba(),
    "longhorn": lambda D: presets.longhorn(),
    "gateloop": lambda D: presets.gateloop(),
    "llama": lambda D: presets.llama(heads=heads(D, 64)),
}
ALONE = {"mamba2": 2.0, "mamba": 2.0, "longhorn": 2.0, "dense_retnet": 1.75}  # times the layers, no feed-forward
PEERS: dict[str, tuple[str, Callable[[int], dict[str, int]]]] = {
    "gla": ("GLA", lambda D: {"num_heads": 4}),
    "hgrn2": ("HGRN2", lambda D: {"num_heads": heads(D, 128), "expand_ratio": 128}),
    "retnet": ("RetNet", lambda D: {"num_heads": heads(D, 256)}),
    "gated_delta_net_wide": ("GatedDeltaNet", lambda D: {"num_heads": heads(D, 256), "head_dim": 256, "expand_v": 2}),
    "llama": ("Transformer", lambda D: {"num_heads": heads(D, 64)}),
}
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s in bfloat16, dense
WHATS = ("recur", "layers", "compiled", "autocast", "fla", "fla_autocast")


def heads(D: int, size: int) -> int:
    return max(1, D // size)


def ours(name: str, o: argparse.Namespace) -> LanguageModel:
    depth, ffn = (round(ALONE[name] * o.layers), None) if name in ALONE else (o.layers, "swiglu")
    return LanguageModel(OURS[name](o.dim), vocab_size=o.vocabulary, dim=o.dim, depth=depth, ffn=ffn, tie=False)


def fla(name: str, o: argparse.Namespace) -> nn.Module:
    import fla.models
    import fla.ops.common.chunk_o as guard

    guard.TRITON_ABOVE_3_7_1 = True  # its refusal of Hopper's gated backward
    fewer_candidates(4)
    kind, options = PEERS[name]
    sizes = {"hidden_size": o.dim, "num_hidden_layers": o.layers, "vocab_size": o.vocabulary}
    config = getattr(fla.models, f"{kind}Config")(**sizes, **options(o.dim))
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
        "tflops": round(tflops := 6 * parameters * ids.numel() / seconds / 1e12, 1),
        "loss": round(float(loss), 3),
    }
    if gpu:
        peak = next((peak for card, peak in PEAK.items() if card in torch.cuda.get_device_name()), None)
        record["mfu"] = None if peak is None else round(100 * tflops / peak, 1)
        record["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)

        def passes() -> None:
            loss_of(ids).backward()
            optimiser.zero_grad(set_to_none=True)  # or the next gradients are added to these

        record |= profiled(passes)
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
    record = {"model": name, "what": what, "dim": o.dim, "layers": o.layers, "batch": o.batch, "length": o.length}
    wide = what.endswith("autocast") or o.device != "cuda"
    loss_of: Callable[[Tensor], Tensor]
    try:
        with torch.device(o.device):
            model = (fla if what.startswith("fla") else ours)(name, o)
        model = model.to(torch.float32 if wide else torch.bfloat16).train()
        torch.compiler.reset()  # each starts as a process of its own would
        if what.startswith("fla"):
            loss_of = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
        else:
            if what == "layers":
                model.compile_layers()
            loss_of = torch.compile(model.loss) if what == "compiled" else model.loss
        run = loss_of

        def autocast(ids: Tensor) -> Tensor:
            with torch.autocast(o.device, torch.bfloat16):
                return run(ids)

        return record | measure(model, autocast if what.endswith("autocast") else run, o)
    except Exception as failure:
        return record | {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    finally:
        model = loss_of = run = None  # type: ignore[assignment]
        gc.collect()
        if o.device == "cuda":
            torch.cuda.empty_cache()


def table(found: dict[str, Any]) -> str:
    columns = {"dim": "D", "parameters_m": "parameters M", "tokens_per_s": "tokens/s", "mfu": "MFU %"}
    columns |= {"step_ms": "step ms", "gpu_ms": "GPU ms", "launches": "launches", "peak_mib": "peak MiB"}
    columns |= {"tflops": "TFLOP/s", "first_steps_s": "first 3 steps s"}
    lines = [f"{found['device']}, torch {found['torch']}; {found['sizes']}", ""]
    lines += [f"| model | what | {' | '.join(columns.values())} |", "|---|---" + "|--:" * len(columns) + "|"]
    for r in found["records"]:
        cells = (
            [str(r.get(name, "")) for name in columns] if "failed" not in r else [r["failed"][:80].replace("|", "/")]
        )
        lines.append(f"| {r['model']} | {r['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Tokens per second, a row per model and width, a bar for each way to run it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if "tokens_per_s" in r]
    rows = list(dict.fromkeys((r["model"], r["dim"]) for r in records))
    whats = [what for what in WHATS if any(r["what"] == what for r in records)]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.2), layout="constrained")
    for i, what in enumerate(whats):
        mine = [(rows.index((r["model"], r["dim"])), r["tokens_per_s"]) for r in records if r["what"] == what]
        at = [row + 0.8 * (i / len(whats) - 0.5) for row, _ in mine]
        axes.barh(at, [speed for _, speed in mine], 0.8 / len(whats), label=what, align="edge")
    axes.set_yticks(range(len(rows)), [f"{model}, D = {dim}" for model, dim in rows])
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second of a training step")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(whats), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=OURS, default=list(OURS), metavar="NAME")
    parser.add_argument("--what", nargs="+", choices=WHATS, default=["recur", "fla"])
    parser.add_argument("--compile", choices=("layers", "whole"), help="instead of --what: eager, then compiled so")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, number in (("batch", 8), ("length", 2048), ("dim", 1024), ("layers", 24), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after so long")
    parser.add_argument("--model-seconds", type=float, default=240, help="end a model after so long")
    parser.add_argument("--check", action="store_true", help="run tests/gpu_glue.py first")
    parser.add_argument("--out", type=Path, help="folder for models.json, models.md and models.png")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print records alone")
    o = parser.parse_args()
    if o.compile is not None:
        o.what = ["recur", "layers" if o.compile == "layers" else "compiled"]
    return o


def there(name: str, what: str) -> bool:
    return not what.startswith("fla") or (name in PEERS and find_spec("fla") is not None)


def measured(model: str, o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of a model, as a process of its own prints them."""
    sizes = ("device", "batch", "length", "dim", "layers", "vocabulary")
    given = [word for name in sizes for word in (f"--{name}", str(getattr(o, name)))]
    command = [sys.executable, __file__, "--here", "--models", model, "--what", *o.what, *given]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = Timer(o.model_seconds, process.kill)
    timer.start()
    seen = set()
    for line in process.stdout or ():
        if line.startswith("{"):
            record = json.loads(line)
            seen.add(record["what"])
            yield record
    timer.cancel()
    if process.wait() != 0:
        for what in (what for what in o.what if there(model, what) and what not in seen):
            failed = f"the process ended with {process.returncode}; it has {o.model_seconds:.0f} s"
            yield {"model": model, "what": what, "dim": o.dim, "layers": o.layers, "failed": failed}


def write(out: Path, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "models.md").write_text(table(found))
    draw(out / "models.png", found["records"])


def earlier(o: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What --out holds that was measured on the same card with the same torch and vocabulary."""
    path = None if o.out is None else o.out / "models.json"
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    same = all(before.get(key) == found[key] for key in ("device", "torch", "sizes"))
    return [r for r in before["records"] if "dim" in r] if same else []


def main() -> int:
    o, begin = options(), time.time()
    if o.here:
        for model in o.models:
            for what in (what for what in o.what if there(model, what)):
                print(json.dumps(record_of(model, what, o)), flush=True)
        return 0
    failed = 0
    if o.check:
        script = Path(__file__).parents[1] / "tests" / "gpu_glue.py"
        failed = subprocess.run([sys.executable, script], cwd=script.parent, check=False).returncode
    name = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    sizes = f"{o.batch} x {o.length} tokens, {o.layers} layers, vocabulary {o.vocabulary}"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "sizes": sizes}
    records = {(r["model"], r["what"], r["dim"]): r for r in earlier(o, found)}
    for model in o.models:
        if time.time() - begin > o.seconds:
            break
        for record in measured(model, o):
            print(json.dumps(record), flush=True)
            records[model, record["what"], o.dim] = record
            found["records"] = list(records.values())
            if o.out is not None:
                write(o.out, found)
    print(table({"records": [], **found}))
    return failed


if __name__ == "__main__":
    sys.exit(main())
