"""Mamba and Mamba-2, as released with their papers and by transformers, and the frame that Longhorn takes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm, OutputGate, Project
from recur.blocks.feedforward import gated
from recur.convert import mamba3
from recur.convert.keys import Keys, merged, stack, taps, tied, under
from recur.convert.official import UNQUANTISED, Official, unless_misspelt
from recur.presets.mamba import mamba
from recur.presets.mamba2 import mamba2, mamba2_mlp
from recur.recipe import Recipe

LAYER: Keys = {
    "project.*": "in_proj.*",
    "short_conv.weight": taps("conv1d.weight"),
    "short_conv.bias": "conv1d.bias",
    "project_2.weight": "x_proj.weight",
    "skip.D": merged("D"),
    "project_3.*": "out_proj.*",
}
KEYS: Keys = {
    **LAYER,
    "project_2.dt_up": "dt_proj.weight",
    "selective_scan.dt_bias": "dt_proj.bias",
    "selective_scan.A_log": "A_log",
}
KEYS_2: Keys = {
    "enter.*": "in_proj.*",
    "short_conv.weight": taps("conv1d.weight"),
    "short_conv.bias": "conv1d.bias",
    "step_decay.*": "*",
    "skip.D": merged("D"),
    "norm.weight": merged("norm.weight"),
    "leave.*": "out_proj.*",
}
INITIAL = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init")
PLACE = ("use_fast_path", "layer_idx", "device", "dtype")
UNLIMITED = (0.0, float("inf"))


def limits(low: Any, high: Any) -> tuple[float, float] | None:
    """Bounds of the time step, None if they bound nothing; JSON of transformers has infinity as {"__float__": ...}."""
    low, high = (float(x["__float__"] if isinstance(x, Mapping) else x) for x in (low, high))
    return None if (low, high) == UNLIMITED else (low, high)


def rank_of(rank: int | str) -> int | str:
    """The width between the two maps of the time step."""
    return "ceil(D/16)" if rank == "auto" else rank


def mixer_of(preset: Callable[..., Recipe], keys: Keys) -> Official:
    """The mixer module of a preset with Mamba's options."""

    def build(c: Any) -> Mixer:
        sizes = {"state": c.d_state, "expand": c.expand, "conv": c.d_conv, "rank": rank_of(c.dt_rank)}
        return Mixer(preset(**sizes, conv_bias=c.conv_bias, bias=c.bias), c.d_model)

    config = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False}
    rest: dict[str, Any] = {"inert": (*INITIAL, *PLACE), "only": {"layer": ("Mamba1",)}}
    return Official(build, under("parts.", "", keys), ("d_model",), config, **rest)


def mixer_2(c: Any) -> Mixer:
    gate, norm = OutputGate("z"), Norm("y", groups="G")
    beside = c.expand * c.d_model - (c.d_ssm or c.expand * c.d_model)
    recipe = (mamba2_mlp if beside else mamba2)(
        **({"mlp": beside} if beside else {}),
        state=c.d_state,
        inner=c.d_ssm or f"{c.expand}*D",
        head=c.headdim,
        groups=c.ngroups,
        conv=c.d_conv,
        conv_bias=c.conv_bias,
        bias=c.bias,
        limit=limits(*c.dt_limit),
        rates=tuple(c.A_init_range),
        skip="H P" if c.D_has_hdim else "H",
        leave=((norm, gate) if c.norm_before_gate else (gate, norm)) if c.rmsnorm else (gate,),
    )
    return Mixer(recipe, c.d_model)


