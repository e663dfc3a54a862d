"""Gated linear attention, as the Longhorn repository runs it."""

from __future__ import annotations

from typing import Any

from recur.blocks import LanguageModel, Mixer
from recur.blocks.feedforward import swiglu
from recur.convert.keys import Keys, rows, stack, tied
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
FFN_KEYS: Keys = {"parts.project.weight": rows("w1.weight", "w3.weight"), "parts.project_2.weight": "w2.weight"}
KEYS: Keys = {
    "embedding.weight": tied("transformer.wte.weight", "lm_head.weight"),
    **stack("transformer.h.*.", ("attn.", MIXER_KEYS), ("", FFN_KEYS), ("ln_1", "ln_2"), "transformer.ln_f"),
}


CONFIG = {"d_model": 2048, "n_head": 8, "n_layer": 24}


def mixer(c: Any) -> Mixer:
    return Mixer(gla(heads=c.n_head), c.d_model)


def model(c: Any) -> LanguageModel:
    ffn = swiglu(init="normal")
    return LanguageModel(gla(heads=c.n_head), vocab_size=c.vocab_size, dim=c.d_model, depth=c.n_layer, ffn=ffn)


ONLY = {"use_gk": (True,), "use_gv": (False,)}
MIXER = Official(mixer, MIXER_KEYS, (), CONFIG, inert=("context_length", "vocab_size"), only=ONLY)
MODEL = Official(model, KEYS, ("vocab_size",), CONFIG, inert=("context_length",), only=ONLY)
