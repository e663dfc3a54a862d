"""Recipes by words: "mamba", "hgrn2:heads=4", "longhorn+longhorn+llama" for a hybrid, "@recipe.json" for a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recur import blocks, presets
from recur.axes import RecipeError, shown
from recur.fields import check_types
from recur.reading import one_line, read_json, unknown
from recur.recipe import Recipe, above

if TYPE_CHECKING:
    from recur.own import Own


def read(words: str, own: Own | None = None) -> list[Recipe]:
    """The recipes that words name, in their order.

    Args:
        words: a preset's name with options, NAME:OPTION=VALUE,...; several joined by +; or @FILE, what `to_dict` wrote.
        own:   parts and recipes of a file of your own (recur.own.load), known beside the presets.

    Raises: RecipeError naming the preset (and near ones), the option or the file that is invalid.
    """
    parts, recipes = ((), {}) if own is None else (own.parts, own.recipes)
    pieces = [words] if words.startswith("@") else words.split("+")
    return [_file(Path(piece[1:]), parts) if piece.startswith("@") else _named(piece, recipes) for piece in pieces]


above.read = read


def _file(place: Path, parts: Iterable[type]) -> Recipe:
    try:
        return Recipe.from_dict(read_json(place), parts)
    except ValueError as error:
        hint = "" if parts or "is not a part of recur" not in str(error) else "; --import FILE.py brings parts"
        raise RecipeError(f"cannot read a recipe from {place}: {one_line(error)}{hint}") from error


def _named(words: str, more: Mapping[str, Callable[..., Recipe]]) -> Recipe:
    name, _, listed = words.partition(":")
    known: dict[str, Callable[..., Recipe]] = {n: getattr(presets, n) for n in presets.names()} | dict(more)
    if name not in known:
        raise RecipeError(unknown("preset", name, known))
    options = dict(pair.partition("=")[::2] for pair in listed.split(",") if pair)
    try:
        recipe = known[name](**{key: _value(value) for key, value in options.items()})
        check_types(recipe.parts)
    except (TypeError, ValueError, ArithmeticError) as error:
        given = f"{name} cannot be built with {shown(listed)[1:-1]}" if listed else f"{name} cannot be built"
        raise RecipeError(f"{given}: {one_line(error)}") from error
    return recipe


def _value(text: str) -> Any:
    """A JSON value, a way to read of recur.blocks (scan=in_grid), or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # thousands of brackets are text as well
        return {way.__name__: way for way in blocks.WAYS}.get(text, text)
