"""Recipes trained alike: the same data, size, schedule and seeds; a table, pictures, and the order they came in."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recur.train.config import InputError, Settings, checked, known, resolved
from recur.train.models import parameters, solve_width, with_paper_depth
from recur.train.run import TASKS, finish
from recur.train.trainer import fit, prepare

# What papers say of two recipes on a task: the first one does better. Read off the abstracts; sizes there are larger.
CLAIMS = (
    ("longhorn", "mamba", "lm extrapolation", "Liu et al. 2024, arXiv:2407.14207"),
    ("longhorn", "gla", "lm", "Liu et al. 2024, arXiv:2407.14207"),
    ("longhorn", "mamba", "mqar", "Liu et al. 2024, arXiv:2407.14207"),
    ("longhorn", "gla", "mqar", "Liu et al. 2024, arXiv:2407.14207"),
    ("longhorn", "retnet", "mqar", "Liu et al. 2024, arXiv:2407.14207"),
    ("hgrn2", "mamba", "lm", "Qin et al. 2024, arXiv:2404.07904"),
    ("hgrn2", "retnet", "lm", "Qin et al. 2024, arXiv:2404.07904"),
    ("hgrn2", "hgrn", "lm mqar", "Qin et al. 2024, arXiv:2404.07904"),
    ("gla", "retnet", "lm mqar", "Yang et al. 2023, arXiv:2312.06635"),
    ("gateloop", "llama", "lm", "Katsch 2023, arXiv:2311.01927"),
    ("gateloop", "retnet", "lm", "Katsch 2023, arXiv:2311.01927"),
    ("dense_retnet", "retnet", "lm", "He et al. 2024, arXiv:2403.00818"),
    ("mamba", "llama", "lm extrapolation", "Gu & Dao 2023, arXiv:2312.00752"),
    ("llama", "mamba", "mqar", "Arora et al. 2023, arXiv:2312.04927"),
)


def compare(
    task: str,
    recipes: Sequence[str],
    layers: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    seeds: int = 1,
    parameters: int | None = None,
    widths: Sequence[int] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Train every recipe with every seed (and width), and return the report that `out/report.md` holds as well.

    With `parameters` the width of each recipe is solved for, to within a tenth. `depth` counts layers of a mixer and a
    feed-forward; a recipe without one gets twice as many. A run that fails is recorded and the rest go on. All numbers
    lie in results.json, which grows run by run; called again with the same choices, it makes what is not there yet.

    Raises: InputError if `out` holds a comparison of other choices.
    """
    out.mkdir(parents=True, exist_ok=True)
    choices = {"task": task, "parameters": parameters, "choices": {k: v for layer in layers for k, v in layer.items()}}
    results = [result for result in _before(out, choices) if "error" not in result]
    there = {(result["recipe"], result["width"], result["seed"]) for result in results}
    for recipe in recipes:
        for width in widths or (None,):
            for seed in range(seeds):
                if (recipe, width, seed) in there:
                    continue
                label = f"{recipe}{'' if width is None else f', width {width}'}, seed {seed}"
                began = time.perf_counter()
                try:
                    result = _one(task, recipe, layers, out, seed, parameters, width)
                except Exception as error:  # recorded, and told in the report: one failure must not cost the rest
                    result = {
                        "recipe": recipe,
                        "seed": seed,
                        "width": width,
                        "error": f"{type(error).__name__}: {error}",
                    }
                gc.collect()
                result["seconds"] = round(time.perf_counter() - began, 1)
                results.append(result)
                content = json.dumps({**choices, "runs": results})
                (out / "results.json").write_text(content, encoding="utf-8")
                report(f"{label}: {_short(result)}")
    order = {recipe: place for place, recipe in enumerate(recipes)}
    results.sort(key=lambda result: order.get(result["recipe"], len(order)))
    return _report(task, results, out)


