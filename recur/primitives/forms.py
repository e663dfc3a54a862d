"""What all scans have in common: their result, forms, the token loop, packing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from recur.kernels.packing import document_of, mirror, state_count
from recur.shapes import ShapeError, readable


class ScanOut(NamedTuple):
    """What a scan returns: `y`, one output per token, and `state`, the memory after the last token.

    >>> y, state = recur.gated_scan(torch.ones(1, 2, 1), torch.zeros(1))
    >>> y.flatten(), state
    (tensor([1., 2.]), tensor([[2.]]))

    Attributes:
        y: [B T ...].
        state: [B ...].
    """

    y: Tensor
    state: Tensor


class SlowPath(UserWarning):
    """Warns that form="auto" did not take the kernel on a GPU: why, and the remedy. Once per reason and process.

    `generate` warns so too, where it runs step by step because it cannot capture a CUDA graph.

    `warnings.simplefilter("ignore", recur.SlowPath)` silences it, "error" makes it an exception.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", recur.SlowPath)  # raise where a kernel is not taken
    ...     y, _ = recur.gated_scan(torch.ones(1, 2, 1), torch.zeros(1))  # on a CPU there is none to take
    """


class Refusal(NamedTuple):
    """Why a kernel does not compute a call, the nearest form that does, and what would let the kernel compute it."""

    reason: str
    nearest: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.nearest}"


class Choice(NamedTuple):
    """What a function ran: "triton", another form of a scan, or "torch" for the formula of a norm, gate or step.

    refusal: why it is not the kernel, None if it is, or if the form was asked for by name.
    """

    function: str
    form: str
    refusal: Refusal | None


NO_GPU = Refusal("form='triton' needs a GPU", "form='chunked' runs anywhere", "move the tensors to a GPU")
listener: ContextVar[Callable[[Choice], None] | None] = ContextVar("listener", default=None)  # set by recur.explain
_warned: set[str] = set()  # what the kernels do not cover, as far as it was said


def chosen(function: str, form: str, refusal: Refusal | None, on_gpu: bool) -> str:
    """The form, after it was noted, and the first time for each reason to leave the kernel on a GPU warned about."""
    if torch.compiler.is_compiling():
        if on_gpu and refusal is not None:
            _warn(function, form, *refusal)
        return form
    if (note := listener.get()) is not None:
        note(Choice(function, form, refusal))
    elif on_gpu and refusal is not None:
        _warn(function, form, *refusal)
    return form


@torch.compiler.assume_constant_result
def _warn(function: str, form: str, reason: str, nearest: str, remedy: str) -> None:
    """While a graph is traced this runs then and there, and leaves nothing in the graph."""
    lacks = reason.rpartition("does not cover ")[2]
    if lacks not in _warned:
        _warned.add(lacks)
        runs = f'form="auto" is {form!r} here' if form != "torch" else "the formula in torch runs here"
        warnings.warn(f"{function}: {runs}: {reason}. Remedy: {remedy}", SlowPath, stacklevel=4)


def choose_form(
    function: str, form: str, available: tuple[str, ...], device: torch.device, refusal: Callable[..., Refusal | None]
) -> str:
    """The form to run: "auto" is "triton" for what the kernel covers on a GPU and "chunked" for all else; any other
    name is used or raises an error.

    Args: available: the forms of this function; refusal: why "triton" cannot run this call on a device, None if it can.
    Raises: ValueError for a name that is not a form, NotImplementedError for one this function, or this call, lacks.
    Warns: SlowPath, once per reason, if "auto" is "chunked" on a GPU.
    """
    names = ("auto", "recurrent", "chunked", "parallel", "triton")
    if form not in names:
        raise ValueError(f"{function}: form must be one of {', '.join(names)}, got {form!r}")
    if form == "auto":
        refused = refusal(device) if device.type == "cuda" else NO_GPU
        return chosen(function, "triton" if refused is None else "chunked", refused, device.type == "cuda")
    if form not in available:
        raise NotImplementedError(f"{function}: form={form!r} is not available here; these are: {', '.join(available)}")
    if form == "triton" and (reason := refusal(device)) is not None:
        raise NotImplementedError(f"{function}: {reason}")
    return chosen(function, form, None, False)


def unroll(
    step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, cu_seqlens: Tensor | None = None, /, **tokens: Tensor
) -> ScanOut:
    """The token loop, which defines every scan: y_t, state = step(state, one token of each tensor [B T ...]).

    A tensor with 1 for B or T is the same for all. In a packed row every token takes the state of its document [n ...]
    and puts it back. `step` is pure, so this is twice differentiable. Cost: T steps.
    """
    shape = torch.broadcast_shapes(*(tensor.shape[:2] for tensor in tokens.values()))
    columns = [tensor.expand(*shape, *tensor.shape[2:]).unbind(1) for tensor in tokens.values()]
    document = None if cu_seqlens is None else document_of(cu_seqlens, shape[1])
    ys = []
    for t, token in enumerate(zip(*columns, strict=True)):
        mine = state if document is None else state.index_select(0, document[t])
        y, new = step(mine, **dict(zip(tokens, token, strict=True)))
        state = new if document is None else state.index_copy(0, document[t], new)
        ys.append(y)
    return ScanOut(torch.stack(ys, dim=1), state)


def right_to_left(scan: Callable[..., ScanOut]) -> Callable[..., ScanOut]:
    """The scan `(initial, cu_seqlens, **tokens)` read from the end: documents and their states are mirrored too."""

    def flipped(initial: Tensor | None, cu_seqlens: Tensor | None, **tokens: Tensor) -> ScanOut:
        length = max(tensor.shape[1] for tensor in tokens.values())
        states = [] if cu_seqlens is None else [0]
        initial = None if initial is None else initial.flip(states)
        flips = {name: tensor.flip(1) for name, tensor in tokens.items()}
        y, state = scan(initial, mirror(cu_seqlens, length), **flips)
        return ScanOut(y.flip(1), state.flip(states))

    return flipped


def first_state(
    x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The state before the first token of x [B T ...], [B *shape], or [n *shape] of n documents: zeros if none came."""
    if initial_state is not None:
        return initial_state.to(dtype)
    return x.new_zeros(state_count(x.shape[0], cu_seqlens), *shape, dtype=dtype)


