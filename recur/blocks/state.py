"""States of layers: what one must look like, whether one that is handed in fits, how a step writes into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from recur.recipe import Site, State
from recur.shapes import ShapeError

Layout = Any  # a dict or list of layouts, a Leaf, or the type of a leaf that is not a tensor

REMEDY = "init_state(batch) makes one that fits"


REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
INTEGER = (torch.int64, torch.int32)
# what a step cannot keep a memory in, beside tokens that it computes in this; it does round to bfloat16, if asked
NARROW = {
    torch.float32: (torch.float16, torch.complex32),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex32),
}


@dataclass(frozen=True)
class Leaf:
    """What a tensor of a state must be: one row per sequence, then these sizes; None is any, for caches that grow.

    dtypes: what it may be; any width will do, so that a state goes on after a cast.
    memory: whether it is a recurrent memory, which scans want in float32 or wider.
    """

    sizes: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]
    memory: bool = False


POSITION = Leaf((), INTEGER)


def layout(body: Any, site: Site) -> Layout:
    """The layout of the state of a chain of parts, read off the one it starts with."""
    # in bfloat16, so that what is float32 nevertheless is a memory
    site = Site(**{**vars(site), "dtype": torch.bfloat16, "device": torch.device("meta")})
    return tree_map(_leaf, body.init_state(site, 1, None))


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return type(value)
    dtypes = next((kind for kind in (REAL, COMPLEX, INTEGER) if value.dtype in kind), (value.dtype,))
    memory = value.dtype in (torch.float32, torch.complex64)
    return Leaf(tuple(size or None for size in value.shape[1:]), dtypes, memory)


def fitting(
    function: str, wanted: Layout, state: State, rows: int, x: Tensor, *, step: bool, letter: str = "B"
) -> State:
    """The state, checked, with leaves that can be computed with: the same object where nothing must be done to it.

    Tensors made in inference mode are copied outside of it, and in a step a memory too narrow for x is widened.

    Args: rows: sequences, an axis called `letter`; x: the tokens it meets; step: whether it will be overwritten.
    Raises: TypeError, ValueError or ShapeError naming the first entry that does not fit.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = NARROW[wide] if step else ()
    inference, device, unready = torch.is_inference_mode_enabled(), x.device, False

    def fail(error: type[Exception], path: tuple[Any, ...], rule: str, got: str) -> Exception:
        name = "state" + "".join(f"[{key!r}]" for key in path)
        return error(f"{function}: {name} must {rule}, got {got}; {REMEDY}")

    def check(wanted: Layout, value: Any, path: tuple[Any, ...]) -> None:
        nonlocal device, unready
        if isinstance(wanted, Leaf):
            if not isinstance(value, Tensor):
                raise fail(TypeError, path, "be a tensor", type(value).__name__)
            sizes = (rows, *wanted.sizes)
            if value.shape != sizes and not _fits(value.shape, sizes):
                axes = ", ".join("*" if size is None else str(size) for size in sizes)
                rule = f"be [{letter}{' ...' * (len(sizes) > 1)}] = ({axes}{',' * (len(sizes) == 1)})"
                raise fail(ShapeError, path, rule, f"shape {tuple(value.shape)}")
            if value.dtype not in wanted.dtypes:
                raise fail(TypeError, path, f"be {' or '.join(map(str, wanted.dtypes))}", str(value.dtype))
            if len(path) > 1 and path[-1] == "position":
                device = value.device  # each layer of a model may be on a device of its own
            if value.device != device:
                raise fail(ValueError, path, f"be on {device}", f"one on {value.device}")
            unready = unready or (wanted.memory and value.dtype in narrow) or (not inference and value.is_inference())
        elif isinstance(wanted, dict):
            if not isinstance(value, dict):
                raise fail(TypeError, path, f"be a dict with the keys {_listed(wanted)}", type(value).__name__)
            if value.keys() != wanted.keys():
                raise fail(ValueError, path, f"have the keys {_listed(wanted)}", _listed(value))
            for key, inner in wanted.items():
                check(inner, value[key], (*path, key))
        elif isinstance(wanted, list):
            if not isinstance(value, (list, tuple)) or len(value) != len(wanted):
                got = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
                raise fail(ValueError, path, f"be a list of {len(wanted)} entries", got)
            for number, inner in enumerate(wanted):
                check(inner, value[number], (*path, number))
        elif not isinstance(value, wanted):
            raise fail(TypeError, path, f"be of type {wanted.__name__}", type(value).__name__)

    check(wanted, state, ())
    return _made_ready(wanted, state, wide, narrow) if unready else state


def _listed(keys: Any) -> str:
    return ", ".join(map(str, keys)) or "none"


def _fits(shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    """Whether a shape has these sizes, where None is any."""
    return len(shape) == len(sizes) and all(want in (None, size) for size, want in zip(shape, sizes, strict=True))


def _made_ready(wanted: Layout, value: Any, wide: torch.dtype, narrow: tuple[torch.dtype, ...]) -> Any:
    if isinstance(wanted, dict):
        return {key: _made_ready(inner, value[key], wide, narrow) for key, inner in wanted.items()}
    if isinstance(wanted, list):
        return [_made_ready(inner, old, wide, narrow) for inner, old in zip(wanted, value, strict=True)]
    if not isinstance(value, Tensor):
        return value
    if wanted.memory and value.dtype in narrow:
        return value.to(wide.to_complex() if value.is_complex() else wide)
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def overwrite(state: State, new: State) -> None:
    """Put a new state into an old one: in place if the old tensor can hold it, else (a cache grew) by reference."""
    for key, value in new.items() if isinstance(new, dict) else enumerate(new):
        old = state[key]
        if isinstance(value, (dict, list)):
            overwrite(old, value)
        elif isinstance(value, Tensor) and value is not old and _holds(old, value):
            old.copy_(value)
        else:
            state[key] = value


def _holds(old: Tensor, value: Tensor) -> bool:
    return (
        old.shape == value.shape
        and (old.dtype == value.dtype or torch.promote_types(old.dtype, value.dtype) == old.dtype)
        and (not old.is_inference() or torch.is_inference_mode_enabled())
    )


def passed(position: Tensor, length: int, cu_seqlens: Tensor | None, in_place: bool) -> Tensor:
    """The positions after these tokens."""
    if in_place:
        return position.add_(length)
    return position + (length if cu_seqlens is None else cu_seqlens.diff())


def nbytes(state: State) -> int:
    """Bytes of all tensors of a state.

    Args:
        state: of a layer or a model.

    >>> model = recur.LanguageModel("gla:heads=2", vocab_size=256, dim=32, depth=2)
    >>> recur.blocks.nbytes(model.init_state(batch=1))  # whatever the length of the sequence
    2088
    """
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def detach(state: State) -> State:
    """The same numbers without their history, as truncated backpropagation wants them.

    Args:
        state: of a layer or a model.

    >>> layer = recur.Mixer("gla:heads=2", dim=32)
    >>> _, state = layer(torch.randn(1, 5, 32))
    >>> recur.detach(state)["parts"]["outer_scan"].requires_grad
    False
    """
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
