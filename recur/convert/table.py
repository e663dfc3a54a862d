"""The one table of official modules."""

from __future__ import annotations

from recur.convert import dense_retnet, gateloop, gla, gss, hgrn, hgrn2, longhorn, mamba, retnet
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
    "longhorn": longhorn.MIXER,
    "longhorn_lm": longhorn.MODEL,
    "mamba": mamba.MIXER,
    "mamba_lm": mamba.MODEL,
    "retnet": retnet.MODEL,
    "retnet_retention": retnet.MIXER,
    "simple_gate_loop": gateloop.SIMPLE,
}
