"""GateLoop, as its PyTorch package has it: both mixers, the transformer around them, the simple layer; its JAX file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from recur.blocks import (
    Attention,
    ComplexGate,
    GatedAttention,
    LanguageModel,
    Mixer,
    Norm,
    OuterScan,
    OutputGate,
    Project,
    Reshape,
    Rotary,
)
from recur.blocks.feedforward import gelu
from recur.convert.keys import Keys, merged, rows, transposed, under
from recur.convert.official import Official
from recur.presets.gateloop import LINEAR, RELATIVE_LINEAR, gateloop, gateloop_attention, relative, simple_gateloop
from recur.recipe import Part, Recipe

MIXER_KEYS: Keys = {
    "parts.project.weight": "to_qkv.weight",
    "parts.project_2.*": "to_a.0.*",
    "parts.gate.weight": "to_gates.0.weight",
    "parts.norm.weight": merged("maybe_sub_ln.weight"),
    "parts.norm.bias": merged("maybe_sub_ln.bias"),
    "parts.out.weight": "to_out.weight",
}
ATTENTION_KEYS: Keys = {
    "parts.project.weight": "to_qkv.0.weight",
    "parts.position.weight": "to_a.0.weight",
    "parts.rotary.frequencies": "rotary_emb.freqs",
    "parts.gate.weight": "to_gates.0.weight",
    "parts.out.*": "to_out.1.*",
}
SIMPLE: Keys = {"project.weight": "to_qkva.0.weight", "norm.weight": "norm.gamma", "last.*": "maybe_post_ln.*"}
SIMPLE_KEYS = {**under("parts.", "", SIMPLE), **under("parts.reverse.", "", SIMPLE)}
JAX: Keys = {
    "parts.project.weight": transposed(rows("wq", "wk", "wv")),
    "parts.project_2.weight": transposed("wa"),
    "parts.gate.weight": transposed("wg"),
    "parts.out.weight": transposed("wo"),
}
JAX_KEYS: Keys = {"parts.norm.weight": "norm.gamma", **JAX}
JAX_MODEL_KEYS: Keys = {
    "embedding.weight": "embedding",
    **under("blocks.*.mixer.", "layers.*.0.", JAX),
    "blocks.*.mixer_norm.weights.weight": "layers.*.0.norm.gamma",
    "blocks.*.ffn.parts.project.weight": transposed("layers.*.1.proj_in.weight"),
    "blocks.*.ffn.parts.project.bias": "layers.*.1.proj_in.bias",
    "blocks.*.ffn.parts.project_2.weight": transposed("layers.*.1.proj_out.weight"),
    "blocks.*.ffn.parts.project_2.bias": "layers.*.1.proj_out.bias",
    "blocks.*.ffn_norm.weights.weight": "layers.*.1.norm.gamma",
    "final_norm.weights.weight": "norm.gamma",
}


def model_keys(ours: Collection[str]) -> Keys:
    """The norm before the head moves the head's name; the norm after each sum is a LayerNorm; one of two mixers."""
    pre = "final_norm.weights.weight" in ours
    attends = any(name.endswith("mixer.parts.out.bias") for name in ours)
    return {
        "embedding.weight": "token_emb.weight",
        **under("blocks.*.mixer.", "layers.*.0.fn.", ATTENTION_KEYS if attends else MIXER_KEYS),
        "blocks.*.mixer_norm.weights.weight": "layers.*.0.norm.gamma" if pre else "layers.*.0.norm.weight",
        "blocks.*.mixer_norm.weights.bias": "layers.*.0.norm.bias",
        "blocks.*.ffn.parts.project.*": "layers.*.1.fn.0.*",
        "blocks.*.ffn.parts.project_2.*": "layers.*.1.fn.2.*",
        "blocks.*.ffn_norm.weights.weight": "layers.*.1.norm.gamma" if pre else "layers.*.1.norm.weight",
        "blocks.*.ffn_norm.weights.bias": "layers.*.1.norm.bias",
        "final_norm.weights.weight": "to_logits.0.gamma",
        "head.weight": "to_logits.1.weight" if pre else "to_logits.weight",
    }


def mixer_recipe(c: Any) -> Recipe:
    law = "signed" if c.ablate_complex else "polar"
    fraction = c.frac_gradient_state_transition
    recipe = gateloop(heads=c.heads or "I", inner=c.dim_inner or "D", law=law, gate_gradient=fraction)
    if c.ablate_state_transition:  # a = 1, and what the gate would be read from is there and not read
        recipe = recipe.replace(OuterScan, OuterScan(decay=None)).remove(ComplexGate)
    if c.sub_ln:
        recipe = recipe.insert_before("gate", Norm("y", kind="layer"))
    if c.add_swish_gating:
        return recipe
    recipe = recipe.remove(OutputGate).remove("gate")
    return recipe if c.dim_inner not in (None, c.dim) else recipe.replace("out", Reshape("y", "D"))


def mixer(c: Any) -> Mixer:
    return Mixer(mixer_recipe(c), c.dim)


