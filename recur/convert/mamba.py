"""Mamba and Mamba-2, as released with their papers and by transformers, and the frame that Longhorn takes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm, OutputGate, Project
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, merged, taps, tied, under
from recur.convert.official import OF_A_FILE, Official
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

    return Official(build, under("parts.", "", keys), inert=(*INITIAL, *PLACE), only={"layer": ("Mamba1",)})


def mixer_2(
    d_model: int,
    d_state: int = 128,
    d_conv: int = 4,
    expand: int = 2,
    headdim: int = 64,
    d_ssm: int | None = None,
    ngroups: int = 1,
    A_init_range: Sequence[float] = (1.0, 16.0),
    D_has_hdim: bool = False,
    rmsnorm: bool = True,
    norm_before_gate: bool = False,
    dt_limit: Sequence[float] = UNLIMITED,
    bias: bool = False,
    conv_bias: bool = True,
) -> Mixer:
    gate, norm = OutputGate("z"), Norm("y", groups="G")
    beside = expand * d_model - (d_ssm or expand * d_model)
    recipe = (mamba2_mlp if beside else mamba2)(
        **({"mlp": beside} if beside else {}),
        state=d_state,
        inner=d_ssm or f"{expand}*D",
        head=headdim,
        groups=ngroups,
        conv=d_conv,
        conv_bias=conv_bias,
        bias=bias,
        limit=limits(*dt_limit),
        rates=(A_init_range[0], A_init_range[1]),
        skip="H P" if D_has_hdim else "H",
        leave=((norm, gate) if norm_before_gate else (gate, norm)) if rmsnorm else (gate,),
    )
    return Mixer(recipe, d_model)


def model_of(
    mixers: Mapping[str, Official], keys: Keys, *, prefix: str = "", ignored: tuple[str, ...] = ()
) -> Official:
    """The language model of one of these mixers, by ssm_cfg["layer"]; the first is the default."""

    def build(
        d_model: int = 2560,
        n_layer: int = 64,
        vocab_size: int = 50277,
        d_intermediate: int = 0,
        ssm_cfg: Mapping[str, Any] | None = None,
        rms_norm: bool = True,
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
    ) -> LanguageModel:
        options = {"layer": next(iter(mixers)), **(ssm_cfg or {}), "d_model": d_model}
        layer = options.pop("layer")
        if layer not in mixers:
            raise NotImplementedError(f"ssm_cfg: layer must be {' or '.join(map(repr, mixers))} so far, got {layer!r}")
        recipe = mixers[layer].make("ssm_cfg", options).recipe
        beside = gated(hidden=f"{-(-d_intermediate // 128) * 128}", out_init="residual_twice")
        if d_intermediate:  # two branches a layer
            recipe = recipe.replace(recipe.body.keys()[-1], replace(recipe.parts[-1], init="residual_twice"))
        return LanguageModel(
            recipe,
            vocab_size=-(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple,
            dim=d_model,
            depth=n_layer,
            ffn=beside.replace("project", Project("x", h="F", z="F")) if d_intermediate else None,
            norm="rms" if rms_norm else "layer",
            tie=tie_embeddings,
        )

    inert = ("residual_in_fp32", "fused_add_norm", "attn_cfg", "initializer_cfg", "device", "dtype", *ignored)
    only: dict[str, tuple[Any, ...]] = {} if "attn_layer_idx" in ignored else {"attn_layer_idx": ([], None)}
    return Official(build, frame("embedding", keys), prefix=prefix, inert=inert, only=only)


def frame(embedding: str, keys: Keys) -> Keys:
    """A backbone of such mixers, its embedding called so."""
    return {
        "embedding.weight": tied(f"backbone.{embedding}.weight", "lm_head.weight"),
        "head.weight": "lm_head.weight",
        **under("blocks.*.mixer.parts.", "backbone.layers.*.mixer.", keys),
        "blocks.*.mixer_norm.weights.*": "backbone.layers.*.norm.*",
        "blocks.*.ffn.parts.project.weight": "backbone.layers.*.mlp.fc1.weight",
        "blocks.*.ffn.parts.project_2.weight": "backbone.layers.*.mlp.fc2.weight",
        "blocks.*.ffn_norm.weights.*": "backbone.layers.*.norm2.*",
        "final_norm.weights.*": "backbone.norm_f.*",
    }


def _of_transformers(recipe: Recipe, vocab: int, dim: int, depth: int, tie: bool, eps: float) -> LanguageModel:
    """The frame that transformers puts around either mixer."""
    norm = Norm("x", eps=eps, to="y")
    return LanguageModel(recipe, vocab_size=vocab, dim=dim, depth=depth, tie=tie, norm=norm, embed_std=0.1)


def transformers_model(
    vocab_size: int = 50280,
    hidden_size: int = 768,
    state_size: int = 16,
    num_hidden_layers: int = 32,
    layer_norm_epsilon: float = 1e-5,
    expand: int = 2,
    conv_kernel: int = 4,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    time_step_rank: int | str = "auto",
    tie_word_embeddings: bool = True,
) -> LanguageModel:
    options: dict[str, Any] = {"expand": expand, "conv": conv_kernel, "bias": use_bias, "conv_bias": use_conv_bias}
    rank = "ceil(D/16)" if time_step_rank == "auto" else time_step_rank
    sizes = vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings, layer_norm_epsilon
    return _of_transformers(mamba(state=state_size, rank=rank, **options), *sizes)


def transformers_model_2(
    num_heads: int = 128,
    head_dim: int = 64,
    vocab_size: int = 32768,
    hidden_size: int = 4096,
    state_size: int = 128,
    num_hidden_layers: int = 64,
    layer_norm_epsilon: float = 1e-5,
    expand: int = 2,
    conv_kernel: int = 4,
    n_groups: int = 8,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    time_step_limit: Sequence[Any] = UNLIMITED,
    tie_word_embeddings: bool = False,
) -> LanguageModel:
    if num_heads * head_dim != expand * hidden_size:
        raise ValueError(
            f"mamba2_hf: num_heads * head_dim must be expand * hidden_size = {expand * hidden_size}, "
            f"got {num_heads} * {head_dim}"
        )
    leave = (OutputGate("z"), Norm("y", groups="G", eps=layer_norm_epsilon))
    options: dict[str, Any] = {"head": head_dim, "groups": n_groups, "limit": limits(*time_step_limit), "leave": leave}
    options |= {"expand": expand, "conv": conv_kernel, "bias": use_bias, "conv_bias": use_conv_bias}
    sizes = vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings, layer_norm_epsilon
    return _of_transformers(mamba2(state=state_size, **options), *sizes)


MIXER = mixer_of(mamba, KEYS)
MIXER_2 = Official(
    mixer_2,
    under("parts.", "", KEYS_2),
    inert=(*INITIAL, *PLACE, "chunk_size", "use_mem_eff_path", "process_group", "sequence_parallel"),
    only={"activation": ("swish", "silu"), "layer": ("Mamba2",)},
)
MODEL = model_of({"Mamba1": MIXER, "Mamba2": MIXER_2}, {**KEYS, **KEYS_2})
CONFIG = (
    *(*OF_A_FILE, "pad_token_id", "intermediate_size"),
    *("initializer_range", "residual_in_fp32", "rescale_prenorm_residual", "time_step_min", "time_step_max"),
    *("time_step_floor", "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan"),
    *("chunk_size", "d_inner", "d_model", "n_layer", "ssm_cfg", "fused_add_norm", "pad_vocab_size_multiple"),
)
SILU = {"hidden_act": ("silu", "swish"), "rms_norm": (True,)}
TRANSFORMERS = Official(transformers_model, frame("embeddings", KEYS), inert=CONFIG, only=SILU)
TRANSFORMERS_2 = Official(
    transformers_model_2, frame("embeddings", KEYS_2), inert=(*CONFIG, "time_step_rank", "norm_before_gate"), only=SILU
)
