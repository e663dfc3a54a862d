"""What this machine offers a run: threads, memory for a model, and compilation."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import nn

from recur import LanguageModel
from recur.kernel import installed
from recur.reading import InputError, unknown
from recur.train.config import Settings

LONG = 1000  # steps that pay for the compilation of a layer


def with_threads(settings: Settings) -> Settings:
    """Settings whose threads are a number: those that torch would use, less the processors that are busy already.

    A thread that waits for a processor makes all others wait: on a busy machine two threads may take three times as
    long as one. The number is part of a run, as sums depend on it in their last bits.
    """
    if settings.device != "cpu" or settings.threads:
        return settings
    return replace(settings, threads=idle_threads(torch.get_num_threads(), os.cpu_count() or 1, _load()))


def idle_threads(most: int, processors: int, load: float) -> int:
    """At least one of `most`; `load` is how many processes ran or waited to run in the last minute."""
    return max(1, min(most, processors - round(load)))


def use_threads(settings: Settings) -> str:
    """Have torch use them.   Returns: words for the report."""
    if settings.device != "cpu":
        return ""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    used = torch.get_num_threads()
    return f", {used} thread{'s' * (used > 1)} of {os.cpu_count()} processors (--threads)"


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def check_memory(numbers: int, what: str) -> None:
    """Raise InputError if the weights alone, in float32, exceed this machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * numbers > held:
        size = f"{numbers:,} weights take {4 * numbers / 2**30:,.0f} GiB, of {held / 2**30:,.0f} here"
        raise InputError(f"there is not enough memory for {what}: its {size}")


def backend(settings: Settings) -> str | None:
    """The backend that compiles the layers of a run; None if they run eagerly, as short runs do by "auto".

    Raises: InputError unless torch.compile knows it.
    """
    name = settings.compile
    if name == "auto":
        pays = settings.device == "cuda" and installed() is not None and settings.steps >= LONG
        name = "inductor" if pays else "none"
    if name == "none":
        return None
    from torch._dynamo import list_backends

    if name not in (names := ["none", "auto", *list_backends(exclude_tags=())]):
        raise InputError(f"--compile: {unknown('backend', name, names)}")
    return name


def compile_layers(model: nn.Module, settings: Settings) -> None:
    """Have every language model in `model` compile its layers, if the run is compiled.   Raises: as `backend`."""
    if (name := backend(settings)) is not None:
        for part in model.modules():
            if isinstance(part, LanguageModel):
                part.compile_layers(backend=name)


def use_compiler(settings: Settings) -> str:
    """Words for the report."""
    name = backend(settings)
    return "" if name is None else f", layers compiled by {name} in their first steps (--compile none: eager)"
