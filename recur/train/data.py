"""Text in: reading it, its characters as numbers, batches of it, and what counting alone predicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class InputError(ValueError):
    """What the caller handed in cannot be used; the message is one line and names the remedy where there is one."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.   Raises: InputError if the file is missing, unreadable, binary or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text, got other bytes at offset {error.start}") from error
    if "\0" in text:
        raise InputError(f"{path} must be UTF-8 text, got a zero byte at offset {text.index(chr(0))}")
    if not text.strip():
        raise InputError(f"{path} must hold text, got an empty file")
    return text


def python_documentation() -> str:
    """The language reference that CPython carries for its `help()`: about half a megabyte of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def encode(text: str, vocabulary: str) -> Tensor:
    """[T] int64: the place of each character in `vocabulary`.   Raises: InputError naming characters it lacks."""
    place = {character: i for i, character in enumerate(vocabulary)}
    if unknown := sorted(set(text) - set(place)):
        listed = " ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise InputError(f"the model's vocabulary of {len(vocabulary)} characters lacks {listed}")
    return torch.tensor([place[character] for character in text], dtype=torch.long)


def decode(ids: Tensor, vocabulary: str) -> str:
    """The text of ids [T]."""
    return "".join(vocabulary[i] for i in ids.tolist())


@dataclass(frozen=True)
class Corpus:
    """One text as numbers: its first nine tenths to learn from, its last tenth to be judged by."""

    vocabulary: str
    train: Tensor
    valid: Tensor

    @classmethod
    def from_text(cls, text: str, *, length: int) -> Corpus:
        """Split `text`, of which each part must hold a window of `length` characters and the one after it."""
        vocabulary = "".join(sorted(set(text)))
        ids = encode(text, vocabulary)
        cut = len(ids) - len(ids) // 10
        if len(ids) - cut <= length:
            raise InputError(
                f"the text must have at least {10 * (length + 1)} characters for --length {length}, got {len(ids)}"
            )
        return cls(vocabulary, ids[:cut], ids[cut:])


def random_batch(ids: Tensor, *, batch: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B T] at random places, which (seed, step) alone decide: there is no order to save."""
    starts = np.random.default_rng([seed, step]).integers(0, len(ids) - length, size=batch)
    windows = torch.stack([ids[start : start + length + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B T]: all whole windows side by side, each target once; a shorter tail is left out."""
    count = (len(ids) - 1) // length
    return ids[: count * length].reshape(count, length), ids[1 : count * length + 1].reshape(count, length)


def counting_losses(corpus: Corpus) -> tuple[float, float]:
    """(unigram, bigram): nats per character of the validation text under counts of the training text.

        p(b) = (n_b + 1) / (n + N)          p(b | a) = (n_ab + p(b)) / (n_a + 1)        N characters in the vocabulary

    The bigram falls back on the unigram with the weight of one observation, so that unseen pairs stay finite.
    """
    size = len(corpus.vocabulary)
    train, valid = corpus.train, corpus.valid
    unigram = (train.bincount(minlength=size).double() + 1) / (len(train) + size)
    pairs = (train[:-1] * size + train[1:]).bincount(minlength=size * size).double().reshape(size, size)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdim=True) + 1)
    return -unigram[valid[1:]].log().mean().item(), -bigram[valid[:-1], valid[1:]].log().mean().item()
