"""Gated state spaces, as their PyTorch package has them, and its companions: each core alone, gated, in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from recur.blocks import LanguageModel, Mixer, PositionTaps, Sum
from recur.convert.keys import Keys, rows, under
from recur.convert.official import Official
from recur.presets.gss import dss, gated_smoothing, gated_tap_conv, gss, smoothing, tap_conv
from recur.recipe import Recipe

CORES: dict[str, Keys] = {  # module of the core -> what it holds, beside its norm
    "dss": {"fixed_scan.rho": "Lambda_real", "fixed_scan.eta": "Lambda_imag", "fixed_scan.C_*": "C_*"},
    "mhesa": {"smoothing.alpha": "alphas", "smoothing.damp": "dampen_factors"},
    "dsconv": {"taps.weight": "to_weight.weight", "taps.table": "weight"},
}


def core_keys(core: str) -> Keys:
    keys = {"norm.*": "norm.*", "skip.D": "param_D", **CORES[core]}
    return either_way(keys)


def block_keys(core: str) -> Keys:
    return {
        "norm.*": "norm.*",
        "project.weight": rows("to_u.0.weight", "to_v.0.weight"),
        **under("", f"{core}.", {"norm_2.*": "norm.*", "skip.D": "param_D", **CORES[core]}),
        "project_2.weight": "to_gate.weight",
        "project_3.*": "to_out.*",
    }


def either_way(keys: Keys) -> Keys:
    """The parts of a recipe read left to right, or right to left."""
    return {**under("parts.", "", keys), **under("parts.reverse.", "", keys)}


def model_keys(core: str) -> Callable[[Collection[str]], Keys]:
    def keys(ours: Collection[str]) -> Keys:
        """A norm patched in before the head moves the head's name."""
        return {
            "embedding.weight": "token_emb.weight",
            **under("blocks.*.mixer.parts.", "layers.*.", block_keys(core)),
            "final_norm.weights.*": "to_logits.0.*",
            "head.weight": "to_logits.1.weight" if "final_norm.weights.weight" in ours else "to_logits.weight",
        }

    return keys


def patched(official: Collection[str]) -> dict[str, Any]:
    """Whether the head was replaced by a norm and a head after construction, as the published checkpoint does."""
    return {"to_logits_layernorm_patch": any(name.endswith("to_logits.1.weight") for name in official)}


def tapped(official: Collection[str]) -> dict[str, Any]:
    """Whether taps are learned a position, as they were before the tokens brought them."""
    return {"learned_taps": any(name == "weight" or name.endswith("dsconv.weight") for name in official)}


def _taps(recipe: Recipe, learned: bool, length: int) -> Recipe:
    return recipe.replace("taps", PositionTaps("H", length, name="taps")) if learned else recipe


def _order(recipe: Recipe, reverse_seq: bool) -> Recipe:
    return recipe.reverse() if reverse_seq else recipe


def _frequency(exponential: bool) -> str:
    return "exp" if exponential else "linear"


def _block(recipe: Recipe, dim: int, reverse_seq: bool) -> Mixer:
    """The released block holds its residual sum."""
    recipe = _order(recipe, reverse_seq)
    return Mixer(Recipe(*recipe.parts, Sum("x y"), axes=recipe.axes, source=recipe.source), dim)


def _model(recipe: Recipe, num_tokens: int, dim: int, depth: int, patch: bool, frozen: bool) -> LanguageModel:
    sizes: dict[str, Any] = {"vocab_size": num_tokens, "dim": dim, "depth": depth}
    final = "layer" if patch else None
    options: dict[str, Any] = {"embed_std": 1.0, "head_init": "linear", "frozen": frozen}
    return LanguageModel(recipe, **sizes, norm=None, final_norm=final, tie=False, **options)


def dss_alone(dim: int, kernel_N: int = 512, dss_kernel_lambda_imag_exp: bool = True) -> Mixer:
    return Mixer(dss(state=kernel_N, frequency=_frequency(dss_kernel_lambda_imag_exp)), dim)


def mhesa_alone(dim: int, heads: int, reverse_seq: bool = False) -> Mixer:
    return Mixer(_order(smoothing(heads=heads), reverse_seq), dim)


