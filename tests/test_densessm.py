"""Dense hidden connections: re-read states against states written out, DenseMamba in both readings, edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recur import LanguageModel, Mixer, convert, presets
from recur.blocks import Decay, DenseCarry, DenseFusion, DenseRead, OnlineScan, OuterScan, Project, SelectiveScan
from recur.convert.table import OFFICIAL
from recur.presets.dense import dense, dense_states
from recur.recipe import Recipe, RecipeError

B, T, D, LAYERS = 2, 6, 4, 4
Tensors = Mapping[str, Tensor]
States = Callable[[Tensors, Mapping[str, Tensor]], list[Tensor]]  # the flow, the scan's weights -> S_t [B ... K V]


def outer_states(flow: Tensors, weights: Mapping[str, Tensor]) -> list[Tensor]:
    S, every = torch.zeros(B, 2, 3, 2, dtype=torch.float64), []
    for t in range(T):
        S = flow["log_a"][:, t, :, None, None].exp() * S + flow["k"][:, t, :, :, None] * flow["v"][:, t, :, None, :]
        every.append(S)
    return every


def online_states(flow: Tensors, weights: Mapping[str, Tensor]) -> list[Tensor]:
    r, S, every = torch.sigmoid(flow["rate"] + weights["rate_bias"]), torch.zeros(B, 3, D, dtype=torch.float64), []
    for t in range(T):
        k = flow["k"][:, t, :, None]
        eps = (r[:, t] / (1 + r[:, t] * flow["k"][:, t].square().sum(-1, keepdim=True)))[:, None]
        S = (1 - eps * k**2) * S + eps * flow["x"][:, t, None] * k
        every.append(S)
    return every


def selective_states(flow: Tensors, weights: Mapping[str, Tensor]) -> list[Tensor]:
    delta, A = F.softplus(flow["dt"] + weights["dt_bias"]), -weights["A_log"].exp().T
    S, every = torch.zeros(B, 3, D, dtype=torch.float64), []
    for t in range(T):
        S = torch.exp(delta[:, t, None] * A) * S + (delta * flow["x"])[:, t, None] * flow["B"][:, t, :, None]
        every.append(S)
    return every


AXES = {"H": 2, "K": 3, "V": 2, "N": 3}
READS: dict[str, tuple[Recipe, str, States]] = {
    "outer product": (
        Recipe(
            Project("x", q="H K", k="H K", v="H V", z="H", g="H V"),
            Decay("z"),
            DenseRead(OuterScan(), gate="g"),
            axes=AXES,
            out="H V",
        ),
        "q",
        outer_states,
    ),
    "online": (
        Recipe(Project("x", rate="D", k="N", q="N", g="D"), DenseRead(OnlineScan("x"), gate="g"), axes=AXES),
        "q",
        online_states,
    ),
    "selective": (
        Recipe(Project("x", dt="D", B="N", C="N", g="D"), DenseRead(SelectiveScan("x"), gate="g"), axes=AXES),
        "C",
        selective_states,
    ),
}


@pytest.mark.parametrize("name", READS)
def test_re_read_states_are_those_written_out(name: str) -> None:
    torch.manual_seed(0)
    recipe, query, states_of = READS[name]
    past: tuple[Tensors, ...] = ()
    states: list[list[Tensor]] = []
    for layer in range(LAYERS):
        mixer = Mixer(recipe, D, depth=LAYERS, layer=layer).double()
        flow, _ = mixer.run(torch.randn(B, T, D, dtype=torch.float64), past=past)
        past = (*past, flow.published)
        states.append(states_of(flow, dict(mixer.parts["dense_read"].named_parameters())))
        for t in range(T):
            fused = torch.einsum("b...kv,b...k->b...v", states[-1][t], flow[query][:, t])
            for shallow in states[-3:-1]:
                read = torch.einsum("b...kv,b...k->b...v", shallow[t], flow[query][:, t])
                fused = fused + F.silu(flow["g"][:, t]) * read
            torch.testing.assert_close(flow["y"][:, t], fused)


@pytest.mark.parametrize("carry", [False, True])
def test_dense_mamba_is_its_equations(carry: bool) -> None:
    """Whole layers, every state in memory: h' is read, and with `carry` it is also what the next token starts from."""
    torch.manual_seed(0)
    recipe = presets.dense_mamba(state=3, carry=carry)
    past: tuple[Tensors, ...] = ()
    shallow: list[Tensor] = []
    for layer in range(LAYERS):
        x = torch.randn(B, T, D, dtype=torch.float64)
        mixer = Mixer(recipe, D, depth=LAYERS, layer=layer).double()
        flow, _ = mixer.run(x, past=past)
        past = (*past, flow.published)
        parts = {key: dict(part.named_parameters()) for key, part in mixer.parts.items()}
        u, gate = F.linear(x, parts["project"]["weight"]).chunk(2, -1)
        conv = parts["short_conv"]
        u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), conv["weight"][:, None], conv["bias"], groups=2 * D).mT)
        low, write, read = F.linear(u, parts["project_2"]["weight"]).split([1, 3, 3], -1)
        scan = parts["dense_carry" if carry else "dense_read"]
        delta = F.softplus(F.linear(low, parts["project_2"]["dt_up"]) + scan["dt_bias"])
        gates = parts["dense_gates"]
        z = F.silu(F.linear(F.silu(F.linear(x, gates["weight"])), gates["state_dense_up"]))
        h, unfused, ys = torch.zeros(B, 2 * D, 3, dtype=torch.float64), [], []
        for t in range(T):
            own = torch.exp(-delta[:, t, :, None] * scan["A_log"].exp()) * h
            own = own + (delta * u)[:, t, :, None] * write[:, t, None]
            fused = own + z[:, t, :, None] * sum(states[:, t] for states in shallow[-2:])
            h = fused if carry else own
            unfused.append(own)
            ys.append((fused * read[:, t, None]).sum(-1))
        shallow.append(torch.stack(unfused, 1))
        y = (torch.stack(ys, 1) + parts["skip"]["D"] * u) * F.silu(gate)
        torch.testing.assert_close(flow["y"], F.linear(y, parts["project_3"]["weight"]))


