"""Laws that every recurrence must keep, and hypothesis strategies to try them with: check your own variants here.

    check(my_recipe, dim=32)                            every law that applies holds, or LawBroken says where it fails
    check(my_scan, strategies.gated_scans())            the same for a function (tensors by name) -> (y, state)
    check(my_recipe, laws=["splits"], report=print)     one law, reported when it holds

`recur.testing.laws` states the laws. Inputs of a scan unlike recur's are drawn by a strategy that yields `Inputs`.
Needs hypothesis: pip install -e '.[test]' in a clone.
"""

from __future__ import annotations

import importlib
from typing import Any

from recur.testing.checking import check
from recur.testing.compare import Inputs, LawBroken
from recur.testing.values import check_inputs

__all__ = ["Inputs", "LawBroken", "check", "check_inputs", "laws", "strategies"]


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
            f"recur.testing.{name} needs hypothesis: pip install -e '.[test]' in a clone", name="hypothesis"
        ) from None
