"""Recipes by words: "mamba", "hgrn2:heads=4", "longhorn+longhorn+llama" for a hybrid, "@recipe.json" for a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recur import blocks, presets
from recur.axes import RecipeError, shown
from recur.fields import check_types
from recur.own import Own
from recur.reading import one_line, read_json, unknown
from recur.recipe import Recipe


def read(words: str, own: Own | None = None) -> list[Recipe]:
    """The recipes that words name, in their order.

    Args:
        words: a preset's name with options, NAME:OPTION=VALUE,...; several joined by +; or @FILE, what `to_dict` wrote.
        own:   parts and recipes of a file of one's own (recur.own.load), known beside the presets.

    Raises: RecipeError naming the preset (and near ones), the option or the file that is of no use.
    """
    own = own or Own()
    pieces = [words] if words.startswith("@") else words.split("+")
    return [_file(Path(piece[1:]), own) if piece.startswith("@") else _named(piece, own.recipes) for piece in pieces]


def named(recipes: str | Sequence[Recipe | str]) -> list[Recipe]:
    """Recipes, those that are words read.   Raises: RecipeError as `read`."""
    if isinstance(recipes, str):
        return read(recipes)
    return [read_one(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]


def read_one(words: str) -> Recipe:
    """The recipe that words name.   Raises: RecipeError as `read`, or if there are several."""
    recipes = read(words)
    if len(recipes) != 1:
        raise RecipeError(f"a layer has one recipe, got {len(recipes)} in {shown(words)}")
    return recipes[0]


def _file(place: Path, own: Own) -> Recipe:
    try:
        return Recipe.from_dict(read_json(place), own.parts)
    except ValueError as error:
        hint = "" if own.parts or "is no part of recur" not in str(error) else "; --import FILE.py brings parts"
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
