"""The chunked cross-entropy of a linear head equals torch's own, with every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recur import LanguageModel, presets
from recur.primitives.loss import linear_cross_entropy
from recur.shapes import ShapeError

close = torch.testing.assert_close


def plain(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), target)


def inputs(N: int, D: int, V: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))
    target = torch.randint(V, (N,), generator=rng)
    target[torch.rand(N, generator=rng) < 0.3] = -100
    target[0] = 0
    return *(t.to(dtype).requires_grad_() for t in (x, weight, bias)), target


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_chunks_make_the_plain_loss_and_its_gradients(N, D, V, chunk, seed):
    *leaves, target = inputs(N, D, V, seed)
    for given_leaves in (leaves, leaves[:2]):
        x, weight, *bias = given_leaves
        losses = [linear_cross_entropy(x, weight, target, *bias, chunk=chunk), plain(x, weight, target, *bias)]
        close(*losses)
        for got, want in zip(*(torch.autograd.grad(3 * loss, given_leaves) for loss in losses), strict=True):
            close(got, want)


def test_second_derivatives_are_those_of_the_plain_loss():
    x, weight, bias, target = inputs(7, 3, 5, 0)
    hessians = []
    for loss in (linear_cross_entropy(x, weight, target, bias, chunk=2), plain(x, weight, target, bias)):
        first = torch.autograd.grad(loss, (x, weight, bias), create_graph=True)
        hessians.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias)))
    for got, want in zip(*hessians, strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_torchs_own(dtype):
    *leaves, target = inputs(64, 32, 200, 1, dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = plain(wide[0], wide[1], target, wide[2])
    errors = []
    for run in (lambda *a: linear_cross_entropy(*a, chunk=16), plain):
        loss = run(leaves[0], leaves[1], target, leaves[2])
        grads = torch.autograd.grad(loss, leaves)
        wanted = torch.autograd.grad(exact, wide, retain_graph=True)
        pairs = zip((loss.detach(), *grads), (exact.detach(), *wanted), strict=True)
        errors.append([float((got.double() - want).norm() / want.norm()) for got, want in pairs])
    assert all(mine <= 1.5 * torchs + 1e-6 for mine, torchs in zip(*errors, strict=True)), errors
    assert linear_cross_entropy(leaves[0], leaves[1], target, chunk=16).dtype == torch.float32


def slopes(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def sums(*tensors: Tensor) -> Tensor:
    return linear_cross_entropy(*tensors, reduction="sum", chunk=2)


def plain_sum(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), target, reduction="sum")


@pytest.mark.parametrize("count", [0, 5])
def test_where_nothing_counts_the_sum_is_0_and_so_are_gradients(count):
    x, weight, bias, _ = inputs(max(count, 1), 3, 4, 0)
    x = x[:count].detach().requires_grad_()
    target = torch.full((count,), -100)
    loss = sums(x, weight, target, bias)
    close(loss, torch.zeros_like(loss))
    assert linear_cross_entropy(x, weight, target, bias, chunk=2).isnan()
    for reduction in ("sum", "mean"):
        loss = linear_cross_entropy(x, weight, target, bias, chunk=2, reduction=reduction)
        for slope in slopes(loss, [x, weight, bias]):
            close(slope, torch.zeros_like(slope))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so itself
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_in_a_graph_it_is_one_node_without_all_logits(with_bias, frozen):
    N, D, V = 7, 3, 11
    *leaves, target = inputs(N, D, V, 3)
    leaves = leaves if with_bias else leaves[:2]
    if frozen is not None:
        leaves[frozen] = leaves[frozen].detach()
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, examples: object) -> object:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(sums, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    losses = [compiled(*leaves[:2], target, *leaves[2:]), plain_sum(*leaves[:2], target, *leaves[2:])]
    close(*losses)
    moving = [leaf for leaf in leaves if leaf.requires_grad]
    for got, want in zip(*(slopes(3 * loss, moving) for loss in losses), strict=True):
        close(got, want)
    nodes = [node for graph in seen for node in graph.graph.nodes]
    assert [node.target for node in nodes].count(torch.ops.recur.linear_cross_entropy.default) == 1
    sizes = [
        value.numel() for node in nodes for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)
    ]
    assert sizes
    assert max(sizes) < N * V


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operator made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


@pytest.mark.parametrize("transformed", [False, True])
def test_no_tensor_of_all_logits_is_made(transformed):
    N, D, V = 12, 3, 11
    *leaves, target = inputs(N, D, V, 3)

    def loss(*leaves: Tensor) -> Tensor:
        return sums(*leaves[:2], target, leaves[2])

    with Largest() as seen:
        if transformed:
            grad(loss, (0, 1, 2))(*leaves)
        else:
            loss(*leaves).backward()
    assert 2 * V <= seen.entries < N * V


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31 - 1))
def test_transforms_of_torch_func_are_those_of_the_plain_loss(N, D, V, with_bias, seed):
    *leaves, target = (t.detach() for t in inputs(N, D, V, seed))
    leaves = leaves if with_bias else leaves[:2]
    rng = torch.Generator().manual_seed(seed)
    steps = tuple(torch.randn(leaf.shape, generator=rng, dtype=torch.float64) for leaf in leaves)
    every = tuple(range(len(leaves)))
    rows = [torch.stack([leaf, 0.5 * leaf, leaf + 1]) for leaf in leaves]

    def found(loss: Callable[..., Tensor]) -> list[object]:
        def of(*leaves: Tensor) -> Tensor:
            return loss(*leaves[:2], target, *leaves[2:])

        slope = grad(of, every)
        along = [
            jvp(of, tuple(leaves), steps),
            jvp(slope, tuple(leaves), steps),
        ]
        each = [
            vmap(of)(*rows),
            vmap(slope)(*rows),
            vmap(slope, in_dims=(0, *[None] * (len(leaves) - 1)))(rows[0], *leaves[1:]),
        ]
        return [of(*leaves), slope(*leaves), hessian(of, every)(*leaves), *along, *each]

    for got, want in zip(tree_leaves(found(sums)), tree_leaves(found(plain_sum)), strict=True):
        close(got, want)


def test_under_autocast_products_are_narrow_and_gradients_of_weights_are_not():
    *leaves, target = inputs(32, 16, 50, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [linear_cross_entropy(*leaves[:2], target, leaves[2], chunk=8), plain(*leaves[:2], target, leaves[2])]
    exact = plain(*leaves[:2], target, leaves[2])
    wanted = slopes(exact, leaves)
    errors = [
        [float((got - want).norm() / want.norm()) for got, want in zip(slopes(loss, leaves), wanted, strict=True)]
        for loss in losses
    ]
    assert losses[0].dtype == torch.float32
    assert all(1e-5 < mine <= 1.5 * torchs for mine, torchs in zip(*errors, strict=True)), errors


def test_frozen_inputs_have_no_gradient_and_evaluation_makes_none():
    x, weight, bias, target = inputs(7, 3, 5, 0)
    frozen = linear_cross_entropy(x, weight.detach(), target, bias, chunk=2)
    for got, want in zip(
        *(torch.autograd.grad(f, (x, bias)) for f in (frozen, plain(x, weight, target, bias))), strict=True
    ):
        close(got, want)
    with torch.no_grad():
        close(linear_cross_entropy(x, weight, target, bias, chunk=2), plain(x, weight, target, bias))


def test_no_more_logits_than_a_chunk_are_there(monkeypatch):
    seen, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(linear(*args)) or seen[-1])
    x, weight, bias, target = inputs(10, 3, 5, 0)
    linear_cross_entropy(x, weight, target, bias, chunk=4).backward()
    assert [len(logits) for logits in seen] == [4, 4, 2]


@pytest.mark.parametrize("options", [{}, {"tie": False}, {"tie": False, "head_bias": True}])
def test_a_model_has_the_loss_of_its_logits(options, monkeypatch):
    monkeypatch.setattr("recur.primitives.loss.LOGITS", 40)  # four tokens
    lm = LanguageModel(presets.gla(heads=2), vocab_size=10, dim=16, depth=1, **options).double()
    ids = torch.randint(10, (2, 8))
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    want = F.cross_entropy(lm(ids[:, :-1]).flatten(0, 1), targets.flatten())
    losses = (lm(ids[:, :-1], targets=targets), want)
    close(*losses)
    for got, wanted in zip(*(torch.autograd.grad(loss, list(lm.parameters())) for loss in losses), strict=True):
        close(got, wanted)
    loss, state = lm(ids[:, :-1], targets=targets, return_state=True)
    close(loss, want)
    assert state["position"].tolist() == [7, 7]


def test_errors():
    x, weight, _, target = inputs(4, 3, 5, 0)
    with pytest.raises(ShapeError, match="linear_cross_entropy: x has D=3 but weight has D=2"):
        linear_cross_entropy(x, weight[:, :2], target)
    with pytest.raises(TypeError, match=r"target must be integers, got torch\.float64"):
        linear_cross_entropy(x, weight, target.double())
    with pytest.raises(ValueError, match="linear_cross_entropy: reduction must be one of mean, sum, got 'none'"):
        linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        linear_cross_entropy(x, weight, target, chunk=0)
    lm = LanguageModel(presets.gla(heads=2), vocab_size=10, dim=16, depth=1)
    with pytest.raises(ShapeError, match=r"LanguageModel: targets must be \[B T\] = \(2, 8\), got shape \(2, 7\)"):
        lm(torch.zeros(2, 8, dtype=torch.long), targets=torch.zeros(2, 7, dtype=torch.long))
