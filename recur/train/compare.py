"""Recipes trained under the same conditions: data, size, schedule and seeds; with a table, plots and their order."""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recur.reading import InputError, read_json
from recur.train.config import Settings
from recur.train.models import solve_width, with_paper_depth
from recur.train.run import TASKS, configured, finish
from recur.train.task import Task
from recur.train.trainer import Training, fit, prepare
from recur.weights import parameter_count

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


class Guess(NamedTuple):
    """What a guess without the input reaches, None if unknown, and how many answers a final evaluation asks for."""

    chance: float | None
    answers: int


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
    feed-forward; a recipe without one gets twice as many. Every recipe is built at every size before the first is
    trained. A run that fails later is recorded and the rest go on. All numbers lie in results.json, which grows run by
    run; called again with the same choices, it makes what is not there yet.

    Raises: InputError naming the recipe and the size that cannot be built, or if `out` holds a comparison of other
        choices.
    """
    settings, made = configured(task, *layers)
    made.open(settings)
    sized = {
        (recipe, width): _sized(made, settings, recipe, parameters, width)
        for recipe in dict.fromkeys(recipes)
        for width in widths or (None,)
    }
    guess = Guess(made.chance(), _answers(made, settings))
    out.mkdir(parents=True, exist_ok=True)
    choices = {"task": task, "parameters": parameters, "choices": {k: v for layer in layers for k, v in layer.items()}}
    results = [result for result in _before(out, choices) if "error" not in result]
    there = {(result["recipe"], result["width"], result["seed"]) for result in results}
    for (recipe, width), chosen in sized.items():
        for seed in range(seeds):
            if (recipe, width, seed) in there:
                continue
            label = f"{recipe}{'' if width is None else f', width {width}'}, seed {seed}"
            began = time.perf_counter()
            result: dict[str, Any] = {"recipe": recipe, "seed": seed, "width": width}
            run = _started(task, replace(chosen, seed=seed), layers, out)
            try:
                result |= _trained(run)
            except Exception as error:  # recorded, and listed in the report: one failure must not cost the rest
                result["error"] = f"{type(error).__name__}: {error}"
            gc.collect()
            result["seconds"] = round(time.perf_counter() - began, 1)
            results.append(result)
            content = json.dumps({**choices, "runs": results})
            (out / "results.json").write_text(content, encoding="utf-8")
            report(f"{label}: {_short(result)}")
    order = {recipe: place for place, recipe in enumerate(recipes)}
    results.sort(key=lambda result: order.get(result["recipe"], len(order)))
    return write_report(task, results, guess, out)


def _before(out: Path, choices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that are in the folder already."""
    place = out / "results.json"
    if not place.exists():
        return []
    known = read_json(place)
    if not (isinstance(known, dict) and isinstance(runs := known.pop("runs", None), list)):
        raise InputError(f"{place} is not what recur compare writes: choose another --out")
    if known != json.loads(json.dumps(choices)):
        raise InputError(f"{out} holds a comparison of other choices: choose another --out")
    return list(runs)


def _sized(task: Task, settings: Settings, recipe: str, target: int | None, width: int | None) -> Settings:
    """The settings of a recipe's runs.   Raises: InputError if its model cannot be built so."""
    dim = settings.dim if width is None else width
    settings = replace(settings, recipe=recipe, dim=dim)
    settings = with_paper_depth(settings, task.recipes(settings))
    if target is not None:
        return solve_width(task, settings, target)
    with torch.device("meta"):
        task.build(settings)
    return settings


def _answers(task: Task, settings: Settings) -> int:
    """About how many answers the shown final evaluation has."""
    split = task.finals[0]
    return task.weight(task.batch(split, 0, 1)) * (task.rows(split) or settings.evaluate)


def _started(task: str, settings: Settings, layers: Sequence[Mapping[str, Any]], out: Path) -> Training:
    name = f"{settings.recipe}-{settings.dim}-{settings.seed}".replace(":", "-").replace("/", "-")
    shutil.rmtree(out / "runs" / name, ignore_errors=True)  # what a run that failed has left
    return prepare(configured(task, *layers)[1], settings, out / "runs" / name)


