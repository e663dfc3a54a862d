"""The axis letters, checked in one place.

B batch, T time, H heads, G groups of heads, K key dim, V value dim, N state slots, C chunk, D model width.
A pattern names one letter per axis, "*" any number of further axes, "|" separates alternatives: "B T H | B T H K".
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from recur.kernels.cached import cached

T = TypeVar("T")
PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors with data and a shape of numbers, outside compilation


class ShapeError(ValueError):
    """Axes that do not fit, named in the letters of the docstring.

    >>> recur.gated_scan(torch.ones(1, 4, 2), torch.zeros(3))
    Traceback (most recent call last):
    recur.shapes.ShapeError: gated_scan: x has *=(2,) but log_decay has *=(3,); expected x: [B T *] and ...
    """


def bind(function: str, **arguments: tuple[Tensor | None, str]) -> dict[str, Any]:
    """Match every tensor with its pattern and return the size of each letter ("*" as a tuple).

    `bind("gated_scan", x=(x, "B T *"))` returns {"B": 2, "T": 128, "*": (64,)}. A tensor that is None is skipped. Of
    alternatives with as many axes, the first whose sizes are those of the arguments before it is taken.

    Raises: TypeError if an argument is not a tensor, ShapeError if ranks or sizes disagree, ValueError if devices do.
    """
    names, patterns, tensors = tuple(arguments), [], []
    for tensor, pattern in arguments.values():
        tensors.append(tensor)
        patterns.append(pattern)
    return per_signature(_BOUND, (names, *patterns), tensors, lambda: _bind(function, arguments)).copy()


_BOUND: dict[Hashable, dict[str, Any]] = {}


def _bind(function: str, arguments: dict[str, tuple[Tensor | None, str]]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    device, device_of = None, ""
    for name, (tensor, patterns) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor [{patterns}], got {type(tensor).__name__}")
        shape = tensor.shape
        letters = _fitting(patterns, shape, sizes)
        if not letters:
            raise ShapeError(f"{function}: {name} must be [{patterns}], got shape {tuple(shape)}")
        for letter, size in zip(letters, _split(letters, shape) if "*" in letters else shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                fitting = {o: _fitting(p, x.shape, sizes) for o, (x, p) in arguments.items() if isinstance(x, Tensor)}
                other = next(o for o, found in fitting.items() if letter in found)
                raise ShapeError(
                    f"{function}: {other} has {letter}={sizes[letter]} but {name} has {letter}={size}; expected "
                    f"{other}: [{arguments[other][1]}] and {name}: [{patterns}], got {name} of shape {tuple(shape)}"
                )
        if device is None:
            device, device_of = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{function}: {device_of} is on {device} but {name} is on {tensor.device}")
    return sizes


_KNOWN: dict[tuple[str, int], list[str]] = {}  # of the patterns in our code: a few dozen


def _of_rank(patterns: str, rank: int) -> list[str]:
    """The alternatives that have this rank, found once; torch.compile warns of a cache of functools."""
    known = None if torch.compiler.is_compiling() else _KNOWN.get((patterns, rank))
    if known is None:
        known = [pattern[::2] for pattern in patterns.split(" | ")]
        known = [letters for letters in known if len(letters) == rank or ("*" in letters and rank >= len(letters) - 1)]
        if not torch.compiler.is_compiling():
            _KNOWN[patterns, rank] = known
    return known


def _fitting(patterns: str, shape: torch.Size, sizes: dict[str, Any]) -> str:
    """The letters of the alternative that has this rank, or none: of several the first that agrees with most sizes."""
    found = _of_rank(patterns, len(shape))
    best, most = "", -1
    for letters in found:
        agreeing = sum([sizes.get(x, n) == n for x, n in zip(letters, shape, strict=False)]) if found[1:] else 0
        if agreeing > most:
            best, most = letters, agreeing
    return best


def _split(letters: str, shape: torch.Size) -> list[Any]:
    """One size per letter; the sizes that "*" stands for as a tuple."""
    at, extra = letters.index("*"), len(shape) - len(letters) + 1
    return [*shape[:at], tuple(shape[at : at + extra]), *shape[at + extra :]]


def per_signature(known: dict[Hashable, T], options: Hashable, tensors: Sequence[Any], check: Callable[[], T]) -> T:
    """check(), which raises, or answers what follows from options and from shapes, dtypes and devices of arguments.

    The answer for such arguments is looked up if it is `known`; an error never is.
    """
    if torch.compiler.is_compiling():
        return check()
    found: list[Any] = [options]
    for x in tensors:
        if x is None:
            found.append(None)
        elif type(x) in PLAIN:
            found += (x.shape, x.dtype, x.device)
        else:  # sizes may be symbols, and what is no tensor has none
            return check()
    return cached(known, tuple(found), check)


def expect(function: str, name: str, tensor: Tensor | None, letters: str, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless the tensor, if given, has exactly this shape, whose axes are these letters."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ShapeError(f"{function}: {name} must be [{letters}] = {shape}, got shape {tuple(tensor.shape)}")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64 (or complex128), float32 otherwise: what states and decays are computed in."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(t is not None and t.dtype in wide for t in tensors) else torch.float32


def check_float(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is real and floating."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be real and floating, got {tensor.dtype}")


def check_number(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given is floating or complex."""
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{function}: {name} must be floating or complex, got {tensor.dtype}")


def check_given(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError if an argument that has no default is not a tensor; `bind` would take None for one left out."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {tensor and type(tensor).__name__}")


def readable(tensor: Tensor) -> bool:
    """Whether there are values that may be looked at cheaply: those of a plain tensor on a CPU, outside compilation.

    False on the meta device, for fake tensors and other subclasses, under a dispatch mode, and inside torch.func's
    transforms.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in PLAIN
        and tensor.numel() > 0
        and not is_in_torch_dispatch_mode()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether the values may be looked at and are finite, their sum included: then there is nothing to guard against.

    One pass over the tensor. Both answers lead to the same numbers; the careful way costs more passes.
    """
    return readable(tensor) and bool(tensor.detach().sum().isfinite())


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which nothing is cast on the tensor's device; the meta device knows no autocast of its own."""
    kind = tensor.device.type
    kind = "cpu" if kind == "meta" else kind
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def pick(function: str, argument: str, value: Any, choices: Mapping[Any, T]) -> T:
    """What this value stands for. Raises: ValueError listing the values there are."""
    if value not in choices:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return choices[value]
