"""Gated DeltaNet-2, Comba and (gated) DeltaProduct: the layers and models of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from recur.blocks import Act, FeedbackKey, LanguageModel, Mixer, Norm, OutputGate, Project, Scale, ShortConv
from recur.convert import hub
from recur.convert.keys import Keys, Place, merged, rows, under
from recur.convert.official import Official, unless_misspelt
from recur.presets.comba import comba
from recur.presets.delta_product import delta_product, gated_delta_product
from recur.presets.gated_delta_net2 import gated_delta_net2
from recur.recipe import Part, Recipe


def convolutions(kind: str) -> Place:
    """A convolution of q, k and v cut by tensors; a Conv1d's taps are [C 1 W]."""

    def place(part: Any, weight: Tensor) -> Mapping[str, Tensor]:
        pieces = zip("qkv", weight.split(part.widths), strict=True)
        return {f"{name}_conv1d.{kind}": piece if kind == "bias" else piece[:, None] for name, piece in pieces}

    return place


def enter(c: Any) -> Part:
    return ShortConv("q k v", width=c.conv_size, bias=c.conv_bias) if c.use_short_conv else Act("q k v", "silu")


def leave(c: Any, act: str) -> tuple[Part, ...]:
    norm = Norm("y", over="V", eps=c.norm_eps, name="read_norm")
    gate = (Project("x", g="H V", name="gate"), norm, OutputGate("g", act=act))
    return gate if c.use_output_gate else (norm,)


def sizes(c: Any) -> dict[str, Any]:
    """Heads of values and of keys, and their channels."""
    value = c.head_dim * c.expand_v
    if value != int(value):
        raise ValueError(f"expand_v: head_dim * expand_v must be an integer, got {c.head_dim} * {c.expand_v}")
    heads = c.num_heads if c.num_v_heads is None else c.num_v_heads
    if heads % c.num_heads:
        raise ValueError(f"num_v_heads must be a multiple of num_heads={c.num_heads}, got {c.num_v_heads}")
    return {"heads": heads, "groups": c.num_heads, "key": c.head_dim, "value": int(value)}


def recipe_2(c: Any) -> Recipe:
    reach = (Scale("b", "2"),) if c.allow_neg_eigval else ()
    return gated_delta_net2(**sizes(c), enter=enter(c), reach=reach, eps=c.norm_eps)


def recipe_comba(c: Any) -> Recipe:
    correct = c.correction_factor if c.use_output_correction else None
    feedback = FeedbackKey(decay="learned" if c.use_inner_decay else "none", correct=correct)
    return comba(**sizes(c), enter=enter(c), feedback=feedback, leave=leave(c, "sigmoid"))


def recipe_product(c: Any) -> Recipe:
    reach = (Scale("beta", "2"),) if c.allow_neg_eigval else ()
    options: dict[str, Any] = {"enter": enter(c), "reach": reach, "leave": leave(c, "silu")}
    return (gated_delta_product if c.use_forget_gate else delta_product)(
        writes=c.num_householder, **sizes(c), **options
    )


KEYS: Keys = {
    "short_conv.weight": convolutions("weight"),
    "short_conv.bias": convolutions("bias"),
    "step_decay.A_log": "A_log",
    "step_decay.dt_bias": merged("dt_bias"),
    "gate.weight": "g_proj.weight",
    "read_norm.weight": "o_norm.weight",
    "leave.weight": "o_proj.weight",
}
KEYS_2: Keys = {
    **KEYS,
    "enter.weight": rows("q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "w_proj.weight"),
    "gates.weight": rows("g_proj.0.weight", "f_proj.0.weight"),
    "gates.g_up": "g_proj.1.weight",
    "gates.g_bias": "g_proj.1.bias",
    "gates.dt_up": "f_proj.1.weight",
}
KEYS_COMBA: Keys = {
    **KEYS,
    "enter.weight": rows("q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight", "a_proj.weight"),
    "feedback_key.*": "*",
}
KEYS_PRODUCT: Keys = {
    **KEYS,
    "enter.weight": rows("q_proj.weight", "k_proj.weight", "v_proj.weight", "b_proj.weight"),
    "decay.weight": "a_proj.weight",
}
CONFIG = {
    "hidden_size": 2048, "head_dim": 256, "num_heads": 6, "num_v_heads": None, "expand_v": 2, "use_short_conv": True,
    "conv_size": 4, "conv_bias": False, "norm_eps": 1e-5,
}  # fmt: skip
OF_COMBA = {
    "use_output_gate": True, "use_output_correction": True, "use_inner_decay": True, "correction_factor": 1.0,
}  # fmt: skip
OF_PRODUCT = {
    "use_output_gate": True, "use_forget_gate": True, "allow_neg_eigval": True, "num_householder": 2,
}  # fmt: skip


def layer(recipe: Callable[[Any], Recipe], keys: Keys, **config: Any) -> Official:
    def build(c: Any) -> Mixer:
        return Mixer(recipe(c), c.hidden_size)

    return Official(build, under("parts.", "", keys), config={**CONFIG, **config}, inert=("mode", "layer_idx"))


def model(
    kind: str, recipe: Callable[[Any], Recipe], keys: Keys, *, inert: tuple[str, ...] = (), **config: Any
) -> Official:
    """The layer's options that a model does not hand to it have their defaults, whatever its configuration says."""
    handed = {**HUB, **config}

    def build(c: Any) -> LanguageModel:
        given = {name: value for name, value in vars(c).items() if name in handed}
        return hub.model(recipe(SimpleNamespace(**{**CONFIG, **OF_COMBA, **OF_PRODUCT, **given})), c)

    return Official(
        build,
        hub.keys(under("parts.", "", keys)),
        config=handed,
        base="model.",
        inert=(*hub.INERT, *inert),
        only={**hub.ONLY, "model_type": (kind,)},
        ignores=unless_misspelt,
    )


HUB = {
    **hub.CONFIG, "num_hidden_layers": 21, "conv_size": 4, "head_dim": 256, "num_heads": 6, "expand_v": 2.0,
    "use_output_gate": True, "use_short_conv": True,
}  # fmt: skip
GATED_DELTA_NET2 = layer(recipe_2, KEYS_2, head_dim=128, num_heads=16, expand_v=1.0, allow_neg_eigval=False)
COMBA = layer(recipe_comba, KEYS_COMBA, **OF_COMBA)
GATED_DELTA_PRODUCT = layer(recipe_product, KEYS_PRODUCT, **OF_PRODUCT)
COMBA_MODEL = model(
    "comba",
    recipe_comba,
    KEYS_COMBA,
    inert=("use_output_correction", "use_inner_decay", "correction_factor"),
    num_v_heads=None,
)
GATED_DELTA_PRODUCT_MODEL = model(
    "gated_deltaproduct",
    recipe_product,
    KEYS_PRODUCT,
    use_forget_gate=False,
    allow_neg_eigval=False,
    num_householder=1,
)
