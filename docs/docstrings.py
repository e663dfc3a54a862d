"""How docstrings become pages: an extension of griffe.

recur's docstrings name their paragraphs ("Returns: y [B T V].   Raises: ShapeError.") and write axes as [B T *]. Here
each named paragraph gets a line of its own, what Markdown would take for its own is escaped, and examples are fenced.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

NAMED = "Returns|Yields|Raises|Warns|Cost|Source|Rounding|Call"
INLINE = re.compile(rf"   (?=(?:{NAMED}): )")
HEAD = re.compile(rf"({NAMED}): (.*)")
CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"([*\[\]])")


class Paragraphs(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(docstring: str) -> str:
    lines = INLINE.sub("\n", docstring).split("\n")
    out: list[str] = []
    named = False  # inside a named paragraph, whose further lines are indented
    for i, line in enumerate(lines):
        if head := HEAD.fullmatch(line):
            named = True
            out += ["", f"**{head[1]}:** {escaped(head[2])}"]
        elif line.startswith(">>> "):
            named = False
            first = i == 0 or lines[i - 1] == ""
            out += ["", "```pycon", line] if first else [line]
        elif named and line.startswith("    "):
            out.append(escaped(line.strip()))
        else:
            named = named and line != ""
            equation = line.startswith("    ") and not _argument(lines, i)
            out.append(line if equation or _printed(lines, i) else escaped(line))
        if _last_of_example(lines, i):
            out.append("```")
    return "\n".join(out).strip()


def escaped(text: str) -> str:
    """Without what Markdown would read as emphasis, a link or a tag; code between backticks stays."""
    parts = CODE.split(text)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part.replace("<", "&lt;")) for i, part in enumerate(parts))


def _argument(lines: list[str], i: int) -> bool:
    """Whether a line belongs to a list of arguments."""
    while i > 0 and (lines[i].startswith("    ") or not lines[i]):
        i -= 1
    return lines[i] in ("Args:", "Attributes:")


def _printed(lines: list[str], i: int) -> bool:
    """Whether a line belongs to an example."""
    while i > 0 and lines[i]:
        if lines[i].startswith(">>> "):
            return True
        i -= 1
    return lines[i].startswith(">>> ")


def _last_of_example(lines: list[str], i: int) -> bool:
    return bool(lines[i]) and _printed(lines, i) and (i + 1 == len(lines) or not lines[i + 1])
