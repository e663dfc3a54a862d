"""Mamba's selective state space, as released with its paper, and the frame that Longhorn's release takes from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recur.blocks import LanguageModel, Mixer
from recur.convert.keys import Keys, taps, tied, under
from recur.convert.official import Official
from recur.presets.mamba import mamba
from recur.recipe import Recipe

LAYER: Keys = {
    "project.*": "in_proj.*",
    "short_conv.weight": taps("conv1d.weight"),
    "short_conv.bias": "conv1d.bias",
    "project_2.weight": "x_proj.weight",
    "skip.D": "D",
    "project_3.*": "out_proj.*",
}
INITIAL = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")


def mixer_of(preset: Callable[..., Recipe], keys: Keys) -> Official:
    """The mixer module of a preset with Mamba's options."""

    def build(
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
    ) -> Mixer:
        rank = "ceil(D/16)" if dt_rank == "auto" else dt_rank
        recipe = preset(state=d_state, expand=expand, conv=d_conv, rank=rank, conv_bias=conv_bias, bias=bias)
        return Mixer(recipe, d_model)

    inert = (*INITIAL, "use_fast_path", "layer_idx", "device", "dtype")
    return Official(build, under("parts.", "", keys), inert=inert, only={"layer": ("Mamba1",)})


def model_of(mixer: Official, keys: Keys, prefix: str = "") -> Official:
    """The language model of that mixer: pre-norm, no feed-forward, a vocabulary rounded up."""

    def build(
        d_model: int = 2560,
        n_layer: int = 64,
        vocab_size: int = 50277,
        ssm_cfg: Mapping[str, Any] | None = None,
        rms_norm: bool = True,
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
    ) -> LanguageModel:
        recipe = mixer.make("ssm_cfg", {**(ssm_cfg or {}), "d_model": d_model}).recipe
        padded = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        norm = "rms" if rms_norm else "layer"
        return LanguageModel(recipe, vocab_size=padded, dim=d_model, depth=n_layer, norm=norm, tie=tie_embeddings)

    frame: Keys = {
        "embedding.weight": tied("backbone.embedding.weight", "lm_head.weight"),
        "head.weight": "lm_head.weight",
        **under("blocks.*.mixer.parts.", "backbone.layers.*.mixer.", keys),
        "blocks.*.mixer_norm.weights.*": "backbone.layers.*.norm.*",
        "final_norm.weights.*": "backbone.norm_f.*",
    }
    inert = ("residual_in_fp32", "fused_add_norm", "attn_cfg", "initializer_cfg", "device", "dtype")
    only: dict[str, tuple[Any, ...]] = {"d_intermediate": (0,), "attn_layer_idx": ([], None)}
    return Official(build, frame, prefix=prefix, inert=inert, only=only)


KEYS: Keys = {
    **LAYER,
    "project_2.dt_up": "dt_proj.weight",
    "selective_scan.dt_bias": "dt_proj.bias",
    "selective_scan.A_log": "A_log",
}
MIXER = mixer_of(mamba, KEYS)
MODEL = model_of(MIXER, KEYS)
