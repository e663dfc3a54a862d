"""Where tokens come from: a text, a folder of memory-mapped bins, the hub; and rows of them."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recur.axes import shown
from recur.reading import InputError, decoded, one_line, read_bytes, read_json, reason
from recur.train.tokenize import Tokenizer, tokenizer_of

Batch = dict[str, Tensor]

# Short names of corpora on the hub: repository, configuration, revision, field of the text.
HUB: dict[str, tuple[str, str | None, str | None, str]] = {
    "enwik8": ("LTCB/enwik8", None, "refs/convert/parquet", "text"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "text"),
    "openwebtext": ("Skylion007/openwebtext", None, "refs/convert/parquet", "text"),
    "slimpajama": ("cerebras/SlimPajama-627B", None, None, "text"),
    "pile": ("monology/pile-uncopyrighted", None, None, "text"),
}


def generator(*seeds: int) -> np.random.Generator:
    """Random numbers that these whole numbers alone decide."""
    return np.random.default_rng(seeds)


def python_documentation() -> str:
    """The language reference that CPython carries for its `help()`: about half a megabyte of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


@dataclass(frozen=True)
class Tokens:
    """A stretch of tokens [n], in memory or mapped from a file, and where documents start in it (ascending)."""

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, at: np.ndarray, length: int) -> Batch:
        """Windows that start at these places: ids, labels (the next token) and starts [B T].

        starts[b, t] is True if token t opens a document. The last token of a document predicts the first of the next.
        """
        spread = at[:, None] + np.arange(length + 1)
        windows = torch.from_numpy(np.asarray(self.ids[spread.ravel()], dtype=np.int64)).view(len(at), length + 1)
        place = np.searchsorted(self.starts, spread.ravel())
        opens = np.append(self.starts, -1)[place] == spread.ravel()
        return {
            "ids": windows[:, :-1],
            "labels": windows[:, 1:],
            "starts": torch.from_numpy(opens).view(len(at), length + 1),
        }

    def sample(self, rows: int, length: int, *seeds: int) -> Batch:
        """Windows at random places that only `seeds` decide, so no order needs to be saved."""
        return self.rows(generator(*seeds).integers(0, len(self) - length, size=rows), length)

    def count(self, length: int) -> int:
        """Whole windows side by side, each target once; a shorter tail is left out."""
        return (len(self) - 1) // length

    def windows(self, first: int, rows: int, length: int) -> Batch:
        """Windows side by side, from number `first` on."""
        last = min(first + rows, self.count(length))
        return self.rows(np.arange(first, last) * length, length)


@dataclass(frozen=True)
class Corpus:
    """Tokens for training, validation and, if there are any, testing; `digest` identifies them."""

    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens
    test: Tokens | None
    digest: str


