"""RetNet, as the Longhorn repository runs it."""

from __future__ import annotations

from recur.blocks import LanguageModel, Mixer, Norm, RetentionScale
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, rows, tied, under
from recur.convert.official import Official
from recur.presets.retnet import retnet
from recur.recipe import Recipe

MIXER_KEYS: Keys = {
    "parts.project.weight": rows("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"),
    "parts.project_2.weight": "out_proj.weight",
}
FFN_KEYS: Keys = {"project.weight": rows("fc1.weight", "gate.weight"), "project_2.weight": "fc2.weight"}
KEYS: Keys = {
    "embedding.weight": tied(
        "embed_tokens.weight", "transformer.embed_tokens.weight", "transformer.output_projection.weight"
    ),
    **under("blocks.*.mixer.", "transformer.layers.*.retention.", MIXER_KEYS),
    "blocks.*.mixer_norm.weights.*": "transformer.layers.*.retention_layer_norm.*",
    **under("blocks.*.ffn.parts.", "transformer.layers.*.ffn.", FFN_KEYS),
    "blocks.*.ffn_norm.weights.*": "transformer.layers.*.final_layer_norm.*",
    "final_norm.weights.*": "transformer.layer_norm.*",
}


def recipe(heads: int, value: int, eps: float, mode: str, chunk: int) -> Recipe:
    """The layer as the original computes it in that mode."""
    scales: dict[str, tuple[RetentionScale, ...]] = {
        "recurrent": (),
        "parallel": (RetentionScale(eps=eps),),
        "chunk": (RetentionScale(eps=eps, chunk=chunk),),
    }
    if mode not in scales:
        raise ValueError(f"retnet: mode must be one of {', '.join(scales)}, got {mode!r}")
    return retnet(heads=heads, value=value, eps=eps, scale=scales[mode])


def mixer(
    decoder_embed_dim: int = 768,
    decoder_value_embed_dim: int = 1280,
    decoder_retention_heads: int = 3,
    layernorm_eps: float = 1e-6,
    recurrent_chunk_size: int = 512,
    mode: str = "recurrent",
) -> Mixer:
    layer = recipe(decoder_retention_heads, decoder_value_embed_dim, layernorm_eps, mode, recurrent_chunk_size)
    return Mixer(layer, decoder_embed_dim)


def model(
    vocab_size: int,
    decoder_layers: int = 12,
    decoder_embed_dim: int = 768,
    decoder_value_embed_dim: int = 1280,
    decoder_retention_heads: int = 3,
    decoder_ffn_embed_dim: int = 1280,
    layernorm_eps: float = 1e-6,
    recurrent_chunk_size: int = 512,
    mode: str = "recurrent",
) -> LanguageModel:
    return LanguageModel(
        recipe(decoder_retention_heads, decoder_value_embed_dim, layernorm_eps, mode, recurrent_chunk_size),
        vocab_size=vocab_size,
        dim=decoder_embed_dim,
        depth=decoder_layers,
        ffn=gated(hidden=str(decoder_ffn_embed_dim), act="gelu", init="normal"),
        norm=Norm("x", eps=layernorm_eps, to="y"),
    )


IDLE = ("max_target_positions", "chunkwise_recurrent")
ONLY: dict[str, tuple[object, ...]] = {  # what the constructor has besides
    "activation_fn": ("gelu",),
    **dict.fromkeys(("dropout", "activation_dropout", "drop_path_rate"), (0.0,)),
    **dict.fromkeys(("decoder_normalize_before", "no_scale_embedding", "subln"), (True,)),
    **dict.fromkeys(("deepnorm", "layernorm_embedding", "no_output_layer"), (False,)),
}
MIXER = Official(mixer, MIXER_KEYS, inert=(*IDLE, "vocab_size", "decoder_layers", "decoder_ffn_embed_dim"), only=ONLY)
MODEL = Official(model, KEYS, derived=("retnet_rel_pos.angle", "retnet_rel_pos.decay"), inert=IDLE, only=ONLY)
