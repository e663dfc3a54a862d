"""What the options of GateLoop and GSS mean: each against its equation, written out (float64)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recur import Mixer, convert, presets
from recur.blocks import GatedAttention, PositionTaps
from recur.presets.gateloop import RELATIVE_LINEAR, relative
from recur.recipe import Part, Recipe

close = torch.testing.assert_close
T = 9


def layer(recipe: Recipe, dim: int = 8) -> tuple[Mixer, Tensor]:
    torch.manual_seed(0)
    return Mixer(recipe, dim).double(), torch.randn(2, T, dim).double()


def flow(mixer: Mixer, x: Tensor) -> dict[str, Tensor]:
    return dict(mixer.run(x)[0].tensors)


@pytest.mark.parametrize(("read", "softmax"), [(GatedAttention(), True), (RELATIVE_LINEAR, False)])
@pytest.mark.parametrize("gate", ["polar", "amplitude_phase", "signed"])
def test_relative_positions_are_products_of_the_gates_between(read: Part, softmax: bool, gate: str) -> None:
    recipe = presets.gateloop_attention(heads=2, positions=relative(gate=gate), read=read)
    cut = next(i for i, part in enumerate(recipe.parts) if part == read) + 1
    inner = Recipe(*recipe.parts[:cut], *recipe.parts[cut + 2 :], axes=recipe.axes)  # without the output gate
    mixer, x = layer(inner)
    seen = flow(mixer, x)
    q, k, v, a = seen["q"], seen["k"], seen["v"], seen["log_a"].exp()
    for t in range(T):
        between = [a[:, s + 1 : t + 1].prod(1) for s in range(t + 1)]  # [B H K], the same for channels 2j and 2j + 1
        scores = torch.stack([(q[:, t] * (between[s] * k[:, s]).real).sum(-1) / 2 for s in range(t + 1)], -1)
        share = scores.softmax(-1) if softmax else scores  # sqrt(K) = 2
        wanted = torch.einsum("bhs,bshv->bhv", share, v[:, : t + 1]).flatten(1)
        out = mixer.parts["out"]
        close(mixer(x).y[:, t], wanted @ out.weight.T + out.bias)
    assert torch.equal(a[..., ::2], a[..., 1::2])


def test_a_checkpoint_can_be_read_as_released_and_as_meant() -> None:
    config = {"dim": 8, "dim_head": 4, "heads": 2, "data_dependent_rel_pos": True}
    recipe = presets.gateloop_attention(heads=2, width=4, positions=relative()).remove("output_gate").remove("gate")
    mixer, x = layer(recipe)
    state = convert.to_official("gateloop_full_attention", mixer)
    released = convert.from_official("gateloop_full_attention", state, config)
    meant = convert.from_official(
        "gateloop_full_attention", state, {**config, "data_dependent_rel_pos": "intended", "softmax_normalize": True}
    )
    assert not torch.allclose(released(x).y, meant(x).y)
    assert torch.isfinite(meant(1e3 * x).y).all()
    for module in (released, meant):
        again = convert.to_official("gateloop_full_attention", module)
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("forget", ["tied", "own"])
def test_a_true_recurrence_starts_as_the_linear_one_and_then_reads_its_state(forget: str) -> None:
    linear, x = layer(presets.gated_linear_rnn(inner=3, forget=forget))
    true, _ = layer(presets.gated_rnn(inner=3, forget=forget))
    ours = true.state_dict()
    ours |= {key: weight for key, weight in linear.state_dict().items() if key in ours}
    true.load_state_dict(ours)
    close(true(x).y, linear(x).y)
    again = true.parts["loop"]["recurrent"].weight
    torch.nn.init.normal_(again)
    first, last = linear.parts["project"], linear.parts["project_2"]
    h, names = torch.zeros(2, 3).double(), "z i o" if forget == "tied" else "z i f o"
    for t in range(T):
        gates = (x[:, t] @ first.weight.T + first.bias + h @ again.T).chunk(len(names.split()), -1)
        g = dict(zip(names.split(), gates, strict=True))
        keep = 1 - g["i"].sigmoid() if forget == "tied" else g["f"].sigmoid()
        h = keep * h + g["i"].sigmoid() * g["z"].tanh()
        close(true(x).y[:, t], (g["o"].sigmoid() * h.tanh()) @ last.weight.T + last.bias)


def test_smoothing_is_a_convolution_with_falling_weights() -> None:
    mixer, x = layer(presets.smoothing(heads=2))
    u = flow(mixer, x)["v"]
    alpha, damp = (mixer.parts["smoothing"].get_parameter(name).sigmoid() for name in ("alpha", "damp"))
    kernel = alpha * ((1 - alpha) * damp) ** torch.arange(T)[:, None]  # [T H]
    kernel = kernel.repeat_interleave(4, -1)
    wanted = torch.stack([sum(kernel[s] * u[:, t - s] for s in range(t + 1)) for t in range(T)], 1)
    close(mixer(x).y, wanted + mixer.parts["skip"].D * u)


@pytest.mark.parametrize("name", ["ds_conv", "gated_ds_conv", "gated_ds_conv_lm"])
def test_taps_were_once_learned_for_every_position(name: str) -> None:
    config = {"dim": 8, "heads": 2, "max_seq_len": 20}
    config |= {"num_tokens": 5, "depth": 2} if name.endswith("lm") else {}
    config |= {} if name == "ds_conv" else {"dim_dsconv": 8}
    torch.manual_seed(0)
    built = convert.build(name, {**config, "learned_taps": True})
    state = convert.to_official(name, built)
    assert sum(tensor.shape == (20, 2) for tensor in state.values()) == config.get("depth", 1)
    again = convert.from_official(name, state, config)
    x = torch.randint(5, (2, T)) if name.endswith("lm") else torch.randn(2, T, 8)
    close(again(x), built(x))


def test_the_last_learned_tap_weighs_the_newest_token() -> None:
    recipe = presets.tap_conv(heads=2).replace("taps", PositionTaps("H", length=20, name="taps"))
    mixer, x = layer(recipe)
    u, table = flow(mixer, x)["v"], mixer.parts["taps"].table.repeat_interleave(4, -1)
    wanted = torch.stack([sum(table[19 - s] * u[:, t - s] for s in range(t + 1)) for t in range(T)], 1)
    close(mixer(x).y, wanted + mixer.parts["skip"].D * u)
    with pytest.raises(ValueError, match="PositionTaps: length=20 is too short for 21 tokens"):
        mixer(torch.randn(1, 21, 8).double())


def test_taps_are_read_from_the_input_before_its_norm() -> None:
    mixer, x = layer(presets.tap_conv(heads=2))
    u, tap = flow(mixer, x)["v"], (x @ mixer.parts["taps"].weight.T).repeat_interleave(4, -1)
    wanted = torch.stack([sum(tap[:, s] * u[:, t - s] for s in range(t + 1)) for t in range(T)], 1)
    close(mixer(x).y, wanted + mixer.parts["skip"].D * u)
