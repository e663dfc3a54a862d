"""Gates, norms, convolution, rotation, poles and fusion: against their formulas, at their edges, and their errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from recur.primitives.conv import causal_conv, token_shift
from recur.primitives.fixed import tap_conv
from recur.primitives.gates import (
    ACTIVATIONS,
    activation,
    complex_gate,
    lower_bounded_decay,
    lower_bounds,
    output_gate,
    polar_gate,
    scale_gradient,
    sigmoid_decay,
    signed_gate,
)
from recur.primitives.hidden import dense_fusion
from recur.primitives.norms import normalise
from recur.primitives.poles import poles, zero_order_hold
from recur.primitives.rotary import rotary_frequencies, rotate
from recur.shapes import ShapeError, bind, check_float, expect

close = torch.testing.assert_close


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- gates


def test_sigmoid_decay_is_a_root_of_the_sigmoid_and_never_overflows():
    z = torch.tensor([-1000.0, -3.0, 0.0, 1000.0], dtype=torch.float64)
    close(sigmoid_decay(z, tau=4.0).exp(), torch.sigmoid(z) ** 0.25)
    assert sigmoid_decay(z)[0] == -1000
    assert sigmoid_decay(z.half()).dtype == torch.float32


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1e-30, 0.3, 1 - 1e-12]))
def test_a_bounded_decay_keeps_its_bound_and_what_it_lets_in(seed, bound):
    z = 30 * draw(64, seed=seed)
    log_a, keep = lower_bounded_decay(z, torch.full_like(z, bound))
    direct = bound + (1 - bound) * torch.sigmoid(z)
    close(log_a.exp(), direct, rtol=1e-12, atol=0)
    close(keep, (1 - bound) * torch.sigmoid(-z), rtol=1e-12, atol=0)
    close(-torch.expm1(log_a), keep, rtol=1e-9, atol=1e-15)


def test_a_bounded_decay_has_finite_gradients_at_a_bound_of_zero():
    z, bound = (
        draw(5).requires_grad_(),
        torch.tensor([0.0, 0.0, 0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True),
    )
    sum(part.sum() for part in lower_bounded_decay(z, bound)).backward()
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(bound.grad).all()
    assert gradcheck(lower_bounded_decay, (draw(5).requires_grad_(), torch.full((5,), 0.3).double().requires_grad_()))


def test_lower_bounds_start_at_zero_and_rise():
    table = lower_bounds(torch.ones(4, 3))
    close(table, torch.tensor([0.0, 0.25, 0.5, 0.75])[:, None].expand(4, 3))
    rising = lower_bounds(draw(6, 5))
    assert (rising[0] == 0).all()
    assert (rising.diff(dim=0) > 0).all()
    assert rising.max() < 1
    for law in ("skip_first", "skip_last"):
        table, logits = lower_bounds(draw(6, 5), law=law), draw(6, 5)
        close(torch.stack([lower_bounds(logits, law=law, layer=layer) for layer in range(6)]), table)


def test_complex_gates():
    real, imag = draw(20), draw(20, seed=1)
    gate = polar_gate(real, imag).exp()
    c = torch.complex(real, imag)
    close(gate, torch.sigmoid(c.abs()) * c / c.abs())
    close(complex_gate(real, imag).exp(), torch.polar(torch.sigmoid(real), imag))
    close(signed_gate(real, imag).exp(), torch.complex(real.sign() * real.abs().sigmoid(), torch.zeros_like(real)))
    assert polar_gate(real.half(), imag.half()).dtype == torch.complex64
    zero = torch.zeros(1, requires_grad=True)
    polar_gate(zero, zero).real.sum().backward()
    assert zero.grad == 0
    with pytest.raises(ShapeError, match="complex_gate: magnitude has"):
        complex_gate(real, imag[:3])


def test_output_gate_and_scaled_gradient():
    y, z = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    close(output_gate(y, z), y * z * torch.sigmoid(z))
    with pytest.raises(ShapeError, match="output_gate: y has"):
        output_gate(y, z[:1])
    x = draw(3).requires_grad_()
    close(scale_gradient(x, 0.9), x)
    scale_gradient(x, 0.9).sum().backward()
    close(x.grad, torch.full((3,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("name", ["identity", "silu", "1+elu", "relu2", "softplus", "exp", "gelu_tanh"])
def test_activations_are_pointwise(name):
    x = draw(7)
    close(activation(name)(x)[3], activation(name)(x[3]))


@pytest.mark.parametrize("name", ["elu", "softplus"])
def test_activations_are_those_of_torch(name):
    x = torch.tensor([-800.0, -30, -1, -1e-9, 0, 1e-9, 1, 30, 800], dtype=torch.float64, requires_grad=True)
    mine, torchs = activation(name)(x), getattr(torch.nn.functional, name)(x)
    close(mine, torchs)
    close(*(torch.autograd.grad(y.sum(), x)[0] for y in (mine, torchs)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_lie_where_a_compiler_expects_them(name):
    """A gradient that comes in transposed leaves with the strides that its fake has."""

    def strides():
        x, dy = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 3).mT
        return torch.autograd.grad(activation(name)(x), x, dy)[0].stride()

    with FakeTensorMode():
        promised = strides()
    assert strides() == promised


def test_dense_fusion_adds_the_past_through_the_gate():
    new, gate, past = draw(2, 3, 4), draw(2, 3, 4, seed=1), [draw(2, 3, 4, seed=s) for s in (2, 3)]
    close(dense_fusion(new, past, gate), new + gate * (past[0] + past[1]))
    assert dense_fusion(new, [], gate) is new
    with pytest.raises(ShapeError, match="past_0 has"):
        dense_fusion(new, [draw(2, 3, 5)], gate)


# ---------------------------------------------------------------------- norms and rotation


def test_norms_are_their_formulas():
    x, weight, bias = draw(2, 3, 4, 5), draw(4, 5, seed=1), draw(4, 5, seed=2)
    flat = x.flatten(2)
    rms = flat / (flat.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(normalise(x, axes=2, weight=weight), rms.view_as(x) * weight)
    layer = torch.nn.functional.layer_norm(x, (4, 5), weight, bias, 1e-5)
    close(normalise(x, "layer", axes=2, weight=weight, bias=bias), layer)
    close(normalise(x, "l2", eps=1e-12), torch.nn.functional.normalize(x, dim=-1) * 5**0.5)
    close(normalise(x, "unit", eps=1e-12), torch.nn.functional.normalize(x, dim=-1))
    eps = draw(2, 3, 4, 1, seed=3).abs()
    close(normalise(x, eps=eps), x / (x.square().mean(-1, keepdim=True) + eps).sqrt())
    assert normalise(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="kind must be one of rms, layer, l2, unit, smooth_unit, got 'batch'"):
        normalise(x, "batch")


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotation_keeps_lengths_and_sees_only_differences(layout):
    q, k = draw(1, 1, 2, 6).expand(1, 9, 2, 6), draw(1, 1, 2, 6, seed=1).expand(1, 9, 2, 6)
    frequencies, position = rotary_frequencies(6), torch.arange(9)[None]
    a, b = (rotate(x, position, frequencies, layout=layout) for x in (q, k))
    close(a.norm(dim=-1), q.norm(dim=-1))
    score = torch.einsum("bthk,bshk->bhts", a, b)
    close(score[..., 1:, 1:], score[..., :-1, :-1])
    later = rotate(q, position + 10**9, frequencies, layout=layout)
    close(later.norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize(("layout", "pairs"), [("interleaved", ((0, 1), (2, 3))), ("half", ((0, 2), (1, 3)))])
def test_channels_without_a_frequency_stay(layout, pairs):
    x, frequencies, position = draw(2, 3, 2, 5), rotary_frequencies(4), torch.arange(3)[None]
    rotated = rotate(x, position, frequencies, layout=layout)
    assert torch.equal(rotated[..., 4], x[..., 4])
    for j, (a, b) in enumerate(pairs):
        angle = position[..., None] * frequencies[j]
        close(rotated[..., a], x[..., a] * angle.cos() - x[..., b] * angle.sin())
        close(rotated[..., b], x[..., b] * angle.cos() + x[..., a] * angle.sin())


def test_rotary_frequencies():
    close(rotary_frequencies(4), torch.tensor([1.0, 0.01]).double())  # numbers of float32
    close(rotary_frequencies(4, inclusive=True), torch.tensor([1.0, 1e-4]).double())
    close(rotary_frequencies(2, inclusive=True), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="dim must be even, got 3"):
        rotary_frequencies(3)
    with pytest.raises(ValueError, match="layout must be"):
        rotate(draw(1, 1, 1, 2), torch.zeros(1, 1), rotary_frequencies(2), layout="pairs")


# ---------------------------------------------------------------------- convolution


def conv_loop(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Definition, token by token."""
    rows = []
    for t in range(x.shape[1]):
        window = torch.cat([state, x[:, t : t + 1]], 1)
        rows.append((window * weight.T).sum(1) + bias)
        state = window[:, 1:]
    return torch.stack(rows, 1)


