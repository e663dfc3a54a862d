"""What `recur.explain` counts is what happens: on a CPU beside a counter, kernels beside Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from interpreted import Laws, run_laws
from launches import _Operators
from torch import Tensor

import recur
from recur import LanguageModel, Mixer, presets
from recur.counting import FREE
from recur.explain import CARDS, Card, Explanation, binary, decimal, duration, explain

LAWS = law = Laws()
randn = torch.randn
B, T, D = 2, 70, 32
NAMES = [name for name in presets.names() if not getattr(presets, name)().inputs]


def layer(name: str) -> tuple[Mixer, Tensor]:
    torch.manual_seed(0)
    return Mixer(getattr(presets, name)(), D), randn(B, T, D, requires_grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_those_that_a_counter_finds(name: str) -> None:
    mixer, x = layer(name)
    found = explain(mixer, batch=B, length=T)
    with _Operators() as forward:
        y = mixer(x).y
    dy = torch.empty_like(y)
    with _Operators() as backward:
        y.backward(dy)
    assert found.phase("forward").operators == forward.found
    assert found.phase("backward").operators == backward.found
    assert found.phase("forward").kernels == found.phase("backward").kernels == Counter()
    if mixer.recipe.causal:
        state = mixer.init_state(B)
        with _Operators() as step:
            mixer.step(x[:, 0].detach(), state)
        assert found.phase("step").operators == step.found
        kept = sum(leaf.numel() * leaf.element_size() for leaf in torch.utils._pytree.tree_leaves(state))
        assert found.state == kept // B
    assert found.memory["weights"] == sum(weight.nbytes for weight in mixer.parameters())
    assert found.memory["gradients"] == sum(w.grad.nbytes for w in mixer.parameters() if w.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_that_hooks_see(name: str) -> None:
    mixer, x = layer(name)
    found = explain(mixer, batch=B, length=T)
    own = {t.untyped_storage()._cdata for t in (x, *mixer.parameters(), *mixer.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(x).y
    kept = {key: storage for key, storage in kept.items() if key not in own | {y.untyped_storage()._cdata}}
    saved = sum(storage.nbytes() for storage in kept.values())
    print(name, found.memory["activations"], saved)
    assert found.memory["activations"] == saved