def _trained(run: Training) -> dict[str, Any]:
    """Train one, and what is recorded of it."""
    fit(run)
    finals, settings = finish(run), run.settings
    measured = [point for point in run.curve if any(name.startswith("valid_") for name in point)]
    return {
        "dim": settings.dim,
        "depth": settings.depth,
        "parameters": parameter_count(run.plain_model),
        "steps": run.step,
        "stopped": run.stopped,
        "valid": [[point["step"], {n: point[f"valid_{n}"] for n in ("loss", *run.task.metrics)}] for point in measured],
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


def write_report(task: str, results: Sequence[Mapping[str, Any]], guess: Guess, out: Path) -> str:
    """The table, the order and the papers' claims in Markdown; pictures beside it."""
    cls = TASKS[task]
    shown, better = (cls.metrics[0], max) if cls.metrics else ("loss", min)
    done = [result for result in results if "error" not in result]
    failed = [f"- {r['recipe']}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    lines = [f"# {task}: {shown}", ""]
    if done:
        lines += [*_table(done, shown), "", *_order(task, done, shown, better, guess), ""]
        _pictures(task, done, shown, guess.chance, out)
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


def _order(
    task: str, done: Sequence[Mapping[str, Any]], shown: str, better: Callable[..., Any], guess: Guess
) -> list[str]:
    """The order the recipes came in, for each width, and whether each paper's claim was seen; none among guesses."""
    lines = []
    for width in dict.fromkeys(result["width"] for result in done):
        values: dict[str, list[float]] = {}
        for result in done:
            if result["width"] == width:
                split = next(iter(result["final"]))
                values.setdefault(result["recipe"], []).append(result["final"][split][shown])
        ranked = sorted(values, key=lambda name: statistics.fmean(values[name]), reverse=better is max)
        bound = _best_guess(guess, better)
        guesses = [name for name in ranked if better(statistics.fmean(values[name]), bound) == bound]
        where = "" if width is None else f" at width {width}"
        learned = [f"{name} {statistics.fmean(values[name]):.4f}" for name in ranked if name not in guesses]
        if learned:
            lines += [f"Order by {shown}{where}, best first: {', '.join(learned)}.", ""]
        if guesses:
            lines += [f"No better than chance ({guess.chance:.4g}){where}: {', '.join(guesses)}.", ""]
        plain = {name.partition(":")[0]: name for name in ranked}
        for first, second, tasks, source in CLAIMS:
            if task in tasks.split() and first in plain and second in plain:
                both = {plain[first], plain[second]} <= set(guesses)
                seen = "both at chance" if both else _seen(values[plain[first]], values[plain[second]], better)
                lines.append(f"- {first} ahead of {second}{where} ({source}): {seen}.")
        lines.append("")
    return lines[:-1]


def _best_guess(guess: Guess, better: Callable[..., Any]) -> float:
    """The best that guessing reaches: chance plus three standard errors for an accuracy, 2% less for a loss."""
    chance = guess.chance
    if chance is None:
        return -math.inf if better is max else math.inf
    if better is min:
        return 0.98 * chance
    return chance + 3 * math.sqrt(chance * (1 - chance) / guess.answers)


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


def _pictures(task: str, done: Sequence[Mapping[str, Any]], shown: str, chance: float | None, out: Path) -> None:
    from recur.train.plot import draw_comparison

    cls = TASKS[task]
    label = cls.unit if shown == "loss" else shown
    curves: dict[str, list[Any]] = {}
    for (recipe, width), runs in _cells(done).items():
        name = recipe if width is None else f"{recipe}, {width}"
        curves[name] = [[(step, values[shown]) for step, values in run["valid"]] for run in runs]
    look: dict[str, Any] = {"title": f"{task}: validation", "x": "step", "y": label, "log": False, "chance": chance}
    draw_comparison(out / "curves.png", curves, **look)
    splits = [split for split in done[0]["final"] if split.endswith("x")]
    if splits:
        lengths = {
            name: [[(run["length"] * int(s[:-1]), run["final"][s][shown]) for s in splits] for run in runs]
            for (name, _), runs in _cells(done).items()
        }
        look = {"title": f"{task}: trained at {done[0]['length']}", "x": "tokens read at once", "y": label}
        draw_comparison(out / "lengths.png", lengths, **look, log=True, chance=chance)
    if done[0]["width"] is not None:
        by_width: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for result in done:
            split = next(iter(result["final"]))
            at = by_width.setdefault(result["recipe"], {}).setdefault(result["seed"], [])
            at.append((result["width"], result["final"][split][shown]))
        look = {"title": f"{task}: {shown} after training", "x": "width", "y": label, "log": True, "chance": chance}
        draw_comparison(out / "widths.png", {name: list(seeds.values()) for name, seeds in by_width.items()}, **look)
