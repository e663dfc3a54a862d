"""What the trainer needs of a task: a model, batches that only a number decides, and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recur import Recipe
from recur.own import load
from recur.train.config import Settings
from recur.train.data import Batch
from recur.train.models import read_recipes

SPLITS = {"train": 0, "valid": 1, "test": 2}


@dataclass
class Task:
    """A task whose fields are its options. Subclasses say what differs.

    name, about, source: its name, what it tests, and where it was published.
    defaults: settings that differ from those of Settings.
    setups:   named sets of choices, such as a paper's.
    metrics:  what `score` sums besides the loss, and which of them is shown.
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    source: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {}
    setups: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    unit: ClassVar[str] = "nats"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def open(self, settings: Settings) -> None:
        """Take the settings and read or make the data.   Raises: InputError if there is none."""
        self.settings = settings

    def recipes(self, settings: Settings) -> list[Recipe]:
        return read_recipes(settings.recipe, load(settings.imports))

    def build(self, settings: Settings) -> nn.Module:
        """The model, freshly initialised."""
        raise NotImplementedError(f"{type(self).__name__}: a task must build a model: define build(settings)")

    def batch(self, split: str, index: int, rows: int) -> Batch:
        """Batch number `index` of `rows` rows; every entry has the rows first. Fewer rows end an evaluation's split."""
        raise NotImplementedError(f"{type(self).__name__}: a task must have data: define batch(split, index, rows)")

    def rows(self, split: str) -> int | None:
        """How many rows a split has; None if they are drawn without end."""
        return None

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The arguments of the model's call."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def weight(self, batch: Batch) -> int:
        """The number of predictions, by which the summed loss is divided."""
        return int((batch["labels"] != -100).sum())

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch: the loss, and each of `metrics`."""
        return cross_entropy_and_hits(outputs, batch["labels"])

    def tokens(self, batch: Batch) -> int:
        """Tokens read, for the speed."""
        return next(iter(batch.values())).shape[:2].numel()

    @property
    def finals(self) -> Sequence[str]:
        """Splits that are evaluated in full when training ends."""
        return ("valid",)

    def record(self) -> dict[str, Any]:
        """What a checkpoint must keep besides options and settings, such as a vocabulary; equal when resumed."""
        return {}

    def levels(self) -> dict[str, float]:
        """Losses to compare with, drawn as lines."""
        return {}

    def chance(self) -> float | None:
        """What a guess without the input reaches, of the first metric or else of the loss; None if unknown."""
        return None

    def epilogue(self, model: nn.Module) -> str:
        """What is printed when training is over."""
        return ""


def commonest(labels: Sequence[int] | np.ndarray) -> float:
    """The share of the commonest label: the accuracy of who always says it."""
    return float(np.bincount(np.asarray(labels)).max() / len(labels))


def cross_entropy_and_hits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of logits [... N] in float32, and how many most likely answers are right; -100 is not counted."""
    flat, wanted = logits.float().flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum")
    with torch.no_grad():
        hits = (flat.argmax(-1) == wanted).sum()
    return {"loss": loss, "accuracy": hits}


def part(batch: Batch, first: int, step: int, rows: int) -> Batch:
    """Every `step`-th row from `first` on, at most `rows` of them."""
    return {name: tensor[first::step][:rows] for name, tensor in batch.items()}