def open_corpus(
    source: str | None, tokenizer: str, *, length: int, valid: float = 0.1, test: float = 0.0, separator: str = ""
) -> Corpus:
    """The corpus of a text file, a folder that `write_bins` filled, a nanoGPT-style .bin of uint16, or the hub.

    Args:
        source:    a path, hub:NAME (read whole; `write_bins` and `Stream` are for large ones), or None for the
                   documentation inside CPython.
        tokenizer: "char", "byte", or the name or folder of a Hugging Face tokenizer. "byte" reads the bytes of a file
                   as they are; the others UTF-8 without a byte-order mark, \\n in the place of \\r\\n and \\r.
        length:    of a window; every part must hold one and the token after it.
        valid, test: shares of the text kept apart, test last; hub corpora have their own.
        separator: what stands between documents in a text file, \\n and other escapes of Python meaning what they do
                   there; "" makes it one document.

    Raises: InputError in one line for what cannot be read or holds too little.
    """
    place = Path(source or "")
    if not 0 < valid < 1 - test:
        raise InputError(f"--valid must be above 0, and --valid plus --test below 1, got {valid:g} and {test:g}")
    if source is None or not (source.startswith("hub:") or place.is_dir() or place.suffix == ".bin"):
        content = python_documentation().encode() if source is None else read_bytes(place)
        corpus = _from_text(content, place, tokenizer, valid, test, unescaped(separator), length)
    elif separator:
        raise InputError("--separator is for a text file: documents of the hub and of bins have their own starts")
    elif source.startswith("hub:"):
        corpus = _from_documents(hub_documents(source[4:], "train"), hub_documents(source[4:], "valid"), tokenizer)
    else:
        corpus = _from_bins(place, tokenizer, valid)
    for name, part in (("training", corpus.train), ("validation", corpus.valid), ("test", corpus.test)):
        if part is not None and len(part) <= length:
            need = f"at least {length + 1} tokens for --length {length}, got {len(part)}"
            raise InputError(f"the {name} part of the text must have {need}")
    if test and corpus.test is None:
        raise InputError("--test is for a text file: the hub and bins have no test part here")
    return corpus


ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[abfnrtv0\\'\"])")


def unescaped(words: str) -> str:
    """Text in which Python's escapes are replaced by what they mean; all other characters stay as they are.

    Raises: InputError for a backslash that begins no escape.
    """
    rest = ESCAPE.sub("", words)
    try:
        if "\\" not in rest:
            return ESCAPE.sub(lambda match: ast.literal_eval(f"'{match[0]}'"), words)
    except SyntaxError:  # \U beyond the last character
        pass
    known = r"\n \r \t \0 \a \b \f \v \\ \xHH \uHHHH \UHHHHHHHH"
    raise InputError(f"--separator {shown(words)} has a backslash that starts none of {known}; write it twice")


def _from_text(
    content: bytes, place: Path, kind: str, valid: float, test: float, separator: str, length: int
) -> Corpus:
    """The parts of a file; bytes are split as bytes, and never decoded."""
    if not content.strip():
        raise InputError(f"{place} must hold text, got an empty file")
    whole: Any = content
    if kind != "byte":
        whole = decoded(content, place)
        if "\0" in whole:
            raise InputError(f"{place} must be UTF-8 text, got a zero byte at offset {content.index(0)}")
    try:
        between: Any = separator.encode(errors="surrogateescape") if kind == "byte" else separator
    except UnicodeEncodeError as error:
        raise InputError(f"--separator must be text that UTF-8 can hold, got {separator!r}") from error
    if separator and between not in whole:
        raise InputError(f"--separator {separator!r} does not occur in {place}; without it the text is one document")
    tokenizer = tokenizer_of(kind, "".join(sorted(set(whole))) if kind == "char" else "")
    pieces = whole.split(between) if separator else [whole]
    texts = [piece + between for piece in pieces[:-1]] + [piece for piece in pieces[-1:] if piece]
    encoded = [tokenizer.encode(piece) for piece in texts]
    ids = np.concatenate(encoded)
    borders = np.cumsum([0, *map(len, encoded)])[:-1]
    kept_valid, kept_test = int(len(ids) * valid), int(len(ids) * test)
    if min(kept_valid, kept_test if test else kept_valid) <= length:
        need = math.ceil((length + 1) / min(valid, test or valid))
        raise InputError(f"the text must have at least {need} tokens for --length {length}, got {len(ids)}")
    cuts = [0, len(ids) - kept_valid - kept_test, len(ids) - kept_test, len(ids)]
    parts = [_cut(ids, borders, low, high) for low, high in pairwise(cuts)]
    digest = hashlib.sha256(content if kind == "byte" else whole.encode()).hexdigest()
    return Corpus(tokenizer, parts[0], parts[1], parts[2] if test else None, digest)


def _cut(ids: np.ndarray, borders: np.ndarray, low: int, high: int) -> Tokens:
    return Tokens(ids[low:high], borders[(borders >= low) & (borders < high)] - low)


def _from_documents(train: Iterator[str], valid: Iterator[str], kind: str) -> Corpus:
    texts = {"train": list(train), "valid": list(valid)}
    every = "".join(texts["train"] + texts["valid"])
    tokenizer = tokenizer_of(kind, "".join(sorted(set(every))))
    parts = {name: _joined(tokenizer, documents) for name, documents in texts.items()}
    return Corpus(tokenizer, parts["train"], parts["valid"], None, hashlib.sha256(every.encode()).hexdigest())


def _joined(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    encoded = [encode_document(tokenizer, text) for text in documents]
    starts = np.cumsum([0, *map(len, encoded)])[:-1]
    return Tokens(np.concatenate([np.zeros(0, np.int64), *encoded]), starts)


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of one document, with the tokenizer's end-of-text token after it where there is one."""
    end = getattr(tokenizer, "end", None)
    ids = tokenizer.encode(text)
    return ids if end is None else np.append(ids, end)


# ---------------------------------------------------------------------- bins


def write_bins(out: Path, source: str, tokenizer: str, *, valid: float = 0.1, report: Callable[[int], Any]) -> None:
    """Tokenise once: train.bin, valid.bin, their document starts, and meta.json in the folder `out`.

    Hub corpora are streamed, a document at a time, so that they need not fit in memory; `report` hears its length.
    Files take their names when all of them are whole, so that tokens made before are not lost to a source that fails.
    """
    if not source.startswith("hub:"):
        if not Path(source).is_file() or source.endswith(".bin"):
            raise InputError(f"recur data reads a text file or hub:NAME, got {source}")
        corpus = open_corpus(source, tokenizer, length=1, valid=valid)
        kind = corpus.tokenizer
    elif tokenizer == "char":
        raise InputError("a hub corpus needs --tokenizer byte or a Hugging Face tokenizer: characters must be known")
    else:
        kind = tokenizer_of(tokenizer)
    width = _width(kind.size)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".partial-") as folder:
        for name in ("train", "valid"):
            bins = Path(folder) / f"{name}.bin"
            if not source.startswith("hub:"):
                part = getattr(corpus, name)
                np.asarray(part.ids, dtype=width).tofile(bins)
                starts, total = part.starts, len(part)
                report(total)
            else:
                listed, total = [], 0
                with bins.open("wb") as file:
                    for text in hub_documents(source[4:], name):
                        ids = encode_document(kind, text)
                        listed.append(total)
                        total += len(ids)
                        ids.astype(width).tofile(file)
                        report(len(ids))
                starts = np.asarray(listed, dtype=np.int64)
            if total == 0:
                raise InputError(no_tokens(source, name))
            np.save(bins.with_suffix(".starts.npy"), starts)
        meta = {"tokenizer": kind.to_dict(), "dtype": np.dtype(width).name}
        (Path(folder) / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        for made in Path(folder).iterdir():
            made.replace(out / made.name)


def _width(size: int) -> type:
    return np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32


def _from_bins(place: Path, kind: str, valid: float) -> Corpus:
    if place.suffix == ".bin" and not place.is_dir():
        if kind == "char":
            raise InputError(
                f"{place} holds numbers: name the tokenizer that wrote them, --tokenizer byte or one of Hugging Face"
            )
        tokenizer, ids = tokenizer_of(kind), _mapped(place, np.uint16)
        check_ids(ids, tokenizer.size, place)
        cut = len(ids) - int(len(ids) * valid)
        none = np.zeros(0, np.int64)
        digest = hashlib.sha256(f"{place.name} {len(ids)}".encode()).hexdigest()
        return Corpus(tokenizer, Tokens(ids[:cut], none), Tokens(ids[cut:], none), None, digest)
    try:
        meta, parts = read_json(place / "meta.json"), {}
        dtype = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]]
        tokenizer = tokenizer_of(**meta["tokenizer"])
        for name in ("train", "valid"):
            ids, starts = _mapped(place / f"{name}.bin", dtype), np.load(place / f"{name}.starts.npy", mmap_mode="r")
            check_ids(ids, tokenizer.size, place / f"{name}.bin")
            _check_starts(starts, len(ids), place / f"{name}.starts.npy")
            parts[name] = Tokens(ids, starts)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        remedy = f"make them with recur data SOURCE --out {place}"
        raise InputError(f"{place} holds no tokens: {remedy} ({one_line(error)})") from error
    digest = hashlib.sha256(json.dumps([meta, *(len(part) for part in parts.values())]).encode()).hexdigest()
    return Corpus(tokenizer, parts["train"], parts["valid"], None, digest)


