"""HGRN2: the units and the language model of its authors, and the layer and model of the hub."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm, both_ways, in_grid, in_series, one_way
from recur.blocks.feedforward import gated
from recur.convert.hgrn import activation_of, alone, hub
from recur.convert.keys import Keys, merged, rows, tied, under
from recur.convert.official import OF_A_FILE, Official
from recur.presets.hgrn2 import hgrn2
from recur.recipe import Recipe

UNIT: Keys = {
    "project.*": "in_proj.*",
    "norm.weight": merged("norm.weight"),
    "norm.bias": merged("norm.bias"),
    "project_2.*": "out_proj.*",
}
FFN_KEYS: Keys = {
    "project.weight": rows("l1.weight", "l2.weight"),
    "project.bias": rows("l1.bias", "l2.bias"),
    "project_2.*": "l3.*",
}
KEYS: Keys = {
    "embedding.weight": tied("model.embed_tokens.weight", "lm_head.weight"),
    "head.weight": "lm_head.weight",
    "shared.lower_bounds.logits": merged("model.lower_bounds", first=1),
    **under("blocks.*.mixer.parts.", "model.layers.*.token_mixer.", UNIT),
    "blocks.*.mixer_norm.weights.*": "model.layers.*.token_norm.*",
    **under("blocks.*.ffn.parts.", "model.layers.*.channel_mixer.", FFN_KEYS),
    "blocks.*.ffn_norm.weights.*": "model.layers.*.channel_norm.*",
    "final_norm.weights.*": "model.final_norm.*",
}


def _norm(norm_type: str, source: str) -> Norm:
    if norm_type not in ("layernorm", "simplermsnorm"):
        raise ValueError(f'hgrn2: norm_type must be "layernorm" or "simplermsnorm", got {norm_type!r}')
    layer = Norm(source, kind="layer", to="y")
    return layer if norm_type == "layernorm" else Norm(source, eps=1e-6, affine="none", to="y")


def unit(
    preset: Callable[..., Recipe],
    embed_dim: int,
    expand_ratio: int = 2,
    act_fun: str = "silu",
    uv_act_fun: str = "sigmoid",
    use_norm: bool = True,
    bias: bool = True,
    norm_type: str = "layernorm",
) -> Mixer:
    acts = {"value_act": activation_of(act_fun), "read_act": activation_of(uv_act_fun)}
    norm = (_norm(norm_type, "y"),) if use_norm else ()
    recipe = preset(heads=embed_dim // expand_ratio, bias=bias, init="linear", norm=norm, **acts)
    return Mixer(alone(recipe), embed_dim)


def series(**options: Any) -> Recipe:
    return in_series(hgrn2(scan=both_ways, **options))


def model(
    vocab_size: int = 50272,
    decoder_embed_dim: int = 1024,
    decoder_layers: int = 24,
    expand_ratio: int = 2,
    in_act: str = "none",
    out_act: str = "silu",
    glu_act: str = "none",
    glu_dim: int = 2816,
    bias: bool = False,
    norm_type: str = "simplermsnorm",
    no_scale_embedding: bool = True,
    tie_word_embeddings: bool = True,
    pad_token_id: int | None = 1,
) -> LanguageModel:
    acts: dict[str, Any] = {"value_act": activation_of(in_act), "read_act": activation_of(out_act)}
    return LanguageModel(
        hgrn2(heads=decoder_embed_dim // expand_ratio, bias=bias, norm=(_norm(norm_type, "y"),), **acts),
        vocab_size=vocab_size,
        dim=decoder_embed_dim,
        depth=decoder_layers,
        ffn=gated(hidden=str(glu_dim), bias=bias, act=activation_of(glu_act), init="normal"),
        norm=_norm(norm_type, "x"),
        tie=tie_word_embeddings,
        head_init="normal",
        embed_scale=1.0 if no_scale_embedding else decoder_embed_dim**0.5,
        padding=pad_token_id,
    )


def hub_hgrn2(dim: int, heads: int | None, expand: int | None, affine: bool, eps: float) -> Recipe:
    """Its norm has an eps of 1e-5 whatever the configuration says."""
    heads = heads if expand is None else dim // expand
    if heads is None:
        raise ValueError("hgrn2: expand_ratio or num_heads must be given, got neither")
    norm = Norm("y", eps=1e-5, affine="full" if affine else "none")
    return hgrn2(heads=heads, scale="1/sqrt(K)", norm=(norm,))


def _unit(preset: Callable[..., Recipe], ours: str = "parts.", **more: Any) -> Official:
    return Official(partial(unit, preset), under(ours, "", UNIT), **more)


UNITS = {
    "bihgru2_1d": _unit(partial(hgrn2, scan=both_ways), inert=("chunk_size",)),
    "hgru2_1d": _unit(partial(hgrn2, scan=one_way), inert=("use_fla",)),
    "hgru2_2d_parallel": _unit(partial(hgrn2, scan=in_grid)),
    "hgru2_2d_series": _unit(series, "parts.body."),
}
MODEL = Official(model, KEYS, inert=(*OF_A_FILE, "add_bos_token", "causal", "init_std"))
HUB = hub(hub_hgrn2, 128, "i", "q", "f")