@given(st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 2**31 - 1))
def test_convolution_is_its_loop_in_every_document(width, lengths, seed):
    documents = [draw(1, length, 3, seed=seed + i) for i, length in enumerate(lengths)]
    weight, bias = draw(3, width, seed=seed + 10), draw(3, seed=seed + 11)
    states = draw(len(lengths), width - 1, 3, seed=seed + 12)
    row, borders = torch.cat(documents, 1), torch.tensor([0, *lengths]).cumsum(0)
    packed = causal_conv(row, weight, bias, initial_state=states, cu_seqlens=borders)
    for i, document in enumerate(documents):
        alone = causal_conv(document, weight, bias, initial_state=states[i : i + 1])
        close(alone.state[0], torch.cat([states[i], document[0]])[len(document[0]) :])
        close(packed.state[i], alone.state[0])
        if lengths[i]:
            close(alone.y, conv_loop(document, weight, bias, states[i : i + 1]))
            close(packed.y[:, borders[i] : borders[i + 1]], alone.y)


@given(st.integers(0, 12), st.integers(0, 2**31 - 1))
def test_tap_convolution_is_its_sum(T, seed):
    u, tap = draw(2, T, 3, seed=seed), draw(2, T, 3, seed=seed + 1)
    sums = [sum((tap[:, s] * u[:, t - s] for s in range(t + 1)), torch.zeros(2, 3).double()) for t in range(T)]
    close(tap_conv(u, tap), torch.stack(sums, 1) if sums else u)
    with pytest.raises(ShapeError, match="tap_conv: u has"):
        tap_conv(u, tap[..., :2])


