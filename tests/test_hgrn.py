"""HGRN and HGRN2: units of which nothing is recorded against loops written out, first values, ways through a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recur import LanguageModel, Mixer, convert, presets
from recur.blocks import LowerBounds, both_ways, in_grid, in_series
from recur.convert.table import OFFICIAL
from recur.presets.hgrn import without_bounds
from recur.primitives.gates import lower_bounds
from recur.recipe import RecipeError

B, R, C, D = 2, 3, 4, 6  # rows and columns of a grid; a line has C tokens
Scan = Callable[[Tensor, Tensor], Tensor]  # a, x [... T D] -> every h


def ahead(a: Tensor, x: Tensor) -> Tensor:
    """The loop, along the axis before the last."""
    h, every = torch.zeros_like(x[..., 0, :]), []
    for t in range(x.shape[-2]):
        h = a[..., t, :] * h + x[..., t, :]
        every.append(h)
    return torch.stack(every, -2)


def behind(a: Tensor, x: Tensor) -> Tensor:
    return ahead(a.flip(-2), x.flip(-2)).flip(-2)


def both(a: Tensor, x: Tensor) -> Tensor:
    return ahead(a, x) + behind(a, x)


def down(scan: Scan) -> Scan:
    """Along the columns of [B R C D]."""
    return lambda a, x: scan(a.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)


WEIGHTS = {"input_proj": 2 * D, "lambda_proj": D, "gate": 2 * D, "out_proj": D}


def state_of(widths: dict[str, int], cheap: int = 0) -> dict[str, Tensor]:
    """Random weights under official names; `cheap` is the rank of the two gates."""
    features = widths["gate"]
    layers: dict[str, nn.Module] = {"norm": nn.LayerNorm(features)}
    for name, width in widths.items():
        narrow = cheap and name in ("lambda_proj", "gate")
        layers[name] = (
            nn.Sequential(nn.Linear(D, cheap), nn.Linear(cheap, width))
            if narrow
            else nn.Linear(features if name == "out_proj" else D, width)
        )
    state = nn.ModuleDict(layers).double().state_dict()
    return {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in state.items()}


def affine(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The linear map of that name, or the two of its stages."""
    for stage in [name] if f"{name}.weight" in state else [f"{name}.0", f"{name}.1"]:
        x = F.linear(x, state[f"{stage}.weight"], state[f"{stage}.bias"])
    return x


def written_out(state: dict[str, Tensor], x: Tensor, bound: Tensor, scan: Scan, gate: str, gate_first: bool) -> Tensor:
    """A unit as the paper's equations, complex if there are angles."""
    f = bound + (1 - bound) * torch.sigmoid(affine(state, "lambda_proj", x))
    c = F.silu(affine(state, "input_proj", x))
    if "theta" in state:
        pairs = torch.view_as_complex(c.unflatten(-1, (D, 2)))
        h = scan(f * torch.exp(1j * state["theta"].view(D)), (1 - f) * pairs)
        features = torch.cat([h.real, h.imag], -1)
    else:
        features = scan(f, (1 - f) * c)
    g = {"silu": F.silu, "sigmoid": torch.sigmoid}[gate](affine(state, "gate", x))
    norm = (state["norm.weight"], state["norm.bias"])
    width = features.shape[-1:]
    y = F.layer_norm(features * g, width, *norm) if gate_first else F.layer_norm(features, width, *norm) * g
    return affine(state, "out_proj", y)


@pytest.mark.parametrize(
    ("name", "config", "scan", "gate", "gate_first"),
    [
        ("hgru1_1d_v2", {"gate_dim": 3}, ahead, "sigmoid", False),
        ("hgru1_1d_v2", {"gate_dim": 3, "causal": False}, both, "sigmoid", False),
        ("hgru1_1d_v3", {"gate_dim": 3}, ahead, "sigmoid", True),
        ("hgru1_2d", {}, lambda a, x: ahead(a, x) + down(ahead)(a, x), "silu", False),
        ("hgru1_2d", {"causal": False}, lambda a, x: both(a, x) + down(both)(a, x), "silu", False),
        ("hgru1_real_2d", {}, lambda a, x: both(a, x) + down(both)(a, x), "silu", False),
        ("hgru1_real_v6", {"causal": False}, both, "silu", False),
    ],
)
def test_a_unit_is_its_equations(name: str, config: dict[str, Any], scan: Scan, gate: str, gate_first: bool) -> None:
    torch.manual_seed(0)
    real = "real" in name
    widths = dict.fromkeys(WEIGHTS, D) if real else WEIGHTS
    state = state_of(widths, config.get("gate_dim", 0))
    if not real:
        state["theta"] = torch.rand(1, 1, D, dtype=torch.float64) * 3
    unit = convert.from_official(name, state, {"embed_dim": D, **config})
    shape, grid = ((B, R, C, D), (R, C)) if "2d" in name else ((B, C, D), None)
    x, bound = torch.randn(shape, dtype=torch.float64), torch.rand(D, dtype=torch.float64)
    y, _ = unit(x.view(B, -1, D), grid=grid, bound=bound.view(1, 1, D))
    torch.testing.assert_close(y.view(shape), written_out(state, x, bound, scan, gate, gate_first))
    back = convert.to_official(name, unit)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_two_laws_of_lower_bounds_agree_at_first_and_differ_once_trained() -> None:
    torch.testing.assert_close(lower_bounds(torch.ones(4, 2)), torch.arange(4.0)[:, None].expand(4, 2) / 4)
    torch.testing.assert_close(lower_bounds(torch.zeros(4, 2), law="skip_last"), lower_bounds(torch.ones(4, 2)))
    share = (logits := torch.randn(4, 2)).softmax(0)
    zero = torch.zeros(1, 2)
    torch.testing.assert_close(lower_bounds(logits), torch.cat([zero, share[1:].cumsum(0)]))
    torch.testing.assert_close(lower_bounds(logits, law="skip_last"), torch.cat([zero, share[:-1].cumsum(0)]))
    with pytest.raises(ValueError, match="lower_bounds: law must be one of skip_first, skip_last, got 'sum'"):
        lower_bounds(logits, law="sum")
    with pytest.raises(RecipeError, match="LowerBounds: law must be one of skip_first, skip_last, got 'sum'"):
        LowerBounds("D", law="sum")


