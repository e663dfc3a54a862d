"""Layers that share a compiled graph: as many graphs as kinds, whatever the depth; the eager values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiers import quick
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from recur import LanguageModel, Recipe, presets
from recur.blocks import Act, Project
from recur.primitives.gates import ACTIVATIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo does so itself
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
CAUSAL = [name for name in presets.names() if getattr(presets, name)().causal]
SUITE = ("gla", "gss", "hgrn2", "longhorn", "mamba3", "retnet", "rwkv7")  # one for each kind of scan and of decay
HYBRID = [presets.gla(heads=2), presets.hgrn2(heads=2), presets.llama(heads=2)]
# recipe, layers, graphs
KINDS: dict[str, tuple[Recipe | list[Recipe], int, int]] = {
    "one kind": (presets.gla(heads=2), 5, 1),
    "bounds that rise with depth": (presets.hgrn2(heads=2), 5, 1),
    "positions": (presets.retnet(heads=2), 5, 1),
    "first values by layer": (presets.rwkv(heads=2), 5, 1),
    "three kinds": (HYBRID, 6, 3),
    "more kinds than torch compiles of one function": (
        [Recipe(Project("x", y="D"), Act("y", act)) for act in list(ACTIVATIONS)[:9]],
        9,
        9,
    ),
    "two layers below": (presets.dense_retnet(heads=2, layers=2), 5, 3),  # of which the first two have fewer
}


def model(recipe: Recipe | list[Recipe] | str, depth: int = 3, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(recipe, vocab_size=11, dim=32, depth=depth, **options)


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(length))


def counting(graphs: list[Any]) -> Callable[..., Any]:
    return lambda graph, examples: graphs.append(graph) or graph.forward


@pytest.mark.parametrize("name", KINDS)
def test_as_many_graphs_as_kinds_of_layers(name: str) -> None:
    """In training, and again in evaluation and in steps."""
    recipe, depth, kinds = KINDS[name]
    lm, graphs = model(recipe, depth, ffn="swiglu"), list[Any]()
    torch.compiler.reset()
    lm.compile_layers(backend=counting(graphs), fullgraph=True)
    for _ in range(2):
        lm.loss(ids_of(2, 7)).backward()
        assert len(graphs) == kinds
    state = lm.eval().prefill(ids_of(2, 7))[1]
    assert len(graphs) == 2 * kinds
    for _ in range(3):
        lm.step(ids_of(2, 1)[:, 0], state)
    assert len(graphs) == 3 * kinds + (recipe is HYBRID)  # whose attention finds its cache longer than before


def results(lm: LanguageModel, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """The loss, every gradient, and the state."""
    lm.zero_grad()
    targets = ids.roll(-1, 1)
    loss, state = lm(ids, targets=targets, return_state=True, **options)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in lm.named_parameters() if weight.grad is not None}
    leaves = tree_leaves(state)
    return {"loss": loss.detach(), **found, **{f"state {i}": leaf for i, leaf in enumerate(leaves)}}


def assert_same(got: Any, want: Any) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        if isinstance(x, Tensor):
            torch.testing.assert_close(
                got[name].detach(), x.detach(), rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


def both(name: str, backend: str) -> tuple[LanguageModel, LanguageModel]:
    """Two equal models, the first compiled by layer."""
    compiled, eager = (model(getattr(presets, name)(), 2).double() for _ in range(2))
    torch.compiler.reset()
    return compiled.compile_layers(backend=backend, fullgraph=True), eager


@pytest.mark.parametrize("name", quick(CAUSAL, SUITE))
def test_values_and_gradients_are_those_of_the_eager_model(name: str) -> None:
    lms = both(name, "aot_eager")
    assert lms[0].state_dict().keys() == lms[1].state_dict().keys()
    assert_same(*(results(lm, ids_of(2, 9)) for lm in lms))


@pytest.mark.parametrize("name", quick(CAUSAL, ("retnet",)))
def test_other_lengths_documents_states_and_steps_are_those_of_the_eager_model(name: str) -> None:
    """The positions that a fresh state holds are rows of one tensor, so the inputs of a step overlap in memory."""
    lms = both(name, "aot_eager")
    for length in (5, 9):
        assert_same(*(results(lm, ids_of(2, length)) for lm in lms))
    borders = torch.tensor([0, 4, 4, 9])
    assert_same(*(results(lm, ids_of(1, 9), cu_seqlens=borders) for lm in lms))
    states = [lm.eval().prefill(ids_of(2, 5))[1] for lm in lms]
    copies = [tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state) for state in states]
    assert_same(*(results(lm, ids_of(2, 6), state=state) for lm, state in zip(lms, copies, strict=True)))
    for token in ids_of(2, 3).unbind(1):
        torch.testing.assert_close(*(lm.step(token, state) for lm, state in zip(lms, states, strict=True)))
    assert torch.equal(states[0]["position"], torch.tensor([8, 8]))
    for got, want in zip(*map(tree_leaves, states), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", quick(["gla", "mamba"], ("gla",)))
def test_inductor_computes_the_same(name: str) -> None:
    eager, compiled = model(name), model(name)
    torch.compiler.reset()
    compiled.compile_layers()
    got, want = (results(lm, ids_of(2, 9)) for lm in (compiled, eager))
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=1e-3, atol=1e-5)


def test_recomputed_layers_are_compiled_too() -> None:
    graphs: list[Any] = []
    eager, compiled = model("retnet"), model("retnet", checkpoint=True)
    torch.compiler.reset()
    compiled.compile_layers(backend=counting(graphs))
    got, want = (results(lm, ids_of(2, 5)) for lm in (compiled, eager))
    assert got.keys() == want.keys()
    for key, x in want.items():
        torch.testing.assert_close(got[key], x)
    assert len(graphs) == 1
