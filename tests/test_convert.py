"""Official state_dicts in and out: complete, reversible, and refused as a whole when something does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden import case_of
from hypothesis import given
from hypothesis import strategies as st
from replay import Module, Vectors
from test_golden import FOLDER
from torch import Tensor

from recur import LanguageModel, Mixer, convert, presets
from recur.weights import WRAPPERS

FILES = [Vectors(path) for path in sorted(FOLDER.glob("*.safetensors"))]
MODULES = {vectors: case for vectors in FILES if isinstance(case := case_of(vectors), Module)}
RECORDED = {vectors.path.stem: vectors for vectors in MODULES if vectors.section("param")}
OF_EACH_NAME = {case.name: vectors for vectors, case in MODULES.items() if vectors.section("param")}
CONFIG = {"d_model": 8, "n_layer": 2, "vocab_size": 10, "ssm_cfg": {"d_state": 2}}
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay", "rope.inv_freq")  # computed, not learned
WRITTEN_OUT = {"hgru1_1d_v2", "hgru1_1d_v3", "hgru1_2d", "hgru1_real_2d"}  # compared with loops in test_hgrn.py
FRAMED = {"comba_hub", "gated_delta_product_hub", "rwkv7_hub"}  # compared with layers and the demo in test_wider.py
HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


def longhorn_lm() -> dict[str, Tensor]:
    """A state_dict that was never official."""
    recipe = presets.longhorn(state=2)
    return convert.to_official("longhorn_lm", LanguageModel(recipe, vocab_size=16, dim=8, depth=2))


@pytest.mark.parametrize("stem", RECORDED)
def test_what_goes_in_comes_out(stem: str) -> None:
    vectors, recorded = RECORDED[stem], RECORDED[stem].section("param")
    back = convert.to_official(MODULES[vectors].name, MODULES[vectors].make(vectors))
    recorded = {key.removeprefix("net."): tensor for key, tensor in recorded.items()}
    tied = vectors.config.get("tied_keys", {})
    learned = {key for key in recorded if not key.endswith(BUFFERS)}
    assert set(back) == learned | set(tied)
    for key, tensor in back.items():
        assert tensor.dtype == recorded[tied.get(key, key)].dtype
        assert torch.equal(tensor, recorded[tied.get(key, key)]), key


def test_every_official_name_is_covered_by_a_recorded_file() -> None:
    assert {case.name for case in MODULES.values()} | WRITTEN_OUT | FRAMED == set(convert.names())


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    state = longhorn_lm()
    del state["backbone.norm_f.weight"], state["backbone.layers.1.mixer.D"]
    state["backbone.layers.0.mixer.in_proj.weight"] = torch.zeros(32, 7)
    state["backbone.layers.0.mixer.A_log"] = torch.zeros(16, 2)
    with pytest.raises(ValueError, match="must fit longhorn_lm") as error:
        convert.from_official("longhorn_lm", state, CONFIG)
    assert str(error.value).splitlines()[1:] == [
        "  misshapen: backbone.layers.0.mixer.in_proj.weight must be [32, 8], got [32, 7]",
        "  missing: backbone.layers.1.mixer.D",
        "  missing: backbone.norm_f.weight",
        "  unexpected: backbone.layers.0.mixer.A_log",
    ]


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_a_tied_tensor_may_come_under_any_of_its_names(kept: str) -> None:
    state = longhorn_lm()
    alone = {key: tensor for key, tensor in state.items() if key not in (EMBEDDING, HEAD) or key == kept}
    back = convert.to_official("longhorn_lm", convert.from_official("longhorn_lm", alone, CONFIG))
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_tied_tensors_that_differ_are_refused() -> None:
    state = longhorn_lm()
    state[HEAD] = state[HEAD] + 1
    with pytest.raises(ValueError, match=f"different: {HEAD} must equal {EMBEDDING}"):
        convert.from_official("longhorn_lm", state, CONFIG)


def test_an_untied_head_has_a_place_of_its_own() -> None:
    state = longhorn_lm()
    state[HEAD] = state[HEAD] + 1
    model = convert.from_official("longhorn_lm", state, {**CONFIG, "tie_embeddings": False})
    back = convert.to_official("longhorn_lm", model)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_prefix_of_a_wrapper_is_dropped() -> None:
    state = longhorn_lm()
    wrapped = {f"transformer.{key}": tensor for key, tensor in state.items()}
    back = convert.to_official("longhorn_lm", convert.from_official("longhorn_lm", wrapped, CONFIG))
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", OF_EACH_NAME)
def test_wrappers_at_every_place_of_a_key_are_dropped(name: str) -> None:
    vectors = OF_EACH_NAME[name]
    state, arguments = vectors.section("param"), MODULES[vectors].arguments(vectors)
    wrapped = {
        "_orig_mod.module." + key.replace(".", f".{'.'.join(WRAPPERS)}."): tensor for key, tensor in state.items()
    }
    modules = [convert.from_official(name, given, arguments) for given in (state, wrapped)]
    assert same(*(convert.to_official(name, module) for module in modules))


@given(st.data())
def test_any_wrappers_around_any_modules_are_dropped(data: st.DataObject) -> None:
    state, some = longhorn_lm(), st.lists(st.sampled_from(WRAPPERS), max_size=2)

    def around(segment: str) -> str:
        return ".".join([*data.draw(some), segment])

    prefix = data.draw(st.sampled_from(["", "transformer."]), label="prefix")
    wrapped = {".".join(map(around, (prefix + key).split("."))): tensor for key, tensor in state.items()}
    assert same(convert.to_official("longhorn_lm", convert.from_official("longhorn_lm", wrapped, CONFIG)), state)


def test_a_wrapped_module_has_the_keys_of_what_it_wraps() -> None:
    state = longhorn_lm()
    model = convert.from_official("longhorn_lm", state, CONFIG)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert any("blocks.1._orig_mod." in key for key in model.state_dict())
    wrapped = torch.nn.parallel.DataParallel(torch.compile(model, backend="eager"))
    assert same(convert.to_official("longhorn_lm", wrapped), state)


def test_keys_that_depend_on_our_parameters_are_found_in_a_wrapped_module() -> None:
    config = {"num_tokens": 4, "dim": 4, "depth": 1, "to_logits_layernorm_patch": True}
    model = convert.build("gated_state_space_lm", config)
    modules = (torch.compile(model, backend="eager"), model)
    assert same(*(convert.to_official("gated_state_space_lm", module) for module in modules))


def test_two_keys_that_differ_by_a_wrapper_are_refused() -> None:
    state = longhorn_lm()
    state["backbone._orig_mod.norm_f.weight"] = state["backbone.norm_f.weight"]
    words = "must hold backbone.norm_f.weight once, got backbone.norm_f.weight and backbone._orig_mod.norm_f.weight"
    with pytest.raises(ValueError, match=re.escape(words)):
        convert.from_official("longhorn_lm", state, CONFIG)


SMALL: dict[str, dict[str, Any]] = {
    "dense_gau_retnet": {
        "hidden_size": 16, "query_key_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 2,
        "dense_block_layers": 1, "vocab_size": 8,
    },
    "comba_hub": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "num_heads": 2, "head_dim": 4},
    "gated_delta_product_hub": {
        "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "num_heads": 2, "head_dim": 4,
    },
    "hgrn2_hub": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "expand_ratio": 8},
    "hgrn2_lm": {"decoder_embed_dim": 16, "decoder_layers": 2, "vocab_size": 8, "glu_dim": 8},
    "hgrn_hub": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8},
    "mamba2_hf": {
        "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1,
    },
    "mamba_hf": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "state_size": 4},
    "rwkv7_hub": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "head_dim": 8},
}  # fmt: skip
OF_TRANSFORMERS = pytest.mark.parametrize("name", SMALL)


@OF_TRANSFORMERS
def test_what_a_class_without_a_head_saved_is_taken(name: str) -> None:
    """Its keys lack the name under which the class with a head has it. An untied head is missing all the same."""
    state = convert.to_official(name, convert.build(name, SMALL[name]))
    base = "backbone." if name.startswith("mamba") else "model."
    alone = {key.removeprefix(base): tensor for key, tensor in state.items()}
    assert same(convert.to_official(name, convert.from_official(name, alone, SMALL[name])), state)
    untied = {**SMALL[name], "tie_word_embeddings": False}
    bare = {key: tensor for key, tensor in alone.items() if key != HEAD}
    with pytest.raises(ValueError, match=f"got\n  missing: {HEAD}$"):
        convert.from_official(name, bare, untied)


FORMER = {
    "_attn_implementation_autoset": True,
    "torchscript": False,
    "top_k": 50,
    "use_bfloat16": False,
    "num_labels": 2,
}


@OF_TRANSFORMERS
def test_what_transformers_writes_besides_is_ignored(name: str) -> None:
    """Without a warning, which the suite would raise."""
    import transformers

    kept = {key: value for key, value in transformers.PretrainedConfig().to_dict().items() if key != "model_type"}
    generates = transformers.GenerationConfig().to_dict()
    former = {key: generates[key] for key in ("temperature", "num_beams", "bad_words_ids") if key in generates}
    convert.build(name, {**kept, **former, **FORMER, **SMALL[name]})


@OF_TRANSFORMERS
def test_what_the_original_ignores_is_listed_once(name: str) -> None:
    with pytest.warns(
        UserWarning, match=f"^{name}: ignored, as the original ignores it: lucky_number, rope_theta$"
    ) as found:
        convert.build(name, {**SMALL[name], "lucky_number": 7, "rope_theta": 1e4})
    assert len(found) == 1
    assert found[0].filename == __file__
    with pytest.raises(ValueError, match="unknown: vocab_sise; lacking"):
        convert.build(name, {**SMALL[name], "vocab_sise": 8})
    with pytest.raises(NotImplementedError, match=f"{name}: quantization_config must be None so far"):
        convert.build(name, {**SMALL[name], "quantization_config": {"bits": 4}})


@pytest.mark.parametrize("name", ["hgrn_hub", "hgrn2_hub"])
def test_arguments_of_former_years(name: str) -> None:
    model = convert.build(
        name, {**SMALL[name], "rms_norm_eps": 1e-3, "share_conv_kernel": True, "use_short_conv": False}
    )
    assert model.final_norm.norm.eps == 1e-3
    assert convert.build(name, {**SMALL[name], "rms_norm_eps": 1e-3, "norm_eps": 1e-3}).final_norm.norm.eps == 1e-3
    with pytest.raises(ValueError, match=r"config must hold norm_eps once, got norm_eps=1e-06 and rms_norm_eps=0\.001"):
        convert.build(name, {**SMALL[name], "rms_norm_eps": 1e-3, "norm_eps": 1e-6})
    words = "share_conv_kernel must be left out where use_short_conv is true, as .* had an activation, got False"
    with pytest.raises(NotImplementedError, match=words):
        convert.build(name, {**SMALL[name], "share_conv_kernel": False, "use_short_conv": True})


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("mamba_hf", {"model_type": "falcon_mamba"}, "model_type must be 'mamba' so far, got 'falcon_mamba'"),
        ("mamba2_hf", {"model_type": "mamba"}, "model_type must be 'mamba2' so far, got 'mamba'"),
        ("hgrn_hub", {"model_type": "hgrn2"}, "model_type must be 'hgrn' so far, got 'hgrn2'"),
        ("mamba_hf", {"intermediate_size": 48}, r"intermediate_size must be expand \* hidden_size = 32 so far, got 48"),
        ("hgrn2_hub", {"num_heads": 4}, "num_heads must be hidden_size / expand_ratio = 2 so far, got 4"),
    ],
)
def test_values_that_matter_and_are_not_there_are_refused(name: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        convert.build(name, {**SMALL[name], **more})


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "model", "module", "ema", "model.state_dict"])
def test_the_only_state_dict_of_a_training_checkpoint_is_meant(place: str) -> None:
    state = longhorn_lm()
    moments = {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}}
    held: Any = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
    for name in reversed(place.split(".")):
        held = {name: held}
    held |= {"optimizer": {"state": moments, "param_groups": []}, "step": 7, "best": torch.ones(())}
    if place != "ema":
        held["rng"] = {"torch": torch.zeros(8)}
    assert same(convert.to_official("longhorn_lm", convert.from_official("longhorn_lm", held, CONFIG)), state)


def test_a_checkpoint_of_no_state_dict_or_several_is_refused() -> None:
    state, places = longhorn_lm(), "state_dict, model_state_dict, model, module"
    averaged = {f"module.{key}": tensor for key, tensor in state.items()}
    for held, words in (
        ({"model": state, "ema": averaged, "rng": {"cpu": torch.ones(2)}}, "must hold one state_dict, got model, ema"),
        ({"model": state, "state_dict": {"a": torch.ones(1)}}, "must hold one state_dict, got model, state_dict"),
        ({"a": state, "b": averaged}, "must hold one state_dict, got a, b"),
        ({"step": 3, "optimizer": {"state": {}}}, f"a state_dict, or one under {places}, got entries step, optimizer"),
        ({"model": {}}, f"a state_dict, or one under {places}, got entries model"),
        ([state], f"from_official: state_dict must hold a state_dict, or one under {places}, got list"),
    ):
        with pytest.raises(ValueError, match=words):
            convert.from_official("longhorn_lm", held, CONFIG)  # type: ignore[arg-type]


def test_the_module_shares_neither_memory_nor_random_numbers_with_its_caller() -> None:
    state = longhorn_lm()
    before = {key: tensor.clone() for key, tensor in state.items()}
    seed = torch.get_rng_state()
    model = convert.from_official("longhorn_lm", state, CONFIG)
    assert torch.equal(seed, torch.get_rng_state())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_module_has_the_dtype_of_the_checkpoint(dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in longhorn_lm().items()}
    model = convert.from_official("longhorn_lm", state, CONFIG)
    assert model.embedding.weight.dtype == dtype
    skip = model.blocks[0].mixer.parts["skip"].D
    assert skip.dtype == (dtype if dtype == torch.float64 else torch.float32)
    back = convert.to_official("longhorn_lm", model)
    assert same({key: tensor.to(dtype) for key, tensor in back.items()}, state)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*got 'longhorn-lm'; the nearest is 'longhorn_lm'"):
        convert.from_official("longhorn-lm", {}, {})


def test_arguments_are_checked_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match=r"unknown: d_stat, n_heads; lacking: d_model"):
        convert.from_official("mamba", {}, {"d_stat": 4, "n_heads": 2})
    with pytest.raises(NotImplementedError, match="gate_activation must be 'sigmoid' so far, got 'relu'"):
        convert.from_official("gated_linear_rnn", {}, {"d_in": 4, "d_model": 4, "d_h": 4, "gate_activation": "relu"})
    lm = dict.fromkeys(("n_layer", "d_model", "d_channel_mixing", "input_vocab_size", "output_vocab_size"), 4)
    lm |= {"max_seq_length": 4, "d_h": 4, "positional_encoding_mode": "rotary"}
    with pytest.raises(ValueError, match="positional_encoding_mode must be one of none, sinusoidal, learned, got 'rot"):
        convert.build("gated_linear_rnn_lm", lm)
    with pytest.raises(ValueError, match="mode must be one of recurrent, parallel, chunk, got 'fast'"):
        convert.build("retnet_retention", {"decoder_embed_dim": 8, "mode": "fast"})
    with pytest.raises(NotImplementedError, match="or 'Mamba3' so far, got 'Mamba4'"):
        convert.build("mamba_lm", {"ssm_cfg": {"layer": "Mamba4"}})
    sizes = {"hidden_size": 64, "query_key_dim": 16, "num_attention_heads": 2, "dense_block_layers": 1}
    with pytest.raises(ValueError, match=r"query_key_dim must be hidden_size / 2 = 32, got 16"):
        convert.from_official("densessm_retention", {}, sizes)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_mamba_with_a_feed_forward(layer: str) -> None:
    """Its width is rounded up to 128, and its second half is the gate."""
    config = {"d_model": 8, "n_layer": 1, "vocab_size": 8, "d_intermediate": 20}
    options = {"layer": layer, "headdim": 4} if layer == "Mamba2" else {"layer": layer}
    model = convert.build("mamba_lm", {**config, "ssm_cfg": options})
    state = convert.to_official("mamba_lm", model)
    fc1, fc2 = (state[f"backbone.layers.0.mlp.fc{i}.weight"] for i in (1, 2))
    assert (fc1.shape, fc2.shape) == ((256, 8), (8, 128))
    x = torch.randn(1, 3, 8)
    h, gate = (x @ fc1.T).chunk(2, -1)
    torch.testing.assert_close(model.blocks[0].ffn(x).y, (h * torch.nn.functional.silu(gate)) @ fc2.T)


def test_what_goes_around_the_scan_of_mamba2_is_a_gated_unit() -> None:
    """[z0, x0, z, x, ...] = in_proj h; out = out_proj [silu(z0) x0, y]."""
    both = convert.to_official("mamba2", convert.build("mamba2", {"d_model": 8, "d_ssm": 8, "headdim": 4}))
    alone = {key: tensor for key, tensor in both.items() if "_proj" not in key}
    alone |= {"in_proj.weight": both["in_proj.weight"][16:], "out_proj.weight": both["out_proj.weight"][:, 8:]}
    x = torch.randn(2, 5, 8)
    z0, x0 = (x @ both["in_proj.weight"][:16].T).chunk(2, -1)
    around = (torch.nn.functional.silu(z0) * x0) @ both["out_proj.weight"][:, :8].T
    scanned = convert.from_official("mamba2", alone, {"d_model": 8, "expand": 1, "headdim": 4})(x).y
    whole = convert.from_official("mamba2", both, {"d_model": 8, "d_ssm": 8, "headdim": 4})(x).y
    torch.testing.assert_close(whole, around + scanned)


@pytest.mark.parametrize(
    "options",
    [
        {"d_ssm": 8, "headdim": 2},  # 8 channels of the inner 16 go around the scan
        {"headdim": 4, "D_has_hdim": True, "bias": True},
        {"headdim": 4, "rmsnorm": False, "conv_bias": False},
        {"headdim": 4, "ngroups": 2, "norm_before_gate": True, "dt_limit": [0.01, 0.1], "chunk_size": 64},
    ],
)
def test_options_of_mamba2_come_out_as_they_went_in(options: dict[str, object]) -> None:
    config = {"d_model": 8, "d_state": 3, **options}
    state = convert.to_official("mamba2", convert.build("mamba2", config))
    inner, groups = options.get("d_ssm", 16), options.get("ngroups", 1)
    assert len(state["in_proj.weight"]) == 2 * 16 + 2 * groups * 3 + inner // options["headdim"]
    assert state["out_proj.weight"].shape == (8, 16)
    assert len(state["D"]) == (inner if "D_has_hdim" in options else inner // options["headdim"])
    back = convert.to_official("mamba2", convert.from_official("mamba2", state, config))
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_a_foreign_module_has_no_official_form() -> None:
    with pytest.raises(ValueError, match=re.escape("parts.selective_scan.A_log")):
        convert.to_official("longhorn", Mixer(presets.mamba(), 8))
