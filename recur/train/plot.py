"""The curves of runs, as numbers and as pictures."""

from __future__ import annotations

import csv
import json
import statistics
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # used alone it opens no window and keeps no global state

BLUE, ORANGE, GREY = "#2a6fbb", "#d1571f", "#6b6b6b"
COLORS = (BLUE, ORANGE, "#2f8f4e", "#8c4bb0", "#b3892d", "#c23b6b", "#3a9fa8", "#555555", "#7a5a3a", "#9aa83a")
# These have a colour each; other recipes have one of them too, with another line.
FIRST = ("longhorn", "mamba", "hgrn2", "gla", "gateloop", "retnet", "llama", "gss", "rwkv", "dense_retnet")
STYLES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (3, 5)),
)  # matplotlib's, and two of on and off
LEVELS = ("--", ":", "-.")
Point = Mapping[str, Any]


def write_history(out: Path, curve: Sequence[Point], finals: Mapping[str, Mapping[str, float]]) -> None:
    """curve.csv, one line per step (empty where nothing was measured); history.json with the final evaluations too."""
    names = list(dict.fromkeys(name for point in curve for name in point))
    with (out / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(curve)
    content = {"curve": list(curve), "final": {split: dict(values) for split, values in finals.items()}}
    (out / "history.json").write_text(json.dumps(content), encoding="utf-8")


def draw_curve(
    path: Path,
    curve: Sequence[Point],
    *,
    title: str,
    unit: str,
    metrics: Sequence[str],
    levels: Mapping[str, float],
    rows: int,
    chance: float | None = None,
    final: Mapping[str, float] | None = None,
) -> None:
    """Loss over steps (every batch, their running mean, validation, levels to compare with), below it each metric.

    Args:
        chance: drawn where the first metric is, or the loss if there is none.
        rows:   of the validation part, that the evaluations on the way are of.
        final:  the last evaluation, of all rows: a mark of its own.
    """
    steps = [point["step"] for point in curve]
    panels = 1 + len(metrics)
    figure = Figure(figsize=(9.6, 4.8 + 2.2 * len(metrics)), dpi=150, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[2, *[1] * len(metrics)])[:, 0]
    losses = [point["loss"] for point in curve]
    axes[0].plot(steps, losses, color=BLUE, alpha=0.2, linewidth=0.8)
    axes[0].plot(steps, running_mean(losses), color=BLUE, linewidth=1.8, label="training, running mean")
    for name, ax in zip(("loss", *metrics), axes, strict=True):
        measured = {p["step"]: p[f"valid_{name}"] for p in curve if f"valid_{name}" in p}
        if measured:
            label = f"validation, {rows} rows"
            ax.plot(list(measured), list(measured.values()), "o-", color=ORANGE, markersize=4, label=label)
        if final is not None:
            label = f"final validation {final[name]:.3f}"
            ax.plot(steps[-1], final[name], "D", color=ORANGE, markersize=7, clip_on=False, label=label)
        ax.set(ylabel=unit if name == "loss" else name, xlim=(0, steps[-1]), ylim=(0, None if name == "loss" else 1.02))
    for name, level in levels.items():
        _level(axes[0], name, level)
    if chance is not None and chance not in levels.values():
        _level(axes[min(1, len(metrics))], "chance", chance)
    for ax in axes:
        _frame(ax)
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    figure.savefig(path)


def draw_comparison(
    path: Path,
    runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool,
    chance: float | None = None,
) -> None:
    """One line per name: the mean of its runs (one per seed), the band from the least to the largest of them.

    A name is a recipe, or a recipe and a width, "gla, 64"; a recipe has the same colour in every picture.
    """
    figure = Figure(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for (name, curves), (color, style) in zip(runs.items(), looks(list(runs)), strict=True):
        at, low, middle, high = spread(curves)
        ax.plot(at, middle, style, color=color, linewidth=1.6, marker="o", markersize=3, label=name)
        ax.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    if log:
        _powers(ax, sorted({point[0] for curves in runs.values() for curve in curves for point in curve}))
    if chance is not None:
        _level(ax, "chance", chance)
    ax.set(xlabel=x, ylabel=y, title=title)
    _frame(ax)
    figure.savefig(path)


def looks(names: Sequence[str]) -> list[tuple[str, Any]]:
    """A colour and a line for each name. The colour is decided by the recipe's preset alone, whatever else is drawn.

    The line style separates what has the same colour: widths and options of a preset, and presets beyond `FIRST`.
    """
    from recur import presets

    order = [*FIRST, *(name for name in presets.names() if name not in FIRST)]
    made: list[tuple[str, Any]] = []
    for name in names:
        recipe, _, width = name.rpartition(", ")
        preset = (recipe if width.isdigit() else name).partition(":")[0]
        number = order.index(preset) if preset in order else zlib.crc32(preset.encode())
        color, first = COLORS[number % len(COLORS)], number // len(COLORS) if preset in order else 0
        free = [STYLES[(first + i) % len(STYLES)] for i in range(len(STYLES))]
        made.append((color, next((style for style in free if (color, style) not in made), free[0])))
    return made


def _level(ax: Axes, name: str, level: float) -> None:
    """A grey line, a style of its own for each level of these axes."""
    style = LEVELS[sum(line.get_color() == GREY for line in ax.lines) % len(LEVELS)]
    ax.axhline(level, color=GREY, linestyle=style, linewidth=1, label=f"{name} {level:.3g}")


def _frame(ax: Axes) -> None:
    """Axes on two sides; the legend beside them, where it hides nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)


def _powers(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def spread(
    curves: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(x, least, mean, largest) at the places that all curves have."""
    tables = [dict(curve) for curve in curves]
    at = sorted(set.intersection(*(set(table) for table in tables)))
    columns = [[table[x] for table in tables] for x in at]
    return at, [min(c) for c in columns], [statistics.fmean(c) for c in columns], [max(c) for c in columns]


def running_mean(losses: Sequence[float], *, keep: float = 0.95) -> list[float]:
    """Exponential mean m_t = keep m_{t-1} + (1 - keep) loss_t, divided by its weight so that it starts unbiased."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(total / weight)
    return means
