"""Files that people hand in, by one rule: UTF-8, a leading byte-order mark dropped, one line for what is wrong."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recur.axes import shown

MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
MARKS |= {codecs.BOM_UTF16_BE: "UTF-16"}


class InputError(ValueError):
    """What the caller handed in cannot be used; the message is one line and names the remedy where there is one.

    >>> raise recur.train.InputError("--steps must be at least 1, got 0")
    Traceback (most recent call last):
    recur.reading.InputError: --steps must be at least 1, got 0
    """


def one_line(error: BaseException) -> str:
    """What an error of a library says, on one line of moderate length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]} ..."


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """That no such thing has this name, and which ones are near."""
    near = difflib.get_close_matches(name[:100], list(names))
    hint = f"did you mean {' or '.join(near)}?" if near else f"known {kind}s: {', '.join(names)}"
    return f"no {kind} is called {shown(name)}; {hint}"


def read_bytes(place: Path) -> bytes:
    """The content of a file.   Raises: InputError if it is missing, unreadable, a folder, a device or a pipe."""
    try:
        if place.exists() and not place.is_file():  # a device may have no end, a pipe no beginning
            raise InputError(f"cannot read {place}: it is {'a folder' if place.is_dir() else 'not a regular file'}")
        return place.read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {place}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why the system refused a file."""
    return str(getattr(error, "strerror", None) or error).lower()


def read_text(place: Path) -> str:
    """The text of a UTF-8 file without a byte-order mark; line ends \\r\\n and \\r become \\n.

    Raises: InputError as `read_bytes`, and naming the first byte that is not UTF-8.
    """
    return decoded(read_bytes(place), place)


def decoded(content: bytes, place: Path) -> str:
    """The text that the bytes of a file hold, by the rule of `read_text`."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            raise InputError(f"{place} must be UTF-8 text, got the byte-order mark of {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)
        raise InputError(f"{place} must be UTF-8 text, got other bytes at offset {at}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(place: Path) -> Any:
    """The value of a JSON file.   Raises: InputError as `read_text`, and saying what is wrong with it."""
    text = read_text(place)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets of thousands of levels
        raise InputError(f"{place} is not valid JSON: {one_line(error)}") from error