def test_token_shift_and_convolution_errors():
    x = draw(2, 4, 3)
    close(token_shift(x).y, torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
    with pytest.raises(
        ShapeError, match=r"token_shift: initial_state must be \[B 1 D\] = \(2, 1, 3\), got shape \(2, 2, 3\)"
    ):
        token_shift(x, initial_state=draw(2, 2, 3))
    with pytest.raises(ShapeError, match="causal_conv: x has D=3 but weight has D=4"):
        causal_conv(x, draw(4, 2))
    with pytest.raises(ShapeError, match="so B must be 1, got B=2"):
        causal_conv(x, draw(3, 2), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T=4 without falling, got \[0, 3, 2, 4\]"):
        causal_conv(x[:1], draw(3, 2), cu_seqlens=torch.tensor([0, 3, 2, 4]))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32 or int64, got torch\.float32"):
        causal_conv(x[:1], draw(3, 2), cu_seqlens=torch.tensor([0.0, 4.0]))
    with pytest.raises(ShapeError, match=r"cu_seqlens must be \[n\+1\], got shape \(1, 2\)"):
        causal_conv(x[:1], draw(3, 2), cu_seqlens=torch.tensor([[0, 4]]))


# ---------------------------------------------------------------------- poles


def test_zero_order_hold_keeps_its_digits():
    z = torch.tensor([-2.0 + 3.0j, -1e-3 + 2e-3j, -0.009 + 0.001j, -0.0101 + 0j, -50 + 400j], dtype=torch.complex128)
    with_digits = (z.exp() - 1) / z
    close(zero_order_hold(z), with_digits, rtol=1e-12, atol=0)
    tiny = torch.tensor([0.0, -1e-30, -1e-9], dtype=torch.float64)
    close(zero_order_hold(tiny), 1 + tiny / 2, rtol=1e-15, atol=0)
    single = zero_order_hold(torch.tensor([-math.exp(-14.0)]))
    assert abs(single.item() - (1 - math.exp(-14.0) / 2)) < 2**-23
    z = (draw(6) * 0.02).requires_grad_()
    assert gradcheck(lambda real: torch.view_as_real(zero_order_hold(torch.complex(real, real * 0 + 0.003))), (z,))


def test_poles_decay_and_rotate():
    found = poles(torch.tensor([0.0]), torch.tensor([2.0]))
    close(found, torch.tensor([-1.0 + 2.0j]))


# ---------------------------------------------------------------------- shapes


def test_bind_reports_in_letters():
    assert bind("f", x=(draw(2, 3, 4), "B T *"), y=(None, "B")) == {"B": 2, "T": 3, "*": (4,)}
    with pytest.raises(ShapeError, match=r"f: x has D=4 but y has D=5; expected x: \[B D\] and y: \[D \| B D\]"):
        bind("f", x=(draw(2, 4), "B D"), y=(draw(5), "D | B D"))
    with pytest.raises(ShapeError, match=r"f: x must be \[B T\], got shape \(2, 3, 4\)"):
        bind("f", x=(draw(2, 3, 4), "B T"))
    with pytest.raises(TypeError, match=r"f: x must be a tensor \[B\], got list"):
        bind("f", x=([1], "B"))
    with pytest.raises(ValueError, match="f: x is on cpu but y is on meta"):
        bind("f", x=(draw(2), "B"), y=(torch.ones(2, device="meta"), "B"))
    with pytest.raises(TypeError, match=r"f: x must be real and floating, got torch\.int64"):
        check_float("f", x=torch.tensor([1]))
    with pytest.raises(ShapeError, match=r"f: x must be \[B D\] = \(1, 2\), got shape \(2,\)"):
        expect("f", "x", draw(2), "B D", (1, 2))
