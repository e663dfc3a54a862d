"""What every scan shares: its result, its forms, the token loop, packing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from recur.shapes import ShapeError


class ScanOut(NamedTuple):
    """What a scan returns: `y`, one output a token, and `state`, the memory after the last token."""

    y: Tensor
    state: Tensor


def choose_form(
    function: str,
    form: str,
    available: tuple[str, ...],
    *,
    device: torch.device | None = None,
    refusal: Callable[[], str | None] | None = None,
) -> str:
    """The form to run: "auto" is "triton" for what the kernel covers on a GPU and "chunked" for all else; any other
    name is taken or refused.

    Args: available: the forms of this function; refusal: tells why "triton" cannot run this call, None if it can.
    Raises: ValueError for a name that is no form, NotImplementedError for one this function, or this call, lacks.
    """
    names = ("auto", "recurrent", "chunked", "parallel", "triton")
    if form not in names:
        raise ValueError(f"{function}: form must be one of {', '.join(names)}, got {form!r}")
    if form == "auto":
        fast = refusal is not None and device is not None and device.type == "cuda" and refusal() is None
        return "triton" if fast else "chunked"
    if form not in available:
        raise NotImplementedError(f"{function}: form={form!r} is not available here; these are: {', '.join(available)}")
    if form == "triton" and refusal is not None and (reason := refusal()) is not None:
        raise NotImplementedError(f"{function}: {reason}")
    return form


def unroll(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, **tokens: Tensor) -> ScanOut:
    """The token loop, which defines every scan: y_t, state = step(state, one token of each tensor [B T ...]).

    `step` is pure, so this is twice differentiable. Cost: T steps.
    """
    names, columns = list(tokens), [tensor.unbind(1) for tensor in tokens.values()]
    ys = []
    for token in zip(*columns, strict=True):
        y, state = step(state, **dict(zip(names, token, strict=True)))
        ys.append(y)
    return ScanOut(torch.stack(ys, dim=1), state)


def unroll_documents(
    step: Callable[..., tuple[Tensor, Tensor]], states: Tensor, cu_seqlens: Tensor, **tokens: Tensor
) -> ScanOut:
    """The token loop over one packed row: every token takes the state of its document [n ...] and puts it back."""

    def packed(states: Tensor, *, document: Tensor, **token: Tensor) -> tuple[Tensor, Tensor]:
        y, state = step(states.index_select(0, document), **token)
        return y, states.index_copy(0, document, state)

    length = next(iter(tokens.values())).shape[1]
    return unroll(packed, states, document=document_of(cu_seqlens, length)[None], **tokens)


def check_packing(function: str, cu_seqlens: Tensor | None, batch: int, length: int) -> None:
    """cu_seqlens [n+1] int holds the document borders 0 = c_0 <= ... <= c_n = T of one packed row.

    Shapes and types are always checked; values only on a CPU outside compilation, where reading them is free.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ShapeError(f"{function}: cu_seqlens must be [n+1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if batch != 1:
        raise ShapeError(f"{function}: with cu_seqlens the documents lie in one row, so B must be 1, got B={batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != length or any(b < a for a, b in pairwise(borders)):
            raise ValueError(
                f"{function}: cu_seqlens must rise from 0 to T={length} without falling, got {_brief(borders)}"
            )


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ...]"


def mirror(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Document borders of the row read from its end."""
    return None if cu_seqlens is None else length - cu_seqlens.flip(0)


def document_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T]: the document each token lies in."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.to(tokens.dtype)[1:].contiguous(), tokens, right=True)
