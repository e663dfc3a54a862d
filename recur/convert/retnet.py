"""RetNet, as the Longhorn repository runs it."""

from __future__ import annotations

from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm, RetentionScale
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, rows, stack, tied
from recur.convert.official import Official
from recur.presets.retnet import retnet
from recur.recipe import Recipe
from recur.shapes import pick

MIXER_KEYS: Keys = {
    "parts.project.weight": rows("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"),
    "parts.project_2.weight": "out_proj.weight",
}
FFN_KEYS: Keys = {"parts.project.weight": rows("fc1.weight", "gate.weight"), "parts.project_2.weight": "fc2.weight"}
NORMS = ("retention_layer_norm", "final_layer_norm")
KEYS: Keys = {
    "embedding.weight": tied(
        "embed_tokens.weight", "transformer.embed_tokens.weight", "transformer.output_projection.weight"
    ),
    **stack("transformer.layers.*.", ("retention.", MIXER_KEYS), ("ffn.", FFN_KEYS), NORMS, "transformer.layer_norm"),
}


CONFIG = {
    "decoder_embed_dim": 768, "decoder_value_embed_dim": 1280, "decoder_retention_heads": 3, "decoder_layers": 12,
    "decoder_ffn_embed_dim": 1280, "layernorm_eps": 1e-6, "recurrent_chunk_size": 512, "mode": "recurrent",
}  # fmt: skip


def recipe(c: Any) -> Recipe:
    """The layer as the original computes it in that mode."""
    eps = c.layernorm_eps
    scales: dict[str, tuple[RetentionScale, ...]] = {
        "recurrent": (),
        "parallel": (RetentionScale(eps=eps),),
        "chunk": (RetentionScale(eps=eps, chunk=c.recurrent_chunk_size),),
    }
    scale = pick("retnet", "mode", c.mode, scales)
    return retnet(heads=c.decoder_retention_heads, value=c.decoder_value_embed_dim, eps=eps, scale=scale)


def mixer(c: Any) -> Mixer:
    return Mixer(recipe(c), c.decoder_embed_dim)


def model(c: Any) -> LanguageModel:
    return LanguageModel(
        recipe(c),
        vocab_size=c.vocab_size,
        dim=c.decoder_embed_dim,
        depth=c.decoder_layers,
        ffn=gated(hidden=str(c.decoder_ffn_embed_dim), act="gelu", init="normal"),
        norm=Norm("x", eps=c.layernorm_eps, to="y"),
    )


IDLE = ("max_target_positions", "chunkwise_recurrent")
ONLY: dict[str, tuple[object, ...]] = {  # what the constructor has besides
    "activation_fn": ("gelu",),
    **dict.fromkeys(("dropout", "activation_dropout", "drop_path_rate"), (0.0,)),
    **dict.fromkeys(("decoder_normalize_before", "no_scale_embedding", "subln"), (True,)),
    **dict.fromkeys(("deepnorm", "layernorm_embedding", "no_output_layer"), (False,)),
}
BUFFERS = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")
MIXER = Official(mixer, MIXER_KEYS, (), CONFIG, inert=(*IDLE, "vocab_size"), only=ONLY)
MODEL = Official(model, KEYS, ("vocab_size",), CONFIG, derived=BUFFERS, inert=IDLE, only=ONLY)