def _mapped(place: Path, dtype: type) -> np.ndarray:
    """A file of numbers, mapped.   Raises: InputError if it is missing, empty, or holds half a number."""
    if not place.is_file():
        raise InputError(f"cannot read {place}: no such file")
    size, width = place.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise InputError(f"{place} must hold numbers of {8 * width} bits, got {size} bytes")
    try:
        return np.memmap(place, dtype=dtype, mode="r")
    except OSError as error:
        raise InputError(f"cannot read {place}: {reason(error)}") from error


def check_ids(ids: np.ndarray, size: int, place: Path, at_once: int = 2**22) -> None:
    """Raise InputError for an id that a vocabulary of `size` lacks.

    Cost: one reading of the file, unless its numbers cannot be too large.
    """
    if np.iinfo(ids.dtype).max < size:
        return
    for first in range(0, len(ids), at_once):
        piece = ids[first : first + at_once]
        if int(piece.max()) >= size:
            at = int(np.argmax(piece >= size))
            raise InputError(
                f"{place} must hold ids below {size}, as its tokenizer has, got {piece[at]} at {first + at}"
            )


def _check_starts(starts: np.ndarray, length: int, place: Path) -> None:
    fits = starts.ndim == 1 and starts.dtype.kind in "iu"
    if fits and len(starts):
        fits = bool(starts[0] >= 0 and starts[-1] < length and np.all(starts[1:] >= starts[:-1]))
    if not fits:
        raise InputError(f"{place} must hold places of documents in {length} tokens, ascending")


# ---------------------------------------------------------------------- hub


