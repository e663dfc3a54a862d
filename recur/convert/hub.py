"""What the hub's language models have in common: the frame around their layers, and its keys."""

from __future__ import annotations

from typing import Any

from recur.blocks import LanguageModel, Norm
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, rows, stack, tied
from recur.convert.official import UNQUANTISED
from recur.recipe import Recipe

CONFIG = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "hidden_ratio": 4, "intermediate_size": None,
    "norm_eps": 1e-6, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
INERT = (
    *("attn_mode", "max_position_embeddings", "initializer_range", "fuse_norm", "fuse_swiglu"),
    *("fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
)
ONLY: dict[str, tuple[Any, ...]] = {
    **UNQUANTISED, "hidden_act": ("swish", "silu"), "attn": (None,), "attnres_block_size": (None,),
}  # fmt: skip


def model(recipe: Recipe, c: Any) -> LanguageModel:
    """RMS norms, a gated feed-forward, and a head of its own unless it is tied."""
    rule = f"256*ceil(int(D*{c.hidden_ratio}*2/3)/256)"
    return LanguageModel(
        recipe,
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        depth=c.num_hidden_layers,
        ffn=gated(hidden=rule if c.intermediate_size is None else str(c.intermediate_size), init="normal"),
        norm=Norm("x", eps=c.norm_eps, to="y"),
        tie=c.tie_word_embeddings,
        head_init="normal",
        padding=c.pad_token_id,
    )


def keys(layer: Keys) -> Keys:
    """Those of a model with this layer."""
    mlp: Keys = {
        "parts.project.weight": rows("gate_proj.weight", "up_proj.weight"),
        "parts.project_2.weight": "down_proj.weight",
    }
    return {
        "embedding.weight": tied("model.embeddings.weight", "lm_head.weight"),
        "head.weight": "lm_head.weight",
        **stack("model.layers.*.", ("attn.", layer), ("mlp.", mlp), ("attn_norm", "mlp_norm"), "model.norm"),
    }
