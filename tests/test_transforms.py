"""torch.func, forward mode and torch.export over scans, layers and models; how they are refused. Laws hold the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import recur
from recur import LanguageModel, presets

B, T, G, H, K, V = 2, 5, 2, 4, 3, 2
BORDERS = torch.tensor([0, 2, 2, 5])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def decay(*shape: int) -> Tensor:
    return F.logsigmoid(draw(*shape))


def complex_gates(*shape: int) -> Tensor:
    return torch.complex(decay(*shape), draw(*shape))


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.scan(q, k, v, log_decay, initial_state=state, **options)


def delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.scan(q, k, v, log_decay, beta=beta, initial_state=state, **options)


def wide(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, erase: Tensor, remove: Tensor, write: Tensor, state: Tensor,
    **options: Any,
) -> Any:  # fmt: skip
    given = {"erase": erase, "remove": remove, "write": write, "erase_from": "previous", "initial_state": state}
    return recur.scan(q, k, v, log_decay, **given, **options)


def gated(x: Tensor, log_decay: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.gated_scan(x, log_decay, initial_state=state, **options)


def selective(x: Tensor, rate: Tensor, A: Tensor, write: Tensor, read: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.selective_scan(x, rate.sigmoid(), A, write, read, initial_state=state, **options)


def online(x: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.online_scan(x, rate.sigmoid(), k, q, initial_state=state, **options)


def fixed(x: Tensor, poles: Tensor, readout: Tensor, state: Tensor, **options: Any) -> Any:
    return recur.fixed_scan(x, poles, readout, initial_state=state, **options)


def qkv(rows: int) -> tuple[Tensor, ...]:
    return draw(rows, T, G, K), draw(rows, T, G, K), draw(rows, T, H, V)


def keys(rows: int, *writes: int) -> tuple[Tensor, ...]:
    """erase per group, remove per head."""
    return draw(rows, T, *writes, G, K) / 2, draw(rows, T, *writes, H, K) / 2


def cases() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]]:
    """A scan, its tensors, and options."""
    torch.manual_seed(0)
    beta, packed = torch.rand(B, T, H, dtype=torch.float64), {"cu_seqlens": BORDERS}
    complex_state = torch.complex(draw(B, H, K, V), draw(B, H, K, V))
    inputs = draw(B, T, 4), draw(B, T, 4)
    row = draw(1, T, 4), draw(1, T, 4)
    A, slots, states = -draw(4, 3).exp(), (draw(B, T, 2, 3), draw(B, T, 3)), draw(B, 4, 3)
    poles, several = complex_gates(3), (draw(B, T, 3, G, K), draw(B, T, 2, G, K), draw(B, T, 2, H, V))
    return {
        "scan": (scan, (*qkv(B), decay(B, T, H), draw(B, H, K, V)), {}),
        "scan, constant": (scan, (*qkv(B), decay(H), draw(B, H, K, V)), {"reverse": True}),
        "scan, key-wise": (scan, (*qkv(B), decay(B, T, H, K), draw(B, H, K, V)), {}),
        "scan, complex": (scan, (*qkv(B), complex_gates(B, T, H), complex_state), {}),
        "scan, packed": (scan, (*qkv(1), decay(1, T, H), draw(3, H, K, V)), packed),
        "delta": (delta, (*qkv(B), decay(B, T, H), beta, draw(B, H, K, V)), {}),
        "delta, complex": (delta, (*qkv(B), complex_gates(B, T, H, K), beta, complex_state), {}),
        "delta, packed": (delta, (*qkv(1), decay(1, T, H, K), beta[:1], draw(3, H, K, V)), packed),
        "wide": (wide, (*qkv(B), decay(B, T, H), *keys(B), draw(B, T, H, V), draw(B, H, K, V)), {}),
        "wide, key-wise, packed": (
            wide,
            (*qkv(1), decay(1, T, H, K), *keys(1), draw(1, T, H), draw(3, H, K, V)),
            packed,
        ),
        "wide, several": (
            wide,
            (*several, decay(B, T, H), *keys(B, 2), draw(B, T, 2, H), draw(B, H, K, V)),
            {"reverse": True},
        ),
        "gated": (gated, (draw(B, T, 3), decay(B, T, 3), draw(B, 3)), {}),
        "gated, constant": (gated, (draw(B, T, 3), decay(3), draw(B, 3)), {}),
        "gated, packed": (gated, (draw(1, T, 3), decay(1, T, 3), draw(3, 3)), packed),
        "selective": (selective, (*inputs, A, *slots, states), {}),
        "selective, packed": (selective, (*row, A, draw(4, 3), draw(1, T, 2, 3), draw(3, 4, 3)), packed),
        "online": (online, (*inputs, *slots, states), {}),
        "fixed": (fixed, (draw(B, T, 4), poles, draw(4, 3), torch.complex(states, states)), {}),
        "fixed, chunked": (
            fixed,
            (draw(B, T, 4), poles, draw(4, 3), torch.complex(states, states)),
            {"form": "chunked"},
        ),
    }


CASES = cases()


def outputs(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    run, tensors, options = CASES[name]
    return lambda *given: tuple(run(*given, **options)), tensors


def loss(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A number that is curved in every input."""
    run, tensors = outputs(name)
    return lambda *given: sum((y.abs().square() + y.real.sin()).sum() for y in run(*given)), tensors


