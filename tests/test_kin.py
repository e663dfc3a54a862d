"""Kin of the main systems: each preset against its paper's equations as a loop, in float64; first values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recur import Mixer, presets
from recur.blocks import AppendOne, DivideByLast, LowRank, OuterScan, Project, Stabilise
from recur.primitives.gates import power_decay
from recur.primitives.stabilise import largest_log
from recur.recipe import Recipe, RecipeError

B, T, D, H = 2, 7, 8, 2


def built(recipe: Recipe, dim: int = D) -> Mixer:
    """With every weight moved off its first value."""
    torch.manual_seed(0)
    layer = Mixer(recipe, dim).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return layer


def project(layer: Mixer, key: str, x: Tensor) -> list[Tensor]:
    """What a Project writes, in its order."""
    part, outs = layer.parts[key], dict(zip(layer.recipe.body.keys(), layer.recipe.parts, strict=True))[key].outs
    pieces = F.linear(x.flatten(2), part.weight, getattr(part, "bias", None)).split(part.splits, -1)
    full = [
        F.linear(y, getattr(part, f"{name}_up")) if isinstance(axes, LowRank) else y
        for (name, axes), y in zip(outs, pieces, strict=True)
    ]
    return [piece.unflatten(-1, shape) for piece, shape in zip(full, part.shapes, strict=True)]


def matrix_loop(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, beta: Tensor | None = None) -> Tensor:
    """Every read S_t^T q_t [B T H V]; keep [B T H K], beta [B T H] writes the error instead of the value."""
    S, reads = q.new_zeros(B, H, q.shape[-1], v.shape[-1]), []
    for t in range(T):
        S = keep[:, t, :, :, None] * S
        u = v[:, t] if beta is None else beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        reads.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(reads, 1)


def causal_conv(weight: Tensor, x: Tensor) -> Tensor:
    width = weight.shape[1]
    return F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], groups=len(weight)).mT


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rms(layer: Mixer, y: Tensor) -> Tensor:
    """The last norm of a delta network, head by head."""
    return F.rms_norm(y, y.shape[-1:], layer.parts["norm_3"].weight, eps=1e-5)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_linear_attention(x: Tensor) -> None:
    layer = built(presets.linear_attention(heads=H))
    q, k, v = project(layer, "project", x)
    q, k = 1 + F.elu(q), 1 + F.elu(k)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    y = torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True), v)
    torch.testing.assert_close(layer(x).y, *project(layer, "project_2", y))


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
def test_delta_networks(name: str, x: Tensor) -> None:
    layer = built(getattr(presets, name)(heads=H, conv=3))
    q, k, v, beta, *gates = project(layer, "project", x)
    g, dt = gates if gates else (None, None)
    widths = [piece[0, 0].numel() for piece in (q, k, v)]
    mixed = F.silu(causal_conv(layer.parts["short_conv"].weight, torch.cat([p.flatten(2) for p in (q, k, v)], -1)))
    q, k, v = (new.view_as(old) for new, old in zip(mixed.split(widths, -1), (q, k, v), strict=True))
    keep = torch.ones_like(k)
    if dt is not None:
        step = layer.parts["step_decay"]
        delta = F.softplus(dt + step.dt_bias)
        delta = delta if name == "kda" else delta[..., None]
        keep = torch.exp(-step.A_log.exp()[:, None] * delta).expand_as(k)
    q, k = unit(q) / math.sqrt(q.shape[-1]), unit(k)
    y = rms(layer, matrix_loop(q, k, v, keep, torch.sigmoid(beta)))
    if g is not None:
        y = y * (torch.sigmoid(g) if name == "kda" else F.silu(g))
    torch.testing.assert_close(layer(x).y, *project(layer, "project_2", y))


def test_mlstm_without_its_stabiliser(x: Tensor) -> None:
    layer = built(presets.mlstm(heads=H))
    q, k, v, o = project(layer, "project", x)
    i, f = project(layer, "project_2", x)
    keep = torch.sigmoid(f + layer.parts["learned"].value)[..., None].expand_as(k)
    k = torch.exp(i)[..., None] * k / math.sqrt(k.shape[-1])
    read = matrix_loop(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), keep)
    y = read[..., :-1] / read[..., -1:].abs().clamp(min=1)
    y = F.layer_norm(y, y.shape[-1:], eps=1e-5) * layer.parts["norm"].weight * torch.sigmoid(o)
    torch.testing.assert_close(layer(x).y, *project(layer, "project_3", y))


def diagonal_loop(a: Tensor, u: Tensor) -> Tensor:
    h, every = torch.zeros_like(u[:, 0]), []
    for t in range(T):
        h = a[:, t] * h + u[:, t]
        every.append(h)
    return torch.stack(every, 1)


def test_min_gru(x: Tensor) -> None:
    layer = built(presets.min_gru(expand=2))
    z, u = project(layer, "project", x)
    y = diagonal_loop(1 - torch.sigmoid(z), torch.sigmoid(z) * u)
    torch.testing.assert_close(layer(x).y, *project(layer, "project_2", y))


def test_rg_lru(x: Tensor) -> None:
    layer = built(presets.rg_lru(conv=3))
    u, g = project(layer, "project", x)
    u = causal_conv(layer.parts["short_conv"].weight, u) + layer.parts["short_conv"].bias
    r, i = project(layer, "project_2", u)
    a = torch.exp(-8 * F.softplus(layer.parts["power_decay"].Lambda) * torch.sigmoid(r))
    y = diagonal_loop(a, torch.sqrt(1 - a**2) * torch.sigmoid(i) * u) * F.gelu(g)
    torch.testing.assert_close(layer(x).y, *project(layer, "project_3", y))


def test_s4d_is_its_kernel(x: Tensor) -> None:
    layer = built(presets.s4d(state=3))
    scan, t = layer.parts["pole_scan"], torch.arange(T)
    step, A = scan.log_dt.exp()[:, None], torch.complex(-scan.r.exp(), scan.w)
    C = torch.complex(scan.C_real, scan.C_imag) * (torch.exp(step * A) - 1) / A
    kernel = 2 * torch.einsum("vn,vnt->vt", C, torch.exp((step * A)[..., None] * t)).real
    y = torch.stack([(kernel[:, : s + 1].flip(1).T * x[:, : s + 1]).sum(1) for s in range(T)], 1)
    y, g = project(layer, "project", F.gelu(y + layer.parts["skip"].D * x))
    torch.testing.assert_close(layer(x).y, y * torch.sigmoid(g))


def test_the_running_maximum_is_its_loop() -> None:
    f, i = -torch.rand(B, T, H, dtype=torch.float64) * 50, torch.randn(B, T, H, dtype=torch.float64) * 100
    m, want = torch.full((B, H), -1e30, dtype=torch.float64), []
    for t in range(T):
        m = torch.maximum(f[:, t] + m, i[:, t])
        want.append(m)
    got, before, last = largest_log(f, i)
    torch.testing.assert_close(got, torch.stack(want, 1))
    assert torch.equal(before[:, 1:], got[:, :-1])
    torch.testing.assert_close(last, m)


@pytest.mark.parametrize("loud", [1.0, 1000.0])
def test_exponential_gates_stay_in_bounds(loud: float) -> None:
    layer = Mixer(presets.mlstm(heads=H), D)
    with torch.no_grad():
        layer.parts["project_2"].weight.normal_(0, loud)
    x = torch.randn(B, 50, D, requires_grad=True)
    y, state = layer(x)
    y.square().sum().backward()
    for tensor in (y, x.grad, *(leaf for leaf in state["parts"].values())):
        assert bool(torch.isfinite(tensor).all())


def test_first_values_of_constants() -> None:
    torch.manual_seed(0)
    gate = Mixer(presets.rg_lru(), 4096).parts["power_decay"]
    a = torch.exp(-8 * F.softplus(gate.Lambda))
    assert 0.9 <= a.min().item() < 0.901
    assert 0.998 < a.max().item() <= 0.9991
    assert a.mean().item() == pytest.approx(0.9495, abs=2e-3)
    forget = Mixer(presets.mlstm(heads=4), 16).parts["learned"].value
    assert forget.tolist() == [3.0, 4.0, 5.0, 6.0]
    scan = Mixer(presets.s4d(state=4), 4096).parts["pole_scan"]
    assert scan.r.exp().unique().tolist() == [0.5]
    torch.testing.assert_close(scan.w[0], math.pi * torch.arange(4.0))
    assert scan.log_dt.mean().item() == pytest.approx((math.log(1e-3) + math.log(1e-1)) / 2, abs=0.1)
    assert scan.C_real.std().item() == pytest.approx(1, abs=0.02)
    step = Mixer(presets.gated_delta_net(heads=1024), 1024).parts["step_decay"]
    assert 1 <= step.A_log.exp().min().item() < 2
    assert 15 < step.A_log.exp().max().item() <= 16


def test_a_power_decay_that_keeps_everything_lets_nothing_in_and_has_gradients() -> None:
    r = torch.zeros(3, requires_grad=True)
    log_a, keep = power_decay(r, torch.zeros(3))
    assert log_a.tolist() == [0, 0, 0]
    assert keep.max().item() < 1e-15
    (log_a + keep).sum().backward()
    assert r.grad is not None
    assert bool(torch.isfinite(r.grad).all())


def test_counts_must_be_there_and_of_the_right_heads() -> None:
    qkv = Project("x", q="H K", k="H K", v="H K", n="K")
    axes = {"H": 2, "K": "D/2"}
    with pytest.raises(RecipeError, match=r"part 3 DivideByLast needs y to end in a count, got \[H K\]"):
        Recipe(qkv, OuterScan(decay=None), DivideByLast(), axes=axes)
    with pytest.raises(RecipeError, match=r"part 4 DivideByLast needs n \[H\], got \[K\]"):
        Recipe(qkv, AppendOne(), OuterScan(decay=None), DivideByLast("n"), axes=axes)
    with pytest.raises(RecipeError, match=r"part 2 Stabilise needs n \[H\], got \[K\]"):
        Recipe(qkv, Stabilise(decay="n", write="n"), axes=axes)
