"""HGRN2, as its authors release it: the gated unit alone, and the language model."""

from __future__ import annotations

from recur.blocks import LanguageModel, LowerBounds, Mixer, Norm
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, merged, rows, tied, under
from recur.convert.official import Official
from recur.presets.hgrn2 import hgrn2
from recur.recipe import Recipe

MIXER_KEYS: Keys = {
    "parts.project.*": "in_proj.*",
    "parts.norm.weight": merged("norm.weight"),
    "parts.norm.bias": merged("norm.bias"),
    "parts.project_2.*": "out_proj.*",
}
FFN_KEYS: Keys = {"project.weight": rows("l1.weight", "l2.weight"), "project_2.weight": "l3.weight"}
KEYS: Keys = {
    "embedding.weight": tied("model.embed_tokens.weight", "lm_head.weight"),
    "head.weight": "lm_head.weight",
    "shared.lower_bounds.logits": merged("model.lower_bounds", first=1),
    **under("blocks.*.mixer.", "model.layers.*.token_mixer.", MIXER_KEYS),
    "blocks.*.mixer_norm.weights.*": "model.layers.*.token_norm.*",
    **under("blocks.*.ffn.parts.", "model.layers.*.channel_mixer.", FFN_KEYS),
    "blocks.*.ffn_norm.weights.*": "model.layers.*.channel_norm.*",
    "final_norm.weights.*": "model.final_norm.*",
}


def _act(name: str) -> str:
    return "identity" if name == "none" else name


def _norm(norm_type: str, source: str) -> Norm:
    if norm_type not in ("layernorm", "simplermsnorm"):
        raise ValueError(f'hgrn2: norm_type must be "layernorm" or "simplermsnorm", got {norm_type!r}')
    layer = Norm(source, kind="layer", to="y")
    return layer if norm_type == "layernorm" else Norm(source, eps=1e-6, affine="none", to="y")


def mixer(
    embed_dim: int,
    expand_ratio: int = 2,
    act_fun: str = "silu",
    uv_act_fun: str = "sigmoid",
    use_norm: bool = True,
    bias: bool = True,
    norm_type: str = "layernorm",
) -> Mixer:
    """The unit alone takes its lower bound as an input `bound` [1 1 H K] (zeros for none)."""
    heads, norm = embed_dim // expand_ratio, _norm(norm_type, "y")
    recipe = hgrn2(heads=heads, bias=bias, value_act=_act(act_fun), read_act=_act(uv_act_fun), norm=norm)
    left_out = LowerBounds if use_norm else (LowerBounds, Norm)
    parts = [part for part in recipe.parts if not isinstance(part, left_out)]
    return Mixer(Recipe(*parts, axes=recipe.axes, inputs={"bound": "H K"}, source=recipe.source), embed_dim)


def model(
    vocab_size: int = 50272,
    decoder_embed_dim: int = 1024,
    decoder_layers: int = 24,
    expand_ratio: int = 2,
    in_act: str = "none",
    out_act: str = "silu",
    glu_act: str = "none",
    glu_dim: int = 2816,
    norm_type: str = "simplermsnorm",
    tie_word_embeddings: bool = True,
) -> LanguageModel:
    heads, norm = decoder_embed_dim // expand_ratio, _norm(norm_type, "y")
    return LanguageModel(
        hgrn2(heads=heads, value_act=_act(in_act), read_act=_act(out_act), norm=norm),
        vocab_size=vocab_size,
        dim=decoder_embed_dim,
        depth=decoder_layers,
        ffn=gated(hidden=str(glu_dim), act=_act(glu_act), init="normal"),
        norm=_norm(norm_type, "x"),
        tie=tie_word_embeddings,
    )


TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "add_bos_token", "use_cache", "init_std", "causal")
MIXER = Official(mixer, MIXER_KEYS, inert=("use_fla", "causal"))
MODEL = Official(model, KEYS, inert=TOKENS, only={"bias": (False,), "no_scale_embedding": (True,)})
