"""Images as sequences of pixels, row by row; recipes that take a grid are given its sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from recur.reading import InputError, one_line
from recur.train.config import Settings, one_of, option, path, whole
from recur.train.data import Batch, generator
from recur.train.models import SequenceModel
from recur.train.task import SPLITS, Task, commonest

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Pictures:
    """Pixels [n, H, W, C] as bytes, and labels [n]."""

    pixels: np.ndarray
    labels: np.ndarray


class PictureTask(Task):
    """Classify pictures that `read` finds; a tenth for validation and a tenth for the test if the data do not say."""

    names = 0

    def read(self, settings: Settings) -> dict[str, Pictures]:
        """The parts train, valid and test."""
        raise NotImplementedError(f"{type(self).__name__}: a task must have pictures: define read(settings)")

    def open(self, settings: Settings) -> None:
        super().open(settings)
        self._parts = self.read(settings)
        if empty := [name for name, part in self._parts.items() if not len(part.labels)]:
            raise InputError(f"{self.name}: the {' and '.join(empty)} part must have pictures, got none")
        self._classes = int(max(part.labels.max() for part in self._parts.values())) + 1
        pixels = self._parts["train"].pixels.reshape(-1, self._parts["train"].pixels.shape[-1]) / 255
        self._mean, self._std = pixels.mean(0), pixels.std(0) + 1e-6

    def build(self, settings: Settings) -> nn.Module:
        channels = self._parts["train"].pixels.shape[-1]
        return SequenceModel(self.recipes(settings), settings, inputs=channels, outputs=self._classes)

    def batch(self, split: str, index: int, rows: int) -> Batch:
        part = self._parts[split]
        if split == "train":
            at = generator(self.settings.seed, SPLITS[split], index).integers(0, len(part.labels), rows)
        else:
            first = index * self.settings.batch
            at = np.arange(first, min(first + rows, len(part.labels)))
        pixels = (part.pixels[at] / 255 - self._mean) / self._std
        x = torch.from_numpy(pixels.astype(np.float32)).flatten(1, 2)
        return {"x": x, "labels": torch.from_numpy(part.labels[at].astype(np.int64))}

    def rows(self, split: str) -> int | None:
        return None if split == "train" else len(self._parts[split].labels)

    def chance(self) -> float:
        return commonest(self._parts["valid"].labels)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"x": batch["x"], "grid": tuple(self._parts["train"].pixels.shape[1:3])}

    @property
    def finals(self) -> Sequence[str]:
        return ("valid", "test")


@dataclass
class Images(PictureTask):
    """Sequential image classification: one pixel per token, one class per picture."""

    data: str | None = option(
        None, path, "a folder with one folder of pictures per class (scikit-learn's 8 x 8 digits)"
    )
    side: int = option(0, whole(0, 4097), "pictures are scaled to squares of this side; 0 keeps their size")
    color: str = option("grey", one_of("grey", "rgb"), "channels of a pixel")

    name: ClassVar[str] = "images"
    about: ClassVar[str] = "Sequential image classification: pixels row by row."
    source: ClassVar[str] = "Le et al. 2015, arXiv:1504.00941 (there: MNIST)"
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 2, "batch": 64, "steps": 1000}

    def read(self, settings: Settings) -> dict[str, Pictures]:
        return split_three(digits() if self.data is None else folder(Path(self.data), self.side, self.color))


def digits() -> Pictures:
    """1,797 handwritten digits of 8 x 8 pixels in 17 greys, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Pictures((found.images[..., None] * 255 / 16).astype(np.uint8), found.target)


def folder(place: Path, side: int, color: str) -> Pictures:
    """All pictures of a folder whose subfolders are the classes, in the order of their names."""
    classes = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted(file for file in (place / name).iterdir() if file.suffix.lower() in SUFFIXES):
            with opened(file) as image:
                converted = image.convert("L" if color == "grey" else "RGB")
                scaled = converted.resize((side, side)) if side else converted
                pixels.append(np.atleast_3d(np.asarray(scaled)))
                labels.append(label)
    shapes = {array.shape for array in pixels}
    if not pixels:
        raise InputError(f"{place} must hold one folder of pictures per class, got none")
    if len(shapes) > 1:
        raise InputError(f"{place} holds pictures of {len(shapes)} sizes: scale them with --side")
    return Pictures(np.stack(pixels), np.asarray(labels))


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A picture.   Raises: InputError if the file holds none that can be read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} must hold a picture: {one_line(error)}") from error


def split_three(pictures: Pictures) -> dict[str, Pictures]:
    """Eight tenths to learn from, a tenth to validate, a tenth to test, drawn with seed 42."""
    order = generator(42).permutation(len(pictures.labels))
    tenth = max(1, len(order) // 10)
    cuts = {"train": order[2 * tenth :], "valid": order[:tenth], "test": order[tenth : 2 * tenth]}
    if not len(cuts["train"]):
        raise InputError(f"there must be at least 3 pictures, got {len(order)}")
    return {name: Pictures(pictures.pixels[at], pictures.labels[at]) for name, at in cuts.items()}
