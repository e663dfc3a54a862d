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
from recur.convert import hub as framed
from recur.convert.keys import Keys, merged, rows, taps, under
from recur.convert.official import Official, unless_misspelt
from recur.presets.hgrn import hgrn, hgrn_complex, without_bounds
from recur.recipe import Part, Recipe

# ---------------------------------------------------------------------- the authors' units


def alone(recipe: Recipe, layer: int | None = None) -> Recipe:
    """A unit by itself, which takes its lower bound as an input `bound` (zeros for none); layer 0 ignores it."""
    (bounds,) = (part for part in recipe.parts if isinstance(part, LowerBounds))
    parts = [part for part in recipe.parts if part is not bounds]
    ignored = [Scale("bound", "0")] if layer == 0 else []
    return recipe.like(*ignored, *parts, inputs={"bound": bounds.axes})


def activation_of(name: str) -> str:
    """A name that means nothing to the authors is the identity."""
    return name if name in ("gelu", "relu", "elu", "sigmoid", "exp", "leak", "1+elu", "2+elu", "silu") else "identity"


def real(c: Any) -> Mixer:
    options: dict[str, Any] = {"bias": c.bias, "init": "linear", "act": activation_of(c.act_fun)}
    return Mixer(alone(hgrn(expand=c.expand_ratio, leave=(SIGMOID, NORM), **options)), c.embed_dim)


def narrow_real(ways: Ways, c: Any) -> Mixer:
    act = activation_of(c.act_fun)
    leave = (NORM, OutputGate("g", act=act))
    return Mixer(alone(hgrn(bias=True, init="linear", act=act, scan=ways[c.causal], leave=leave)), c.embed_dim)


def with_angles(ways: Ways, phases: tuple[str, ...], c: Any) -> Mixer:
    act = activation_of(c.act_fun)
    leave = (NORM, OutputGate("g", act=act))
    recipe = hgrn_complex(bias=c.bias, act=act, phases=phases, scan=ways[c.causal], leave=leave)
    return Mixer(alone(recipe), c.embed_dim)


def with_low_rank(leave: tuple[Part, ...], c: Any) -> Mixer:
    options: dict[str, Any] = {"bias": c.bias, "rank": c.gate_dim, "act": activation_of(c.act_fun), "leave": leave}
    return Mixer(alone(hgrn_complex(scan=LINE[c.causal], **options)), c.embed_dim)


def angle(name: str) -> Callable[[Any, Tensor], Mapping[str, Tensor]]:
    """Theirs has an axis for time and one for the batch."""
    return lambda part, theta: {name: theta[None, None]}


def unit(build: Callable[[Any], Mixer], config: Mapping[str, Any], linear: tuple[str, ...], **more: Any) -> Official:
    """Keys: the first Project as one linear map an output, and what else there is."""
    first = {f"project.{kind}": rows(*(f"{name}.{kind}" for name in linear)) for kind in ("weight", "bias")}
    norm = {f"norm.{kind}": merged(f"norm.{kind}") for kind in ("weight", "bias")}
    keys: Keys = {**first, **norm, "project_2.*": "out_proj.*", **more}
    config = {"act_fun": "silu", **config}
    return Official(build, under("parts.", "", keys), ("embed_dim",), config, inert=("use_triton",))


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
GATES, REAL = ("input_proj", "output_gate", "forget_gate"), ("input_proj", "gate", "lambda_proj")
WAY = {"causal": True}
FULL = {**WAY, "bias": True}
RANK = {**FULL, "gate_dim": 128}

UNITS = {
    "bihgru1_1d": unit(partial(with_angles, BOTH_WAYS, ("turn", "turn_back")), FULL, PLAIN, **TWO),
    "bihgru1_2d": unit(partial(with_angles, ALL_WAYS, ("turn", "turn_back")), FULL, PLAIN, **TWO),
    "hgru1_1d": unit(partial(with_angles, LINE, ("turn",)), FULL, PLAIN, **ONE),
    "hgru1_1d_v2": unit(partial(with_low_rank, (NORM, SIGMOID)), RANK, CHEAP, **UP, **ONE),
    "hgru1_1d_v3": unit(partial(with_low_rank, (SIGMOID, NORM)), RANK, CHEAP, **UP, **ONE),
    "hgru1_2d": unit(partial(with_angles, GRID, ("turn",)), FULL, PLAIN, **ONE),
    "hgru1_real_1d": unit(real, {"expand_ratio": 2, "bias": True}, GATES),
    "hgru1_real_2d": unit(partial(narrow_real, ALL_WAYS), WAY, REAL),
    "hgru1_real_v6": unit(partial(narrow_real, LINE), WAY, REAL),
}

# ---------------------------------------------------------------------- the hub's layers and models

RecipeOf = Callable[[Any], Recipe]


def hub_hgrn(c: Any) -> Recipe:
    norm = Norm("y", eps=c.norm_eps, affine="full" if c.elementwise_affine else "none")
    return hgrn(expand=c.expand_ratio or 1, leave=(norm, OutputGate("g")))


def hub_mixer(recipe_of: RecipeOf, c: Any) -> Mixer:
    return Mixer(alone(convolved(recipe_of(c), c, c.conv_bias), c.layer_idx), c.hidden_size)


def hub_model(recipe_of: RecipeOf, c: Any) -> LanguageModel:
    recipe = convolved(recipe_of(c), c, False)
    return framed.model(recipe if c.use_lower_bound else without_bounds(recipe), c)


def convolved(recipe: Recipe, c: Any, bias: bool) -> Recipe:
    """If asked for, with short convolutions, without an activation of their own, of all that is projected but the gate
    of y. Those of the months when a kernel could be shared had one.
    """
    if not c.use_short_conv:
        return recipe
    if c.share_conv_kernel is not None:
        raise NotImplementedError(
            "hgrn: share_conv_kernel must be left out where use_short_conv is true, as the convolutions of its time "
            f"had an activation, got {c.share_conv_kernel!r}"
        )
    names = [name for name, _ in recipe.parts[0].outs if name != "g"]  # type: ignore[attr-defined]
    convs = (ShortConv(name, width=c.conv_size, bias=bias, act="identity") for name in names)
    return recipe.insert_before("act", *convs)


def hub(kind: str, recipe_of: RecipeOf, expand: int, *names: str) -> dict[str, Official]:
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
    model: Keys = {"shared.lower_bounds.logits": merged("model.lower_bounds", first=1), **framed.keys(layer)}
    given = {"expand_ratio": expand}
    return {
        "layer": Official(partial(hub_mixer, recipe_of), layer, (), {**HUB_LAYER, **given}, inert=("mode",)),
        "lm": Official(
            partial(hub_model, recipe_of),
            model,
            config={**HUB_LM, **given},
            base="model.",
            inert=framed.INERT,
            only={**framed.ONLY, "model_type": (kind,)},
            renamed={"rms_norm_eps": "norm_eps"},
            ignores=unless_misspelt,
        ),
    }


MIXING = {
    "num_heads": None, "use_short_conv": False, "conv_size": 4, "share_conv_kernel": None, "elementwise_affine": True,
}  # fmt: skip
HUB_LAYER = {**MIXING, "hidden_size": 1024, "conv_bias": False, "norm_eps": 1e-5, "layer_idx": None}
HUB_LM = {**MIXING, **framed.CONFIG, "use_lower_bound": True}
HUB = hub("hgrn", hub_hgrn, 1, "i", "g", "f")
