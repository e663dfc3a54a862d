"""A Loop in a graph: one node for all lengths, or unrolled if no node can hold its body; the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map

from recur import Mixer, Recipe, presets
from recur.blocks import Decay, Dropout, GatedScan, Loop, Map, Project, Sum
from recur.blocks.attention import Attention


def nonlinear(*inside: Any) -> Recipe:
    """h_t = u_t + W h_{t-1}, then these parts."""
    loop = Loop((Project("last", r="D"), Sum("u r", out="h"), *inside), feed="h", axes="D")
    return Recipe(Project("x", u="D"), loop, Project("h", y="D"))


def layer(recipe: Recipe) -> Mixer:
    torch.manual_seed(0)
    mixer = Mixer(recipe, 6)
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return mixer


def in_graphs(call: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
    """The call compiled, and the names of the operators in its graphs."""
    operators: list[str] = []

    def keep(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    return torch.compile(call, backend=keep, fullgraph=True, dynamic=True), operators


def has_node(operators: list[str]) -> bool:
    return any("recur.loop" in name for name in operators)


SCAN = Loop((Project("last", z="D"), Decay("z"), GatedScan("u", out="h")), feed="h", axes="D")
HELD = {
    "gated_rnn": presets.gated_rnn(inner=5),
    "scan inside": Recipe(Project("x", u="D"), SCAN, Project("h", y="D")),
    "loop inside": Recipe(Project("x", u="D"), Loop((SCAN,), "h", "D", last="before"), Project("h", y="D")),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_node_equals_the_loop(name: str, packed: bool) -> None:
    """Values, states and gradients, from a state on."""
    mixer, borders = layer(HELD[name]), torch.tensor([0, 2, 2, 7]) if packed else None
    graph, operators = in_graphs(lambda x, state: mixer(x, state, cu_seqlens=borders))
    state = mixer(torch.randn(3 if packed else 2, 4, 6)).state
    x, runs = torch.randn(1 if packed else 2, 7, 6), []
    for run in (graph, lambda x, state: mixer(x, state, cu_seqlens=borders)):
        before = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()), state)
        leaves = [x.clone().requires_grad_(), *tree_leaves(before["parts"])]
        y, after = run(leaves[0], before)
        total = y.sin().sum() + sum(leaf.sin().sum() for leaf in tree_leaves(after["parts"]))
        runs.append((y, after, torch.autograd.grad(total, [*leaves, *mixer.parameters()], materialize_grads=True)))
    torch.testing.assert_close(*runs)
    assert has_node(operators)


def test_weights_that_are_computed_are_those_of_the_node() -> None:
    mixer, x = layer(presets.gated_rnn()), torch.randn(2, 5, 6)
    parametrizations.weight_norm(mixer.get_submodule("parts.loop.recurrent"), "weight")
    graph, operators = in_graphs(lambda x: mixer(x).y)
    torch.testing.assert_close(graph(x), mixer(x).y)
    assert has_node(operators)


def test_a_node_computes_in_the_precision_of_its_surroundings() -> None:
    """Gradients err no more than those of the loop, which adds those of a weight in bfloat16."""
    mixer, x = layer(presets.gated_rnn()), torch.randn(2, 5, 6)
    graph, operators = in_graphs(lambda x: mixer(x).y)

    def run(call: Callable[..., Any], enabled: bool = True) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = call(x)
        return y, *torch.autograd.grad(y.float().sum(), list(mixer.parameters()))

    (y, *got), (want, *wanted), (_, *exact) = run(graph), run(lambda x: mixer(x).y), run(lambda x: mixer(x).y, False)
    assert torch.equal(y, want)
    assert y.dtype == torch.bfloat16
    for slope, reference, truth in zip(got, wanted, exact, strict=True):
        assert slope.dtype == torch.float32
        assert (slope - truth).norm() <= 2 * (reference - truth).norm()
    assert has_node(operators)


UNROLLED = {
    "form": (nonlinear(), {"form": "recurrent"}),
    "dropout": (nonlinear(Dropout("h", 0.0)), {}),
    "function": (nonlinear(Map(torch.tanh, reads="h", out="h", axes="D")), {}),
    "cache": (nonlinear(Project("h", q="2 3", k="2 3", v="2 3"), Attention(out="a")), {}),
}


@pytest.mark.parametrize("name", UNROLLED)
def test_what_a_node_cannot_hold_is_unrolled(name: str) -> None:
    recipe, options = UNROLLED[name]
    mixer, x = layer(recipe), torch.randn(2, 5, 6)
    graph, operators = in_graphs(lambda x: mixer(x, **options).y)
    torch.testing.assert_close(graph(x), mixer(x).y)
    assert not has_node(operators)


def test_a_hook_inside_fires_in_a_graph() -> None:
    mixer, x = layer(nonlinear()), torch.randn(2, 5, 6)
    plain = mixer(x).y
    mixer.get_submodule("parts.loop.project").register_forward_hook(lambda module, args, out: (0.5 * out[0],))
    graph, operators = in_graphs(lambda x: mixer(x).y)
    torch.testing.assert_close(graph(x), mixer(x).y)
    assert not torch.allclose(mixer(x).y, plain)
    assert not has_node(operators)
