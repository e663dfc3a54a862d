"""DenseRetNet, the one architecture that the DenseSSM authors release."""

from __future__ import annotations

from typing import Any

from recur.blocks import Block, LanguageModel, LowRank, Mixer, Norm, Project, RetentionScale
from recur.convert.keys import Keys, merged, rows, under
from recur.convert.official import UNQUANTISED, Official, unless_misspelt
from recur.presets.dense_retnet import dense_retnet
from recur.recipe import Recipe
from recur.shapes import pick

MIXER_KEYS: Keys = {
    "parts.project.weight": rows("q_proj.weight", "k_proj.weight", "to_hidden.0.weight", "to_hidden.0.weight"),
    "parts.project_2.weight": rows("k_select.fc1.weight", "v_select.fc1.weight"),
    "parts.project_2.k_gate_up": "k_select.fc2.weight",
    "parts.project_2.v_gate_up": "v_select.fc2.weight",
    "parts.dense_fusion.weight": merged("k_norm.weight"),
    "parts.dense_fusion_2.weight": merged("v_norm.weight"),
    "parts.norm.weight": "group_norm.weight",
    "parts.project_3.weight": "to_out.0.weight",
}
KEYS: Keys = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    **under("blocks.*.mixer.", "model.layers.*.self_attn.", MIXER_KEYS),
    "blocks.*.mixer_norm.weights.*": "model.layers.*.input_layernorm.*",
    "final_norm.weights.*": "model.norm.*",
}


LAYER_NEEDS = ("hidden_size", "query_key_dim", "num_attention_heads", "dense_block_layers")
CONFIG = {"dropout": 0.1, "rms_norm_eps": 1e-6, "pad_token_id": 0, "mode": "recurrent"}


def recipe(c: Any) -> Recipe:
    """The mixer as the original computes it in that mode."""
    dim, eps = c.hidden_size, c.rms_norm_eps
    if 2 * c.query_key_dim != dim:
        raise ValueError(
            f"dense_gau_retnet: query_key_dim must be hidden_size / 2 = {dim / 2:g}, got {c.query_key_dim}"
        )
    scales: dict[str, tuple[RetentionScale, ...]] = {"recurrent": (), "parallel": (RetentionScale(eps=eps),)}
    scale = pick("dense_gau_retnet", "mode", c.mode, scales)
    sizes = {"heads": c.num_attention_heads, "layers": c.dense_block_layers}
    return dense_retnet(**sizes, dropout=c.dropout, eps=eps, scale=scale)


def mixer(c: Any) -> Mixer:
    return Mixer(recipe(c), c.hidden_size)


def layer(c: Any) -> Block:
    return Block(recipe(c), c.hidden_size, norm=Norm("x", eps=c.rms_norm_eps, to="y"))


def model(c: Any) -> LanguageModel:
    return LanguageModel(
        recipe(c),
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        depth=c.num_hidden_layers,
        norm=Norm("x", eps=c.rms_norm_eps, to="y"),
        tie=False,
        head_init="normal",
        padding=c.pad_token_id,
    )


def projection(c: Any) -> Mixer:
    """The two linear maps behind the gate of a fusion."""
    rank, width = c.input_dim // c.mid_reduction_ratio, int(c.input_dim / c.final_reduction_ratio)
    maps = LowRank(str(width), rank=str(rank), act="silu", init="normal")
    return Mixer(Recipe(Project("x", y=maps, init="normal"), out=str(width)), c.input_dim)


INERT = ("deepnorm", "retnorm", "layernorm_eps", "max_position_embeddings", "initializer_range")
OF_MODEL = ("vocab_size", "num_hidden_layers")
ONLY = {**UNQUANTISED, "v_factor": (2,), "hidden_act": ("silu",), "tie_word_embeddings": (False,)}
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")
BLOCK_KEYS: Keys = {**under("mixer.", "self_attn.", MIXER_KEYS), "mixer_norm.weights.*": "input_layernorm.*"}
MIXER = Official(mixer, MIXER_KEYS, LAYER_NEEDS, CONFIG, inert=(*INERT, *OF_MODEL), only=ONLY)
LAYER = Official(layer, BLOCK_KEYS, LAYER_NEEDS, CONFIG, inert=(*INERT, *OF_MODEL), only=ONLY)
MODEL = Official(
    model,
    KEYS,
    (*OF_MODEL, *LAYER_NEEDS),
    CONFIG,
    base="model.",
    derived=BUFFERS,
    inert=INERT,
    only=ONLY,
    ignores=unless_misspelt,
)
PROJECTION = Official(
    projection,
    {"parts.project.weight": "fc1.weight", "parts.project.y_up": "fc2.weight"},
    needs=("input_dim",),
    config={"mid_reduction_ratio": 32, "final_reduction_ratio": 2},
)
