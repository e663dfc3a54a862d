"""LLaMA, as the Longhorn repository runs it."""

from __future__ import annotations

from recur.blocks import LanguageModel, Mixer
from recur.blocks.feedforward import swiglu
from recur.convert.keys import Keys, rows, tied, under
from recur.convert.official import Official
from recur.presets.llama import llama

MIXER_KEYS: Keys = {"parts.project.*": "c_attn.*", "parts.project_2.*": "c_proj.*"}
KEYS: Keys = {
    "embedding.weight": tied("transformer.wte.weight", "lm_head.weight"),
    **under("blocks.*.mixer.", "transformer.h.*.attn.", MIXER_KEYS),
    "blocks.*.mixer_norm.weights.*": "transformer.h.*.ln_1.*",
    "blocks.*.ffn.parts.project.weight": rows("transformer.h.*.mlp.fc_2.weight", "transformer.h.*.mlp.fc_1.weight"),
    "blocks.*.ffn.parts.project_2.weight": "transformer.h.*.mlp.c_proj.weight",
    "blocks.*.ffn_norm.weights.*": "transformer.h.*.ln_2.*",
    "final_norm.weights.*": "transformer.ln_f.*",
}


def mixer(n_embd: int = 768, n_head: int = 12, bias: bool = False) -> Mixer:
    return Mixer(llama(heads=n_head, bias=bias), n_embd)


def model(
    vocab_size: int = 50304,
    n_embd: int = 768,
    n_head: int = 12,
    n_layer: int = 12,
    bias: bool = False,
    dropout: float = 0.0,
) -> LanguageModel:
    return LanguageModel(
        llama(heads=n_head, bias=bias),
        vocab_size=vocab_size,
        dim=n_embd,
        depth=n_layer,
        ffn=swiglu(init="normal", out_init="normal_residual"),
        dropout=dropout,
    )


BUFFERS = ("rope.inv_freq",)
MIXER = Official(mixer, MIXER_KEYS, derived=BUFFERS, inert=("block_size", "vocab_size", "n_layer", "dropout"))
MODEL = Official(model, KEYS, derived=BUFFERS, inert=("block_size",))
