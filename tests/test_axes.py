"""Axis expressions and recipes from files that anyone may have written: bounded work, one error that repeats them."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recur import Mixer, Recipe, RecipeError, presets
from recur.axes import OPERATORS, evaluate, letters, shown, size
from recur.blocks import DenseRead, Project, Rename, ShortConv, Skip

AXES = {"D": 64, "H": 4}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("9**9**9", "'9**9**9' must stay below 2^63 and finite"),
        ("2**(2**33)", "'2**(2**33)' must stay below 2^63 and finite"),
        ("(-9)**(9**9)", "'(-9)**(9**9)' must stay below 2^63 and finite"),
        ("2**63", "'2**63' must stay below 2^63 and finite"),
        ("1e400", "'1e400' must stay below 2^63 and finite"),
        ("1e308*D*D", "'1e308*D*D' must stay below 2^63 and finite"),
        ("10.0**400", "'10.0**400' has no value: "),
        ("9" * 150, "9' must stay below 2^63 and finite"),
        ("1e300", "1e300 must be a positive integer, got 1e+300"),
        ("D/0", "'D/0' has no value: division by zero"),
        ("D//(H-4)", "'D//(H-4)' has no value: "),
        ("0**-1", "'0**-1' has no value: "),
        ("sqrt(-D)", "'sqrt(-D)' has no value: "),
        ("(-1)**0.5", "'(-1)**0.5' has no real value"),
        ("max(1)", "'max(1)' has no value: "),
        ("int(1,2,3)", "'int(1,2,3)' has no value: "),
        ("D%H", "'D%H' must be built from numbers, axis letters, + - * / //"),
        ("True", "'True' must be built from"),
        ("None", "'None' must be built from"),
        ("'D'", "must be built from"),
        ("1j", "'1j' must be built from"),
        ("D<<60", "'D<<60' must be built from"),
        ("[D]", "'[D]' must be built from"),
        ("max(*[1,2])", "'max(*[1,2])' must be built from"),
        ("D if D else H", "'D if D else H' must be built from"),
        ("nan", "'nan' mentions nan, which is not among D, H"),
        ("", "'' is not an expression"),
        ("D\0", "'D\\x00' is not an expression"),
        ("\udc80", "is not an expression"),
        ("-" * 5000 + "16", "must have at most 200 characters, got 5002"),
        ("-" * 150 + "16", "16' must have at most 100 letters and operators inside one another"),
        ("(" * 199, "is not an expression"),
        (True, "True is not an expression; give a number or a string"),
        (None, "None is not an expression"),
        ([1], "[1] is not an expression"),
        ({"D": 1}, "{'D': 1} is not an expression"),
        (2j, "2j is not an expression"),
        (float("nan"), "nan is not a size; a number must be finite"),
        (float("inf"), "inf is not a size; a number must be finite"),
        (10**5000, "must be below 2^63, got one of thousands of digits"),
        (-3, "-3 must be a positive integer, got -3"),
        (0, "0 must be a positive integer, got 0"),
    ],
    ids=lambda value: ascii(shown(value))[:30],
)  # fmt: skip
def test_an_expression_of_no_use_is_repeated(expression: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        size(expression, AXES)


def test_numbers_of_every_kind_are_axes() -> None:
    assert [size(one, AXES) for one in (16, 16.0, np.int64(16), "16", "1.6e1", "2**4", "(-4)**2", "4**2.0")] == [16] * 8
    assert [evaluate(one, AXES) for one in ("1**(2**62)", "(-1)**(2**62)", "0**(2**62)")] == [1, 1, 0]
    assert evaluate("2**62", AXES) == 2**62


def test_a_name_of_one_value_does_not_pass_for_another() -> None:
    assert size(1, AXES) == 1  # equal to True, as a key of a cache too
    with pytest.raises(RecipeError, match="True is not an expression"):
        size(True, AXES)


def doubling(letters: int) -> dict[str, str | int]:
    """Each letter the larger of the next one, twice: 2^letters values if each were looked up anew."""
    return {**{f"A{i}": f"max(A{i + 1},A{i + 1})" for i in range(letters)}, f"A{letters}": 3}


def test_letters_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setitem(OPERATORS, ast.Mult, lambda a, b: calls.append(1) or a * b)
    axes = {f"A{i}": f"A{i + 1}*1-A{i + 1}+A{i + 1}" for i in range(12)} | {"A12": 3}
    assert evaluate("A0", axes) == 3
    assert len(calls) == 12


def test_letters_in_a_long_chain_or_a_circle_are_refused() -> None:
    assert size("A0", doubling(45)) == 3
    with pytest.raises(RecipeError, match=r"'max\(A\d+,A\d+\)' must have at most 100 letters and operators inside"):
        size("A0", doubling(60))
    with pytest.raises(RecipeError, match="A is defined by itself, A = 'B'"):
        size("A", {"A": "B", "B": "A"})
    many = {f"A{i}": 1 for i in range(101)}
    with pytest.raises(RecipeError, match="axes must name at most 100 letters, got 101"):
        Recipe(Rename("x", "y"), axes=many)


TEXTS = st.text(st.sampled_from("DHK0123456789.e+-*/%()<,\0 maxintsqrceil"), max_size=30)


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_is_a_size_or_a_recipe_error(texts: list[str]) -> None:
    axes = {"D": 64, **dict(zip("HKEF", texts, strict=False))}
    for text in texts:
        try:
            letters(text)
            found = size(text, axes)
        except RecipeError:
            continue
        assert 1 <= found < 2**63


# ---------------------------------------------------------------------- recipes from JSON


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every entry of a JSON value, the whole included."""
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from leaves(entry, (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = changed(value[place[0]], place[1:], new)
    return value


def places() -> list[tuple[str, tuple[Any, ...]]]:
    """Every field of every part, once, in the first preset that has it; and the keys of a recipe."""
    found: dict[tuple[Any, ...], tuple[str, tuple[Any, ...]]] = {}
    for name in presets.names():
        recipe = getattr(presets, name)().to_dict()
        for place in leaves(recipe):
            part = (recipe["parts"][place[1]]["part"], *place[2:]) if len(place) > 1 and place[0] == "parts" else place
            found.setdefault(part, (name, place))
    return list(found.values())


PLACES = places()
VALUES = (
    None, True, -1, 0, 7, 1.5, float("nan"), 10**30, "", "zzz", "9**9**9", "D/0", "a\0b", "(" * 150, [], ["x"], [[1]],
    {}, {"part": "Act"}, {"part": "Act", "names": "x"}, {"part": 3},
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_recipe_with_one_wrong_value_is_refused_or_built(value: Any) -> None:
    """A law or an activation that is not there is a ValueError of its own words; nothing else escapes."""
    for name, place in PLACES:
        recipe = changed(getattr(presets, name)().to_dict(), place, value)
        try:
            made = Recipe.from_dict(recipe)
            with torch.device("meta"):
                Mixer(made, 64)
        except RecipeError:
            pass
        except ValueError as error:
            if not re.match("(init: law|activation: name) must be one of ", str(error)):
                raise


def test_the_key_that_is_wrong_is_named() -> None:
    good = presets.hgrn2().to_dict()

    def refused(words: str, data: Any) -> None:
        with pytest.raises(RecipeError, match=re.escape(words)):
            Recipe.from_dict(data)

    for key in ("axes", "inputs", "source", "parts"):
        refused(f"from_dict: a recipe needs {key!r}, which is missing", {k: v for k, v in good.items() if k != key})
    refused("from_dict: a recipe must be an object with keys axes, inputs, source, out, frame, parts, got [1]", [1])
    refused("from_dict: a recipe has no 'part'; did you mean 'parts'?", {**good, "part": 1})
    refused("from_dict: 'axes' must be of type Mapping, got [1]", {**good, "axes": [1]})
    refused("from_dict: 'axes' must have names as keys, got 1", {**good, "axes": {1: 2}})
    refused("from_dict: 'inputs' must name the axes of u in a string, got 3", {**good, "inputs": {"u": 3}})
    refused("axes: [1] is not an expression", {**good, "axes": {"H": 4, "K": [1]}})
    refused('parts[0] must be an object with "part", the name of a class, got 3', {**good, "parts": [3]})
    refused(
        'parts[0].names must have "part", the name of a class, got {}',
        {**good, "parts": [{"part": "Act", "names": {}}]},
    )
    odd = {"part": "Act", "names": "x", "nams": 1}
    refused("parts[0] Act has no 'nams'; did you mean 'names'?", {**good, "parts": [odd]})
    refused("parts[0] Act has no 'zz'; known are name, names, fn", {**good, "parts": [{"part": "Act", "zz": 1}]})
    refused("parts[0] Act needs 'names', which is missing", {**good, "parts": [{"part": "Act"}]})
    refused("parts[0] Act: 'names' must be str, got 3", {**good, "parts": [{"part": "Act", "names": 3}]})
    skip = {"part": "Skip", "source": "x", "mean": True}
    refused("parts[0] Skip: 'mean' must be float, got True", {**good, "parts": [skip]})
    wide = {"part": "ShortConv", "source": "x", "width": 10**30}
    refused("parts[0] ShortConv: 'width' must be int, got 1000", {**good, "parts": [wide]})
    deep: Any = {"part": "Act", "names": "x"}
    for _ in range(2000):
        deep = {"part": "Reverse", "parts": [deep]}
    refused("parts[0] must nest at most 32 deep", {**good, "parts": [deep]})


def test_every_preset_and_an_older_recipe_without_out_come_back() -> None:
    for name in presets.names():
        recipe = getattr(presets, name)()
        data = json.loads(json.dumps(recipe.to_dict()))
        if data["out"] == "D":
            del data["out"]
        assert Recipe.from_dict(data) == recipe


def test_parts_that_read_nothing_or_have_no_size_are_refused() -> None:
    for part, words in ((Project("", y="D"), "part 1 Project must name the tensors that it reads, got ''"),
                        (ShortConv(""), "part 1 ShortConv must name the tensors that it reads, got ''")):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            Recipe(part, Rename("x", "y"))
    with pytest.raises(RecipeError, match="ShortConv: width must be at least 1 and below 2\\^31, got 0"):
        ShortConv("x", width=0)
    with pytest.raises(RecipeError, match="Skip: std must be a number of at least 0, got nan"):
        Skip("x", std=float("nan"))
    with pytest.raises(RecipeError, match="DenseRead: scan must be a part such as OuterScan, got 'u'"):
        DenseRead("u", gate="g")
    for name, axis in (("s4d", "N"), ("gated_smoothing", "H")):
        data = json.dumps(getattr(presets, name)().to_dict())
        field = "N" if name == "s4d" else "heads"
        two = re.sub(rf'"{field}": "{axis}"', f'"{field}": "{axis} {axis}"', data)
        with pytest.raises(RecipeError, match=f"must name one axis, got '{axis} {axis}'"):
            Mixer(Recipe.from_dict(json.loads(two)), 64)
