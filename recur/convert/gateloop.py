"""GateLoop, as its PyTorch package has it: the attention-like mixer, the transformer around it, the simple layer."""

from __future__ import annotations

from collections.abc import Collection

from recur.blocks import LanguageModel, Mixer, Norm, OutputGate
from recur.blocks.feedforward import gelu
from recur.convert.keys import Keys, merged, under
from recur.convert.official import Official
from recur.presets.gateloop import gateloop, simple_gateloop
from recur.recipe import Recipe

MIXER_KEYS: Keys = {
    "parts.project.weight": "to_qkv.weight",
    "parts.project_2.*": "to_a.0.*",
    "parts.project_3.weight": "to_gates.0.weight",
    "parts.norm.weight": merged("maybe_sub_ln.weight"),
    "parts.norm.bias": merged("maybe_sub_ln.bias"),
    "parts.project_4.weight": "to_out.weight",
}
SIMPLE_KEYS: Keys = {"parts.norm.weight": "norm.gamma", "parts.project.weight": "to_qkva.0.weight"}


def model_keys(ours: Collection[str]) -> Keys:
    """The norm before the head moves the head's name; the norm after each sum is a LayerNorm."""
    pre = "final_norm.weights.weight" in ours
    return {
        "embedding.weight": "token_emb.weight",
        **under("blocks.*.mixer.", "layers.*.0.fn.", MIXER_KEYS),
        "blocks.*.mixer_norm.weights.weight": "layers.*.0.norm.gamma" if pre else "layers.*.0.norm.weight",
        "blocks.*.mixer_norm.weights.bias": "layers.*.0.norm.bias",
        "blocks.*.ffn.parts.project.*": "layers.*.1.fn.0.*",
        "blocks.*.ffn.parts.project_2.*": "layers.*.1.fn.2.*",
        "blocks.*.ffn_norm.weights.weight": "layers.*.1.norm.gamma" if pre else "layers.*.1.norm.weight",
        "blocks.*.ffn_norm.weights.bias": "layers.*.1.norm.bias",
        "final_norm.weights.weight": "to_logits.0.gamma",
        "head.weight": "to_logits.1.weight" if pre else "to_logits.weight",
    }


def _recipe(heads: int | None, inner: int | None, sub_ln: bool, fraction: float) -> Recipe:
    recipe = gateloop(heads=heads or "I", inner=inner or "D", gate_gradient=fraction)
    return recipe.insert_before(OutputGate, Norm("y", kind="layer")) if sub_ln else recipe


def mixer(
    dim: int,
    heads: int | None = None,
    dim_inner: int | None = None,
    sub_ln: bool = False,
    frac_gradient_state_transition: float = 0.9,
) -> Mixer:
    return Mixer(_recipe(heads, dim_inner, sub_ln, frac_gradient_state_transition), dim)


def model(
    dim: int,
    num_tokens: int,
    depth: int,
    ff_mult: int = 4,
    gate_loop_heads: int | None = None,
    dim_gate_looped_attn: int | None = None,
    frac_gradient_state_transition: float = 0.9,
    post_ln_norm: bool = False,
    sub_ln: bool = False,
) -> LanguageModel:
    pre = Norm("x", kind="l2", eps=1e-12, to="y")
    return LanguageModel(
        _recipe(gate_loop_heads, dim_gate_looped_attn, sub_ln, frac_gradient_state_transition),
        vocab_size=num_tokens,
        dim=dim,
        depth=depth,
        ffn=gelu(hidden=f"{ff_mult}*D"),
        block="post" if post_ln_norm else "pre",
        norm="layer" if post_ln_norm else pre,
        tie=False,
    )


def simple(dim: int) -> Mixer:
    return Mixer(simple_gateloop(), dim)


ABLATIONS = {"ablate_complex": (False,), "ablate_state_transition": (False,)}
MEMORY = ("checkpoint_gate_looped_attn",)
OF_ATTENTION = ("dim_head", "heads", "rotary_emb", "data_dependent_rel_pos", "attn_softmax_normalize")
MIXER = Official(mixer, MIXER_KEYS, inert=MEMORY, only={"add_swish_gating": (True,), **ABLATIONS})
MODEL = Official(
    model,
    model_keys,
    inert=(*MEMORY, *OF_ATTENTION),
    only={"use_gate_looped_attn": (True,), "attn_add_swish_gating": (True,), **ABLATIONS},
)
SIMPLE = Official(
    simple,
    SIMPLE_KEYS,
    inert=("use_heinsen", "use_jax_associative_scan"),
    only={"prenorm": (True,), "post_ln": (False,), "reverse": (False,)},
)