def dsconv_alone(dim: int, heads: int, max_seq_len: int = 2048, learned_taps: bool = False) -> Mixer:
    return Mixer(_taps(tap_conv(heads=heads), learned_taps, max_seq_len), dim)


def _gss(F: float, N: int, H: int, exponential: bool) -> Recipe:
    return gss(state=N, width=H, expand=F, frequency=_frequency(exponential))


def gss_block(
    dim: int,
    dim_expansion_factor: float = 4,
    dss_kernel_N: int = 512,
    dss_kernel_H: int = 256,
    reverse_seq: bool = False,
    dss_kernel_lambda_imag_exp: bool = True,
) -> Mixer:
    recipe = _gss(dim_expansion_factor, dss_kernel_N, dss_kernel_H, dss_kernel_lambda_imag_exp)
    return _block(recipe, dim, reverse_seq)


def gss_model(
    num_tokens: int,
    dim: int,
    depth: int,
    dim_expansion_factor: float = 4,
    dss_kernel_N: int = 512,
    dss_kernel_H: int = 256,
    dss_kernel_lambda_imag_exp: bool = True,
    to_logits_layernorm_patch: bool = False,
    frozen_shared_embedding: bool = False,
) -> LanguageModel:
    recipe = _gss(dim_expansion_factor, dss_kernel_N, dss_kernel_H, dss_kernel_lambda_imag_exp)
    return _model(recipe, num_tokens, dim, depth, to_logits_layernorm_patch, frozen_shared_embedding)


def gated_mhesa(dim: int, heads: int = 8, dim_mhesa: int = 512, dim_expansion_factor: float = 4) -> Mixer:
    return _block(gated_smoothing(heads=heads, width=dim_mhesa, expand=dim_expansion_factor), dim, False)


def mhesa_model(
    num_tokens: int,
    dim: int,
    depth: int,
    heads: int = 8,
    dim_mhesa: int = 512,
    dim_expansion_factor: float = 4,
    to_logits_layernorm_patch: bool = False,
    frozen_shared_embedding: bool = False,
) -> LanguageModel:
    recipe = gated_smoothing(heads=heads, width=dim_mhesa, expand=dim_expansion_factor)
    return _model(recipe, num_tokens, dim, depth, to_logits_layernorm_patch, frozen_shared_embedding)


def gated_dsconv(
    dim: int,
    heads: int = 8,
    dim_dsconv: int = 512,
    dim_expansion_factor: float = 4,
    reverse_seq: bool = False,
    max_seq_len: int = 2048,
    learned_taps: bool = False,
) -> Mixer:
    recipe = gated_tap_conv(heads=heads, width=dim_dsconv, expand=dim_expansion_factor)
    return _block(_taps(recipe, learned_taps, max_seq_len), dim, reverse_seq)


def dsconv_model(
    num_tokens: int,
    dim: int,
    depth: int,
    heads: int = 8,
    dim_dsconv: int = 512,
    dim_expansion_factor: float = 4,
    max_seq_len: int = 2048,
    learned_taps: bool = False,
    to_logits_layernorm_patch: bool = False,
    frozen_shared_embedding: bool = False,
) -> LanguageModel:
    recipe = gated_tap_conv(heads=heads, width=dim_dsconv, expand=dim_expansion_factor)
    recipe = _taps(recipe, learned_taps, max_seq_len)
    return _model(recipe, num_tokens, dim, depth, to_logits_layernorm_patch, frozen_shared_embedding)


DSS = Official(dss_alone, core_keys("dss"))
MHESA = Official(mhesa_alone, core_keys("mhesa"))
DSCONV = Official(dsconv_alone, core_keys("dsconv"), infer=tapped)
BLOCK = Official(gss_block, either_way(block_keys("dss")))
GATED_MHESA = Official(gated_mhesa, either_way(block_keys("mhesa")))
GATED_DSCONV = Official(gated_dsconv, either_way(block_keys("dsconv")), infer=tapped)
MODEL = Official(gss_model, model_keys("dss"), prefix="net.", infer=patched)
MHESA_MODEL = Official(mhesa_model, model_keys("mhesa"), prefix="net.", infer=patched)
DSCONV_MODEL = Official(dsconv_model, model_keys("dsconv"), prefix="net.", infer=lambda s: {**patched(s), **tapped(s)})