def model_of(
    mixers: Mapping[str, Official], keys: Keys, *, prefix: str = "", ignored: tuple[str, ...] = ()
) -> Official:
    """The language model of one of these mixers, by ssm_cfg["layer"]; the first is the default."""

    def build(c: Any) -> LanguageModel:
        options = {"layer": next(iter(mixers)), **(c.ssm_cfg or {}), "d_model": c.d_model}
        layer = options.pop("layer")
        if layer not in mixers:
            raise NotImplementedError(f"ssm_cfg: layer must be {' or '.join(map(repr, mixers))} so far, got {layer!r}")
        recipe = mixers[layer].make("ssm_cfg", options).recipe
        beside = gated(hidden=f"{-(-c.d_intermediate // 128) * 128}", out_init="residual_twice")
        if c.d_intermediate:  # two branches per layer
            recipe = recipe.replace(recipe.body.keys()[-1], replace(recipe.parts[-1], init="residual_twice"))
        return LanguageModel(
            recipe,
            vocab_size=-(-c.vocab_size // c.pad_vocab_size_multiple) * c.pad_vocab_size_multiple,
            dim=c.d_model,
            depth=c.n_layer,
            ffn=beside.replace("project", Project("x", h="F", z="F")) if c.d_intermediate else None,
            norm="rms" if c.rms_norm else "layer",
            tie=c.tie_embeddings,
        )

    config = {
        "d_model": 2560,
        "n_layer": 64,
        "vocab_size": 50277,
        "d_intermediate": 0,
        "ssm_cfg": None,
        "rms_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }
    inert = ("residual_in_fp32", "fused_add_norm", "attn_cfg", "initializer_cfg", "device", "dtype", *ignored)
    only: dict[str, tuple[Any, ...]] = {} if "attn_layer_idx" in ignored else {"attn_layer_idx": ([], None)}
    return Official(build, frame("embedding", keys), (), config, prefix, inert=inert, only=only)


def frame(embedding: str, keys: Keys) -> Keys:
    """A backbone of such mixers, its embedding called so."""
    mlp: Keys = {"parts.project.weight": "fc1.weight", "parts.project_2.weight": "fc2.weight"}
    mixer = under("parts.", "", keys)
    return {
        "embedding.weight": tied(f"backbone.{embedding}.weight", "lm_head.weight"),
        "head.weight": "lm_head.weight",
        **stack("backbone.layers.*.", ("mixer.", mixer), ("mlp.", mlp), ("norm", "norm2"), "backbone.norm_f"),
    }


def _of_transformers(preset: Callable[..., Recipe], c: Any, **options: Any) -> LanguageModel:
    """The frame that transformers puts around either mixer, and the options that both have."""
    options |= {"state": c.state_size, "expand": c.expand, "conv": c.conv_kernel}
    return LanguageModel(
        preset(**options, bias=c.use_bias, conv_bias=c.use_conv_bias),
        vocab_size=c.vocab_size,
        dim=c.hidden_size,
        depth=c.num_hidden_layers,
        norm=Norm("x", eps=c.layer_norm_epsilon, to="y"),
        tie=c.tie_word_embeddings,
        embed_std=0.1,
    )


def transformers_model(c: Any) -> LanguageModel:
    inner = int(c.expand * c.hidden_size)
    if c.intermediate_size not in (None, inner):
        raise NotImplementedError(
            f"mamba_hf: intermediate_size must be expand * hidden_size = {inner} so far, got {c.intermediate_size}"
        )
    return _of_transformers(mamba, c, rank=rank_of(c.time_step_rank))


def transformers_model_2(c: Any) -> LanguageModel:
    if c.num_heads * c.head_dim != c.expand * c.hidden_size:
        raise ValueError(
            f"mamba2_hf: num_heads * head_dim must be expand * hidden_size = {c.expand * c.hidden_size}, "
            f"got {c.num_heads} * {c.head_dim}"
        )
    leave = (OutputGate("z"), Norm("y", groups="G", eps=c.layer_norm_epsilon))
    options = {"head": c.head_dim, "groups": c.n_groups, "limit": limits(*c.time_step_limit), "leave": leave}
    return _of_transformers(mamba2, c, **options)


MIXER = mixer_of(mamba, KEYS)
OF_MIXER_2 = {
    "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "d_ssm": None, "ngroups": 1, "rmsnorm": True,
    "A_init_range": (1.0, 16.0), "D_has_hdim": False, "norm_before_gate": False, "dt_limit": UNLIMITED,
    "bias": False, "conv_bias": True,
}  # fmt: skip
MIXER_2 = Official(
    mixer_2,
    under("parts.", "", KEYS_2),
    needs=("d_model",),
    config=OF_MIXER_2,
    inert=(*INITIAL, *PLACE, "chunk_size", "use_mem_eff_path", "process_group", "sequence_parallel"),
    only={"activation": ("swish", "silu"), "layer": ("Mamba2",)},
)
MODEL = model_of({"Mamba1": MIXER, "Mamba2": MIXER_2, "Mamba3": mamba3.MIXER}, {**KEYS, **KEYS_2, **mamba3.KEYS})
BOTH = {"layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
CONFIG = {
    **BOTH, "vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32,
    "time_step_rank": "auto", "tie_word_embeddings": True, "intermediate_size": None,
}  # fmt: skip
CONFIG_2 = {
    **BOTH, "num_heads": 128, "head_dim": 64, "vocab_size": 32768, "hidden_size": 4096, "state_size": 128,
    "num_hidden_layers": 64, "n_groups": 8, "time_step_limit": UNLIMITED, "tie_word_embeddings": False,
}  # fmt: skip
INERT = (
    *("initializer_range", "residual_in_fp32", "rescale_prenorm_residual", "time_step_min", "time_step_max"),
    *("time_step_floor", "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan"),
    *("chunk_size", "d_inner", "d_model", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple"),
)
INERT_2 = (*INERT, "time_step_rank", "norm_before_gate", "intermediate_size")
ONLY = {**UNQUANTISED, "hidden_act": ("silu", "swish"), "rms_norm": (True,)}
REST: dict[str, Any] = {
    "base": "backbone.",
    "older": {"backbone.embedding.weight": "backbone.embeddings.weight"},
    "ignores": unless_misspelt,
}
TRANSFORMERS = Official(
    transformers_model,
    frame("embeddings", KEYS),
    config=CONFIG,
    inert=INERT,
    only={**ONLY, "model_type": ("mamba",)},  # others of these weights' names compute something else
    **REST,
)
TRANSFORMERS_2 = Official(
    transformers_model_2,
    frame("embeddings", KEYS_2),
    config=CONFIG_2,
    inert=INERT_2,
    only={**ONLY, "model_type": ("mamba2",)},
    **REST,
)
