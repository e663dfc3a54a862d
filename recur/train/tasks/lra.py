"""The Long Range Arena: ListOps from its grammar; text, retrieval, image and pathfinder from the benchmark's files."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from recur.axes import shown
from recur.reading import InputError, one_line, read_bytes, read_text
from recur.train.config import Settings, count, natural, one_of, option, path, whole
from recur.train.data import Batch, generator
from recur.train.models import SequenceModel
from recur.train.task import SPLITS, Task, commonest
from recur.train.tasks.images import Pictures, PictureTask, opened, split_three

T = TypeVar("T")
ARENA = "Tay et al. 2020, arXiv:2011.04006"
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SYMBOLS = ("", *OPERATORS, *map(str, range(10)), "X", "<eos>")  # 0 pads; X is the closing bracket
PARTS = ("train", "valid", "test")


def arena(batch: int, depth: int, dim: int, lr: float, warmup: int, steps: int, **more: Any) -> dict[str, Any]:
    """HGRN2's choices for one of the tasks (its scripts), common ones filled in."""
    return {"batch": batch, "depth": depth, "dim": dim, "lr": lr, "warmup": warmup, "steps": steps} | {
        "weight_decay": 0.0,
        "min_lr": 0.0,
        "clip": 0.0,
        "norm": "layer",
        "precision": "bfloat16",
        "seed": 2222,
        "every": steps // 50,
        **more,
    }


class ReadTask(Task):
    """Classify texts of symbols: rows [n] of ids, padded on the right, averaged over their own lengths."""

    symbols: ClassVar[int] = 0
    classes: ClassVar[int] = 2
    pool: ClassVar[str] = "mean"

    def read(self, settings: Settings, part: str) -> tuple[list[Any], list[int]]:
        """Rows and labels of a part."""
        raise NotImplementedError(f"{type(self).__name__}: a task must have rows: define read(settings, part)")

    def open(self, settings: Settings) -> None:
        super().open(settings)
        self._parts = {part: self.read(settings, part) for part in PARTS}
        empty = [part for part, (rows, _) in self._parts.items() if not rows]
        if empty:
            raise InputError(f"{self.name}: the {' and '.join(empty)} part must have rows, got none")

    def build(self, settings: Settings) -> nn.Module:
        options: dict[str, Any] = {"tokens": self.symbols, "outputs": self.classes, "pool": self.pool}
        return SequenceModel(self.recipes(settings), settings, **options)

    def batch(self, split: str, index: int, rows: int) -> Batch:
        texts, labels = self._parts[split]
        if split == "train":
            at = generator(self.settings.seed, SPLITS[split], index).integers(0, len(texts), rows).tolist()
        else:
            first = index * self.settings.batch
            at = list(range(first, min(first + rows, len(texts))))
        x, lengths = zip(*(self.encode(texts[i]) for i in at), strict=True)
        wanted = torch.tensor([labels[i] for i in at])
        return {"x": torch.from_numpy(np.stack(x)), "lengths": torch.tensor(lengths), "labels": wanted}

    def encode(self, row: Any) -> tuple[np.ndarray, Any]:
        """ids [T], padded with 0, and how many of them are text."""
        ids = np.asarray(row[: self.settings.length], np.int64)
        return np.pad(ids, (0, self.settings.length - len(ids))), len(ids)

    def rows(self, split: str) -> int | None:
        return None if split == "train" else len(self._parts[split][0])

    def chance(self) -> float:
        return commonest(self._parts["valid"][1])

    @property
    def finals(self) -> Sequence[str]:
        return ("valid", "test")


