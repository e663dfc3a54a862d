"""HGRN2: the units and the language model of its authors, and the layer and model of the hub."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm, both_ways, in_grid, in_series, one_way
from recur.blocks.feedforward import gated
from recur.convert.hgrn import activation_of, alone, hub
from recur.convert.keys import Keys, merged, rows, stack, tied, under
from recur.convert.official import UNQUANTISED, Official, unless_misspelt
from recur.presets.hgrn2 import hgrn2
from recur.recipe import Recipe

UNIT: Keys = {
    "project.*": "in_proj.*",
    "norm.weight": merged("norm.weight"),
    "norm.bias": merged("norm.bias"),
    "project_2.*": "out_proj.*",
}
MIXER_KEYS = under("parts.", "", UNIT)
FFN_KEYS: Keys = {
    "parts.project.weight": rows("l1.weight", "l2.weight"),
    "parts.project.bias": rows("l1.bias", "l2.bias"),
    "parts.project_2.*": "l3.*",
}
NORMS = ("token_norm", "channel_norm")
KEYS: Keys = {
    "embedding.weight": tied("model.embed_tokens.weight", "lm_head.weight"),
    "head.weight": "lm_head.weight",
    "shared.lower_bounds.logits": merged("model.lower_bounds", first=1),
    **stack("model.layers.*.", ("token_mixer.", MIXER_KEYS), ("channel_mixer.", FFN_KEYS), NORMS, "model.final_norm"),
}


def _norm(norm_type: str, source: str) -> Norm:
    if norm_type not in ("layernorm", "simplermsnorm"):
        raise ValueError(f'hgrn2: norm_type must be "layernorm" or "simplermsnorm", got {norm_type!r}')
    layer = Norm(source, kind="layer", to="y")
    return layer if norm_type == "layernorm" else Norm(source, eps=1e-6, affine="none", to="y")


def unit(preset: Callable[..., Recipe], c: Any) -> Mixer:
    acts = {"value_act": activation_of(c.act_fun), "read_act": activation_of(c.uv_act_fun)}
    norm = (_norm(c.norm_type, "y"),) if c.use_norm else ()
    recipe = preset(heads=c.embed_dim // c.expand_ratio, bias=c.bias, init="linear", norm=norm, **acts)
    return Mixer(alone(recipe), c.embed_dim)


def series(**options: Any) -> Recipe:
    return in_series(hgrn2(scan=both_ways, **options))


def model(c: Any) -> LanguageModel:
    dim, bias = c.decoder_embed_dim, c.bias
    acts: dict[str, Any] = {"value_act": activation_of(c.in_act), "read_act": activation_of(c.out_act)}
    return LanguageModel(
        hgrn2(heads=dim // c.expand_ratio, bias=bias, norm=(_norm(c.norm_type, "y"),), **acts),
        vocab_size=c.vocab_size,
        dim=dim,
        depth=c.decoder_layers,
        ffn=gated(hidden=str(c.glu_dim), bias=bias, act=activation_of(c.glu_act), init="normal"),
        norm=_norm(c.norm_type, "x"),
        tie=c.tie_word_embeddings,
        head_init="normal",
        embed_scale=1.0 if c.no_scale_embedding else dim**0.5,
        padding=c.pad_token_id,
    )


def hub_hgrn2(c: Any) -> Recipe:
    """Its norm has an eps of 1e-5 whatever the configuration says."""
    heads = c.num_heads if c.expand_ratio is None else c.hidden_size // c.expand_ratio
    if heads is None:
        raise ValueError("hgrn2: expand_ratio or num_heads must be given, got neither")
    if c.num_heads not in (None, heads):
        raise NotImplementedError(
            f"hgrn2: num_heads must be hidden_size / expand_ratio = {heads} so far, got {c.num_heads}"
        )
    norm = Norm("y", eps=1e-5, affine="full" if c.elementwise_affine else "none")
    return hgrn2(heads=heads, scale="1/sqrt(K)", norm=(norm,))


UNIT_CONFIG = {
    "expand_ratio": 2, "act_fun": "silu", "uv_act_fun": "sigmoid", "use_norm": True, "bias": True,
    "norm_type": "layernorm",
}  # fmt: skip
CONFIG = {
    "vocab_size": 50272, "decoder_embed_dim": 1024, "decoder_layers": 24, "expand_ratio": 2, "in_act": "none",
    "out_act": "silu", "glu_act": "none", "glu_dim": 2816, "bias": False, "norm_type": "simplermsnorm",
    "no_scale_embedding": True, "tie_word_embeddings": True, "pad_token_id": 1,
}  # fmt: skip


def _unit(preset: Callable[..., Recipe], ours: str = "parts.", **more: Any) -> Official:
    return Official(partial(unit, preset), under(ours, "", UNIT), ("embed_dim",), UNIT_CONFIG, **more)


UNITS = {
    "bihgru2_1d": _unit(partial(hgrn2, scan=both_ways), inert=("chunk_size",)),
    "hgru2_1d": _unit(partial(hgrn2, scan=one_way), inert=("use_fla",)),
    "hgru2_2d_parallel": _unit(partial(hgrn2, scan=in_grid)),
    "hgru2_2d_series": _unit(series, "parts.body."),
}
MODEL = Official(
    model,
    KEYS,
    config=CONFIG,
    base="model.",
    inert=("add_bos_token", "causal", "init_std"),
    only={**UNQUANTISED, "model_type": ("hgrn2",)},
    ignores=unless_misspelt,
)
HUB = hub("hgrn2", hub_hgrn2, 128, "i", "q", "f")
