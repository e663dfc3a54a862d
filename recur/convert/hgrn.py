"""HGRN: the units of its authors (complex, real, in a grid), and the layer and model of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from recur.blocks import (
    LanguageModel,
    LowerBounds,
    Mixer,
    Norm,
    OutputGate,
    Scale,
    ShortConv,
    both_ways,
    down_and_right,
    in_grid,
    one_way,
)
from recur.blocks.feedforward import gated
from recur.convert.keys import Keys, merged, rows, taps, tied, under
from recur.convert.official import OF_A_FILE, Official
from recur.presets.hgrn import hgrn, hgrn_complex, without_bounds
from recur.recipe import Part, Recipe

# ---------------------------------------------------------------------- the authors' units


def alone(recipe: Recipe, layer: int | None = None) -> Recipe:
    """A unit by itself, which takes its lower bound as an input `bound` (zeros for none); layer 0 ignores it."""
    (bounds,) = (part for part in recipe.parts if isinstance(part, LowerBounds))
    parts = [part for part in recipe.parts if part is not bounds]
    ignored = [Scale("bound", "0")] if layer == 0 else []
    return Recipe(*ignored, *parts, axes=recipe.axes, inputs={"bound": bounds.axes}, source=recipe.source)


def activation_of(name: str) -> str:
    """A name that means nothing to the authors is the identity."""
    return name if name in ("gelu", "relu", "elu", "sigmoid", "exp", "leak", "1+elu", "2+elu", "silu") else "identity"


def real(embed_dim: int, act_fun: str = "silu", expand_ratio: int = 2, bias: bool = True) -> Mixer:
    options: dict[str, Any] = {"bias": bias, "init": "linear", "act": activation_of(act_fun)}
    return Mixer(alone(hgrn(expand=expand_ratio, leave=(SIGMOID, NORM), **options)), embed_dim)


def narrow_real(ways: Ways, embed_dim: int, act_fun: str = "silu", causal: bool = True) -> Mixer:
    act = activation_of(act_fun)
    leave = (NORM, OutputGate("g", act=act))
    return Mixer(alone(hgrn(bias=True, init="linear", act=act, scan=ways[causal], leave=leave)), embed_dim)


def turned(
    ways: Ways, phases: tuple[str, ...], embed_dim: int, act_fun: str = "silu", causal: bool = True, bias: bool = True
) -> Mixer:
    act = activation_of(act_fun)
    leave = (NORM, OutputGate("g", act=act))
    recipe = hgrn_complex(bias=bias, act=act, phases=phases, scan=ways[causal], leave=leave)
    return Mixer(alone(recipe), embed_dim)


def turned_cheaply(
    leave: tuple[Part, ...],
    embed_dim: int,
    gate_dim: int = 128,
    act_fun: str = "silu",
    causal: bool = True,
    bias: bool = True,
) -> Mixer:
    options: dict[str, Any] = {"bias": bias, "rank": gate_dim, "act": activation_of(act_fun), "leave": leave}
    return Mixer(alone(hgrn_complex(scan=LINE[causal], **options)), embed_dim)


def angle(name: str) -> Callable[[Any, Tensor], Mapping[str, Tensor]]:
    """Theirs has an axis for time and one for the batch."""
    return lambda part, theta: {name: theta[None, None]}


def unit(build: Callable[..., Mixer], *linear: str, **more: Any) -> Official:
    """Keys: the first Project as one linear map an output, and what else there is."""
    first = {f"project.{kind}": rows(*(f"{name}.{kind}" for name in linear)) for kind in ("weight", "bias")}
    norm = {f"norm.{kind}": merged(f"norm.{kind}") for kind in ("weight", "bias")}
    keys: Keys = {**first, **norm, "project_2.*": "out_proj.*", **more}
    return Official(build, under("parts.", "", keys), inert=("use_triton",))


SIGMOID, NORM = OutputGate("g", act="sigmoid"), Norm("y", kind="layer")
Ways = Mapping[bool, Callable[..., tuple[Part, ...]]]  # of a causal unit, and of one that is not
LINE: Ways = {True: one_way, False: both_ways}
GRID: Ways = {True: down_and_right, False: in_grid}
BOTH_WAYS: Ways = dict.fromkeys((True, False), both_ways)
ALL_WAYS: Ways = dict.fromkeys((True, False), in_grid)

ONE: Keys = {"phase.theta": angle("theta")}
TWO: Keys = {"phase.theta": angle("theta_forward"), "phase_2.theta": angle("theta_reverse")}
UP: Keys = {
    "project.z_up": "lambda_proj.1.weight",
    "project.z_bias": "lambda_proj.1.bias",
    "project.g_up": "gate.1.weight",
    "project.g_bias": "gate.1.bias",
}
PLAIN, CHEAP = ("input_proj", "lambda_proj", "gate"), ("input_proj", "lambda_proj.0", "gate.0")
REAL = ("input_proj", "gate", "lambda_proj")

UNITS = {
    "bihgru1_1d": unit(partial(turned, BOTH_WAYS, ("turn", "turn_back")), *PLAIN, **TWO),
    "bihgru1_2d": unit(partial(turned, ALL_WAYS, ("turn", "turn_back")), *PLAIN, **TWO),
    "hgru1_1d": unit(partial(turned, LINE, ("turn",)), *PLAIN, **ONE),
    "hgru1_1d_v2": unit(partial(turned_cheaply, (NORM, SIGMOID)), *CHEAP, **UP, **ONE),
    "hgru1_1d_v3": unit(partial(turned_cheaply, (SIGMOID, NORM)), *CHEAP, **UP, **ONE),
    "hgru1_2d": unit(partial(turned, GRID, ("turn",)), *PLAIN, **ONE),
    "hgru1_real_1d": unit(real, "input_proj", "output_gate", "forget_gate"),
    "hgru1_real_2d": unit(partial(narrow_real, ALL_WAYS), *REAL),
    "hgru1_real_v6": unit(partial(narrow_real, LINE), *REAL),
}

# ---------------------------------------------------------------------- the hub's layers and models

RecipeOf = Callable[[int, int | None, int | None, bool, float], Recipe]


def hub_hgrn(dim: int, heads: int | None, expand: int | None, affine: bool, eps: float) -> Recipe:
    norm = Norm("y", eps=eps, affine="full" if affine else "none")
    return hgrn(expand=expand or 1, leave=(norm, OutputGate("g")))


def hub_mixer(
    recipe_of: RecipeOf,
    hidden_size: int = 1024,
    num_heads: int | None = None,
    expand_ratio: int | None = 1,
    use_short_conv: bool = False,
    conv_size: int = 4,
    conv_bias: bool = False,
    elementwise_affine: bool = True,
    norm_eps: float = 1e-5,
    layer_idx: int | None = None,
) -> Mixer:
    recipe = recipe_of(hidden_size, num_heads, expand_ratio, elementwise_affine, norm_eps)
    recipe = convolved(recipe, conv_size, conv_bias) if use_short_conv else recipe
    return Mixer(alone(recipe, layer_idx), hidden_size)


def hub_model(
    recipe_of: RecipeOf,
    vocab_size: int = 32000,
    hidden_size: int = 2048,
    num_hidden_layers: int = 24,
    num_heads: int | None = None,
    expand_ratio: int | None = 1,
    use_short_conv: bool = False,
    conv_size: int = 4,
    use_lower_bound: bool = True,
    hidden_ratio: int = 4,
    intermediate_size: int | None = None,
    elementwise_affine: bool = True,
    norm_eps: float = 1e-6,
    pad_token_id: int | None = None,
    tie_word_embeddings: bool = False,
) -> LanguageModel:
    recipe = recipe_of(hidden_size, num_heads, expand_ratio, elementwise_affine, norm_eps)
    recipe = convolved(recipe, conv_size, False) if use_short_conv else recipe
    width = f"256*ceil(int(D*{hidden_ratio}*2/3)/256)" if intermediate_size is None else str(intermediate_size)
    return LanguageModel(
        recipe if use_lower_bound else without_bounds(recipe),
        vocab_size=vocab_size,
        dim=hidden_size,
        depth=num_hidden_layers,
        ffn=gated(hidden=width, init="normal"),
        norm=Norm("x", eps=norm_eps, to="y"),
        tie=tie_word_embeddings,
        head_init="normal",
        padding=pad_token_id,
    )


def convolved(recipe: Recipe, width: int, bias: bool) -> Recipe:
    """With short convolutions, without an activation of their own, of all that is projected but the gate of y."""
    names = [name for name, _ in recipe.parts[0].outs if name != "g"]  # type: ignore[attr-defined]
    convs = (ShortConv(name, width=width, bias=bias, act="identity") for name in names)
    return recipe.insert_before("act", *convs)


def hub(recipe_of: RecipeOf, expand: int, *names: str) -> dict[str, Official]:
    """The layer and the model, the layer's keys from the names of what it projects."""
    convs: Keys = {}
    for number, name in enumerate((name for name in names if name != "g"), 1):
        ours = f"parts.short_conv{f'_{number}' if number > 1 else ''}"
        convs = {**convs, f"{ours}.weight": taps(f"{name}_conv1d.weight"), f"{ours}.bias": f"{name}_conv1d.bias"}
    layer: Keys = {
        "parts.project.weight": rows(*(f"{name}_proj.weight" for name in names)),
        **convs,
        "parts.norm.weight": merged("g_norm.weight"),
        "parts.project_2.weight": "o_proj.weight",
    }
    mlp: Keys = {"project.weight": rows("gate_proj.weight", "up_proj.weight"), "project_2.weight": "down_proj.weight"}
    model: Keys = {
        "embedding.weight": tied("model.embeddings.weight", "lm_head.weight"),
        "head.weight": "lm_head.weight",
        "shared.lower_bounds.logits": merged("model.lower_bounds", first=1),
        **under("blocks.*.mixer.", "model.layers.*.attn.", layer),
        "blocks.*.mixer_norm.weights.*": "model.layers.*.attn_norm.*",
        **under("blocks.*.ffn.parts.", "model.layers.*.mlp.", mlp),
        "blocks.*.ffn_norm.weights.*": "model.layers.*.mlp_norm.*",
        "final_norm.weights.*": "model.norm.*",
    }
    return {
        "layer": Official(partial(hub_mixer, recipe_of, expand_ratio=expand), layer, inert=("mode",)),
        "lm": Official(partial(hub_model, recipe_of, expand_ratio=expand), model, inert=HUB_INERT, only=HUB_ONLY),
    }


HUB_INERT = (
    *(*OF_A_FILE, "attn_mode", "max_position_embeddings", "initializer_range", "fuse_norm", "fuse_swiglu"),
    *("fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
)
HUB_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("swish", "silu"), "attn": (None,), "attnres_block_size": (None,)}
HUB = hub(hub_hgrn, 1, "i", "g", "f")