@dataclass
class ListOps(ReadTask):
    """The value, 0 to 9, of nested lists such as [MAX 2 9 [MIN 4 7] 0]."""

    data: str | None = option(None, path, "folder of basic_{train,val,test}.tsv; made there if it has none")
    examples: int = option(100_000, count, "trees to make; 96 hundredths to learn from, 2 to validate, 2 to test")
    shortest: int = option(500, natural, "trees have more symbols than this")
    longest: int = option(2000, count, "and fewer than this")
    arguments: int = option(10, count, "most arguments of an operator; at least 2")
    nesting: int = option(10, whole(1, 101), "greatest depth")

    name: ClassVar[str] = "listops"
    about: ClassVar[str] = "Long Range Arena: the value of nested list operations."
    source: ClassVar[str] = ARENA
    defaults: ClassVar[dict[str, Any]] = {"dim": 64, "depth": 4, "length": 2048, "batch": 32, "steps": 5000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "hgrn2": arena(128, 5, 64, 5e-4, 5000, 50_000, positions="sinusoidal"),
        "small": {"examples": 20_000, "shortest": 10, "longest": 100, "arguments": 5, "nesting": 4, "length": 100},
    }
    symbols = len(SYMBOLS)
    classes = 10

    def read(self, settings: Settings, part: str) -> tuple[list[Any], list[int]]:
        if self.data is None:
            if not hasattr(self, "_made"):
                self._made = divided(self.trees())
            found = self._made[part]
        else:
            place = Path(self.data)
            files = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
            if place.exists() and not place.is_dir():
                raise InputError(f"--data must be a folder for its tables, got the file {place}")
            if not any((place / name).exists() for name in files.values()):
                made = divided(self.trees())
                place.mkdir(parents=True, exist_ok=True)
                for name, rows in made.items():
                    write_table(place / files[name], [("Source", "Target"), *rows])
            found = parsed(place / files[part], 1, "a tree and its value", _tree_of)
        return [symbols(text) for text, _ in found], [value for _, value in found]

    def trees(self) -> list[tuple[str, int]]:
        """Distinct trees in the benchmark's text form with their values, which seed 0 alone decides.

        Raises: InputError once fewer than one draw in a thousand is a new tree of the lengths asked for.
        """
        if self.longest - self.shortest < 2:
            raise InputError(
                f"listops: --longest must be at least 2 above --shortest, got {self.longest} and {self.shortest}"
            )
        draw, made, tried = random.Random(0), dict[str, int](), 0
        while len(made) < self.examples:
            tried += 1
            if tried > 1000 * len(made) + 100_000:
                raise InputError(
                    f"listops: only {len(made)} of {self.examples} trees fit between the lengths asked for"
                )
            text, value, length = tree(draw, 1, self.nesting, self.arguments, self.longest)
            if self.shortest < length < self.longest:
                made[text] = value
        return list(made.items())


def tree(draw: random.Random, depth: int, nesting: int, arguments: int, longest: int) -> tuple[str, int, int]:
    """(text, value, length) of a random tree: above the greatest depth an operator one time in four, else a digit.

    Order of draws: the number of arguments, each argument, the operator. What grows past `longest` is cut short, as it
    is thrown away.
    """
    if depth >= nesting or draw.random() > 0.25:
        digit = draw.randint(0, 9)
        return str(digit), digit, 1
    children = []
    length = 2
    for _ in range(draw.randint(2, max(2, arguments))):
        children.append(tree(draw, depth + 1, nesting, arguments, longest))
        length += children[-1][2]
        if length >= longest:
            break
    operator = draw.choice(list(OPERATORS))
    text = operator
    for child, _, _ in children:
        text = f"( {text} {child} )"
    return f"( {text} ] )", OPERATORS[operator]([value for _, value, _ in children]), length


def symbols(text: str) -> list[int]:
    """The numbers of a tree's symbols, brackets of binary pairs left out, with an end."""
    words = text.replace("(", " ").replace(")", " ").replace("]", " X ").split()
    return [SYMBOLS.index(word) for word in [*words, "<eos>"]]


