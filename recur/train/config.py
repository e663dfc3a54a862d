"""Typed configuration: a dataclass field is a flag, a key of a YAML or JSON file, and a line of the saved config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recur.axes import shown
from recur.reading import InputError, one_line, read_json, read_text, unknown


def number(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A reader of one number, which names `rule` when the text does not fit it."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {shown(text)}")
        return value

    return read


def whole(low: int, high: int = 2**31) -> Callable[[str], Any]:
    """A reader of a whole number from `low` up to but not including `high`, which a row or a loop can have."""
    at_least = number(int, f"a whole number of at least {low}", lambda n: n >= low)
    below = number(int, f"a whole number below {high}", lambda n: n < high)
    return lambda text: below(str(at_least(text)))


count = whole(1)
natural = whole(0)
seed = number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
positive = number(float, "a positive number", lambda x: 0 < x < math.inf)
at_least_0 = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
fraction = number(float, "a number from 0 up to but not including 1", lambda x: 0 <= x < 1)
share = number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def path(text: str) -> str:
    """A place on this machine as a full path (a run may be resumed from another folder); hub:NAME as it is."""
    return text if text.startswith("hub:") else str(file_or_folder(text).resolve())


def file_or_folder(text: str) -> Path:
    """The name of a file or folder, which need not exist."""
    try:
        if text.strip():
            found = Path(text).expanduser()
            found.resolve()
            return found
        why = "an empty one"
    except (RuntimeError, ValueError, OSError) as error:  # ~nobody, links in a circle, a zero byte, too many letters
        why = f"{shown(text)}: {one_line(error)}"
    raise argparse.ArgumentTypeError(f"must be the name of a file or a folder, got {why}")


def one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {shown(text)}")
        return text

    return read


def several(read: Callable[[str], Any], size: int | None = None) -> Callable[[str], tuple[Any, ...]]:
    """Values separated by commas, each read by `read`; exactly `size` of them if given."""

    def read_all(text: str) -> tuple[Any, ...]:
        values = tuple(read(piece.strip()) for piece in text.split(","))
        if size is not None and len(values) != size:
            raise argparse.ArgumentTypeError(f"must be {size} values separated by commas, got {shown(text)}")
        return values

    return read_all


def option(default: Any, read: Callable[[str], Any], about: str, *, flag: str = "") -> Any:
    """A dataclass field: its default, how its value is read from text, what it means, and its flag if not --NAME."""
    return field(default=default, metadata={"read": read, "about": about, "flag": flag})


FFN = ("paper", "none", "gelu", "swiglu", "gated", "channel_mix", "key_mix")


@dataclass(frozen=True)
class Settings:
    """Everything about model, optimiser and run that is the same for every task."""

    recipe: str = option("longhorn", str, "preset[:option=value,...], joined by + for a hybrid, or @FILE.json")
    imports: str | None = option(None, path, "Python file with parts and recipes of your own", flag="--import")
    dim: int = option(256, count, "width")
    depth: int = option(2, whole(1, 10_000), "layers")
    ffn: str = option("paper", one_of(*FFN), "feed-forward of every layer")
    norm: str = option("paper", one_of("paper", "none", "rms", "layer", "l2"), "norm of the residual stream")
    block: str = option("pre", one_of("pre", "post"), "side of the residual sum that is normalised")
    head: str = option("tied", one_of("tied", "own"), "output matrix of a language model: the embedding, or its own")
    positions: str = option("paper", one_of("paper", "none", "sinusoidal"), "positions added to the embedding")
    dropout: float = option(0.0, fraction, "dropout probability")

    length: int = option(128, count, "tokens per row")
    batch: int = option(16, count, "rows per update, over all processes and accumulation steps")
    accumulate: int = option(1, count, "forward passes per update")

    steps: int = option(500, count, "updates of the weights")
    lr: float = option(3e-3, positive, "peak learning rate")
    min_lr: float = option(0.1, at_least_0, "final learning rate, as a fraction of the peak")
    schedule: str = option("cosine", one_of("cosine", "polynomial", "inverse_sqrt", "constant"), "after the warm-up")
    warmup: int | None = option(None, natural, "steps of linear warm-up; a twentieth of all when not given")
    power: float = option(1.0, positive, "exponent of the polynomial schedule")
    weight_decay: float = option(0.1, at_least_0, "of AdamW, on the weights declared to decay")
    betas: tuple[float, float] = option((0.9, 0.95), several(fraction, 2), "of AdamW")
    clip: float = option(1.0, at_least_0, "largest norm of the gradient; 0 leaves it as it is")

    init: str | None = option(None, path, "first weights: a run's folder, one of its checkpoints, or a converted file")
    every: int = option(100, count, "steps from one checkpoint and evaluation to the next")
    evaluate: int = option(64, count, "rows of a periodic evaluation")
    keep: int = option(1, count, "newest checkpoints kept, beside the best one")
    seed: int = option(0, seed, "of weights, batches and samples")
    seconds: float | None = option(None, positive, "stop training after this time, as if all steps were done")
    device: str = option("cpu", str, "cpu, cuda, mps")
    threads: int = option(0, natural, "CPU threads; 0 leaves out processors that other work keeps busy")
    precision: str = option("float32", one_of("float32", "bfloat16"), "bfloat16 runs matmuls in it (autocast)")
    recompute: str = option("none", one_of("none", "layers"), "layers: recompute activations in the backward pass")
    compile: str = option(
        "auto",
        str,
        "none, or the backend of torch.compile for the layers; auto is inductor on a GPU from 1,000 steps on",
    )


def known(*classes: type) -> dict[str, Field[Any]]:
    """The options of some dataclasses by name."""
    return {f.name: f for cls in classes for f in fields(cls) if "read" in f.metadata}


def add_flags(parser: argparse.ArgumentParser, options: Mapping[str, Field[Any]], defaults: Mapping[str, Any]) -> None:
    """A flag for every option. Flags that are not given set nothing, so that files and defaults apply."""
    for name, made in options.items():
        default = defaults.get(name, made.default)
        about = made.metadata["about"] + ("" if default is None else f" ({_text(default)})")
        flag, read = made.metadata["flag"] or f"--{name.replace('_', '-')}", made.metadata["read"]
        parser.add_argument(flag, dest=name, type=read, default=argparse.SUPPRESS, help=about.replace("%", "%%"))


def read_file(place: Path, options: Mapping[str, Field[Any]], task: str) -> dict[str, Any]:
    """Choices from a YAML or JSON file: flat keys, the names of the flags, and perhaps the task they are for.

    Raises: InputError naming the key that is unknown or the rule that its value breaks.
    """
    values = _yaml(place) if place.suffix in (".yaml", ".yml") else read_json(place)
    if not isinstance(values, dict):
        raise InputError(f"{place} must hold keys and values, got {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise InputError(f"{place}: keys must be names of options, got {shown(key)}")
    if (of := values.pop("task", task)) != task:
        raise InputError(f"{place} is of another task than {task}, got {shown(of)}")
    flags = {made.metadata["flag"].removeprefix("--"): name for name, made in options.items()}
    return checked({flags.get(key, key.replace("-", "_")): value for key, value in values.items()}, options, str(place))


def _yaml(place: Path) -> Any:
    """The value of a YAML file whose plain words are text, as options read text: off is the word off, 1e-3 a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    null = "tag:yaml.org,2002:null"
    kept = {
        first: [rule for rule in rules if rule[0] == null] for first, rules in Loader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = kept
    text = read_text(place)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # !!int of thousands of digits; thousands of brackets
        raise InputError(f"{place} is not valid YAML: {one_line(error)}") from error


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
    """A value of a file as the text of a flag: one word, or a flat list separated by commas."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if item is not None and not isinstance(item, (str, int, float)):
            raise argparse.ArgumentTypeError(f"must be a word, a number or a flat list of them, got {shown(value)}")
    return ",".join(item if isinstance(item, str) else shown(item) for item in items)
