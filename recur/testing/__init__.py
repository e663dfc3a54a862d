"""Laws that every recurrence must keep, and hypothesis strategies to try them with: check your own variants here.

`check(recipe, dim=32)` or `check(scan, strategies.scans())` runs every law that applies. What the laws are is in
`recur.testing.laws`. Needs hypothesis: pip install 'recur-primitives[test]'.
"""

from __future__ import annotations

import importlib
from typing import Any

from recur.testing.checking import check
from recur.testing.compare import LawBroken
from recur.testing.values import check_inputs

__all__ = ["LawBroken", "check", "check_inputs", "laws", "strategies"]


def __getattr__(name: str) -> Any:
    """`laws` and `strategies` draw with hypothesis, which `import recur` must not need."""
    if name not in ("laws", "strategies"):
        raise AttributeError(f"module 'recur.testing' has no attribute {name!r}")
    try:
        return importlib.import_module(f"recur.testing.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hypothesis":
            raise
        raise ModuleNotFoundError(
            f"recur.testing.{name} needs hypothesis: pip install 'recur-primitives[test]'", name="hypothesis"
        ) from None