def divided(rows: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """96 hundredths, 2 and 2, at least one row each."""
    few = max(1, len(rows) // 50)
    return {"train": rows[: -2 * few], "valid": rows[-2 * few : -few], "test": rows[-few:]}


def parsed(place: Path, first: int, what: str, read: Callable[[list[str]], T]) -> list[T]:
    """The rows of a file of tab-separated values from number `first` on.

    Raises: InputError naming a row of no use.
    """
    csv.field_size_limit(2**30)
    content = read_bytes(place).decode(errors="surrogateescape")
    rows = csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    made = []
    try:
        for number, row in enumerate(rows):
            if number >= first:
                made.append(read(row))
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"{place}: row {first + len(made)} must hold {what}, got another ({one_line(error)})"
        ) from error
    return made


def _tree_of(row: list[str]) -> tuple[str, int]:
    symbols(row[0])  # ValueError for a word that is none
    return row[0], _one_of(range(10), row[1])


def _pair_of(row: list[str]) -> tuple[list[np.ndarray], int]:
    one, other = (bytes_of(text.encode(errors="surrogateescape")) for text in row[3:5])
    return [one, other], _one_of(range(2), row[0])


def _one_of(values: range, word: str) -> int:
    if float(word) not in values:
        raise ValueError(f"{word} is not among {values.start} .. {values.stop - 1}")
    return int(float(word))


def write_table(place: Path, rows: Sequence[Sequence[Any]]) -> None:
    with place.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None).writerows(rows)


def bytes_of(text: bytes) -> np.ndarray:
    """Bytes as 1 .. 256 and an end, 257; 0 pads."""
    return np.append(np.frombuffer(text, np.uint8).astype(np.int64) + 1, 257)


