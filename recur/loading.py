"""A trained model by the name of its folder or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Loaded(NamedTuple):
    """A model in evaluation mode on the CPU, and the tokenizer it was trained with; None if its file holds none."""

    model: Any
    tokenizer: Any


def load_model(place: str | Path, *, imports: str | Path | None = None) -> Loaded:
    """The model in a run's folder (of `recur train`), or in a .safetensors file (of `recur convert`).

    Args:
        place:   the folder or the file.
        imports: a Python file with your own parts, if it is not the one that the run names.

    Returns: model, tokenizer = load_model("runs/book"); tokenizer.encode("The ") and .decode(ids) are its use.
    Raises: InputError in one line if there is no checkpoint, it is damaged, or its task writes no text; CheckpointError
        for a file that is none of `recur convert`.

    >>> from pathlib import Path
    >>> place, layer = Path("doctest.safetensors"), recur.Mixer("mamba", dim=16)
    >>> recur.convert.save_module(place, "mamba", {"d_model": 16}, layer)
    >>> model, tokenizer = recur.load_model(place)
    >>> print(type(model).__name__, tokenizer)
    Mixer None
    """
    place = Path(place)
    if place.is_file():
        from recur.convert.files import load_module

        return Loaded(load_module(place)[2].eval(), None)
    from recur.train import run

    return Loaded(*run.load_model(place, imports=imports))