def attention_recipe(c: Any) -> Recipe:
    """data_dependent_rel_pos True is the released law, "intended" the paper's."""
    relates, fraction = c.data_dependent_rel_pos, c.frac_gradient_data_dependent_rel_pos
    law = "intended" if relates == "intended" else "literal"
    positions: tuple[Part, ...] = (Rotary("q k", stored=True),) if c.rotary_emb else ()
    if relates:
        placed = relative(law=law, gate="signed" if c.ablate_complex else "polar", gate_gradient=fraction)
        unread = (Project("x", c="H K", name="position"),)
        positions += unread if c.ablate_state_transition else placed
    reads = {"literal": (LINEAR, Attention(fused=not relates)), "intended": (RELATIVE_LINEAR, GatedAttention())}
    law = "literal" if c.ablate_state_transition else law
    read = reads[law][not relates if c.softmax_normalize is None else c.softmax_normalize]
    recipe = gateloop_attention(heads=c.heads, width=c.dim_head, positions=positions, read=read)
    return recipe if c.add_swish_gating else recipe.remove(OutputGate).remove("gate")


def attention(c: Any) -> Mixer:
    return Mixer(attention_recipe(c), c.dim)


def model(c: Any) -> LanguageModel:
    """Its arguments have other names than those of its mixers."""
    c.add_swish_gating, c.softmax_normalize = c.attn_add_swish_gating, c.attn_softmax_normalize
    c.dim_inner, c.frac_gradient_data_dependent_rel_pos = c.dim_gate_looped_attn, c.frac_gradient_state_transition
    c.heads = c.gate_loop_heads if c.use_gate_looped_attn else c.heads
    return LanguageModel(
        mixer_recipe(c) if c.use_gate_looped_attn else attention_recipe(c),
        vocab_size=c.num_tokens,
        dim=c.dim,
        depth=c.depth,
        ffn=gelu(hidden=f"{c.ff_mult}*D"),
        block="post" if c.post_ln_norm else "pre",
        norm="layer" if c.post_ln_norm else Norm("x", kind="l2", eps=1e-12, to="y"),
        tie=False,
        embed_std=1.0,
        head_init="linear",
    )


def simple(c: Any) -> Mixer:
    recipe = simple_gateloop()
    if not c.prenorm:
        recipe = recipe.replace(Project, Project("x", q="D", b="D", z="D")).remove(Norm)
    if c.post_ln:
        recipe = recipe.insert_after(OutputGate, Norm("y", kind="layer", name="last"))
    return Mixer(recipe.reverse() if c.reverse else recipe, c.dim)


def _jax_norm(dim: int, to: str) -> Norm:
    """Its eps is added to the sum of squares, not to their mean."""
    return Norm("x", eps=1e-5 / dim, to=to)


def _jax_recipe() -> Recipe:
    """All gradients reach the gate; its real parts lie before its imaginary ones; nothing is scaled at first."""
    recipe = gateloop(gate_gradient=1.0).replace("project_2", Project("x", c="2 H"))
    parts = [replace(part, init="unscaled") if isinstance(part, Project) else part for part in recipe.parts]
    return recipe.like(*parts)


def jax(c: Any) -> Mixer:
    recipe = _jax_recipe()
    reads_x = [isinstance(part, Project) and part.source == "x" for part in recipe.parts]
    parts = [replace(p, source="n") if x else p for p, x in zip(recipe.parts, reads_x, strict=True)]  # type: ignore
    return Mixer(Recipe(_jax_norm(c.dim, "n"), *parts, axes=recipe.axes), c.dim)


def jax_model(c: Any) -> LanguageModel:
    return LanguageModel(
        _jax_recipe(),
        vocab_size=c.num_tokens,
        dim=c.dim,
        depth=c.depth,
        ffn=gelu(hidden=f"{c.ff_mult}*D", act="gelu_tanh", init="unscaled"),
        norm=_jax_norm(c.dim, "y"),
    )


ABLATIONS = {"ablate_complex": False, "ablate_state_transition": False}
OF_MIXER = {
    "heads": None, "dim_inner": None, "add_swish_gating": True, "sub_ln": False,
    "frac_gradient_state_transition": 0.9, **ABLATIONS,
}  # fmt: skip
OF_ATTENTION = {
    "dim_head": 64, "heads": 8, "rotary_emb": False, "add_swish_gating": False, "data_dependent_rel_pos": False,
    "frac_gradient_data_dependent_rel_pos": 0.5, "softmax_normalize": None, **ABLATIONS,
}  # fmt: skip
OF_MODEL = {
    "dim_head": 64, "heads": 8, "ff_mult": 4, "use_gate_looped_attn": True, "gate_loop_heads": None,
    "attn_add_swish_gating": True, "dim_gate_looped_attn": None, "attn_softmax_normalize": None,
    "data_dependent_rel_pos": False, "frac_gradient_state_transition": 0.9, **ABLATIONS,
    "rotary_emb": False, "post_ln_norm": False, "sub_ln": False,
}  # fmt: skip
OF_SIMPLE = {"prenorm": True, "post_ln": False, "reverse": False}
MEMORY = ("checkpoint_gate_looped_attn",)
WALKS = ("use_heinsen", "use_jax_associative_scan")
MIXER = Official(mixer, MIXER_KEYS, ("dim",), OF_MIXER, inert=MEMORY)
ATTENTION = Official(attention, ATTENTION_KEYS, ("dim",), OF_ATTENTION)
MODEL = Official(model, model_keys, ("dim", "num_tokens", "depth"), OF_MODEL, inert=MEMORY)
SIMPLE_LAYER = Official(simple, SIMPLE_KEYS, ("dim",), OF_SIMPLE, inert=WALKS)
JAX_LAYER = Official(jax, JAX_KEYS, ("dim",))
JAX_MODEL = Official(jax_model, JAX_MODEL_KEYS, ("num_tokens", "dim", "depth"), {"ff_mult": 4})
