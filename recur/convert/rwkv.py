"""RWKV-5.1a, as the Longhorn repository runs it."""

from __future__ import annotations

from typing import Any

from recur.blocks import LanguageModel, Mixer, Norm
from recur.blocks.feedforward import channel_mix
from recur.convert.keys import Keys, merged, shaped, stack, tied
from recur.convert.official import Official
from recur.presets.rwkv import rwkv

TIME_KEYS: Keys = {
    **{f"parts.token_shift.mu_x{letter}": shaped(f"time_maa_{letter}", 1, 1, -1) for letter in "kvrg"},
    "parts.project.*": "receptance.*",
    "parts.project_2.*": "key.*",
    "parts.project_3.*": "value.*",
    "parts.project_4.*": "gate.*",
    "parts.decay.value": shaped("time_decay", -1, 1),
    "parts.bonus.value": shaped("time_faaaa", -1, 1),
    "parts.norm.weight": merged("ln_x.weight"),
    "parts.norm.bias": merged("ln_x.bias"),
    "parts.project_5.*": "output.*",
}
CHANNEL_KEYS: Keys = {
    **{f"parts.token_shift.mu_x{letter}": shaped(f"time_maa_{letter}", 1, 1, -1) for letter in "kr"},
    "parts.project.*": "key.*",
    "parts.project_2.*": "value.*",
    "parts.project_3.*": "receptance.*",
}
KEYS: Keys = {
    "embedding.weight": tied("transformer.wte.weight", "lm_head.weight"),
    "positions.weight": "transformer.wpe.weight",
    **stack("transformer.h.*.", ("tmix.", TIME_KEYS), ("cmix.", CHANNEL_KEYS), ("ln_1", "ln_2"), "transformer.ln_f"),
}


CONFIG = {
    "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50304, "block_size": 1024,
    "bias": False, "dropout": 0.0,
}  # fmt: skip


def time_mix(c: Any) -> Mixer:
    return Mixer(rwkv(heads=c.n_head, bias=c.bias), c.n_embd, depth=c.n_layer, layer=c.layer_id)


def channel(c: Any) -> Mixer:
    return Mixer(channel_mix(bias=c.bias), c.n_embd, depth=c.n_layer, layer=c.layer_id)


def model(c: Any) -> LanguageModel:
    return LanguageModel(
        rwkv(heads=c.n_head, bias=c.bias),
        vocab_size=c.vocab_size,
        dim=c.n_embd,
        depth=c.n_layer,
        ffn=channel_mix(bias=c.bias),
        norm=Norm("x", kind="layer", affine="full" if c.bias else "weight", to="y"),
        positions=c.block_size,
        dropout=c.dropout,
    )


TIME_MIX = Official(time_mix, TIME_KEYS, config={**CONFIG, "layer_id": 0})
CHANNEL_MIX = Official(channel, CHANNEL_KEYS, config={**CONFIG, "layer_id": 0})
MODEL = Official(model, KEYS, config=CONFIG)