RECIPES = {
    "dense_mamba": presets.dense_mamba(state=3),
    "dense_mamba, carried on": presets.dense_mamba(state=3, carry=True),
    "longhorn, states": dense_states(presets.longhorn(state=3)),
    "longhorn, keys": dense(presets.longhorn(state=3), "k u", layers=3),
    "hgrn2, states": dense_states(presets.hgrn2(heads=2), layers=1),
    "hgrn2, values": dense(presets.hgrn2(heads=2), "v", layers=2),
    "mamba, inputs": dense(presets.mamba(state=3), "u"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_dense_model_is_the_plain_one_in_its_first_layer_and_streams(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(RECIPES[name], vocab_size=11, dim=8, depth=4).double()
    ids = torch.randint(11, (B, T))
    whole, state = model(ids), model.init_state(B)
    stepped = torch.stack([model.step(token, state) for token in ids.unbind(1)], 1)
    torch.testing.assert_close(stepped, whole)
    torch.testing.assert_close(torch.cat([model(ids[:1]), model(ids[1:])]), whole)
    model.checkpoint = True
    torch.testing.assert_close(model(ids), whole)
    loss = model(ids).square().sum()
    gates = [weight for key, weight in model.named_parameters() if "dense_gates" in key]
    slopes = torch.autograd.grad(loss, gates, allow_unused=True, materialize_grads=True)
    moved = [bool(slope.abs().sum() > 0) for slope in slopes]
    per_layer = len(gates) // 4
    assert moved == [False] * per_layer + [True] * (3 * per_layer)


def test_dense_retnet_begins_as_its_reference() -> None:
    torch.manual_seed(0)
    recipe = presets.dense_retnet(heads=2)
    model = LanguageModel(recipe, vocab_size=50, dim=64, depth=2, tie=False, head_init="normal", padding=0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "fusion" not in name:
            assert weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(weight.mean().item()) < 5 * 0.02 * weight.numel() ** -0.5, name
        else:
            assert bool((weight == 1).all()), name
    assert bool((model.embedding.weight[0] == 0).all())


def test_what_does_not_fit_is_refused() -> None:
    for part in (
        DenseFusion("k", gate="g"),
        DenseRead(OuterScan(), gate="g"),
        DenseCarry(SelectiveScan("u"), gate="g"),
    ):
        name = type(part).__name__
        with pytest.raises(RecipeError, match=f"{name}: layers must be at least 1, got 0"):
            type(part)(**{**part.__dict__, "layers": 0})
    with pytest.raises(RecipeError, match="DenseCarry: scan must be a SelectiveScan, got OuterScan"):
        dense_states(presets.hgrn2(), carry=True)
    with pytest.raises(RecipeError, match="dense: the recipe must have one scan that a query reads, got 0"):
        dense(presets.hgrn(), "i")
    with pytest.raises(RecipeError, match="DenseRead needs 'y' and 'g' of equal axes"):
        Recipe(Project("x", q="H K", k="H K", v="H V", g="H K"), DenseRead(OuterScan(decay=None), gate="g"), axes=AXES)
    sizes = {"hidden_size": 8, "query_key_dim": 4, "num_attention_heads": 2, "dense_block_layers": 1}
    with pytest.raises(ValueError, match="dense_gau_retnet: mode must be one of recurrent, parallel, got 'chunk'"):
        convert.from_official("densessm_retention", {}, {**sizes, "mode": "chunk"})


RELEASED = {"vocab_size": 32000, "dense_block_layers": 1}


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        (
            "dense_gau_retnet",
            {**RELEASED, "hidden_size": 1536, "query_key_dim": 768, "num_attention_heads": 2, "num_hidden_layers": 16},
            367_965_696,
        ),
        (
            "dense_gau_retnet",
            {**RELEASED, "hidden_size": 2560, "query_key_dim": 1280, "num_attention_heads": 4, "num_hidden_layers": 25},
            1_334_018_560,
        ),
        ("hgrn2_lm", {"expand_ratio": 128}, 359_784_448),
    ],
)
def test_released_sizes_have_the_released_number_of_parameters(
    name: str, config: dict[str, int], parameters: int
) -> None:
    with torch.device("meta"):
        model = OFFICIAL[name].make(name, config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
