"""GateLoop, as its PyTorch package has it: both mixers, the transformer around them, the simple layer; its JAX file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

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


def _mixer(
    dim: int,
    heads: int | None,
    inner: int | None,
    gate: bool,
    sub_ln: bool,
    fraction: float,
    ablate_complex: bool,
    ablate_state_transition: bool,
) -> Recipe:
    law = "signed" if ablate_complex else "polar"
    recipe = gateloop(heads=heads or "I", inner=inner or "D", law=law, gate_gradient=fraction)
    if ablate_state_transition:  # a = 1, and what the gate would be read from is there and not read
        recipe = recipe.replace(OuterScan, OuterScan(decay=None)).remove(ComplexGate)
    if sub_ln:
        recipe = recipe.insert_before("gate", Norm("y", kind="layer"))
    if gate:
        return recipe
    recipe = recipe.remove(OutputGate).remove("gate")
    return recipe if inner not in (None, dim) else recipe.replace("out", Reshape("y", "D"))


def mixer(
    dim: int,
    heads: int | None = None,
    dim_inner: int | None = None,
    add_swish_gating: bool = True,
    sub_ln: bool = False,
    frac_gradient_state_transition: float = 0.9,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
) -> Mixer:
    ablations = ablate_complex, ablate_state_transition
    return Mixer(
        _mixer(dim, heads, dim_inner, add_swish_gating, sub_ln, frac_gradient_state_transition, *ablations), dim
    )


def _attention(
    width: int,
    heads: int,
    rotary: bool,
    gate: bool,
    rel_pos: bool | str,
    fraction: float,
    softmax: bool | None,
    ablate_complex: bool,
    ablate_state_transition: bool,
) -> Recipe:
    """rel_pos True is the released law, "intended" the paper's."""
    law = "intended" if rel_pos == "intended" else "literal"
    positions: tuple[Part, ...] = (Rotary("q k", stored=True),) if rotary else ()
    if rel_pos:
        placed = relative(law=law, gate="signed" if ablate_complex else "polar", gate_gradient=fraction)
        positions += placed[:1] if ablate_state_transition else placed
    reads = {"literal": (LINEAR, Attention(fused=not rel_pos)), "intended": (RELATIVE_LINEAR, GatedAttention())}
    law = "literal" if ablate_state_transition else law
    read = reads[law][not rel_pos if softmax is None else softmax]
    recipe = gateloop_attention(heads=heads, width=width, positions=positions, read=read)
    return recipe if gate else recipe.remove(OutputGate).remove("gate")


def attention(
    dim: int,
    dim_head: int = 64,
    heads: int = 8,
    rotary_emb: bool = False,
    add_swish_gating: bool = False,
    data_dependent_rel_pos: bool | str = False,
    frac_gradient_data_dependent_rel_pos: float = 0.5,
    softmax_normalize: bool | None = None,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
) -> Mixer:
    options = data_dependent_rel_pos, frac_gradient_data_dependent_rel_pos, softmax_normalize
    ablations = ablate_complex, ablate_state_transition
    return Mixer(_attention(dim_head, heads, rotary_emb, add_swish_gating, *options, *ablations), dim)


def model(
    dim: int,
    num_tokens: int,
    depth: int,
    dim_head: int = 64,
    heads: int = 8,
    ff_mult: int = 4,
    use_gate_looped_attn: bool = True,
    gate_loop_heads: int | None = None,
    attn_add_swish_gating: bool = True,
    dim_gate_looped_attn: int | None = None,
    attn_softmax_normalize: bool | None = None,
    data_dependent_rel_pos: bool | str = False,
    frac_gradient_state_transition: float = 0.9,
    ablate_complex: bool = False,
    ablate_state_transition: bool = False,
    rotary_emb: bool = False,
    post_ln_norm: bool = False,
    sub_ln: bool = False,
) -> LanguageModel:
    gate, fraction = attn_add_swish_gating, frac_gradient_state_transition
    ablations = ablate_complex, ablate_state_transition
    if use_gate_looped_attn:
        recipe = _mixer(dim, gate_loop_heads, dim_gate_looped_attn, gate, sub_ln, fraction, *ablations)
    else:
        options = data_dependent_rel_pos, fraction, attn_softmax_normalize
        recipe = _attention(dim_head, heads, rotary_emb, gate, *options, *ablations)
    return LanguageModel(
        recipe,
        vocab_size=num_tokens,
        dim=dim,
        depth=depth,
        ffn=gelu(hidden=f"{ff_mult}*D"),
        block="post" if post_ln_norm else "pre",
        norm="layer" if post_ln_norm else Norm("x", kind="l2", eps=1e-12, to="y"),
        tie=False,
        embed_std=1.0,
        head_init="linear",
    )


def simple(dim: int, prenorm: bool = True, post_ln: bool = False, reverse: bool = False) -> Mixer:
    recipe = simple_gateloop()
    if not prenorm:
        recipe = recipe.replace(Project, Project("x", q="D", b="D", z="D")).remove(Norm)
    if post_ln:
        recipe = recipe.insert_after(OutputGate, Norm("y", kind="layer", name="last"))
    return Mixer(recipe.reverse() if reverse else recipe, dim)


def _jax_norm(dim: int, to: str) -> Norm:
    """Its eps is added to the sum of squares, not to their mean."""
    return Norm("x", eps=1e-5 / dim, to=to)


def _jax_recipe() -> Recipe:
    """All gradients reach the gate; its real parts lie before its imaginary ones; nothing is scaled at first."""
    recipe = gateloop(gate_gradient=1.0).replace("project_2", Project("x", c="2 H"))
    parts = [replace(part, init="unscaled") if isinstance(part, Project) else part for part in recipe.parts]
    return Recipe(*parts, axes=recipe.axes, source=recipe.source)


def jax(dim: int) -> Mixer:
    recipe = _jax_recipe()
    reads_x = [isinstance(part, Project) and part.source == "x" for part in recipe.parts]
    parts = [replace(p, source="n") if x else p for p, x in zip(recipe.parts, reads_x, strict=True)]  # type: ignore
    return Mixer(Recipe(_jax_norm(dim, "n"), *parts, axes=recipe.axes), dim)


def jax_model(num_tokens: int, dim: int, depth: int, ff_mult: int = 4) -> LanguageModel:
    return LanguageModel(
        _jax_recipe(),
        vocab_size=num_tokens,
        dim=dim,
        depth=depth,
        ffn=gelu(hidden=f"{ff_mult}*D", act="gelu_tanh", init="unscaled"),
        norm=_jax_norm(dim, "y"),
    )


MEMORY = ("checkpoint_gate_looped_attn",)
MIXER = Official(mixer, MIXER_KEYS, inert=MEMORY)
ATTENTION = Official(attention, ATTENTION_KEYS)
MODEL = Official(model, model_keys, inert=MEMORY)
SIMPLE_LAYER = Official(simple, SIMPLE_KEYS, inert=("use_heinsen", "use_jax_associative_scan"))
JAX_LAYER = Official(jax, JAX_KEYS)
JAX_MODEL = Official(jax_model, JAX_MODEL_KEYS)
