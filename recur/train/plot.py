"""The curve of a run, as numbers and as a picture."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path

from matplotlib.figure import Figure  # used alone it opens no window and keeps no global state

from recur.train.settings import Point

BLUE, ORANGE, GREY = "#2a6fbb", "#d1571f", "#6b6b6b"


def write_curve(path: Path, curve: list[Point]) -> None:
    """One line a step: step, lr, train, validation (nats per character, empty where it was not measured)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)


def draw_curve(path: Path, curve: list[Point], *, title: str, unigram: float, bigram: float) -> None:
    """Loss over steps: every batch, their running mean, validation, and what counting alone reaches."""
    steps, losses = [point.step for point in curve], [point.train for point in curve]
    measured = [(point.step, point.validation) for point in curve if point.validation is not None]
    last = measured[-1][1]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=BLUE, alpha=0.2, linewidth=0.8)
    axes.plot(steps, running_mean(losses), color=BLUE, linewidth=1.8, label="training, running mean")
    axes.plot(*zip(*measured, strict=True), "o-", color=ORANGE, markersize=4, label=f"validation, at last {last:.2f}")
    for name, level in (("unigram", unigram), ("bigram", bigram)):
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} entropy {level:.2f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=9,
        )
    axes.set(xlabel="step", ylabel="nats per character", title=title, xlim=(0, steps[-1]), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path)


def running_mean(losses: list[float], *, keep: float = 0.95) -> list[float]:
    """Exponential mean m_t = keep m_{t-1} + (1 - keep) loss_t, divided by its weight so that it starts unbiased."""
    means, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(total / weight)
    return means