@dataclass
class ArenaText(ReadTask):
    """Sentiment of film reviews, byte by byte: folders {train,test}/{pos,neg} of .txt files."""

    data: str = option("aclImdb", path, "folder of the IMDB reviews")

    name: ClassVar[str] = "text"
    about: ClassVar[str] = "Long Range Arena: sentiment of reviews, byte by byte."
    source: ClassVar[str] = ARENA
    defaults: ClassVar[dict[str, Any]] = {"dim": 128, "depth": 4, "length": 4096, "batch": 32, "steps": 20_000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {"hgrn2": arena(64, 4, 128, 5e-3, 10_000, 50_000, dropout=0.1)}
    symbols = 258

    def read(self, settings: Settings, part: str) -> tuple[list[Any], list[int]]:
        folder = "train" if part == "train" else "test"  # as in the benchmark: the test part also selects
        rows, labels = [], []
        for label, kind in enumerate(("neg", "pos")):
            for file in sorted((Path(self.data) / folder / kind).glob("*.txt")):
                rows.append(bytes_of(file.read_bytes()))
                labels.append(label)
        return rows, labels


@dataclass
class Retrieval(ReadTask):
    """Whether one paper cites another: both are read by the same network, which compares [u, v, u - v, u v]."""

    data: str = option("aan", path, "folder of new_aan_pairs.{train,eval,test}.tsv: label, ids, two texts")

    name: ClassVar[str] = "retrieval"
    about: ClassVar[str] = "Long Range Arena: do two documents belong together, byte by byte."
    source: ClassVar[str] = ARENA
    defaults: ClassVar[dict[str, Any]] = {"dim": 128, "depth": 4, "length": 4000, "batch": 16, "steps": 20_000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "hgrn2": arena(128, 2, 256, 5e-3, 312, 50_000, positions="sinusoidal", clip=1.0)
    }
    symbols = 258
    pool = "pair"

    def read(self, settings: Settings, part: str) -> tuple[list[Any], list[int]]:
        name = {"train": "train", "valid": "eval", "test": "test"}[part]
        found = parsed(Path(self.data) / f"new_aan_pairs.{name}.tsv", 0, "a label 0 or 1, two ids, two texts", _pair_of)
        return [pair for pair, _ in found], [label for _, label in found]

    def encode(self, row: Any) -> tuple[np.ndarray, Any]:
        (first, one), (second, other) = (super(Retrieval, self).encode(text) for text in row)
        return np.stack([first, second]), (one, other)


@dataclass
class ArenaImage(PictureTask):
    """CIFAR-10 pixel by pixel, from the binary version's files: a byte of label, 3072 of colours."""

    data: str = option("cifar-10-batches-bin", path, "folder of data_batch_{1..5}.bin and test_batch.bin")
    color: str = option("grey", one_of("grey", "rgb"), "channels of a pixel; HGRN2 ran it in colour")

    name: ClassVar[str] = "image"
    about: ClassVar[str] = "Long Range Arena: CIFAR-10, pixel by pixel."
    source: ClassVar[str] = ARENA
    defaults: ClassVar[dict[str, Any]] = {"dim": 256, "depth": 6, "batch": 64, "steps": 20_000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "hgrn2": arena(64, 6, 512, 3e-3, 30_000, 50_000, positions="sinusoidal", color="rgb")
    }

    def read(self, settings: Settings) -> dict[str, Pictures]:
        train = [self._file(file) for file in sorted(Path(self.data).glob("data_batch_*.bin"))]
        if not train:
            raise InputError(f"{self.data} must hold data_batch_1.bin and more of CIFAR-10's binary version, got none")
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
        order = generator(42).permutation(len(labels))
        tenth = max(1, len(order) // 10)
        parts = {"train": order[tenth:], "valid": order[:tenth]}
        test = Pictures(*self._file(Path(self.data) / "test_batch.bin"))
        return {name: Pictures(pixels[at], labels[at]) for name, at in parts.items()} | {"test": test}

    def _file(self, file: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            rows = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, 3073)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file}: it must hold rows of 3073 bytes ({error})") from error
        pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if self.color == "grey":
            pixels = (pixels @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
        return pixels, rows[:, 0].astype(np.int64)


@dataclass
class Pathfinder(PictureTask):
    """Whether two dots lie on one dashed path: pictures and metadata files of the benchmark (Path-X at 128 x 128)."""

    data: str = option("curv_contour_length_14", path, "folder with metadata/*.npy and the pictures they name")

    name: ClassVar[str] = "pathfinder"
    about: ClassVar[str] = "Long Range Arena: do two dots lie on one path, pixel by pixel."
    source: ClassVar[str] = ARENA
    defaults: ClassVar[dict[str, Any]] = {"dim": 128, "depth": 6, "batch": 64, "steps": 50_000}
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "hgrn2": arena(128, 6, 128, 2e-3, 50_000, 500_000),
        "hgrn2-path-x": arena(256, 6, 32, 7.5e-4, 150_000, 500_000, positions="sinusoidal", clip=1.0),
    }

    def read(self, settings: Settings) -> dict[str, Pictures]:
        pixels, labels = [], []
        for name, label in self._listed():
            file = Path(self.data) / name
            if not file.is_file():
                raise InputError(f"{self.data} lacks {name}, a picture that its metadata name")
            if file.stat().st_size:  # one picture of the benchmark is an empty file
                with opened(file) as image:
                    pixels.append(np.asarray(image.convert("L"))[..., None])
                labels.append(label)
        if not pixels:
            raise InputError(f"{self.data} must hold metadata/*.npy that name pictures, got none")
        return split_three(Pictures(np.stack(pixels), np.asarray(labels)))

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Names and labels: words 0, 1 and 3 of each line of the metadata files, which are text despite their name."""
        for file in sorted((Path(self.data) / "metadata").glob("*.npy"), key=lambda file: (len(file.name), file.name)):
            for line in read_text(file).splitlines():
                words = line.split()
                if len(words) < 4 or words[3] not in ("0", "1"):
                    raise InputError(
                        f"{file} must hold lines of a folder, a name, a number and 0 or 1, got {shown(line)}"
                    )
                yield f"{words[0]}/{words[1]}", int(words[3])
