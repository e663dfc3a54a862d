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


def _recipe(d_h: int, width: int | str, input_act: str, hidden_act: str, recurrent: bool, tied: bool) -> Recipe:
    preset = gated_rnn if recurrent else gated_linear_rnn
    acts = {"input_act": FLAX.get(input_act, input_act), "hidden_act": FLAX.get(hidden_act, hidden_act)}
    return preset(inner=d_h, width=width, forget="tied" if tied else "own", **acts)


def seen(official: Mapping[str, Tensor]) -> dict[str, int]:
    """The width of its input, which the original finds when it is first called."""
    kernel = official.get("proj.kernel")
    return {} if kernel is None else {"d_in": kernel.shape[0]}


def mixer(
    d_model: int,
    d_h: int,
    d_in: int,
    input_activation: str = "tanh",
    hidden_activation: str = "tanh",
    use_true_recurrence: bool = False,
    use_tied_gates: bool = True,
) -> Mixer:
    gates = use_true_recurrence, use_tied_gates
    return Mixer(_recipe(d_h, d_model, input_activation, hidden_activation, *gates), d_in)


def _model(
    recipe: Recipe,
    n_layer: int,
    d_model: int,
    d_channel_mixing: int,
    eps: float,
    input_vocab_size: int,
    output_vocab_size: int,
    mode: str,
    length: int,
    dropout: tuple[float, float, float],
) -> LanguageModel:
    modes: dict[str, Any] = {"none": None, "sinusoidal": "sinusoidal", "learned": length}
    return LanguageModel(
        recipe,
        vocab_size=input_vocab_size,
        dim=d_model,
        depth=n_layer,
        ffn=gelu(hidden=str(d_channel_mixing), act="gelu_tanh", init="lecun"),
        norm=Norm("x", kind="layer", eps=eps, to="y"),
        final_norm=None,
        tie=False,
        outputs=output_vocab_size,
        positions=pick("gated_linear_rnn_lm", "positional_encoding_mode", mode, modes),
        dropout=dropout,
        drop="sum",
        embed_std=d_model**-0.5,
        head_bias=True,
    )


def model(
    n_layer: int,
    d_model: int,
    d_channel_mixing: int,
    input_vocab_size: int,
    output_vocab_size: int,
    max_seq_length: int,
    d_h: int,
    eps: float = 1e-5,
    channel_mixing_dropout: float = 0.0,
    time_mixing_dropout: float = 0.0,
    embedding_dropout: float = 0.0,
    positional_encoding_mode: str = "none",
    input_activation: str = "tanh",
    hidden_activation: str = "tanh",
    use_true_recurrence: bool = False,
    use_tied_gates: bool = True,
) -> LanguageModel:
    recipe = _recipe(d_h, "D", input_activation, hidden_activation, use_true_recurrence, use_tied_gates)
    dropout = embedding_dropout, time_mixing_dropout, channel_mixing_dropout
    sizes = n_layer, d_model, d_channel_mixing, eps, input_vocab_size, output_vocab_size
    return _model(recipe, *sizes, positional_encoding_mode, max_seq_length, dropout)


def transformer(
    n_layer: int,
    d_model: int,
    d_channel_mixing: int,
    input_vocab_size: int,
    output_vocab_size: int,
    max_seq_length: int,
    d_h: int,
    n_head: int,
    eps: float = 1e-5,
    channel_mixing_dropout: float = 0.0,
    time_mixing_dropout: float = 0.0,
    embedding_dropout: float = 0.0,
    positional_encoding_mode: str = "none",
) -> LanguageModel:
    """Its projection is cut into heads first, and inside each into q, k and v."""
    recipe = gateloop_attention(heads=n_head, width=d_h // n_head)
    recipe = recipe.replace("project", Project("x", qkv="H 3 K", bias=True, init="glorot"), Unbind("qkv", "q k v"))
    out = Project("y", y="D", bias=True, init="lecun", name="out")
    recipe = recipe.remove(OutputGate).remove("gate").replace("out", out)
    dropout = embedding_dropout, time_mixing_dropout, channel_mixing_dropout
    sizes = n_layer, d_model, d_channel_mixing, eps, input_vocab_size, output_vocab_size
    return _model(recipe, *sizes, positional_encoding_mode, max_seq_length, dropout)


ONLY: dict[str, tuple[Any, ...]] = {"gate_activation": ("sigmoid",)}
FRAME: dict[str, tuple[Any, ...]] = {"use_word_embedding": (True,), "use_head": (True,)}
MIXER = Official(mixer, MIXER_KEYS, only=ONLY, infer=seen)
MODEL = Official(model, model_keys(MIXER_KEYS), only={**ONLY, **FRAME})
TRANSFORMER = Official(transformer, model_keys(ATTENTION_KEYS), only={"use_causal_mask": (True,), **FRAME})
