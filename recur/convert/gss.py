"""Gated state spaces, as their PyTorch package has them, and its companions: each core alone, gated, in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from recur.blocks import LanguageModel, Mixer, PositionTaps, Sum
from recur.convert.keys import Keys, rows, under
from recur.convert.official import Official
from recur.presets.gss import dss, gated_smoothing, gated_tap_conv, gss, smoothing, tap_conv
from recur.recipe import Recipe

RecipeOf = Callable[[Any], Recipe]  # of the official arguments
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


def _frequency(c: Any) -> str:
    return "exp" if c.dss_kernel_lambda_imag_exp else "linear"


def _taps(recipe: Recipe, c: Any) -> Recipe:
    return recipe.replace("taps", PositionTaps("H", c.max_seq_len, name="taps")) if c.learned_taps else recipe


def dss_core(c: Any) -> Recipe:
    return dss(state=c.kernel_N, frequency=_frequency(c))


def mhesa_core(c: Any) -> Recipe:
    return smoothing(heads=c.heads)


def dsconv_core(c: Any) -> Recipe:
    return _taps(tap_conv(heads=c.heads), c)


def gated_dss(c: Any) -> Recipe:
    sizes = {"state": c.dss_kernel_N, "width": c.dss_kernel_H, "expand": c.dim_expansion_factor}
    return gss(**sizes, frequency=_frequency(c))


def gated_mhesa(c: Any) -> Recipe:
    return gated_smoothing(heads=c.heads, width=c.dim_mhesa, expand=c.dim_expansion_factor)


def gated_dsconv(c: Any) -> Recipe:
    return _taps(gated_tap_conv(heads=c.heads, width=c.dim_dsconv, expand=c.dim_expansion_factor), c)


def ordered(recipe_of: RecipeOf) -> RecipeOf:
    """Read right to left if that is asked for."""
    return lambda c: recipe_of(c).reverse() if c.reverse_seq else recipe_of(c)


def alone(recipe_of: RecipeOf, c: Any) -> Mixer:
    return Mixer(recipe_of(c), c.dim)


def block(recipe_of: RecipeOf, c: Any) -> Mixer:
    """The released block holds its residual sum."""
    recipe = recipe_of(c)
    return Mixer(recipe.like(*recipe.parts, Sum("x y")), c.dim)


def model(recipe_of: RecipeOf, c: Any) -> LanguageModel:
    return LanguageModel(
        recipe_of(c),
        vocab_size=c.num_tokens,
        dim=c.dim,
        depth=c.depth,
        norm=None,
        final_norm="layer" if c.to_logits_layernorm_patch else None,
        tie=False,
        embed_std=1.0,
        head_init="linear",
        frozen=c.frozen_shared_embedding,
    )


REVERSE = {"reverse_seq": False}
TAPS = {"max_seq_len": 2048, "learned_taps": False}
IMAG = {"dss_kernel_lambda_imag_exp": True}
OF_GSS = {"dim_expansion_factor": 4, "dss_kernel_N": 512, "dss_kernel_H": 256, **IMAG}
OF_MHESA = {"heads": 8, "dim_mhesa": 512, "dim_expansion_factor": 4}
OF_DSCONV = {"heads": 8, "dim_dsconv": 512, "dim_expansion_factor": 4, **TAPS}


def _alone(recipe_of: RecipeOf, core: str, needs: tuple[str, ...], config: dict[str, Any], **more: Any) -> Official:
    return Official(partial(alone, recipe_of), core_keys(core), needs, config, **more)


def _block(recipe_of: RecipeOf, core: str, config: dict[str, Any], **more: Any) -> Official:
    return Official(partial(block, recipe_of), either_way(block_keys(core)), ("dim",), config, **more)


def _model(recipe_of: RecipeOf, core: str, config: dict[str, Any], infer: Callable[..., dict[str, Any]]) -> Official:
    config = {**config, "to_logits_layernorm_patch": False, "frozen_shared_embedding": False}
    needs = ("num_tokens", "dim", "depth")
    return Official(partial(model, recipe_of), model_keys(core), needs, config, prefix="net.", infer=infer)


DSS = _alone(dss_core, "dss", ("dim",), {"kernel_N": 512, **IMAG})
MHESA = _alone(ordered(mhesa_core), "mhesa", ("dim", "heads"), REVERSE)
DSCONV = _alone(dsconv_core, "dsconv", ("dim", "heads"), TAPS, infer=tapped)
BLOCK = _block(ordered(gated_dss), "dss", {**OF_GSS, **REVERSE})
GATED_MHESA = _block(gated_mhesa, "mhesa", OF_MHESA)
GATED_DSCONV = _block(ordered(gated_dsconv), "dsconv", {**OF_DSCONV, **REVERSE}, infer=tapped)
MODEL = _model(gated_dss, "dss", OF_GSS, patched)
MHESA_MODEL = _model(gated_mhesa, "mhesa", OF_MHESA, patched)
DSCONV_MODEL = _model(gated_dsconv, "dsconv", OF_DSCONV, lambda s: {**patched(s), **tapped(s)})
