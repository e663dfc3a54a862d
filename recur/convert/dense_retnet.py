"""DenseRetNet, the one architecture that the DenseSSM authors release."""

from __future__ import annotations

from recur.blocks import Block, LanguageModel, LowRank, Mixer, Norm, Project, RetentionScale
from recur.convert.keys import Keys, merged, rows, under
from recur.convert.official import OF_A_FILE, Official
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


def recipe(dim: int, key_dim: int, heads: int, layers: int, dropout: float, eps: float, mode: str) -> Recipe:
    """The mixer as the original computes it in that mode."""
    if 2 * key_dim != dim:
        raise ValueError(f"dense_gau_retnet: query_key_dim must be hidden_size / 2 = {dim / 2:g}, got {key_dim}")
    scales: dict[str, tuple[RetentionScale, ...]] = {"recurrent": (), "parallel": (RetentionScale(eps=eps),)}
    if mode not in scales:
        raise ValueError(f"dense_gau_retnet: mode must be one of {', '.join(scales)}, got {mode!r}")
    return dense_retnet(heads=heads, layers=layers, dropout=dropout, eps=eps, scale=scales[mode])


def mixer(
    hidden_size: int,
    query_key_dim: int,
    num_attention_heads: int,
    dense_block_layers: int,
    dropout: float = 0.1,
    rms_norm_eps: float = 1e-6,
    mode: str = "recurrent",
) -> Mixer:
    sizes = (hidden_size, query_key_dim, num_attention_heads, dense_block_layers)
    return Mixer(recipe(*sizes, dropout, rms_norm_eps, mode), hidden_size)


def layer(
    hidden_size: int,
    query_key_dim: int,
    num_attention_heads: int,
    dense_block_layers: int,
    dropout: float = 0.1,
    rms_norm_eps: float = 1e-6,
    mode: str = "recurrent",
) -> Block:
    sizes = (hidden_size, query_key_dim, num_attention_heads, dense_block_layers)
    norm = Norm("x", eps=rms_norm_eps, to="y")
    return Block(recipe(*sizes, dropout, rms_norm_eps, mode), hidden_size, norm=norm)


def model(
    vocab_size: int,
    hidden_size: int,
    query_key_dim: int,
    num_attention_heads: int,
    num_hidden_layers: int,
    dense_block_layers: int,
    dropout: float = 0.1,
    rms_norm_eps: float = 1e-6,
    pad_token_id: int | None = 0,
    mode: str = "recurrent",
) -> LanguageModel:
    sizes = (hidden_size, query_key_dim, num_attention_heads, dense_block_layers)
    return LanguageModel(
        recipe(*sizes, dropout, rms_norm_eps, mode),
        vocab_size=vocab_size,
        dim=hidden_size,
        depth=num_hidden_layers,
        norm=Norm("x", eps=rms_norm_eps, to="y"),
        tie=False,
        head_init="normal",
        padding=pad_token_id,
    )


def projection(input_dim: int, mid_reduction_ratio: int = 32, final_reduction_ratio: float = 2) -> Mixer:
    """The two linear maps behind the gate of a fusion."""
    rank, width = input_dim // mid_reduction_ratio, int(input_dim / final_reduction_ratio)
    maps = LowRank(str(width), rank=str(rank), act="silu", init="normal")
    return Mixer(Recipe(Project("x", y=maps, init="normal"), out=str(width)), input_dim)


INERT = (*OF_A_FILE, "deepnorm", "retnorm", "layernorm_eps", "max_position_embeddings", "initializer_range")
OF_MODEL = ("num_hidden_layers", "vocab_size", "pad_token_id")
ONLY = {"v_factor": (2,), "hidden_act": ("silu",), "tie_word_embeddings": (False,)}
BLOCK_KEYS: Keys = {**under("mixer.", "self_attn.", MIXER_KEYS), "mixer_norm.weights.*": "input_layernorm.*"}
MIXER = Official(mixer, MIXER_KEYS, inert=(*INERT, *OF_MODEL), only=ONLY)
LAYER = Official(layer, BLOCK_KEYS, inert=(*INERT, *OF_MODEL), only=ONLY)
MODEL = Official(model, KEYS, derived=("retnet_rel_pos.angle", "retnet_rel_pos.decay"), inert=INERT, only=ONLY)
PROJECTION = Official(projection, {"parts.project.weight": "fc1.weight", "parts.project.y_up": "fc2.weight"})
