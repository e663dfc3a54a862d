"""Key maps: every official tensor is a view of one of our parameters, so loading copies into it and saving out of it.

A key map goes from our names to official ones. "*" stands for one segment of a dotted name, and the official name
repeats what each stood for, in order: {"blocks.*.mixer.parts.project.*": "layers.*.in_proj.*"}. Lines for what our
module lacks are idle, and a later parameter takes an official name from an earlier one, as a head of its own does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from recur.weights import unwrapped

Place = Callable[[Any, Tensor], Mapping[str, Tensor]]  # the part, its weight -> official names and views
Keys = Mapping[str, "str | Place"]


def renamed(where: str, names: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """New key -> key, of the checkpoint that is called `where`.   Raises: ValueError for two keys with one new key."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(rename(name), name)) != name:
            raise ValueError(f"{where} must hold {rename(name)} once, got {other} and {name}")
    return found


def tied(*names: str) -> Place:
    """One tensor under several official names."""
    return lambda part, weight: dict.fromkeys(names, weight)


def rows(*names: str) -> Place:
    """A Project cut by outputs: one official name each, in their order. Equal neighbours lie in one official tensor."""

    def place(part: Any, weight: Tensor) -> Mapping[str, Tensor]:
        runs = groupby(zip(names, part.splits, strict=True), key=lambda pair: pair[0])
        sizes = {name: sum(size for _, size in run) for name, run in runs}
        return dict(zip(sizes, weight.split(list(sizes.values())), strict=True))

    return place


def taps(name: str) -> Place:
    """The taps of a depthwise convolution: ours [C W], a Conv1d's [C 1 W]."""
    return lambda part, weight: {name: weight[:, None]}


def merged(name: str, first: int = 0) -> Place:
    """Heads and their channels in one axis: ours [... H K], theirs [... D], merged from axis `first` on."""
    return lambda part, weight: {name: weight.flatten(first)}


def transposed(place: str | Place) -> Place:
    """Matrices that the original keeps as [in, out]."""

    def named(part: Any, weight: Tensor) -> Mapping[str, Tensor]:
        here = {place: weight} if isinstance(place, str) else place(part, weight)
        return {name: view.mT for name, view in here.items()}

    return named


def shaped(name: str, *sizes: int) -> Place:
    """The same numbers under other axes."""
    return lambda part, weight: {name: weight.view(sizes)}


def under(ours: str, theirs: str, keys: Keys) -> dict[str, str | Place]:
    """The same map one level down in both modules."""

    def moved(place: str | Place) -> str | Place:
        if isinstance(place, str):
            return theirs + place
        return lambda part, weight: {theirs + name: view for name, view in place(part, weight).items()}

    return {ours + name: moved(place) for name, place in keys.items()}


def stack(
    layers: str, mixer: tuple[str, Keys], ffn: tuple[str, Keys], norms: tuple[str, str], final: str
) -> dict[str, str | Place]:
    """The residual stack of a LanguageModel: where its layers lie, and mixer, feed-forward and norms in each."""
    return {
        **under("blocks.*.mixer.", layers + mixer[0], mixer[1]),
        "blocks.*.mixer_norm.weights.*": f"{layers}{norms[0]}.*",
        **under("blocks.*.ffn.", layers + ffn[0], ffn[1]),
        "blocks.*.ffn_norm.weights.*": f"{layers}{norms[1]}.*",
        "final_norm.weights.*": f"{final}.*",
    }


def views(module: nn.Module, keys: Keys) -> dict[str, Tensor]:
    """Official name -> the view of our parameter that holds its numbers; tied names share one.

    Raises: ValueError for a parameter that has no place in the map.
    """
    patterns = {re.compile(re.escape(name).replace(r"\*", r"([^.]+)")): place for name, place in keys.items()}
    found: dict[str, Tensor] = {}
    homeless = []
    for name, weight in module.named_parameters():
        plain = unwrapped(name)
        hits = [(match.groups(), place) for pattern, place in patterns.items() if (match := pattern.fullmatch(plain))]
        if not hits:
            homeless.append(name)
            continue
        segments, place = hits[0]
        part = module.get_submodule(name.rpartition(".")[0])
        here = {place: weight.detach()} if isinstance(place, str) else place(part, weight.detach())
        found |= {theirs.replace("*", "{}").format(*segments): view for theirs, view in here.items()}
    if homeless:
        raise ValueError(f"convert: every parameter must have an official place, {', '.join(homeless)} have none")
    return found
