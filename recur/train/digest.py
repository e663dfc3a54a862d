"""What a run reads, in few bytes: a digest of files, and the places where two JSON values differ."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK, BLOCKS = 2**18, 256  # a file of up to BLOCK * BLOCKS bytes, 64 MiB, is read whole
NAMED, SAMPLED = 64, 1000  # files of a folder that have a digest each; files that are read where there are more


def digests(place: Path) -> dict[str, str]:
    """Digests of a file, or of the files in a folder by name; {} if there is neither.

    A file's digest is SHA-256 of its size and content; of a file larger than 64 MiB, of its size and 256 blocks spread
    evenly over it, first and last included. A folder of more than 64 files has one digest: of all names and sizes, and
    of the content of 1000 files spread evenly. Hidden files are left out.

    Cost: reads at most 64 MiB per file.
    """
    if place.is_file():
        return {"": _of_file(place)}
    files = sorted(_files(place))
    if len(files) <= NAMED:
        return {str(file.relative_to(place)): _of_file(file) for file in files}
    listing = [f"{file.relative_to(place)} {file.stat().st_size}" for file in files]
    read = [files[i * (len(files) - 1) // (SAMPLED - 1)] for i in range(SAMPLED)] if len(files) > SAMPLED else files
    content = [_of_file(file) for file in read]
    return {f"{len(files)} files": hashlib.sha256("\n".join([*listing, *content]).encode()).hexdigest()}


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    blocks = min(BLOCKS, -(-size // BLOCK))
    with path.open("rb") as file:
        for i in range(blocks):
            file.seek(i * (size - BLOCK) // (blocks - 1) if size > BLOCK * BLOCKS else i * BLOCK)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which files differ between two results of `digests`, and how."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            how = "is gone" if name not in now else "is new" if name not in before else "changed"
            found.append(f"{name or 'the file'} {how}")
    return found


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ: "parts[4].act 'silu', now 'sigmoid'"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            inside = f"{place}.{key}" if place else str(key)
            if key not in now or key not in before:
                yield f"{inside} {'is gone' if key in before else 'is new'}"
            else:
                yield from differences(before[key], now[key], inside)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{place}[{i}]")
    elif before != now:
        yield f"{place} {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
