"""What a training step launches around its scans, counted without a GPU: operators on fake tensors, views left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from recur import LanguageModel, Recipe
from recur.weights import Weights

FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "promote_types", "_unsafe_view")


class Step(NamedTuple):
    """Operators of the forward and of the backward, and bytes that the forward keeps for it."""

    forward: Counter[str]
    backward: Counter[str]
    kept: int

    def __sub__(self, other: Step) -> Step:  # type: ignore[override]
        return Step(self.forward - other.forward, self.backward - other.backward, self.kept - other.kept)


class _Operators(TorchDispatchMode):
    """Counts what is no view of its input and touches memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        name = func._schema.name.split("::")[-1]
        if not view and name not in FREE and func.namespace != "prim":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended() -> Iterator[None]:
    """A GPU: kernels are taken, values are neither drawn nor looked at."""
    from recur.kernels import scan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "INTERPRETED", True)
        patch.setattr(Weights, "reset_parameters", lambda self: None)
        for name, module in list(sys.modules.items()):
            if name.startswith("recur.") and hasattr(module, "readable"):
                patch.setattr(module, "readable", lambda tensor: False)
        yield


def step(recipe: Recipe, depth: int, ffn: str | None) -> Step:
    """One of a bfloat16 model of 1024 channels on 8 x 2048 tokens, its loss left out."""
    with pretended(), FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = LanguageModel(recipe, vocab_size=32000, dim=1024, depth=depth, ffn=ffn, tie=False)
        torch.set_default_dtype(torch.float32)
        own, kept = {weight.untyped_storage()._cdata for weight in model.parameters()}, {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no other takes its address
            return tensor

        x = torch.empty(8, 2048, 1024, dtype=torch.bfloat16, requires_grad=True)
        with _Operators() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _ = model.hidden(x, form="triton")
        with _Operators() as backward:
            y.backward(torch.empty_like(y))
        return Step(forward.found, backward.found, sum(storage.nbytes() for storage in kept.values()))


def layer(recipe: Recipe, ffn: str | None) -> Step:
    """What one layer more adds."""
    return step(recipe, 3, ffn) - step(recipe, 2, ffn)
