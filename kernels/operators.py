"""Operators of torch, and what their launchers ask of a device.

`torch.library.custom_op` and `register_autograd` do the same and take 8 us longer per call, 36 more where a gradient is
recorded or an argument is overwritten, most of it to look for defaults that these schemas do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import RLock
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("recur", "FRAGMENT")
RUNS: dict[str, Callable[..., Any]] = {}  # what operators run, by their names, for `recur.explain`


def contiguous(x: Any) -> Any:
    """A tensor with its entries in the order of its axes, or a list of such; anything else as it is."""
    if isinstance(x, Tensor):
        return x if x.is_contiguous() else x.contiguous()
    return [contiguous(item) for item in x] if isinstance(x, list) else x


def readable(x: Any) -> Any:
    """A tensor, or a list of them, as kernels read one: contiguous, and beginning at a multiple of 16 bytes, for loads
    of several numbers at once; anything else as it is. 0.3 us per tensor that is so already."""
    if isinstance(x, Tensor):
        if not x.is_contiguous():
            return x.contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()
    return [readable(item) for item in x] if isinstance(x, list) else x


def as_it_is(x: Any) -> Any:
    """For operators that take strides themselves, or overwrite an argument: a copy would cost, or be overwritten."""
    return x


_GIVEN: dict[str, Callable[[Any], Any]] = {}  # by the name of an operator, what is done to its inputs
_FUNCTIONS: dict[str, Any] = {}  # by the name of an operator, what records its derivative in a plain call
_SCALARS = frozenset((type(None), bool, int, float, str))


def undisturbed() -> bool:
    """Whether nobody but autograd wants to see calls: no graph is being made, and there is no mode or transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # which shows operators by their names
    )


def plain(x: Any) -> bool:
    """Whether this is a tensor of no subclass, with data and no lazy negative."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not x.is_neg()


def operator(
    name: str, schema: str = "", *, mutates: tuple[str, ...] = (), given: Callable[[Any], Any] = readable
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what runs as `torch.ops.recur.<name>`, on the device of its first argument, a tensor. A schema is read
    off the annotations unless it is given: torch 2.6 finds none for lists.

    Callers may pass tensors of any strides, views and expanded gradients too: what is decorated gets them `readable`,
    or as `given` makes them. An operator that overwrites an argument gets all of them as they are.
    """
    given = _GIVEN[name] = as_it_is if mutates else given

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        def here(first: Tensor, *rest: Any) -> Any:
            """Of inputs that are as `given` makes them."""
            if not first.is_cuda:
                return run(first, *rest)
            with torch.cuda.device_of(first):
                return run(first, *rest)

        LIBRARY.define(name + (schema or torch.library.infer_schema(run, mutates_args=mutates)))
        LIBRARY.impl(name, lambda *inputs: here(*map(given, inputs)), "CompositeExplicitAutograd")
        RUNS[f"recur::{name}"] = lambda *inputs: run(*map(contiguous if given is readable else given, inputs))
        node = getattr(torch.ops.recur, name).default

        def call(*inputs: Any) -> Any:
            """The operator; a plain call by itself, for the dispatcher takes 10 us, twice that with a derivative."""
            if not undisturbed():
                return node(*inputs)
            ready, records = [], False
            for x in inputs:
                if type(x) in _SCALARS:
                    ready.append(x)
                elif plain(x):
                    ready.append(given(x))
                    records = records or x.requires_grad
                elif type(x) is list and all(map(plain, x)):
                    ready.append(given(x))
                else:
                    return node(*inputs)
            if not (records and torch.is_grad_enabled()):
                return here(*ready)
            return _FUNCTIONS[name].apply(here, *ready) if name in _FUNCTIONS else node(*inputs)

        return call

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what returns empty outputs of the operator of that name, given contiguous tensors."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"recur::{name}", lambda *inputs: run(*map(contiguous, inputs)), lib=LIBRARY)
        return run

    return register


def refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("form='triton' has first derivatives only; form='chunked' has second ones")


def recorded(*inputs: Any) -> bool:
    """Whether a gradient will be asked of what is made of these."""
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def differentiable(
    name: str,
    gradients: Callable[..., Any] = refuse,
    remember: Callable[[Any, tuple[Any, ...], Any], None] = lambda ctx, inputs, output: None,
) -> None:
    """Give the operator of that name its backward: `remember` fills the ctx that `gradients` reads."""
    node = getattr(torch.ops.recur, name).default

    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> Any:
        if _GIVEN[name] is readable:
            inputs = tuple(map(contiguous, inputs))  # what is saved, so that the backward copies nothing again
        output = run(*inputs)
        remember(ctx, inputs, output)
        return output

    ways = {"forward": forward, "backward": lambda ctx, *grads: (None, *_tuple(gradients(ctx, *grads)))}
    function: Any = type(name, (torch.autograd.Function,), {way: staticmethod(run) for way, run in ways.items()})

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return node(*inputs)

    def call(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0:  # of a tangent that came after the form was chosen, with a gradient
            raise NotImplementedError("form='triton' has no forward-mode derivatives; form='chunked' has them")
        return function.apply(below, *inputs) if recorded(*inputs) else below(*inputs)

    LIBRARY.impl(name, call, "Autograd")
    _FUNCTIONS[name] = function


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


# For `recur.explain`: launches are noted instead of made, as a launcher plans them for the device that is asked about.
_NOTE: ContextVar[tuple[Callable[..., None], torch.device] | None] = ContextVar("note", default=None)
_LOCK = RLock()  # an operator may launch kernels of another, as the loss does


@contextmanager
def noting(note: Callable[..., None], device: torch.device) -> Iterator[None]:
    """Inside, this thread's launches call note(kernel, grid, arguments, options); those of other threads are made."""
    launch = triton.runtime.jit.KernelInterface.__getitem__

    def get(kernel: Any, grid: Any) -> Any:
        if _NOTE.get() is None:
            return launch(kernel, grid)
        return lambda *arguments, **options: note(kernel, grid, arguments, options)

    with _LOCK, patch.object(triton.runtime.jit.KernelInterface, "__getitem__", get):
        token = _NOTE.set((note, device if torch.cuda.is_available() else torch.device("cpu")))
        try:
            yield
        finally:
            _NOTE.reset(token)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, those of an H100 for what is not one."""
    noted = _NOTE.get()
    return _processors(device if noted is None else noted[1])


def capability(device: torch.device) -> int:
    """Of a GPU, ten times the major plus the minor; an H100's for what is not one."""
    noted = _NOTE.get()
    return _capability(device if noted is None else noted[1])


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own takes 2 us."""
    return -(-x // y)


def power_of_2(x: int) -> int:
    """The least that is not below x."""
    return 1 << max(0, int(x) - 1).bit_length()
