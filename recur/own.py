"""A Python file of your own, with parts and recipes that the command line and a run's checkpoint can name."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from recur import presets
from recur.reading import InputError, one_line
from recur.recipe import Part, Recipe


@dataclass(frozen=True)
class Own:
    """What such a file defines.

    parts:   its classes of Part, by which a recipe is read from JSON.
    recipes: its recipes, and its functions annotated to return one, by name.
    """

    parts: tuple[type[Part], ...] = ()
    recipes: Mapping[str, Callable[..., Recipe]] = field(default_factory=dict)


def load(file: str | Path | None) -> Own:
    """Run a Python file, once, and collect what it defines; it may import its neighbours. Of no file: nothing.

    Raises: InputError if it is not there, fails, defines nothing of use, or takes a preset's name.
    """
    return Own() if file is None else _load(Path(file).resolve())


def of_run(run: Path, file: str | Path | None) -> tuple[type[Part], ...]:
    """The parts in the file that a run was trained with.   Raises: InputError as `load`, naming the run."""
    try:
        return load(file).parts
    except InputError as error:
        raise InputError(f"the model in {run} has parts of {file}: {error}") from error


@functools.cache
def _load(file: Path) -> Own:
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"--import needs a Python file with parts or recipes, and there is no file {file}")
    name = f"recur_own_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    found = spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    sys.modules[name] = module  # where dataclasses look up their annotations
    sys.path.insert(0, str(file.parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # of a stranger's code, which may raise anything
        del sys.modules[name]
        raise InputError(f"--import {file} fails: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(str(file.parent))
    return _own(vars(module), name, file)


def _own(defined: Mapping[str, Any], module: str, file: Path) -> Own:
    classes = [value for value in defined.values() if inspect.isclass(value) and value.__module__ == module]
    parts = tuple(kind for kind in classes if issubclass(kind, Part))
    recipes: dict[str, Callable[..., Recipe]] = {}
    for name, value in defined.items():
        if isinstance(value, Recipe):
            recipes[name] = functools.partial(_same, value)
        elif inspect.isfunction(value) and value.__module__ == module and _returns_recipe(value):
            recipes[name] = value
    if taken := sorted(set(recipes) & set(presets.names())):
        raise InputError(f"--import {file} defines {', '.join(taken)}, which presets are called: choose another name")
    if not parts and not recipes:
        raise InputError(f"--import {file} must define classes of Part, recipes, or functions annotated -> Recipe")
    return Own(parts, recipes)


def _same(recipe: Recipe) -> Recipe:
    return recipe


def _returns_recipe(function: Callable[..., Any]) -> bool:
    wanted = function.__annotations__.get("return")
    return wanted is Recipe or (isinstance(wanted, str) and wanted.rpartition(".")[2] == "Recipe")
