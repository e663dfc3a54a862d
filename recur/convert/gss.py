"""Gated state spaces, as their PyTorch package has them: the state space alone, the block, the language model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from recur.blocks import FixedScan, LanguageModel, Mixer, Norm, Skip, Sum
from recur.convert.keys import Keys, rows, under
from recur.convert.official import Official
from recur.presets.gss import gss
from recur.recipe import Recipe

CORE: Keys = {
    "fixed_scan.rho": "Lambda_real",
    "fixed_scan.eta": "Lambda_imag",
    "fixed_scan.C_*": "C_*",
    "skip.D": "param_D",
}
BLOCK_KEYS: Keys = {
    "norm.*": "norm.*",
    "project.weight": rows("to_u.0.weight", "to_v.0.weight"),
    "norm_2.*": "dss.norm.*",
    **under("", "dss.", CORE),
    "project_2.weight": "to_gate.weight",
    "project_3.*": "to_out.*",
}


def model_keys(ours: Collection[str]) -> Keys:
    """A norm patched in before the head moves the head's name."""
    return {
        "embedding.weight": "token_emb.weight",
        **under("blocks.*.mixer.parts.", "layers.*.", BLOCK_KEYS),
        "final_norm.weights.*": "to_logits.0.*",
        "head.weight": "to_logits.1.weight" if "final_norm.weights.weight" in ours else "to_logits.weight",
    }


def patched(official: Collection[str]) -> dict[str, Any]:
    """Whether the head was replaced by a norm and a head after construction, as the published checkpoint does."""
    return {"to_logits_layernorm_patch": any(name.endswith("to_logits.1.weight") for name in official)}


def _frequency(exponential: bool) -> str:
    return "exp" if exponential else "linear"


def core(dim: int, kernel_N: int = 512, dss_kernel_lambda_imag_exp: bool = True) -> Mixer:
    scan = FixedScan("n", frequency=_frequency(dss_kernel_lambda_imag_exp))
    return Mixer(Recipe(Norm("x", kind="layer", to="n"), scan, Skip("n"), axes={"N": kernel_N}), dim)


def block(
    dim: int,
    dim_expansion_factor: float = 4,
    dss_kernel_N: int = 512,
    dss_kernel_H: int = 256,
    dss_kernel_lambda_imag_exp: bool = True,
) -> Mixer:
    """The released block holds its residual sum."""
    frequency = _frequency(dss_kernel_lambda_imag_exp)
    recipe = gss(state=dss_kernel_N, width=dss_kernel_H, expand=dim_expansion_factor, frequency=frequency)
    return Mixer(Recipe(*recipe.parts, Sum("x y"), axes=recipe.axes, source=recipe.source), dim)


def model(
    num_tokens: int,
    dim: int,
    depth: int,
    dim_expansion_factor: float = 4,
    dss_kernel_N: int = 512,
    dss_kernel_H: int = 256,
    dss_kernel_lambda_imag_exp: bool = True,
    to_logits_layernorm_patch: bool = False,
) -> LanguageModel:
    frequency = _frequency(dss_kernel_lambda_imag_exp)
    return LanguageModel(
        gss(state=dss_kernel_N, width=dss_kernel_H, expand=dim_expansion_factor, frequency=frequency),
        vocab_size=num_tokens,
        dim=dim,
        depth=depth,
        norm=None,
        final_norm="layer" if to_logits_layernorm_patch else None,
        tie=False,
    )


DSS = Official(core, under("parts.", "", {"norm.*": "norm.*", **CORE}))
BLOCK = Official(block, under("parts.", "", BLOCK_KEYS), only={"reverse_seq": (False,)})
MODEL = Official(model, model_keys, prefix="net.", infer=patched)
