"""LLaMA, as the Longhorn repository runs it."""

from __future__ import annotations

from typing import Any

from recur.blocks import LanguageModel, Mixer
from recur.blocks.feedforward import swiglu
from recur.convert.keys import Keys, rows, stack, tied
from recur.convert.official import Official
from recur.presets.llama import llama

MIXER_KEYS: Keys = {"parts.project.*": "c_attn.*", "parts.project_2.*": "c_proj.*"}
FFN_KEYS: Keys = {"parts.project.weight": rows("fc_2.weight", "fc_1.weight"), "parts.project_2.weight": "c_proj.weight"}
KEYS: Keys = {
    "embedding.weight": tied("transformer.wte.weight", "lm_head.weight"),
    **stack("transformer.h.*.", ("attn.", MIXER_KEYS), ("mlp.", FFN_KEYS), ("ln_1", "ln_2"), "transformer.ln_f"),
}


CONFIG = {"n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50304, "bias": False, "dropout": 0.0}


def mixer(c: Any) -> Mixer:
    return Mixer(llama(heads=c.n_head, bias=c.bias), c.n_embd)


def model(c: Any) -> LanguageModel:
    return LanguageModel(
        llama(heads=c.n_head, bias=c.bias),
        vocab_size=c.vocab_size,
        dim=c.n_embd,
        depth=c.n_layer,
        ffn=swiglu(init="normal", out_init="normal_residual"),
        dropout=c.dropout,
    )


REST: dict[str, Any] = {"config": CONFIG, "derived": ("rope.inv_freq",), "inert": ("block_size",)}
MIXER = Official(mixer, MIXER_KEYS, **REST)
MODEL = Official(model, KEYS, **REST)
