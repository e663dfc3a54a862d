"""Which laws apply to a recipe, without trying them: one compilation per case would cost more than all other laws."""

from __future__ import annotations

from recur.recipe import Part, Recipe
from recur.testing import laws
from recur.testing.subjects import subject_of


def applying(recipe: Recipe | Part, dim: int, depth: int = 1) -> set[str]:
    subject = subject_of(recipe, None, dim, depth)
    return {law.__name__ for law, applies in laws.LAWS.items() if applies(subject)}
