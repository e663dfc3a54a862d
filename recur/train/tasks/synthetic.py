"""Tasks whose data a rule makes: recall, copying, state tracking, regression in context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recur.train.config import InputError, Settings, at_least_0, count, one_of, option, positive, share
from recur.train.data import Batch, generator
from recur.train.models import SequenceModel, language_model
from recur.train.task import SPLITS, Task


def tensors(**arrays: np.ndarray) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass
class MQAR(Task):
    """Multi-query associative recall: pairs k1 v1 k2 v2 ..., then queries k among filler, each to be answered by its v.

    Keys are tokens 1 .. V/2 - 1, values V/2 .. V - 1. Queries stand at 2n + 2g, gaps g drawn without replacement with
    p_g ~ (g + 1)^(gap_power - 1), so that a small one asks soon. Labels at the queries alone.
    """

    vocabulary: int = option(256, count, "tokens, half of them keys and half values")
    pairs: int = option(8, count, "pairs to remember; four tokens of --length each")
    gap_power: float = option(0.01, positive, "of the law of the gaps: 1 is uniform, less asks sooner")
    filler: str = option("zeros", one_of("zeros", "random"), "what stands between queries")

    name: ClassVar[str] = "mqar"
    about: ClassVar[str] = "Multi-query associative recall."
    source: ClassVar[str] = "Arora et al. 2023, arXiv:2312.04927"
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 2, "length": 64, "batch": 64, "steps": 2000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        f"zoology-{length}": {"vocabulary": 8192, "length": length, "pairs": pairs, "batch": batch, "dim": 128}
        | {"depth": 2, "ffn": "none", "norm": "layer", "steps": 64 * 100_000 // batch, "every": 100_000 // batch}
        | {"warmup": 0, "min_lr": 0.0, "clip": 0, "weight_decay": 0.1, "evaluate": 3000, "lr": 1e-3}
        for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
    }

    def open(self, settings: Settings) -> None:
        super().open(settings)
        if settings.length % 2 or self.vocabulary % 2:
            raise InputError(f"mqar: --length and --vocabulary must be even, got {settings.length}, {self.vocabulary}")
        if 4 * self.pairs > settings.length:
            raise InputError(f"mqar: --length must be at least 4 --pairs = {4 * self.pairs}, got {settings.length}")
        if self.pairs > self.vocabulary // 2 - 1:
            raise InputError(f"mqar: --vocabulary {self.vocabulary} has too few keys for --pairs {self.pairs}")

    def build(self, settings: Settings) -> nn.Module:
        return language_model(self.recipes(settings), settings, self.vocabulary)

    def chance(self) -> float:
        return 2 / self.vocabulary

    def batch(self, split: str, index: int, rows: int) -> Batch:
        seed = self.settings.seed if split == "train" else 0
        return tensors(**recall(self, self.settings.length, rows, generator(seed, SPLITS[split], index)))


def recall(task: MQAR, length: int, rows: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """ids and labels [rows, length]."""
    n, half = task.pairs, task.vocabulary // 2
    keys = _distinct(draw, rows, half - 1, n) + 1
    values = _distinct(draw, rows, half, n) + half
    gap = np.arange((length - 2 * n) // 2)
    law = (gap + 1.0) ** (task.gap_power - 1)
    gaps = _distinct(draw, rows, len(gap), n, law)
    ids, labels = np.zeros((rows, length), np.int64), np.full((rows, length), -100)
    ids[:, 0 : 2 * n : 2], ids[:, 1 : 2 * n : 2] = keys, values
    at = 2 * n + 2 * gaps
    np.put_along_axis(ids, at, keys, 1)
    np.put_along_axis(labels, at, values, 1)
    if task.filler == "random":
        ids = np.where(ids == 0, draw.integers(0, task.vocabulary, ids.shape), ids)
    return {"ids": ids, "labels": labels}


def _distinct(draw: np.random.Generator, rows: int, size: int, count: int, law: np.ndarray | None = None) -> np.ndarray:
    """[rows, count] of 0 .. size - 1 without replacement in a row, in the order of drawing, by `law` or evenly.

    The smallest of exponential times with rates p come in the order of draws without replacement.
    """
    times = draw.exponential(size=(rows, size))
    return np.argsort(times if law is None else times / law, 1)[:, :count]


@dataclass
class SelectiveCopying(Task):
    """Tokens stand among blanks; after --copies marks the model writes them in their order.

    Length + 2 copies symbols in all: the scattered tokens, then a mark for each to write.
    """

    vocabulary: int = option(16, count, "different tokens, one of them the blank and one the mark")
    copies: int = option(16, count, "tokens to remember")

    name: ClassVar[str] = "copying"
    about: ClassVar[str] = "Selective copying: remember tokens, forget the blanks between them."
    source: ClassVar[str] = "Gu & Dao 2023, arXiv:2312.00752 (there: length 4096, 16 tokens)"
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 2, "length": 128, "batch": 64, "steps": 2000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "mamba": {"length": 4096, "copies": 16, "vocabulary": 16, "dim": 64, "depth": 2, "steps": 400_000}
        | {"lr": 1e-4, "schedule": "constant", "warmup": 0, "batch": 64, "every": 10_000}
    }

    def open(self, settings: Settings) -> None:
        super().open(settings)
        if self.copies > settings.length or self.vocabulary < 3:
            raise InputError(
                f"copying: --copies must be at most --length and --vocabulary at least 3, "
                f"got {self.copies}, {settings.length}, {self.vocabulary}"
            )

    def build(self, settings: Settings) -> nn.Module:
        return language_model(self.recipes(settings), settings, self.vocabulary)

    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def batch(self, split: str, index: int, rows: int) -> Batch:
        draw = generator(self.settings.seed if split == "train" else 0, SPLITS[split], index)
        length, n = self.settings.length, self.copies
        tokens = draw.integers(2, self.vocabulary, (rows, n))  # 0 is the blank, 1 the mark
        ids = np.zeros((rows, length + n), np.int64)
        np.put_along_axis(ids, np.sort(_distinct(draw, rows, length, n), 1), tokens, 1)
        ids[:, length:] = 1
        labels = np.full(ids.shape, -100)
        labels[:, length:] = tokens
        return tensors(ids=ids, labels=labels)


@dataclass
class StateTracking(Task):
    """After every element of a group, their product so far: parity is the group of 2, S5 the 120 permutations of five.

    y_t = x_t y_{t-1}; a single linear recurrence with positive diagonal gates can do neither at every length.
    """

    group: str = option("parity", one_of("parity", "s3", "s4", "s5"), "whose elements are multiplied")
    factor: int = option(4, count, "longest final evaluation over --length")

    name: ClassVar[str] = "tracking"
    about: ClassVar[str] = "State tracking: the running product of group elements (parity, S5)."
    source: ClassVar[str] = "Merrill et al. 2024, arXiv:2404.08819; Grazzi et al. 2024, arXiv:2411.12537"
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 2, "length": 40, "batch": 64, "steps": 2000}

    def open(self, settings: Settings) -> None:
        super().open(settings)
        self._table = group_table(2 if self.group == "parity" else int(self.group[1:]))

    def build(self, settings: Settings) -> nn.Module:
        return language_model(self.recipes(settings), settings, len(self._table))

    def chance(self) -> float:
        return 1 / len(self._table)

    def batch(self, split: str, index: int, rows: int) -> Batch:
        times = int(split[:-1]) if split.endswith("x") else 1
        code = 2 + times if split.endswith("x") else SPLITS[split]
        draw = generator(self.settings.seed if split == "train" else 0, code, index)
        x = draw.integers(0, len(self._table), (rows, self.settings.length * times))
        y, state = np.empty_like(x), np.zeros(rows, np.int64)
        for t in range(x.shape[1]):
            state = self._table[x[:, t], state]
            y[:, t] = state
        return tensors(ids=x, labels=y)

    @property
    def finals(self) -> Sequence[str]:
        return [f"{2**i}x" for i in range(self.factor.bit_length()) if 2**i <= self.factor]


def group_table(n: int) -> np.ndarray:
    """[n!, n!] the products p after q of all permutations of n things; number 0 changes nothing."""
    elements = list(itertools.permutations(range(n)))
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(p[i] for i in q)] for q in elements] for p in elements])


@dataclass
class Regression(Task):
    """In-context linear regression: x_1 y_1 x_2 y_2 ..., y = w x (+ noise) with a w of its own in every row.

    Two tokens an example, [x 0] and [0 y]; at every x the model predicts its y. Loss: squared error / d.
    """

    features: int = option(8, count, "d, numbers in x")
    noise: float = option(0.0, at_least_0, "standard deviation of what is added to y")
    density: float = option(1.0, share, "share of features that w uses")

    name: ClassVar[str] = "regression"
    about: ClassVar[str] = "In-context linear regression."
    source: ClassVar[str] = "Garg et al. 2022, arXiv:2208.01066"
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 4, "length": 32, "batch": 64, "steps": 2000, "lr": 1e-3}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "garg": {"features": 20, "length": 82, "dim": 256, "depth": 12, "batch": 64, "steps": 500_000}
        | {"lr": 1e-4, "schedule": "constant", "every": 5000}
    }
    unit: ClassVar[str] = "squared error a feature"
    metrics: ClassVar[tuple[str, ...]] = ()

    def open(self, settings: Settings) -> None:
        super().open(settings)
        if settings.length % 2:
            raise InputError(f"regression: --length must be even, two tokens per example, got {settings.length}")

    def build(self, settings: Settings) -> nn.Module:
        return SequenceModel(self.recipes(settings), settings, inputs=self.features + 1, outputs=1, pool="token")

    def batch(self, split: str, index: int, rows: int) -> Batch:
        draw = generator(self.settings.seed if split == "train" else 0, SPLITS[split], index)
        n, d = self.settings.length // 2, self.features
        w = draw.standard_normal((rows, d, 1)) * (draw.random((rows, d, 1)) < self.density)
        x = draw.standard_normal((rows, n, d))
        y = x @ w + self.noise * draw.standard_normal((rows, n, 1))
        tokens = np.zeros((rows, 2 * n, d + 1), np.float32)
        tokens[:, 0::2, :d], tokens[:, 1::2, d:] = x, y
        return tensors(x=tokens, labels=y[..., 0].astype(np.float32))

    def weight(self, batch: Batch) -> int:
        return batch["labels"].numel()

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        gap = outputs[:, 0::2, 0].float() - batch["labels"]
        return {"loss": gap.square().sum() / self.features}

    def chance(self) -> float:
        """The squared error of 0, the mean of every answer."""
        return float(self.batch("valid", 0, 64)["labels"].double().square().mean()) / self.features

    def levels(self) -> dict[str, float]:
        """What least squares reaches on the examples before each (the least norm while they are too few)."""
        batch = self.batch("valid", 0, 64)
        x, y = batch["x"][:, 0::2, : self.features].double(), batch["labels"].double()
        errors = [y[:, :1].square().mean()]
        for t in range(1, x.shape[1]):
            w = torch.linalg.pinv(x[:, :t]) @ y[:, :t, None]
            errors.append((x[:, t : t + 1] @ w)[:, 0, 0].sub(y[:, t]).square().mean())
        return {"least squares": float(torch.stack([e.mean() for e in errors]).mean()) / self.features}