def test_without_bounds_every_layer_is_like_the_first() -> None:
    recipe = presets.hgrn2(heads=2)
    free, x = Mixer(without_bounds(recipe), 8), torch.randn(2, 5, 8)
    first = Mixer(recipe, 8, depth=3, layer=0)
    first.load_state_dict({**free.state_dict(), "shared.lower_bounds.logits": torch.randn(3, 2, 4)})
    torch.testing.assert_close(free(x).y, first(x).y)


def test_a_hub_layer_0_ignores_its_bound_and_needs_heads() -> None:
    config = {"hidden_size": 8, "expand_ratio": 4}
    state = {f"{name}_proj.weight": torch.randn(8, 8) for name in "qfio"} | {"g_norm.weight": torch.ones(8)}
    layers = [convert.from_official("hgrn2_hub_layer", state, {**config, "layer_idx": i}) for i in (0, 1)]
    x, bound = torch.randn(1, 5, 8), torch.full((1, 1, 2, 4), 0.5)
    zero = torch.zeros_like(bound)
    torch.testing.assert_close(layers[0](x, bound=bound).y, layers[1](x, bound=zero).y)
    assert not torch.allclose(layers[1](x, bound=bound).y, layers[1](x, bound=zero).y)
    with pytest.raises(ValueError, match="hgrn2: expand_ratio or num_heads must be given, got neither"):
        convert.from_official("hgrn2_hub_layer", state, {"hidden_size": 8, "expand_ratio": None})


@pytest.mark.parametrize("expand", [1, 2, 16, 128])
def test_an_expansion_by_e_has_e_numbers_per_channel_and_the_same_weights(expand: int) -> None:
    layer = Mixer(presets.hgrn2(heads=f"D/{expand}"), 128)
    assert layer.init_state(1)["parts"]["outer_scan"].numel() == 128 * expand
    assert sum(weight.numel() for weight in layer.parameters()) == 4 * 128 * 128 + 128


def test_first_values_are_those_of_the_references() -> None:
    torch.manual_seed(0)
    dim = 128
    model = LanguageModel(
        presets.hgrn2(heads=8, bias=True),
        vocab_size=64,
        dim=dim,
        depth=2,
        ffn=None,
        tie=False,
        head_init="normal",
        padding=1,
    )
    for name, weight in model.named_parameters():
        if "lower_bounds" in name or "norm" in name:
            assert bool((weight == 1).all()), name
        elif name.endswith("bias"):
            assert bool((weight == 0).all()), name
        else:
            assert abs(weight.mean().item()) < 1e-3, name
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert bool((model.embedding.weight[1] == 0).all())

    unit = Mixer(presets.hgrn_complex(bias=True, rank=32), dim)
    project = unit.parts["project"]
    rows = {"weight": dim, "bias": dim, "z_up": 32, "z_bias": 32, "g_up": 32, "g_bias": 32}
    for name, fan_in in rows.items():
        weight = getattr(project, name)
        assert weight.abs().max().item() <= fan_in**-0.5, name
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15), name
    theta = unit.parts["phase"].theta
    torch.testing.assert_close(theta, 10000 ** (-2 * torch.arange(float(dim)) / dim))


def test_a_padding_token_embeds_as_zero_and_learns_nothing_by_being_read() -> None:
    model = LanguageModel(presets.hgrn(), vocab_size=5, dim=4, depth=1, padding=2, tie=False, embed_scale=3.0)
    plain = LanguageModel(presets.hgrn(), vocab_size=5, dim=4, depth=1, tie=False)
    plain.load_state_dict({**model.state_dict(), "embedding.weight": 3 * model.embedding.weight})
    ids = torch.tensor([[0, 2, 3]])
    torch.testing.assert_close(model(ids), plain(ids))
    model(ids).sum().backward()
    grown = model.embedding.weight.grad.abs().sum(-1) > 0
    assert grown.tolist() == [True, False, False, True, False]
    with pytest.raises(ValueError, match=r"LanguageModel: padding must be an id in 0 \.\. 4, got 5"):
        LanguageModel(presets.hgrn(), vocab_size=5, dim=4, depth=1, padding=5)


