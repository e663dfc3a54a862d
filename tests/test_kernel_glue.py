"""Kernels around the scans (norms, gates, short convolutions) against their formulas in float64, interpreted.

Laws run in processes of their own: `TRITON_INTERPRET=1 python tests/test_kernel_glue.py LAW...`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import Laws, run_laws
from test_kernel_elementwise import compare, randn
from torch import Tensor

from recur import LanguageModel, Mixer, kernel, presets
from recur.blocks import Norm
from recur.primitives.conv import causal_conv, causal_convs
from recur.primitives.gates import biased, lower_bounded_decay, output_gate, polar_gate, sigmoid_decay, weigh
from recur.primitives.norms import normalise
from recur.primitives.rotary import rotary_frequencies, rotate

LAWS = law = Laws()


def agree(name: str, run: Callable[..., Any], *inputs: Tensor | None, half: bool = False) -> None:
    """The kernel, in float32 or with `half` in float16, against the formula in float64."""
    taken = []
    inputs = tuple(x.half() if half and x is not None else x for x in inputs)

    def by(form: str) -> Callable[..., tuple[Tensor, ...]]:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            taken.append(kernel.fused(form, *tensors))
            out = run(*tensors, form=form)
            return out if isinstance(out, tuple) else (out,)

        return call

    compare(name, by("triton"), by("chunked"), list(inputs))
    assert taken == [True, False, False], name


@law
def norms_are_their_formulas() -> None:
    sizes = (((2, 3, 2, 5), 1, 1), ((2, 3, 4, 6), 2, 1), ((1, 7, 12), 1, 3), ((5, 33), 1, 1), ((2, 9, 1), 1, 1))
    for kind, (shape, axes, groups) in product(("rms", "layer", "l2", "unit"), sizes):
        weight, bias = randn(*shape[-axes:]), randn(*shape[-axes:])

        def run(x: Tensor, *affine: Tensor | None, form: str, kind=kind, axes=axes, groups=groups) -> Tensor:
            weight, bias = (*affine, None, None)[:2]
            return normalise(x, kind, axes=axes, groups=groups, eps=0.1, weight=weight, bias=bias, form=form)

        if shape[-1] > 1 or kind != "layer":
            agree(f"{kind} {shape}", run, randn(*shape), weight, bias)
            agree(f"{kind} {shape}, no bias, float16", run, randn(*shape), weight, half=True)
            agree(f"{kind} {shape}, nothing learned", run, randn(*shape))


@law
def norms_with_an_eps_per_row_are_their_formulas() -> None:
    for shape in ((2, 3, 4, 1), (1, 3, 4, 1), (3, 4, 1), (1, 1, 1, 1)):
        eps = torch.rand(shape) + 0.1
        agree(
            f"{shape}",
            lambda x, w, form, eps=eps: normalise(x, eps=eps, weight=w, form=form),
            randn(2, 3, 4, 5),
            randn(5),
        )


@law
def short_vectors_are_divided_by_eps() -> None:
    x = torch.stack([torch.zeros(6), torch.full((6,), 0.01), torch.ones(6)])[None]
    for kind in ("l2", "unit"):
        agree(kind, lambda x, form, kind=kind: normalise(x, kind, eps=0.5, form=form), x)


@law
def a_row_that_is_not_a_number_leaves_others_alone() -> None:
    x, z = randn(1, 9, 3, 5), randn(1, 9, 3, 5)
    want = normalise(x, "layer", form="triton")
    y = x.clone()
    y[0, 4, 1, 2] = torch.nan
    got = normalise(y, "layer", form="triton")
    assert got[0, 4, 1].isnan().all()
    got[0, 4, 1] = want[0, 4, 1]
    assert torch.equal(got, want)
    assert output_gate(y, z, form="triton").isnan().sum() == 1


@law
def gates_are_their_formulas() -> None:
    for act in kernel.GATES:
        agree(
            act, lambda y, z, form, act=act: output_gate(y, z, act=act, form=form), randn(2, 5, 7), 3 * randn(2, 5, 7)
        )
    agree("float16", lambda y, z, form: output_gate(y, z, form=form), randn(2, 5, 3, 7), randn(2, 5, 3, 7), half=True)
    wide = randn(1, 3, 2, 600)
    agree("several tiles", lambda y, z, form: output_gate(y, z, form=form), wide, randn(*wide.shape))


@law
def decays_are_their_formulas() -> None:
    z = torch.tensor([-200.0, -30.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 8.0, 12.0, 17.0]).repeat(2, 3, 2, 1)
    agree("log sigmoid", lambda z, form: sigmoid_decay(z, tau=16.0, form=form), z)
    for act in ("sigmoid", "softplus"):
        bias = randn(2, 10)
        agree(act, lambda z, b, form, act=act: biased(act, z, b, form=form), z, bias)
        agree(f"{act}, float16", lambda z, b, form, act=act: biased(act, z, b, form=form), z, bias, half=True)
    for bound in (None, torch.tensor([[0.0, 1e-30, 0.1, 0.5, 0.99], [0.0, 0.3, 0.3, 0.999, 0.7]]).repeat(1, 2)):
        agree(
            f"bounded {bound}",
            lambda z, *g, form: lower_bounded_decay(z, *(g or (None,)), form=form),
            z,
            *([] if bound is None else [bound]),
        )


@law
def polar_gates_are_their_formulas() -> None:
    at = torch.tensor([0.0, 1e-30, 1e-3, 0.3, -0.3, 1.0, -1.0, 2.5, -40.0, 1e20])
    re, im = (x.flatten().expand(1, 2, -1) for x in torch.meshgrid(at, at, indexing="ij"))
    agree("every octant", lambda re, im, form: torch.view_as_real(polar_gate(re, im, form=form)), re, im)
    pairs = 3 * randn(2, 5, 3, 2)
    for half in (False, True):
        agree(
            f"pairs, {half}",
            lambda c, form: torch.view_as_real(polar_gate(*c.unbind(-1), form=form)),
            pairs,
            half=half,
        )


@law
def weights_of_heads_are_their_formulas() -> None:
    for H, P in ((1, 1), (3, 5), (2, 64)):
        agree(f"H={H} P={P}", lambda u, w, form: weigh(u, w, form=form), randn(2, 5, H, P), randn(2, 5, H))
    agree("float16", lambda u, w, form: weigh(u, w, form=form), randn(2, 5, 3, 4), randn(2, 5, 3), half=True)


@law
def a_small_decay_keeps_its_digits() -> None:
    z = torch.linspace(-40, 40, 81)[None, :, None]
    wide, none = z.double(), torch.zeros(1)
    for name, got, want in (
        ("log sigmoid", sigmoid_decay(z, form="triton"), torch.nn.functional.logsigmoid(wide)),
        ("softplus", biased("softplus", z, none, form="triton"), -torch.nn.functional.logsigmoid(-wide)),
        ("bounded", lower_bounded_decay(z, none + 0.25, form="triton")[0], torch.log1p(-0.75 * torch.sigmoid(-wide))),
    ):
        assert ((got - want) / want).abs().max() < 5e-6, name


@law
def convolutions_are_their_formulas() -> None:
    for W, T, act in [(4, 19, "identity"), *product((1, 2, 4, 8), (1, 3, 19), ("silu",))]:
        x, weight, bias, state = randn(2, T, 5), randn(5, W), randn(5), randn(2, W - 1, 5)

        def run(x: Tensor, w: Tensor, b: Tensor | None = None, s: Tensor | None = None, *, form: str, act=act) -> Any:
            return causal_conv(x, w, b, initial_state=s, act=act, form=form)

        if W > 1:
            agree(f"W={W} T={T} {act}", run, x, weight, bias, state)
        agree(f"W={W} T={T} {act}, fresh, float16", run, x, weight, half=True)


@law
def packed_convolutions_are_their_formulas() -> None:
    for lengths, W in product(((0, 5, 0, 1, 20, 2), (28,), (1,) * 28, (0, 0, 28, 0)), (2, 4)):
        cu, n = torch.tensor([0, *lengths]).cumsum(0), len(lengths)
        x, weight, bias, state = randn(1, 28, 5), randn(5, W), randn(5), randn(n, W - 1, 5)

        def run(x: Tensor, w: Tensor, b: Tensor, s: Tensor | None = None, *, form: str, cu=cu) -> Any:
            return causal_conv(x, w, b, initial_state=s, cu_seqlens=cu, act="silu", form=form)

        agree(f"{lengths} W={W}", run, x, weight, bias, state)
        agree(f"{lengths} W={W}, fresh", run, x, weight, bias)


@law
def several_tensors_are_convolved_with_one_weight() -> None:
    def run(a: Tensor, b: Tensor, c: Tensor, w: Tensor, s: Tensor, *, form: str) -> tuple[Tensor, ...]:
        ys, state = causal_convs((a, b, c), w, initial_state=s, act="silu", form=form)
        return (*ys, state)

    agree("three", run, randn(2, 9, 3), randn(2, 9, 130), randn(2, 9, 1), randn(134, 4), randn(2, 3, 134))


@law
def rows_of_logits_become_the_gradient_of_their_loss() -> None:
    from recur.kernels import loss

    loss.BLOCK = 16  # several blocks per row
    for V, dtype in ((1, torch.float32), (5, torch.float32), (70, torch.float32), (70, torch.float16)):
        logits, target = (5 * randn(9, V)).to(dtype), torch.randint(V, (9,))
        target[3] = -1
        logits[0, 1:] = -torch.inf
        target[0] = 0
        wide = logits.double().requires_grad_()
        want = torch.nn.functional.cross_entropy(wide, target, reduction="none", ignore_index=-1)
        got = kernel.cross_entropy(logits, target)
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(want.sum(), wide)
        torch.testing.assert_close(logits.double(), gradient, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)


@law
def rotations_are_their_formulas() -> None:
    for layout, K, rows in (("half", 2, 1), ("half", 12, 2), ("interleaved", 16, 2), ("interleaved", 6, 1)):
        position = torch.randint(0, 100_000, (rows, 9))

        def run(x: Tensor, form: str, layout=layout, K=K, position=position) -> Tensor:
            return rotate(x, position, rotary_frequencies(K), layout=layout, form=form)

        agree(f"{layout} {K}", lambda x, form: run(x, form=form), randn(2, 9, 3, K), half=True)
        x = randn(2, 9, 3, K)  # the angles of float32, which the formula rounds as well
        torch.testing.assert_close(run(x, "triton"), run(x, "chunked"), rtol=1e-5, atol=2e-6)


@law
def a_rotation_has_second_derivatives() -> None:
    x = randn(1, 5, 2, 4).requires_grad_()
    position, frequencies = torch.arange(5)[None], rotary_frequencies(4)
    y = rotate(x, position, frequencies, form="triton")
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    z = rotate(x, position, frequencies, form="chunked")
    (dx,) = torch.autograd.grad((z**3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(dx.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@law
def any_stride_will_do() -> None:
    """Slices of a projection, transposed and repeated tensors, and gradients that come in so, give the same bits."""
    base = randn(2, 9, 20)
    views = {
        "slice": base[..., 3:11],
        "transposed": randn(2, 8, 9).mT,
        "every other": randn(2, 9, 16)[..., ::2],
        "repeated": randn(1, 1, 8).expand(2, 9, 8),
        "later tokens": randn(2, 12, 8)[:, 3:],
    }
    w, b, taps, state = randn(8), randn(8), randn(8, 4), randn(2, 8, 3).mT
    for name, view in views.items():
        for run in (
            lambda x, form="triton": normalise(x, weight=w, form=form),
            lambda x, form="triton": output_gate(x, x, form=form),
            lambda x, form="triton": biased("softplus", x, b, form=form),
            lambda x, form="triton": lower_bounded_decay(x, b.sigmoid(), form=form)[0],
            lambda x, form="triton": causal_conv(x, taps, b, initial_state=state, form=form)[0],
        ):
            outs = []
            for x in (view, view.contiguous()):
                leaf = x.detach().requires_grad_()
                y = run(leaf)
                dy = torch.ones(y.shape[0], y.shape[2], y.shape[1]).cumsum(1).mT
                outs.append([y, *torch.autograd.grad(y, leaf, dy if x is view else dy.contiguous())])
            assert all(map(torch.equal, *outs)), name


@law
def models_are_those_of_the_formulas() -> None:
    """Loss and gradients by kernels: skip, norm and gate in the order of each preset, packed rows, several layers."""
    exact = (Norm("y", eps=1e-6),)
    for name, recipe in {
        "gla": presets.gla(heads=2),
        "hgrn2": presets.hgrn2(heads=2),
        "gated_delta_net": presets.gated_delta_net(heads=2),
        "retnet": presets.retnet(heads=2),
        "mamba2": presets.mamba2(head=8, state=4, groups=2),
        "longhorn": presets.longhorn(norm=exact),
        "llama": presets.llama(heads=2),
    }.items():
        torch.manual_seed(0)
        lm = LanguageModel(recipe, vocab_size=9, dim=16, depth=2, ffn="swiglu", norm="rms")
        ids, cu = torch.randint(9, (1, 7)), torch.tensor([0, 2, 6])
        found = []
        for form in ("triton", "chunked"):
            loss = lm.loss(ids, cu_seqlens=cu, form=form)
            found.append([loss, *torch.autograd.grad(loss, list(lm.parameters()), materialize_grads=True)])
        for i, (got, want) in enumerate(zip(*found, strict=True)):
            assert (got - want).norm() < 2e-5 * (want.norm() + 1), f"{name}: output {i}"


@law
def parts_side_by_side_are_one_launch() -> None:
    from recur.kernels import norm as home

    launched, run = [], home.norm
    home.norm = lambda x, **options: launched.append(options) or run(x, **options)
    for recipe, count in ((presets.mamba2(head=8, state=4), 1), (presets.gla(heads=2), 1), (presets.longhorn(), 1)):
        launched.clear()
        Mixer(recipe, 16)(randn(1, 3, 16), form="triton")
        assert len(launched) == count, launched
        launched.clear()
        Mixer(recipe, 16)(randn(1, 3, 16), form="chunked")
        assert launched == []


@law
def second_order_is_refused() -> None:
    x, w = randn(1, 3, 4).requires_grad_(), randn(4, 2)
    for y in (
        normalise(x, form="triton"),
        output_gate(x, x, form="triton"),
        sigmoid_decay(x, form="triton"),
        polar_gate(x, x, form="triton").abs(),
        lower_bounded_decay(x, None, form="triton")[0],
        causal_conv(x, w, act="silu", form="triton").y,
        weigh(x[..., None], x, form="triton"),
    ):
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="form='triton' has first derivatives only"):
            dx.sum().backward()


@law
def operators_keep_the_promises_of_torch() -> None:
    """Fakes, schemas, autograd registrations."""
    from recur.kernels import conv, norm, pointwise, rotary  # noqa: F401, registers them

    ops, cu = torch.ops.recur, torch.tensor([0, 4, 9])
    x, z, w, g, taps, state = randn(1, 9, 6), randn(1, 9, 6), randn(6), torch.rand(6), randn(6, 4), randn(2, 3, 6)
    leaves = [t.requires_grad_() for t in (x, z, w, g, taps, state)]
    x, z, w, g, taps, state = leaves
    shape, none = (0.1, 6, 6, "layer", "after", "silu"), torch.zeros(0)
    calls = (
        (ops.norm, (x, z, x, w, w, w, None, *shape)),
        (ops.norm_backward, (z.detach(), x.detach(), z.detach(), None, w.detach(), None, None, None, *shape)),
        (ops.activate, (z, w, "softplus", 0.5)),
        (ops.activate_backward, (x.detach(), z.detach(), None, "sigmoid", 1.0)),
        (ops.weigh, (x.view(1, 9, 2, 3), randn(1, 9, 2).requires_grad_())),
        (ops.weigh_backward, (x.detach().view(1, 9, 2, 3), z.detach().view(1, 9, 2, 3), randn(1, 9, 2))),
        (ops.polar, (x, z)),
        (ops.polar_backward, (randn(1, 9, 6, 2), x.detach(), z.detach())),
        (ops.bounded, (z, g)),
        (ops.bounded_backward, (x.detach(), x.detach(), z.detach(), g.detach())),
        (ops.conv, (x, None, None, taps, w, state, cu, "silu")),
        (ops.rotate, (x.view(1, 9, 1, 6), torch.arange(9)[None], g[:3].detach().double(), True, False)),
        (ops.conv_backward, (z.detach(), none, none, None, z.detach(), None, None, taps.detach(), *[None] * 3, "silu")),
    )  # fmt: skip
    for operator, inputs in calls:
        torch.library.opcheck(operator, inputs)


SLOW = [name for name in LAWS if name.endswith("their_formulas")]
QUICK = [name for name in LAWS if name not in SLOW]


@pytest.mark.parametrize("names", [*([name] for name in SLOW), QUICK], ids=[*SLOW, "quick"])
def test_laws(names: list[str]) -> None:
    run_laws(__file__, names)


if __name__ == "__main__":
    LAWS.main()
