"""Text as numbers: characters, bytes, or a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recur.axes import shown
from recur.reading import InputError, one_line


@dataclass(frozen=True)
class Characters:
    """The place of each character in a vocabulary, which the training text decides."""

    vocabulary: str

    @property
    def size(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """[T] ids.   Raises: InputError naming characters the vocabulary lacks."""
        place = {character: i for i, character in enumerate(self.vocabulary)}
        if unknown := sorted(set(text) - set(place)):
            listed = " ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
            raise InputError(f"the model's vocabulary of {self.size} characters lacks {listed}")
        return np.fromiter((place[character] for character in text), dtype=np.int64, count=len(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "vocabulary": self.vocabulary}


@dataclass(frozen=True)
class Bytes:
    """The bytes of a file as they are, or UTF-8: 256 symbols."""

    size = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """[T] ids; of a text from a command line, the very bytes that were typed.

        Raises: InputError for characters that UTF-8 cannot hold.
        """
        try:
            content = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise InputError(f"text must be what UTF-8 can hold, got {shown(text[error.start])}") from error
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


class HubTokenizer:
    """A tokenizer of transformers, by hub name or folder; documents end with its end-of-text token."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # of transformers, tokenizers, json or requests, each in its own way
            raise InputError(
                f"the tokenizer {name} is neither a folder here nor reachable on the hub: {one_line(error)}"
            ) from error
        self.name, self.size = name, len(self._tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """[T] ids.   Raises: InputError for characters that UTF-8 cannot hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text must be what UTF-8 can hold, got {shown(text[error.start])}") from error
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        return self._tokenizer.eos_token_id

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.name}


Tokenizer = Characters | Bytes | HubTokenizer


def tokenizer_of(kind: str, vocabulary: str = "") -> Tokenizer:
    """ "char" with a vocabulary, "byte", or the hub name or folder of a tokenizer ("gpt2").

    Raises: InputError if it is none of them.
    """
    if not (isinstance(kind, str) and kind.strip() and isinstance(vocabulary, str)):
        raise InputError(f"a tokenizer must be char, byte, or a name or folder of one, got {shown(kind)}")
    if kind == "char":
        return Characters(vocabulary)
    return Bytes() if kind == "byte" else HubTokenizer(kind)


def pieces(ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """What the tokens read as, piece by piece as they come; a character waits until all of its bytes are there.

    A token is decoded behind the tokens before it, since tokenizers may write the first one of a text otherwise.
    """
    seen: list[int] = []
    start, end = 0, 0  # of the tokens that were yielded last
    for token in ids:
        seen.append(token)
        before, now = decode(seen[start:end]), decode(seen[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, end = end, len(seen)
    if rest := decode(seen[start:])[len(decode(seen[start:end])) :]:
        yield rest