@pytest.mark.parametrize("name", CASES)
def test_vmap_equals_calls_one_by_one(name: str) -> None:
    """Values and gradients, with the first input batched, the last, or all."""
    (run, tensors), (value, _) = outputs(name), loss(name)
    every = tuple(range(len(tensors)))
    for batched in ((0,), every[-1:], every):
        stacked = [torch.stack([x, x * 0.7]) if i in batched else x for i, x in enumerate(tensors)]
        dims = tuple(0 if i in batched else None for i in every)
        for function in (run, grad(value, argnums=every)):
            got = vmap(function, in_dims=dims)(*stacked)
            singles = [function(*(x[j] if i in batched else x for i, x in enumerate(stacked))) for j in range(2)]
            for found, *wanted in zip(got, *singles, strict=True):
                torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # by torch's own linearize
@pytest.mark.parametrize("name", CASES)
def test_torch_func_equals_autograd(name: str) -> None:
    value, tensors = loss(name)
    for i, x in enumerate(tensors):
        if x.is_complex():
            continue

        def of_one(x: Tensor, i: int = i) -> Tensor:
            return value(*tensors[:i], x, *tensors[i + 1 :])

        leaf, direction = x.clone().requires_grad_(), torch.ones_like(x)
        (slope,) = torch.autograd.grad(of_one(leaf), leaf, create_graph=True)
        (curved,) = torch.autograd.grad((slope * direction).sum(), leaf)
        torch.testing.assert_close(grad(of_one)(x), slope.detach())
        torch.testing.assert_close(jvp(grad(of_one), (x,), (direction,))[1], curved)
        torch.testing.assert_close(linearize(of_one, x)[1](direction), (slope * direction).sum().detach())
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(of_one(forward_ad.make_dual(x, direction))).tangent
            torch.testing.assert_close(moved, (slope * direction).sum().detach())


def test_jacobians_and_hessians_of_a_scan() -> None:
    value, tensors = loss("scan")
    run, _ = outputs("scan")
    v = tensors[2]
    for i, name in ((2, "v"), (3, "log_decay")):

        def of_one(x: Tensor, i: int = i) -> Tensor:
            return run(*tensors[:i], x, *tensors[i + 1 :])[0]

        torch.testing.assert_close(jacfwd(of_one)(tensors[i]), jacrev(of_one)(tensors[i]), msg=name)
    curvature = hessian(lambda v: value(*tensors[:2], v, *tensors[3:]))(v).reshape(v.numel(), v.numel())
    torch.testing.assert_close(curvature, curvature.mT)


CAUSAL = [name for name in presets.names() if getattr(presets, name)().causal]
PRESETS = ("min_gru", "hgrn2", "mamba", "delta_net", "mlstm", "dss", "llama")