def hub_documents(name: str, part: str) -> Iterator[str]:
    """The documents of a part, "train" or "valid", one by one as they arrive.

    `name` is a key of HUB, or any repository or local folder with a text field, NAME[:CONFIGURATION].
    Raises: InputError in one line when the hub cannot be reached or does not have it.
    """
    from datasets import load_dataset

    repository, configuration, revision, column = HUB.get(name, (*_split(name), None, "text"))
    try:
        streams = load_dataset(repository, configuration, revision=revision, streaming=True)
        splits = {
            "train": "train",
            "valid": next((s for s in ("validation", "valid", "test") if s in streams), "train"),
        }
        stream = streams[splits[part]]
        apart = splits["valid"] == "train"  # no part of its own: every two hundredth document is kept for validation
        for i, row in enumerate(stream):
            if not apart or (i % 200 == 199) == (part == "valid"):
                if not isinstance(row[column], str):
                    raise InputError(
                        f"document {i} of {repository} must have text in {column!r}, got {shown(row[column])}"
                    )
                yield row[column]
    except InputError:
        raise
    except Exception as error:  # requests, httpx, fsspec and datasets each have their own way to say it
        raise InputError(
            f"cannot read {repository} from the hub, give a local file instead: {one_line(error)}"
        ) from error


def no_tokens(source: str, part: str) -> str:
    """That a part of a corpus is empty, and where the hub's validation part comes from."""
    apart = "; without a part of its own, every 200th document is kept for validation" * (part == "valid")
    return f"the {'validation' if part == 'valid' else 'training'} part of {source} must have tokens, got none{apart}"


def _split(name: str) -> tuple[str, str | None]:
    repository, _, configuration = name.partition(":")
    return repository, configuration or None


class Stream:
    """Rows of a hub corpus in the order in which it arrives, for corpora too large to keep.

    Batch number i is the i-th stretch of rows * (length + 1) tokens. A resumed run reads up to its place again.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, part: str = "train") -> None:
        self.name, self.tokenizer, self.part = name, tokenizer, part
        self.next = -1

    def check(self) -> None:
        """Look for the first tokens.   Raises: InputError in one line if the hub cannot be reached, or has none."""
        self._restart()
        self._take(1)
        self.next = -1

    def batch(self, index: int, rows: int, length: int) -> Batch:
        if index < self.next or self.next < 0:
            self._restart()
        while True:
            tokens = self._take(rows * (length + 1))
            self.next += 1
            if self.next > index:
                return tokens.rows(np.arange(rows) * (length + 1), length)

    def _restart(self) -> None:
        self._pieces, self.next = self._epochs(), 0
        self._ids: np.ndarray = np.zeros(0, np.int64)
        self._starts: np.ndarray = np.zeros(0, np.int64)

    def _epochs(self) -> Iterator[np.ndarray]:
        """Encoded documents, one epoch after another.   Raises: InputError if an epoch has no tokens."""
        while True:
            found = 0
            for text in hub_documents(self.name, self.part):
                piece = encode_document(self.tokenizer, text)
                found += len(piece)
                yield piece
            if not found:
                raise InputError(no_tokens(f"hub:{self.name}", self.part))

    def _take(self, count: int) -> Tokens:
        pieces, starts, have = [self._ids], [self._starts], len(self._ids)
        while have < count:
            piece = next(self._pieces)
            starts.append(np.asarray([have]))
            pieces.append(piece)
            have += len(piece)
        ids, borders = np.concatenate(pieces), np.concatenate(starts)
        self._ids, self._starts = ids[count:], borders[borders >= count] - count
        return Tokens(ids[:count], borders[borders < count])


def counting_losses(corpus: Corpus) -> tuple[float, float]:
    """(unigram, bigram): nats per token of the validation text under counts of the training text.

        p(b) = (n_b + 1) / (n + N)          p(b | a) = (n_ab + p(b)) / (n_a + 1)        N tokens in the vocabulary

    The bigram falls back on the unigram with the weight of one observation, so that unseen pairs stay finite.
    """
    size = corpus.tokenizer.size
    train, valid = (torch.from_numpy(np.asarray(part.ids, dtype=np.int64)) for part in (corpus.train, corpus.valid))
    unigram = (train.bincount(minlength=size).double() + 1) / (len(train) + size)
    pairs = (train[:-1] * size + train[1:]).bincount(minlength=size * size).double().reshape(size, size)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdim=True) + 1)
    return -unigram[valid[1:]].log().mean().item(), -bigram[valid[:-1], valid[1:]].log().mean().item()


def pack(batch: Batch) -> Any:
    """Rows [B T] with document starts as one row [1 B*T] with cu_seqlens: each row, and each document in it, apart.

    The label of a document's last token is the next document's first: it becomes -100, which no loss counts.
    """
    opens = batch["starts"][:, :-1].clone()
    opens[:, 0] = True
    labels = batch["labels"].masked_fill(batch["starts"][:, 1:], -100)
    borders = opens.flatten().nonzero().flatten()
    return {
        "ids": batch["ids"].reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "cu_seqlens": torch.cat([borders, borders.new_tensor([opens.numel()])]),
    }
