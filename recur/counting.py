"""Counts what a call launches, moves and keeps by running it with tensors that hold no data.

The code that is counted is the code that runs: operators of torch are dispatched, launchers of kernels plan, allocate
and hand over their launches, and only the launches themselves are left out. So a count cannot differ from a run.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from recur.blocks.language_model import Block, LanguageModel, StreamNorm
from recur.primitives.operators import RUNS
from recur.recipe import Chain

# operators that touch no memory, that read only as much as they write, and that do not read what they overwrite
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "promote_types", "_unsafe_view")
GATHERS = ("embedding", "gather", "index", "index_select")
FILLS = ("copy_", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "full", "full_like", "ones", "arange")


class Launch(NamedTuple):
    """One launch: of a "kernel" of recur, or of an operator of "torch", which may be several on a GPU.

    bytes: of all tensors it is given and makes, each once, as often as a cache makes it read them; flops: of its matrix
    products, 2 per multiplication and addition.
    """

    name: str
    kind: str
    bytes: int
    flops: int


class Asked(FakeTensorMode):
    """Tensors without data, which count as tensors of the device that is asked about; see `recur.kernel.device_of`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.asked = device


class Counting(TorchDispatchMode):
    """Inside an `Asked`: `launches`, in order; `live` bytes now and at their `peak`, beside what was there before."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.launches = device, list[Launch]()
        self.live = self.peak = 0
        self.made: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # storages: bytes, and the part that made them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.rpartition("::")[2]
        run = _runs(func._schema.name)
        if run is not None:
            with self, self._kernels():
                out = run(*args, **kwargs)
            written = [x for x, of in zip(args, func._schema.arguments, strict=False) if of.alias_info is not None]
            if written and self.launches:  # by the last, which read them too
                last = self.launches[-1]
                self.launches[-1] = last._replace(bytes=last.bytes + _bytes(tree_leaves(written)))
            return out
        out = func(*args, **kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view:
            self._keep(out)
        if not view and name not in FREE and func.namespace != "prim":
            formula = flop_registry.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            given = [] if name in FILLS else tree_leaves((args, kwargs))
            moved = 2 * _bytes([out]) if name in GATHERS else _bytes(given) + _bytes(tree_leaves(out))
            if name == "copy_":
                moved += _bytes(args[1:2])
            self.launches.append(Launch(name, "torch", moved, int(flops)))
        return out

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Launches of kernels are noted here."""
        from recur.kernels.operators import noting
        from recur.kernels.scan import products

        def note(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__.lstrip('_')}"
            moved, flops = _bytes(tree_leaves((arguments, options))), products(kernel, grid, options)
            self.launches.append(Launch(name, "kernel", moved, flops))

        with noting(note, self.device):
            yield

    def _keep(self, out: Any) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.made:
                    self.made[key] = (
                        weakref.ref(storage, partial(self._drop, key, size)),
                        size,
                        part(),
                    )
                    self.live += size
                    self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self.made[key]

    def kept(self) -> dict[str, int]:
        """Bytes that are there now, by the part that made them."""
        found: Counter[str] = Counter()
        for _, size, where in self.made.values():
            found[where] += size
        return dict(found)


def _runs(name: str) -> Callable[..., Any] | None:
    """What an operator of ours runs; None for an operator of torch."""
    if name in RUNS or not name.startswith("recur::"):
        return RUNS.get(name)
    from recur.kernels.operators import RUNS as LAUNCHERS

    return LAUNCHERS.get(name)


def _bytes(values: Any) -> int:
    """Of tensors, each once; of an axis that is expanded, one entry."""
    found = {}
    for x in values:
        if isinstance(x, Tensor):
            entries = 1
            for size, stride in zip(x.shape, x.stride(), strict=True):
                entries *= size if stride != 0 else min(size, 1)
            key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape)
            found[key] = entries * x.element_size()
    return sum(found.values())


def part() -> str:
    """The part of a recipe, or of a model around it, that is running, such as "mixer.outer_scan"; "" in a backward."""
    frame: FrameType | None = sys._getframe(1)
    names: list[str] = []
    while frame is not None:
        if frame.f_code is Chain.__call__.__code__ and "key" in frame.f_locals:
            names.append("+".join((frame.f_locals["key"], *frame.f_locals.get("more", ()))))
        elif frame.f_code is StreamNorm.forward.__code__:
            names.append("norm")
        elif frame.f_code is Block._branch.__code__ and not (names and names[-1] == "norm"):
            names.append("mixer" if frame.f_locals["branch"] is frame.f_locals["self"].mixer else "ffn")
        elif frame.f_code is LanguageModel._loss.__code__:
            names.append("head and loss")
        elif frame.f_code in (LanguageModel._hidden.__code__, LanguageModel.hidden.__code__) and not names:
            names.append("stream")
        frame = frame.f_back
    return ".".join(reversed(names))


def blank(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor without data of the shape and strides of one, floating ones in this dtype; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return torch.empty_strided(value.shape, value.stride(), dtype=kind, device="cpu")


def copied(module: nn.Module, copy_of: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module with other tensors in the place of its own; weights that are shared stay so."""
    memo: dict[int, Any] = {id(buffer): copy_of(buffer) for buffer in module.buffers()}
    for weight in module.parameters():
        memo[id(weight)] = nn.Parameter(copy_of(weight.detach()), requires_grad=weight.requires_grad)
    return copy.deepcopy(module, memo)


def outline(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The module on the meta device, cast to this dtype as `module.to` does. Not in an `Asked`."""
    made = copied(module, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    return made if dtype is None else made.to(dtype)


def wanting(value: Any) -> Any:
    """Arguments as leaves that want a gradient, where they are floating or complex."""

    def one(x: Any) -> Any:
        return x.requires_grad_() if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) else x

    return tree_map(one, value)


class Trained(NamedTuple):
    """What a forward and a backward launched; bytes of activations between them by part, of gradients, at the peak."""

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    kept: dict[str, int]
    gradients: int
    peak: int


def train(device: torch.device, run: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Trained:
    """Count run() and its backward, in an `Asked`; leaves are those whose gradients stay."""
    counting = Counting(device)
    with counting:
        y = run()
        gc.collect()  # of what only the state was made of
        own = y.untyped_storage()._cdata
        kept = {where: size for where, size in counting.kept().items() if size}
        if y.numel() > 1 and own in counting.made:  # the output is the caller's
            _, size, where = counting.made[own]
            kept[where] -= size
        forward, counting.launches = tuple(counting.launches), []
        if y.requires_grad:
            given = torch.empty_like(y)
            counting.launches.clear()
            y.backward(given)
    gradients = sum(x.grad.nbytes for x in leaves if x.grad is not None)
    return Trained(forward, tuple(counting.launches), kept, gradients, counting.peak)


def steps(device: torch.device, run: Callable[[], Any]) -> tuple[Launch, ...]:
    """Count run() without gradients, in an `Asked`."""
    counting = Counting(device)
    with torch.no_grad(), counting:
        run()
    return tuple(counting.launches)
