"""RWKV-5.1a, as the Longhorn repository runs it."""

from __future__ import annotations

from recur.blocks import LanguageModel, Mixer, Norm
from recur.blocks.feedforward import channel_mix
from recur.convert.keys import Keys, merged, shaped, tied, under
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
    **under("blocks.*.mixer.", "transformer.h.*.tmix.", TIME_KEYS),
    "blocks.*.mixer_norm.weights.*": "transformer.h.*.ln_1.*",
    **under("blocks.*.ffn.", "transformer.h.*.cmix.", CHANNEL_KEYS),
    "blocks.*.ffn_norm.weights.*": "transformer.h.*.ln_2.*",
    "final_norm.weights.*": "transformer.ln_f.*",
}


def time_mix(n_embd: int = 768, n_head: int = 12, n_layer: int = 12, bias: bool = False, layer_id: int = 0) -> Mixer:
    return Mixer(rwkv(heads=n_head, bias=bias), n_embd, depth=n_layer, layer=layer_id)


def channel(n_embd: int = 768, n_layer: int = 12, bias: bool = False, layer_id: int = 0) -> Mixer:
    return Mixer(channel_mix(bias=bias), n_embd, depth=n_layer, layer=layer_id)


def model(
    vocab_size: int = 50304,
    n_embd: int = 768,
    n_head: int = 12,
    n_layer: int = 12,
    block_size: int = 1024,
    bias: bool = False,
    dropout: float = 0.0,
) -> LanguageModel:
    return LanguageModel(
        rwkv(heads=n_head, bias=bias),
        vocab_size=vocab_size,
        dim=n_embd,
        depth=n_layer,
        ffn=channel_mix(bias=bias),
        norm=Norm("x", kind="layer", affine="full" if bias else "weight", to="y"),
        positions=block_size,
        dropout=dropout,
    )


IDLE = ("block_size", "vocab_size", "dropout")
TIME_MIX = Official(time_mix, TIME_KEYS, inert=IDLE)
CHANNEL_MIX = Official(channel, CHANNEL_KEYS, inert=(*IDLE, "n_head"))
MODEL = Official(model, KEYS)
