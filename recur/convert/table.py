"""The one table of official modules."""

from __future__ import annotations

from recur.convert import (
    dense_retnet,
    gateloop,
    gla,
    gss,
    hgrn,
    hgrn2,
    llama,
    longhorn,
    mamba,
    retnet,
    rwkv,
)
from recur.convert.official import Official

OFFICIAL: dict[str, Official] = {
    "dense_gau_retnet": dense_retnet.MODEL,
    "densessm_retention": dense_retnet.MIXER,
    "dss": gss.DSS,
    "gated_state_space_lm": gss.MODEL,
    "gateloop_attention": gateloop.MIXER,
    "gateloop_transformer": gateloop.MODEL,
    "gla": gla.MODEL,
    "gla_mixer": gla.MIXER,
    "gss_block": gss.BLOCK,
    "hgrn2_hub": hgrn2.HUB["lm"],
    "hgrn2_hub_layer": hgrn2.HUB["layer"],
    "hgrn2_lm": hgrn2.MODEL,
    "hgrn_hub": hgrn.HUB["lm"],
    "hgrn_hub_layer": hgrn.HUB["layer"],
    **hgrn.UNITS,
    **hgrn2.UNITS,
    "llama": llama.MODEL,
    "llama_attention": llama.MIXER,
    "longhorn": longhorn.MIXER,
    "longhorn_bidirectional": longhorn.BIDIRECTIONAL,
    "longhorn_lm": longhorn.MODEL,
    "longhorn_norm_gate": longhorn.NORM_GATE,
    "mamba": mamba.MIXER,
    "mamba2": mamba.MIXER_2,
    "mamba2_hf": mamba.TRANSFORMERS_2,
    "mamba_hf": mamba.TRANSFORMERS,
    "mamba_lm": mamba.MODEL,
    "retnet": retnet.MODEL,
    "retnet_retention": retnet.MIXER,
    "rwkv": rwkv.MODEL,
    "rwkv_channel_mix": rwkv.CHANNEL_MIX,
    "rwkv_time_mix": rwkv.TIME_MIX,
    "simple_gate_loop": gateloop.SIMPLE,
}