def model_and_loss(name: str) -> tuple[dict[str, Tensor], Callable[..., Tensor], Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(getattr(presets, name)(), vocab_size=20, dim=16, depth=1)
    weights = {key: weight.detach() for key, weight in model.named_parameters()}

    def value(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],)).logsumexp(-1).sum()

    return weights, value, torch.randint(20, (3, 8))


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_per_example_and_along_a_direction_of_a_model(name: str) -> None:
    weights, value, ids = model_and_loss(name)
    each = vmap(grad(value), in_dims=(None, 0))(weights, ids)
    ones = {key: torch.ones_like(weight) for key, weight in weights.items()}
    for i, row in enumerate(ids):
        leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
        found = torch.autograd.grad(value(leaves, row), tuple(leaves.values()), materialize_grads=True)
        slopes = dict(zip(leaves, found, strict=True))
        for key, slope in slopes.items():
            torch.testing.assert_close(each[key][i], slope, rtol=1e-4, atol=1e-5)
    _, along = jvp(lambda weights: value(weights, ids[-1]), (weights,), (ones,))
    torch.testing.assert_close(along, sum(slope.sum() for slope in slopes.values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_exported_models_take_any_length_and_have_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(getattr(presets, name)(), vocab_size=20, dim=32, depth=1 + ("dense" in name))
    assert model.training
    lengths = ({1: torch.export.Dim("T", min=2, max=512)},)
    exported = torch.export.export(model, (torch.randint(20, (2, 33)),), dynamic_shapes=lengths).module()
    for T in (2, 64, 70):
        ids = torch.randint(20, (2, T))
        got, want = exported(ids), model(ids)
        torch.testing.assert_close(got, want)
    there = dict(exported.named_parameters())
    names = [key for key, _ in model.named_parameters() if key in there]
    assert names
    slopes = torch.autograd.grad(got.logsumexp(-1).sum(), [there[key] for key in names], materialize_grads=True)
    leaves = [model.get_parameter(key) for key in names]
    wanted = torch.autograd.grad(want.logsumexp(-1).sum(), leaves, materialize_grads=True)
    for found, slope in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_rows_of_any_length_share_graphs(name: str) -> None:
    model, graphs = LanguageModel(getattr(presets, name)(), vocab_size=20, dim=32, depth=1 + ("dense" in name)), []

    def keep(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    read = torch.compile(
        lambda ids, borders: model(ids, cu_seqlens=borders, return_state=True),
        backend=keep, dynamic=True, fullgraph=True,
    )  # fmt: skip
    with torch.no_grad():
        for borders in ([0, 20, 70], [0, 64, 128], [0, 100, 100, 200]):
            ids, borders = torch.randint(20, (1, borders[-1])), torch.tensor(borders)
            (got, state), (want, other) = read(ids, borders), model(ids, cu_seqlens=borders, return_state=True)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            rest = torch.randint(20, (len(borders) - 1, 3))  # caches may have more slots in a graph
            torch.testing.assert_close(model(rest, state), model(rest, other), rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2


def test_the_kernel_refuses_forward_mode_by_name() -> None:
    _, tensors = outputs("scan")
    refused = "form='triton' does not cover forward-mode derivatives and torch.func transforms; form='chunked' does"
    for transform in (lambda f: jvp(f, tensors, tensors), lambda f: grad(lambda *x: f(*x)[0].sum())(*tensors)):
        with pytest.raises(NotImplementedError, match=refused):
            transform(lambda *given: tuple(scan(*given, form="triton")))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refused):
        scan(*tensors, form="triton")


def test_operators_of_the_kernel_refuse_tangents_that_come_later() -> None:
    from recur.kernels import operators

    @operators.operator("refuses_tangents_test")
    def refuses_tangents_test(x: Tensor) -> Tensor:
        return x.clone()

    operators.differentiable("refuses_tangents_test")
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivatives; form='chunked'"),
    ):
        refuses_tangents_test(torch.ones(2))


def test_borders_of_documents_are_not_vmapped() -> None:
    x, log_decay = draw(1, T, 3), decay(1, T, 3)
    with pytest.raises(NotImplementedError, match="cu_seqlens must be the same for all that is vmapped"):
        vmap(lambda borders: recur.gated_scan(x, log_decay, cu_seqlens=borders))(torch.stack([BORDERS, BORDERS]))


@pytest.mark.parametrize("name", ["scan", "gated"])
def test_a_transform_inside_a_compiled_function_is_refused_by_name(name: str) -> None:
    value, tensors = loss(name)
    torch.compiler.reset()
    compiled = torch.compile(grad(value), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"a torch\.func transform inside torch.compile needs form='recurrent'"):
        compiled(*tensors)


def test_second_derivatives_of_a_graph_are_refused_by_name() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(B))

    class Scan(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return recur.scan(q, k, v).y

    exported = torch.export.export(Scan(), (q, k, v)).module()
    (slope,) = torch.autograd.grad(exported(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="in a graph this scan has first derivatives only; form='recurrent'"):
        slope.sum().backward()
