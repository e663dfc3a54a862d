"""The GateLoop author's own code: the gated linear RNN, its language model, and the transformer it is compared to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recur.blocks import LanguageModel, Mixer, Norm, OutputGate, Project, Unbind
from recur.blocks.feedforward import gelu
from recur.convert.keys import Keys, transposed, under
from recur.convert.official import Official
from recur.presets.gated_rnn import gated_linear_rnn, gated_rnn
from recur.presets.gateloop import gateloop_attention
from recur.recipe import Recipe
from recur.shapes import pick

FLAX = {"gelu": "gelu_tanh", "swish": "silu"}  # activations of other names here


def dense(ours: str, theirs: str) -> Keys:
    """Flax keeps [in, out] under another name."""
    return {f"{ours}.weight": transposed(f"{theirs}.kernel"), f"{ours}.bias": f"{theirs}.bias"}


MIXER_KEYS: Keys = {
    **dense("parts.project", "proj"),
    **dense("parts.project_2", "out_proj"),
    "parts.loop.recurrent.weight": transposed("model.recurrent_proj.kernel"),
}
ATTENTION_KEYS: Keys = {**dense("parts.project", "qkv_proj"), **dense("parts.out", "out_proj")}


def model_keys(mixer: Keys) -> Keys:
    return {
        "embedding.weight": "input_function.embedding",
        "positions.weight": "wpe.embedding",
        **under("blocks.*.mixer.", "time_mixing_layers_*.model.", mixer),
        "blocks.*.mixer_norm.weights.weight": "time_mixing_layers_*.layer_norm_function.scale",
        "blocks.*.mixer_norm.weights.bias": "time_mixing_layers_*.layer_norm_function.bias",
        **dense("blocks.*.ffn.parts.project", "channel_mixing_layers_*.dense_layers_0"),
        **dense("blocks.*.ffn.parts.project_2", "channel_mixing_layers_*.dense_layers_1"),
        "blocks.*.ffn_norm.weights.weight": "channel_mixing_layers_*.layer_norm.scale",
        "blocks.*.ffn_norm.weights.bias": "channel_mixing_layers_*.layer_norm.bias",
        **dense("head", "head"),
    }


def _recipe(c: Any, width: int | str) -> Recipe:
    acts = {"input_act": c.input_activation, "hidden_act": c.hidden_activation}
    preset = gated_rnn if c.use_true_recurrence else gated_linear_rnn
    gates = "tied" if c.use_tied_gates else "own"
    return preset(inner=c.d_h, width=width, forget=gates, **{key: FLAX.get(act, act) for key, act in acts.items()})


def seen(official: Mapping[str, Tensor]) -> dict[str, int]:
    """The width of its input, which the original finds when it is first called."""
    kernel = official.get("proj.kernel")
    return {} if kernel is None else {"d_in": kernel.shape[0]}


def mixer(c: Any) -> Mixer:
    return Mixer(_recipe(c, c.d_model), c.d_in)


def _model(recipe: Recipe, c: Any) -> LanguageModel:
    modes: dict[str, Any] = {"none": None, "sinusoidal": "sinusoidal", "learned": c.max_seq_length}
    return LanguageModel(
        recipe,
        vocab_size=c.input_vocab_size,
        dim=c.d_model,
        depth=c.n_layer,
        ffn=gelu(hidden=str(c.d_channel_mixing), act="gelu_tanh", init="lecun"),
        norm=Norm("x", kind="layer", eps=c.eps, to="y"),
        final_norm=None,
        tie=False,
        outputs=c.output_vocab_size,
        positions=pick("gated_linear_rnn_lm", "positional_encoding_mode", c.positional_encoding_mode, modes),
        dropout=(c.embedding_dropout, c.time_mixing_dropout, c.channel_mixing_dropout),
        drop="sum",
        embed_std=c.d_model**-0.5,
        head_bias=True,
    )


def model(c: Any) -> LanguageModel:
    return _model(_recipe(c, "D"), c)


def transformer(c: Any) -> LanguageModel:
    """Its projection is cut into heads first, and inside each into q, k and v."""
    recipe = gateloop_attention(heads=c.n_head, width=c.d_h // c.n_head)
    recipe = recipe.replace("project", Project("x", qkv="H 3 K", bias=True, init="glorot"), Unbind("qkv", "q k v"))
    out = Project("y", y="D", bias=True, init="lecun", name="out")
    return _model(recipe.remove(OutputGate).remove("gate").replace("out", out), c)


CELL = {
    "input_activation": "tanh", "hidden_activation": "tanh",
    "use_true_recurrence": False, "use_tied_gates": True,
}  # fmt: skip
FRAME = {
    "eps": 1e-5, "channel_mixing_dropout": 0.0, "time_mixing_dropout": 0.0, "embedding_dropout": 0.0,
    "positional_encoding_mode": "none",
}  # fmt: skip
NEEDS = (
    *("n_layer", "d_model", "d_channel_mixing"),
    *("input_vocab_size", "output_vocab_size", "max_seq_length", "d_h"),
)
WHOLE: dict[str, tuple[Any, ...]] = {"use_word_embedding": (True,), "use_head": (True,)}
SIGMOID: dict[str, tuple[Any, ...]] = {"gate_activation": ("sigmoid",)}
CAUSAL: dict[str, tuple[Any, ...]] = {"use_causal_mask": (True,)}
MIXER = Official(mixer, MIXER_KEYS, ("d_model", "d_h", "d_in"), CELL, only=SIGMOID, infer=seen)
MODEL = Official(model, model_keys(MIXER_KEYS), NEEDS, {**FRAME, **CELL}, only={**SIGMOID, **WHOLE})
TRANSFORMER = Official(transformer, model_keys(ATTENTION_KEYS), (*NEEDS, "n_head"), FRAME, only={**CAUSAL, **WHOLE})