def test_a_grid_must_fit_and_cannot_be_packed() -> None:
    layer, x = Mixer(presets.hgrn2(heads=2, scan=in_grid), 4), torch.randn(1, 6, 4)
    assert layer(x, grid=(2, 3)).y.shape == (1, 6, 4)
    for grid in (None, (6,), (2, 2)):
        with pytest.raises(ValueError, match=r"Along: grid must have an axis [01] and T=6 cells, got"):
            layer(x, grid=grid)
    with pytest.raises(NotImplementedError, match="Along: a grid cannot be packed"):
        layer(x, grid=(2, 3), cu_seqlens=torch.tensor([0, 6]))


def test_a_transposed_image_gives_a_transposed_result_in_a_grid_but_not_in_series() -> None:
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    series = in_series(presets.hgrn2(heads=2, scan=both_ways))
    for recipe, equal in ((presets.hgrn2(heads=2, scan=in_grid), True), (series, False)):
        layer = Mixer(recipe, 8).double()
        there = layer(x.flatten(1, 2), grid=(3, 4)).y.view_as(x)
        back = layer(x.transpose(1, 2).flatten(1, 2), grid=(4, 3)).y.view(2, 4, 3, 8).transpose(1, 2)
        assert torch.allclose(there, back) is equal


OPTIONS: list[tuple[str, dict[str, Any], set[str]]] = [  # official name, config, some keys it must have
    ("hgru2_1d", {"norm_type": "simplermsnorm", "act_fun": "2+elu", "uv_act_fun": "leak"}, {"in_proj.bias"}),
    ("bihgru2_1d", {"use_norm": False, "bias": False, "chunk_size": 64}, {"out_proj.weight"}),
    ("hgru2_2d_series", {"act_fun": "exp", "use_norm": False}, {"in_proj.weight"}),
    ("hgru1_2d", {"act_fun": "gelu"}, {"theta", "norm.bias"}),
    ("hgrn2_hub_layer", {"use_short_conv": True, "conv_size": 3, "elementwise_affine": False}, {"f_conv1d.weight"}),
    ("hgrn_hub_layer", {"use_short_conv": True, "conv_bias": True, "expand_ratio": 2}, {"i_conv1d.bias"}),
    ("hgrn2_hub", {"use_short_conv": True, "hidden_ratio": 2}, {"model.layers.1.attn.q_conv1d.weight"}),
    ("hgrn2_hub", {"use_lower_bound": False, "expand_ratio": None, "num_heads": 2}, {"lm_head.weight"}),
    ("hgrn_hub", {"tie_word_embeddings": True, "pad_token_id": 3}, {"model.lower_bounds", "lm_head.weight"}),
    ("hgrn2_lm", {"bias": True, "norm_type": "layernorm", "tie_word_embeddings": False}, {"model.final_norm.bias"}),
]
SIZES: dict[str, dict[str, Any]] = {
    "hub": {"hidden_size": 8, "expand_ratio": 4, "num_hidden_layers": 2, "vocab_size": 11, "intermediate_size": 6},
    "layer": {"hidden_size": 8, "expand_ratio": 4},
    "lm": {"decoder_embed_dim": 8, "expand_ratio": 4, "decoder_layers": 2, "vocab_size": 11, "glu_dim": 6},
}


@pytest.mark.parametrize(("name", "config", "keys"), OPTIONS)
def test_options_of_checkpoints_go_in_and_out(name: str, config: dict[str, Any], keys: set[str]) -> None:
    torch.manual_seed(0)
    config = {**SIZES.get(name.split("_")[-1], {"embed_dim": 8}), **config}
    if name.endswith(("_hub", "_lm")):  # as their files have it
        kind = name.partition("_")[0]
        config |= {"model_type": kind, "architectures": [f"{kind.upper()}ForCausalLM"], "torch_dtype": "bfloat16"}
    if "hidden_ratio" in config:
        del config["intermediate_size"]
    model = OFFICIAL[name].make(name, config)
    state = convert.to_official(name, model)
    assert keys <= set(state)
    again = convert.from_official(name, state, config)
    back = convert.to_official(name, again)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    if isinstance(model, LanguageModel):
        ids = torch.randint(4, 11, (B, 6))
        torch.testing.assert_close(again(ids), model(ids))
    else:
        x, bound = torch.randn(B, 6, 8), torch.rand(1, 1, *model.recipe.site(8).size(model.recipe.inputs["bound"]))
        torch.testing.assert_close(again(x, grid=(2, 3), bound=bound).y, model(x, grid=(2, 3), bound=bound).y)