def check_packing(
    function: str, cu_seqlens: Tensor | None, batch: int, length: int, initial_state: Tensor | None = None
) -> None:
    """cu_seqlens [n+1] int holds the document borders 0 = c_0 <= ... <= c_n = T of one packed row.

    A state that comes with it is [n ...], one per document.

    Shapes and types are always checked; values only on a CPU outside compilation, where reading them is free.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        got = type(cu_seqlens).__name__
        raise TypeError(f"{function}: cu_seqlens must be an int32 or int64 tensor [n+1], got {got}")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(cu_seqlens):
        raise NotImplementedError(
            f"{function}: cu_seqlens must be the same for all that is vmapped, got a batch of them"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ShapeError(f"{function}: cu_seqlens must be [n+1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if batch != 1:
        raise ShapeError(f"{function}: with cu_seqlens the documents lie in one row, so B must be 1, got B={batch}")
    if initial_state is not None and initial_state.shape[0] != cu_seqlens.numel() - 1:
        raise ShapeError(
            f"{function}: initial_state must be [n ...] with n={cu_seqlens.numel() - 1} documents, "
            f"got shape {tuple(initial_state.shape)}"
        )
    if readable(cu_seqlens):
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != length or any(b < a for a, b in pairwise(borders)):
            raise ValueError(
                f"{function}: cu_seqlens must rise from 0 to T={length} without falling, got {_brief(borders)}"
            )


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ...]"
