"""Typed configuration: a dataclass field is a flag, a key of a YAML or JSON file, and a line of the saved config."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """What the caller handed in cannot be used; the message is one line and names the remedy where there is one."""


def number(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A reader of one number, which names `rule` when the text is no such number."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return read


count = number(int, "a whole number of at least 1", lambda n: n >= 1)
natural = number(int, "a whole number of at least 0", lambda n: n >= 0)
seed = number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
positive = number(float, "a positive number", lambda x: 0 < x < math.inf)
at_least_0 = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
fraction = number(float, "a number from 0 up to but not including 1", lambda x: 0 <= x < 1)
share = number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def path(text: str) -> str:
    """A place on this machine as a full path (a run may be resumed from another folder); hub:NAME as it is."""
    return text if text.startswith("hub:") else str(Path(text).expanduser().resolve())


def one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return text

    return read


def several(read: Callable[[str], Any], size: int | None = None) -> Callable[[str], tuple[Any, ...]]:
    """Values separated by commas, each read by `read`; exactly `size` of them if given."""

    def read_all(text: str) -> tuple[Any, ...]:
        values = tuple(read(piece.strip()) for piece in text.split(","))
        if size is not None and len(values) != size:
            raise argparse.ArgumentTypeError(f"must be {size} values separated by commas, got {text!r}")
        return values

    return read_all


def option(default: Any, read: Callable[[str], Any], about: str) -> Any:
    """A dataclass field: its default, how its value is read from text, and what it means."""
    return field(default=default, metadata={"read": read, "about": about})


FFN = ("paper", "none", "gelu", "swiglu", "gated", "channel_mix")


@dataclass(frozen=True)
class Settings:
    """Everything about model, optimiser and run that is the same for every task."""

    recipe: str = option("longhorn", str, "preset[:option=value,...], joined by + for a hybrid, or @FILE.json")
    dim: int = option(256, count, "width")
    depth: int = option(2, count, "layers")
    ffn: str = option("paper", one_of(*FFN), "feed-forward of every layer")
    norm: str = option("paper", one_of("paper", "none", "rms", "layer", "l2"), "norm of the residual stream")
    block: str = option("pre", one_of("pre", "post"), "side of the residual sum that is normalised")
    head: str = option("tied", one_of("tied", "own"), "read-out of a language model: the embedding, or its own")
    positions: str = option("none", one_of("none", "sinusoidal"), "positions added to the embedding")
    dropout: float = option(0.0, fraction, "probability")

    length: int = option(128, count, "tokens in a row")
    batch: int = option(16, count, "rows in an update, over all processes and accumulation steps")
    accumulate: int = option(1, count, "forward passes an update is spread over")

    steps: int = option(500, count, "updates of the weights")
    lr: float = option(3e-3, positive, "peak learning rate")
    min_lr: float = option(0.1, at_least_0, "last learning rate, as a share of the peak")
    schedule: str = option("cosine", one_of("cosine", "polynomial", "inverse_sqrt", "constant"), "after the warm-up")
    warmup: int | None = option(None, natural, "steps of linear warm-up; a twentieth of all when not given")
    power: float = option(1.0, positive, "of the polynomial schedule")
    weight_decay: float = option(0.1, at_least_0, "of AdamW, on the weights declared to decay")
    betas: tuple[float, float] = option((0.9, 0.95), several(fraction, 2), "of AdamW")
    clip: float = option(1.0, at_least_0, "largest norm of the gradient; 0 leaves it as it is")

    init: str | None = option(None, path, "first weights: a run's folder, one of its checkpoints, or a converted file")
    every: int = option(100, count, "steps from one checkpoint and evaluation to the next")
    evaluate: int = option(64, count, "rows of a periodic evaluation")
    keep: int = option(1, count, "newest checkpoints kept, beside the best one")
    seed: int = option(0, seed, "of weights, batches and samples")
    seconds: float | None = option(None, positive, "stop training after this long, as if steps had been reached")
    device: str = option("cpu", str, "cpu, cuda, mps")
    precision: str = option("float32", one_of("float32", "bfloat16"), "bfloat16 runs matmuls in it (autocast)")
    recompute: str = option("none", one_of("none", "layers"), "layers: recompute activations in the backward pass")
    compile: str = option("none", str, "backend of torch.compile, such as inductor")


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """That no such thing has this name, and which ones are near."""
    near = difflib.get_close_matches(name, list(names))
    hint = f"did you mean {' or '.join(near)}?" if near else f"known {kind}s: {', '.join(names)}"
    return f"no {kind} is called {name!r}; {hint}"


def known(*classes: type) -> dict[str, Field[Any]]:
    """The options of some dataclasses by name."""
    return {f.name: f for cls in classes for f in fields(cls) if "read" in f.metadata}


def add_flags(parser: argparse.ArgumentParser, options: Mapping[str, Field[Any]], defaults: Mapping[str, Any]) -> None:
    """A flag for every option; what is not given leaves no trace, so that files and defaults can be under it."""
    for name, made in options.items():
        default = defaults.get(name, made.default)
        about = made.metadata["about"] + ("" if default is None else f" ({_text(default)})")
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=made.metadata["read"], default=argparse.SUPPRESS, help=about.replace("%", "%%"))


def read_file(place: Path, options: Mapping[str, Field[Any]], task: str) -> dict[str, Any]:
    """Choices from a YAML or JSON file: flat keys, the names of the flags, and perhaps the task they are for.

    Raises: InputError naming the key that is unknown or the rule that its value breaks.
    """
    try:
        text = place.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {place}: {(error.strerror or str(error)).lower()}") from error
    if place.suffix in (".yaml", ".yml"):
        import yaml

        read: Callable[[str], Any] = yaml.safe_load
        mistakes: type[Exception] = yaml.YAMLError
    else:
        read, mistakes = json.loads, json.JSONDecodeError
    try:
        values = read(text)
    except mistakes as error:
        raise InputError(f"{place} is no {'YAML' if read is not json.loads else 'JSON'}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{place} must hold keys and values, got {type(values).__name__}")
    if values.pop("task", task) != task:
        raise InputError(f"{place} is of another task than {task}")
    return checked({key.replace("-", "_"): value for key, value in values.items()}, options, str(place))


def checked(values: Mapping[str, Any], options: Mapping[str, Field[Any]], place: str) -> dict[str, Any]:
    """The values, each read by its own option's rule."""
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key not in options:
            raise InputError(f"{place}: {unknown('option', key, options)}")
        if value is None and options[key].default is None:
            chosen[key] = None
            continue
        try:
            chosen[key] = options[key].metadata["read"](_text(value))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{place}: {key} {error}") from error
    return chosen


def resolved(cls: type, *layers: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from choices, later layers above earlier ones; keys of other classes are left out."""
    names = known(cls)
    merged = {name: value for layer in layers for name, value in layer.items() if name in names}
    return cls(**merged)


def plain(*records: Any) -> dict[str, Any]:
    """The options of some records as a JSON value."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for record in records
        for name, value in asdict(record).items()
        if name in known(type(record))
    }


def _text(value: Any) -> str:
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    return ",".join(map(str, value)) if listed else str(value)