def _before(out: Path, choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that are in the folder already."""
    if not (out / "results.json").exists():
        return []
    known = json.loads((out / "results.json").read_text(encoding="utf-8"))
    runs = known.pop("runs")
    if known != json.loads(json.dumps(choices)):
        raise InputError(f"{out} holds a comparison of other choices: choose another --out")
    return list(runs)


def _one(
    task: str,
    recipe: str,
    layers: Sequence[Mapping[str, Any]],
    out: Path,
    seed: int,
    target: int | None,
    width: int | None,
) -> dict[str, Any]:
    cls = TASKS[task]
    given = [checked(layer, known(Settings, cls), f"task {task}") for layer in (cls.defaults, *layers)]
    settings = replace(resolved(Settings, *given), recipe=recipe, seed=seed)
    settings, made = with_paper_depth(settings), resolved(cls, *given)
    if width is not None:
        settings = replace(settings, dim=width)
    if target is not None:
        made.open(settings)
        settings = solve_width(made, settings, target)
    name = f"{recipe}-{settings.dim}-{seed}".replace(":", "-").replace("/", "-")
    shutil.rmtree(out / "runs" / name, ignore_errors=True)  # what a run that failed has left
    run = prepare(made, settings, out / "runs" / name)
    fit(run)
    finals = finish(run)
    measured = [point for point in run.curve if any(name.startswith("valid_") for name in point)]
    return {
        "recipe": recipe,
        "seed": seed,
        "width": width,
        "dim": settings.dim,
        "depth": settings.depth,
        "parameters": parameters(run.plain_model),
        "steps": run.step,
        "stopped": run.stopped,
        "valid": [[point["step"], {n: point[f"valid_{n}"] for n in ("loss", *made.metrics)}] for point in measured],
        "train": [[point["step"], point["loss"]] for point in run.curve[:: max(1, len(run.curve) // 200)]],
        "final": finals,
        "length": settings.length,
        "tokens": run.step * settings.batch * settings.length,
    }


def _short(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return f"failed after {result['seconds']} s: {result['error']}"
    split, values = next(iter(result["final"].items()))
    found = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    size = f"{result['parameters']:,} parameters, width {result['dim']}, depth {result['depth']}"
    return f"{split} {found}; {size}, {result['steps']} steps, {result['seconds']} s"


def _report(task: str, results: Sequence[Mapping[str, Any]], out: Path) -> str:
    """The table, the order and the papers' claims in Markdown; pictures beside it."""
    cls = TASKS[task]
    shown, better = (cls.metrics[0], max) if cls.metrics else ("loss", min)
    done = [result for result in results if "error" not in result]
    failed = [f"- {r['recipe']}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    lines = [f"# {task}: {shown}", ""]
    if done:
        lines += [*_table(done, shown), "", *_order(task, done, shown, better), ""]
        _pictures(task, done, shown, out)
    if failed:
        lines += ["Failed:", "", *failed, ""]
    text = "\n".join(lines)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _cells(done: Sequence[Mapping[str, Any]]) -> dict[tuple[str, Any], list[Mapping[str, Any]]]:
    cells: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for result in done:
        cells.setdefault((result["recipe"], result["width"]), []).append(result)
    return cells


def _table(done: Sequence[Mapping[str, Any]], shown: str) -> list[str]:
    splits = list(dict.fromkeys(split for result in done for split in result["final"]))
    lines = [f"| recipe | parameters | width | layers | tokens | {' | '.join(splits)} | seconds |"]
    lines += ["|---" * (6 + len(splits)) + "|"]
    for (recipe, _), runs in _cells(done).items():
        values = [_spread([run["final"][split][shown] for run in runs]) for split in splits]
        first, took = runs[0], statistics.fmean(run["seconds"] for run in runs)
        read = f"{first['tokens']:,}" + (" (stopped)" if any(run["stopped"] for run in runs) else "")
        size = f"{first['parameters']:,} | {first['dim']} | {first['depth']} | {read}"
        lines.append(f"| {recipe} | {size} | {' | '.join(values)} | {took:.0f} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    """The mean, and the least and largest where there are several."""
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _order(task: str, done: Sequence[Mapping[str, Any]], shown: str, better: Callable[..., Any]) -> list[str]:
    """The order the recipes came in, for each width, and whether each paper's claim was seen."""
    lines = []
    for width in dict.fromkeys(result["width"] for result in done):
        values: dict[str, list[float]] = {}
        for result in done:
            if result["width"] == width:
                split = next(iter(result["final"]))
                values.setdefault(result["recipe"], []).append(result["final"][split][shown])
        ranked = sorted(values, key=lambda name: statistics.fmean(values[name]), reverse=better is max)
        where = "" if width is None else f" at width {width}"
        listed = ", ".join(f"{name} {statistics.fmean(values[name]):.4f}" for name in ranked)
        lines += [f"Order by {shown}{where}, best first: {listed}.", ""]
        plain = {name.partition(":")[0]: name for name in ranked}
        for first, second, tasks, source in CLAIMS:
            if task in tasks.split() and first in plain and second in plain:
                seen = _seen(values[plain[first]], values[plain[second]], better)
                lines.append(f"- {first} ahead of {second}{where} ({source}): {seen}.")
        lines.append("")
    return lines[:-1]


def _seen(first: Sequence[float], second: Sequence[float], better: Callable[..., Any]) -> str:
    """Whether the first runs are better than the second: beyond the spread of seeds, or by the mean alone."""
    if statistics.fmean(first) == statistics.fmean(second):
        return "equal here"
    ahead = better(statistics.fmean(first), statistics.fmean(second)) != statistics.fmean(second)
    worst, best = (min(first), max(second)) if better is max else (max(first), min(second))
    if ahead and len(first) > 1 and len(second) > 1:
        apart = worst > best if better is max else worst < best
        return "seen, with every seed" if apart else "seen in the mean, within the spread of seeds"
    return "seen" if ahead else "not seen"


def _pictures(task: str, done: Sequence[Mapping[str, Any]], shown: str, out: Path) -> None:
    from recur.train.plot import draw_comparison

    cls = TASKS[task]
    label = cls.unit if shown == "loss" else shown
    curves: dict[str, list[Any]] = {}
    for (recipe, width), runs in _cells(done).items():
        name = recipe if width is None else f"{recipe}, {width}"
        curves[name] = [[(step, values[shown]) for step, values in run["valid"]] for run in runs]
    look: dict[str, Any] = {"title": f"{task}: validation", "x": "step", "y": label, "log": False}
    draw_comparison(out / "curves.png", curves, **look)
    splits = [split for split in done[0]["final"] if split.endswith("x")]
    if splits:
        lengths = {
            name: [[(run["length"] * int(s[:-1]), run["final"][s][shown]) for s in splits] for run in runs]
            for (name, _), runs in _cells(done).items()
        }
        look = {"title": f"{task}: trained at {done[0]['length']}", "x": "tokens read at once", "y": label, "log": True}
        draw_comparison(out / "lengths.png", lengths, **look)
    if done[0]["width"] is not None:
        by_width: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for result in done:
            split = next(iter(result["final"]))
            at = by_width.setdefault(result["recipe"], {}).setdefault(result["seed"], [])
            at.append((result["width"], result["final"][split][shown]))
        look = {"title": f"{task}: {shown} after training", "x": "width", "y": label, "log": True}
        draw_comparison(out / "widths.png", {name: list(seeds.values()) for name, seeds in by_width.items()}, **look)
