"""What runs with the suite and what `make test-slow` adds."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def quick(names: Iterable[str], suite: Container[str]) -> list[Any]:
    """Parameters of a test: those that the suite runs, and the others marked slow."""
    return [name if name in suite else pytest.param(name, marks=pytest.mark.slow) for name in names]
