"""Parts from JSON values: every field is read by the annotation it has in its dataclass, and refused by its name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recur.axes import RecipeError, shown

DEEPEST = 32  # lists and parts inside one another
RENAMED = {"Count": "AppendOne", "Normalise": "DivideByLast", "Weigh": "Multiply"}  # parts, by their earlier names


def read_keys(data: Any, keys: Mapping[str, type], optional: Iterable[str] = ()) -> dict[str, Any]:
    """The entries of a recipe's JSON object.

    Raises: RecipeError naming a key that is missing, unknown or of another type.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"from_dict: a recipe must be an object with keys {', '.join(keys)}, got {shown(data)}")
    _check_names("a recipe", data, keys, [key for key in keys if key not in set(optional)])
    for key, value in data.items():
        if not isinstance(value, keys[key]):
            raise RecipeError(f"from_dict: {key!r} must be of type {keys[key].__name__}, got {shown(value)}")
        for name, entry in value.items() if isinstance(value, Mapping) else ():
            if not isinstance(name, str):
                raise RecipeError(f"from_dict: {key!r} must have names as keys, got {shown(name)}")
            if key == "inputs" and not isinstance(entry, str):
                raise RecipeError(f"from_dict: {key!r} must name the axes of {name} in a string, got {shown(entry)}")
    return dict(data)


def read_part(entry: Any, known: Mapping[str, Callable[..., Any]], place: str) -> Any:
    """The part a JSON object describes, {"part": class, field: value, ...}.

    Args:
        entry: the object.
        known: classes by name; nothing is imported.
        place: where it stands, for messages, such as "parts[2]".

    Raises: RecipeError naming the place and the field that is missing, unknown or not of its annotation.
    """
    if not isinstance(entry, Mapping) or "part" not in entry:
        raise RecipeError(f'from_dict: {place} must be an object with "part", the name of a class, got {shown(entry)}')
    return _read(entry, known, place, 0)


def check_types(parts: Iterable[Any]) -> None:
    """Raise RecipeError unless every field of every part is of its annotation, in parts inside parts too."""
    for part in parts:
        kind: Any = type(part)
        hints = _hints(kind)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name in hints and not _fits(value, hints[field.name]):
                raise RecipeError(f"{kind.__name__}: {field.name!r} must be {_name(field)}, got {shown(value)}")
            check_types(inner for inner in _flat(value) if dataclasses.is_dataclass(inner))


def _flat(value: Any) -> Iterable[Any]:
    """The entries of nested tuples."""
    if not isinstance(value, tuple):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def _name(field: dataclasses.Field[Any]) -> Any:
    """The annotation of a field, as it is written."""
    return getattr(field.type, "__name__", field.type)


def _read(entry: Any, known: Mapping[str, Callable[..., Any]], place: str, depth: int) -> Any:
    if depth > DEEPEST:
        raise RecipeError(f"from_dict: {place.partition('.')[0]} must nest at most {DEEPEST} deep")
    if isinstance(entry, (list, tuple)):
        return tuple(_read(item, known, f"{place}[{i}]", depth + 1) for i, item in enumerate(entry))
    if not isinstance(entry, Mapping):
        return entry
    entry = _renamed(entry, known)
    kind = entry.get("part")
    if not isinstance(kind, str):
        raise RecipeError(f'from_dict: {place} must have "part", the name of a class, got {shown(dict(entry))}')
    if kind not in known:
        raise RecipeError(
            f"from_dict: {kind!r} is not a part of recur; pass its class: from_dict(data, parts=({kind},))"
        )
    made: Any = known[kind]
    own = {field.name: field for field in dataclasses.fields(made)}
    given = {name: value for name, value in entry.items() if name != "part"}
    arguments = inspect.signature(made).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind is not a.VAR_KEYWORD]
    _check_names(f"{place} {kind}", given, own, needed)
    values = {name: _read(value, known, f"{place}.{name}", depth + 1) for name, value in given.items()}
    hints = _hints(made)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            wanted = f"{name!r} must be {_name(own[name])}"
            raise RecipeError(f"from_dict: {place} {kind}: {wanted}, got {shown(given[name])}")
    return made(**values)


def _renamed(entry: Mapping[Any, Any], known: Mapping[str, Any]) -> Mapping[Any, Any]:
    """A part as it is called now, of a recipe that was stored when it had another name."""
    kind = entry.get("part")
    if isinstance(kind, str) and kind in RENAMED and kind not in known:
        return {**entry, "part": RENAMED[kind]}
    if kind == "OutputGate" and "out" in entry:  # which multiplied any tensor
        rest = {name: value for name, value in entry.items() if name not in ("part", "out", "gate")}
        gate = entry.get("gate", "z")
        if entry["out"] == "y":
            return {"part": "OutputGate", "gate": gate, **rest}
        return {"part": "Multiply", "source": entry["out"], "by": gate, "act": "silu", **rest}
    names = entry.get("names")
    if kind == "Sum" and isinstance(names, str) and len(names.split()) == 1:  # which copied a tensor
        rest = {name: value for name, value in entry.items() if name not in ("part", "names", "out")}
        return {"part": "Rename", "source": names, "to": entry.get("out", "y"), **rest}
    return entry


def _check_names(what: str, given: Iterable[Any], known: Iterable[str], needed: Iterable[str]) -> None:
    given, known = list(given), list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise RecipeError(f"from_dict: {what} has no {shown(name)}; {hint}")
    if missing := [name for name in needed if name not in given]:
        raise RecipeError(f"from_dict: {what} needs {', '.join(map(repr, missing))}, which is missing")


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """The annotations of a class; none where a class of your own has some that cannot be resolved here."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation, as JSON has it: integers pass for floats, booleans for no number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint is Any:
        return True
    if hint in (int, float):  # what torch can hold
        small = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return small or (hint is float and isinstance(value, float))
    plain = hint if origin is None else origin
    return not isinstance(plain, type) or isinstance(value, plain)
