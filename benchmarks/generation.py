"""Tokens per second against batch and context, and the memory of a sequence, for recurrences beside softmax attention.

    python benchmarks/generation.py                                  # small, on a CPU: a few minutes
    python benchmarks/generation.py --device cuda --dim 1024 --depth 12 --contexts 1024 8192 65536 --batches 1 16 128

Every model has the same width, depth and feed-forward. A context of random tokens is read in pieces of 512, then tokens
are generated greedily, each by one `model.step`; the median over `--tokens` of them is reported. Attention gets a cache
of exactly the length it needs (`init_state(max_len=...)`). On a GPU a step is replayed from a CUDA graph; on a CPU it
runs on one thread, and its processor time is taken, which other programs do not disturb.
Writes benchmarks/results/generation_DEVICE.json, .md and .png. Needs matplotlib and tqdm (extra `train`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from recur import LanguageModel, presets
from recur.blocks import nbytes

matplotlib.use("agg")
RESULTS = Path(__file__).parent / "results"
MODELS = {
    "llama (softmax attention)": presets.llama(heads=4),
    "longhorn": presets.longhorn(),
    "mamba": presets.mamba(),
    "hgrn2": presets.hgrn2(heads=4),
    "gla": presets.gla(heads=4),
    "longhorn, 1 in 4 attention": [*[presets.longhorn()] * 3, presets.llama(heads=4)],
}


@dataclass(frozen=True)
class Point:
    """One measurement: ms for a token of every sequence of the batch, and the bytes of one sequence's state."""

    model: str
    batch: int
    context: int
    step_ms: float
    state_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.batch / self.step_ms


@torch.no_grad()
def read(model: LanguageModel, batch: int, context: int, tokens: int) -> object:
    """The state after `context` random tokens, with room for `tokens` more."""
    device = model.embedding.weight.device
    ids = torch.randint(model.vocab_size, (1, context), device=device).expand(batch, -1)
    state = model.init_state(batch, max_len=context + tokens)
    for piece in ids.split(512, dim=1):
        _, state = model(piece, state, return_state=True)
    return state


def measure(name: str, model: LanguageModel, batch: int, context: int, tokens: int) -> Point:
    state = read(model, batch, context, tokens + 3)  # three warm up
    token = torch.zeros(batch, dtype=torch.long, device=model.embedding.weight.device)

    def step() -> None:
        token.copy_(model.step(token, state).argmax(-1))

    clock = graphed if token.is_cuda else timed
    median = statistics.median(clock(step, tokens))
    return Point(name, batch, context, median, nbytes(state) // batch)


def timed(step: Callable[[], None], tokens: int) -> list[float]:
    times = []
    for _ in range(tokens + 3):
        started = time.process_time()
        step()
        times.append(1000 * (time.process_time() - started))
    return times[3:]


def graphed(step: Callable[[], None], tokens: int) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(tokens + 1)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def table(points: list[Point], batches: list[int], contexts: list[int]) -> str:
    """Markdown: tokens per second at the first batch by context, at the first context by batch, and bytes."""
    lines = []
    for title, column, values, unit in (
        (f"Tokens a second, batch {batches[0]}, by context", "context", contexts, "tokens_per_second"),
        (f"Tokens a second, context {contexts[0]:,}, by batch", "batch", batches, "tokens_per_second"),
        ("KiB of state per sequence, by context", "context", contexts, "kib"),
    ):
        lines += [
            f"\n## {title}\n",
            f"| model | {' | '.join(f'{value:,}' for value in values)} |",
            "|---" * (len(values) + 1) + "|",
        ]
        fixed = ("batch", batches[0]) if column == "context" else ("context", contexts[0])
        for name in MODELS:
            row = {getattr(p, column): p for p in points if p.model == name and getattr(p, fixed[0]) == fixed[1]}
            cells = [_cell(row[value], unit) if value in row else "" for value in values]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(point: Point, unit: str) -> str:
    value = point.state_bytes / 1024 if unit == "kib" else point.tokens_per_second
    return f"{value:,.0f}"


def draw(points: list[Point], batches: list[int], contexts: list[int], title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, (speed, wide, memory) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for number, name in enumerate(MODELS):
        style = {
            "marker": "o",
            "markersize": 9 - number,
            "color": f"C{number}",
            "linestyle": "--" if "attention" in name else "-",
        }
        along = [p for p in points if p.model == name and p.batch == batches[0]]
        across = [p for p in points if p.model == name and p.context == contexts[0]]
        speed.plot([p.context for p in along], [p.tokens_per_second for p in along], label=name, **style)
        wide.plot([p.batch for p in across], [p.tokens_per_second for p in across], **style)
        memory.plot([p.context for p in along], [p.state_bytes / 2**20 for p in along], **style)
    for axis, heading, x, y in (
        (speed, f"speed by context, batch {batches[0]}", "tokens read before", "tokens/s"),
        (wide, f"speed by batch, context {contexts[0]:,}", "sequences at once", "tokens/s"),
        (memory, "memory of one sequence", "tokens read before", "MiB"),
    ):
        axis.set(title=heading, xlabel=x, ylabel=y, xscale="log", yscale="linear" if axis is speed else "log")
        ticks = batches if axis is wide else contexts
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=len(MODELS), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600, help="start no further measurement after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)  # steps are small: more threads mostly wait for each other
    started, points = time.perf_counter(), []
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pairs = [(options.batches[0], context) for context in options.contexts]
    pairs += [(batch, options.contexts[0]) for batch in options.batches[1:]]
    for name, recipe in tqdm(MODELS.items(), unit="model"):
        torch.manual_seed(0)
        sizes = {"vocab_size": 1024, "dim": options.dim, "depth": options.depth, "ffn": "swiglu"}
        model = LanguageModel(recipe, **sizes).to(options.device, dtype).eval()
        for batch, context in pairs:
            if time.perf_counter() - started < options.seconds:
                points.append(measure(name, model, batch, context, options.tokens))
    kind = platform.processor() or platform.machine()
    where = kind + ", 1 thread" if options.device == "cpu" else torch.cuda.get_device_name()
    title = f"Generation: {options.depth} layers of width {options.dim}, {str(dtype).removeprefix('torch.')}, {where}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"generation_{options.device}"
    record = {"title": title, "torch": torch.__version__, "points": [asdict(point) for point in points]}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"# {title}\n{table(points, options.batches, options.contexts)}"
    stem.with_suffix(".md").write_text(text)
    draw(points, options.batches, options.contexts, title, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
