"""Gated linear attention, as the Longhorn repository runs it."""

from __future__ import annotations

from recur.blocks import LanguageModel, Mixer
from recur.blocks.feedforward import swiglu
from recur.convert.keys import Keys, rows, tied, under
from recur.convert.official import Official
from recur.presets.gla import gla

MIXER_KEYS: Keys = {
    "parts.project.weight": rows("q_proj.weight", "k_proj.weight"),
    "parts.project_2.weight": "v_proj.weight",
    "parts.project_3.weight": "k_gate.0.weight",
    "parts.project_3.z_up": "k_gate.1.weight",
    "parts.project_3.z_bias": "k_gate.1.bias",
    "parts.project_4.*": "g_proj.*",
    "parts.project_5.weight": "out_proj.weight",
}
KEYS: Keys = {
    "embedding.weight": tied("transformer.wte.weight", "lm_head.weight"),
    **under("blocks.*.mixer.", "transformer.h.*.attn.", MIXER_KEYS),
    "blocks.*.mixer_norm.weights.*": "transformer.h.*.ln_1.*",
    "blocks.*.ffn.parts.project.weight": rows("transformer.h.*.w1.weight", "transformer.h.*.w3.weight"),
    "blocks.*.ffn.parts.project_2.weight": "transformer.h.*.w2.weight",
    "blocks.*.ffn_norm.weights.*": "transformer.h.*.ln_2.*",
    "final_norm.weights.*": "transformer.ln_f.*",
}


def mixer(d_model: int = 2048, n_head: int = 8) -> Mixer:
    return Mixer(gla(heads=n_head), d_model)


def model(vocab_size: int, d_model: int = 2048, n_head: int = 8, n_layer: int = 24) -> LanguageModel:
    return LanguageModel(
        gla(heads=n_head), vocab_size=vocab_size, dim=d_model, depth=n_layer, ffn=swiglu(init="normal")
    )


ONLY = {"use_gk": (True,), "use_gv": (False,)}
MIXER = Official(mixer, MIXER_KEYS, inert=("context_length", "n_layer", "vocab_size"), only=ONLY)
MODEL = Official(model, KEYS, inert=("context_length",), only=ONLY)
