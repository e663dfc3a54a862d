"""What follows from shapes, strides and dtypes alone is computed once per signature. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")
MOST = 1000  # lengths differ from call to call, so that signatures have no end


def cached(known: dict[Hashable, T], signature: Hashable, make: Callable[[], T]) -> T:
    """known[signature], made if it is not there; an error is not kept."""
    found = known.get(signature)
    if found is None:
        found = make()
        if len(known) >= MOST:
            known.clear()
        known[signature] = found
    return found
