"""DenseRetNet, the one architecture that the DenseSSM authors release."""

from __future__ import annotations

from recur.blocks import LanguageModel, Mixer, Norm
from recur.convert.keys import Keys, merged, rows, under
from recur.convert.official import Official
from recur.presets.dense_retnet import dense_retnet
from recur.recipe import Recipe

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


def _recipe(dim: int, key_dim: int, heads: int, layers: int, dropout: float, eps: float) -> Recipe:
    if 2 * key_dim != dim:
        raise ValueError(f"dense_gau_retnet: query_key_dim must be hidden_size / 2 = {dim / 2:g}, got {key_dim}")
    return dense_retnet(heads=heads, layers=layers, dropout=dropout, eps=eps)


def mixer(
    hidden_size: int,
    query_key_dim: int,
    num_attention_heads: int,
    dense_block_layers: int,
    dropout: float = 0.1,
    rms_norm_eps: float = 1e-6,
) -> Mixer:
    recipe = _recipe(hidden_size, query_key_dim, num_attention_heads, dense_block_layers, dropout, rms_norm_eps)
    return Mixer(recipe, hidden_size)


def model(
    vocab_size: int,
    hidden_size: int,
    query_key_dim: int,
    num_attention_heads: int,
    num_hidden_layers: int,
    dense_block_layers: int,
    dropout: float = 0.1,
    rms_norm_eps: float = 1e-6,
) -> LanguageModel:
    return LanguageModel(
        _recipe(hidden_size, query_key_dim, num_attention_heads, dense_block_layers, dropout, rms_norm_eps),
        vocab_size=vocab_size,
        dim=hidden_size,
        depth=num_hidden_layers,
        norm=Norm("x", eps=rms_norm_eps, to="y"),
        tie=False,
    )


INERT = ("deepnorm", "retnorm", "layernorm_eps", "max_position_embeddings", "pad_token_id", "use_cache")
ONLY = {"v_factor": (2,), "hidden_act": ("silu",), "tie_word_embeddings": (False,)}
MIXER = Official(mixer, MIXER_KEYS, inert=(*INERT, "num_hidden_layers", "vocab_size"), only=ONLY)
MODEL = Official(model, KEYS, derived=("retnet_rel_pos.angle", "retnet_rel_pos.decay"), inert=INERT, only=ONLY)
