"""The one table of official modules."""

from __future__ import annotations

from recur.convert import dense_retnet, gated_rnn, gateloop, gla, gss, hgrn2, llama, longhorn, mamba, retnet, rwkv
from recur.convert.official import Official

OFFICIAL: dict[str, Official] = {
    "dense_gau_retnet": dense_retnet.MODEL,
    "densessm_retention": dense_retnet.MIXER,
    "ds_conv": gss.DSCONV,
    "dss": gss.DSS,
    "exponential_smoothing": gss.MHESA,
    "gated_ds_conv": gss.GATED_DSCONV,
    "gated_ds_conv_lm": gss.DSCONV_MODEL,
    "gated_exponential_smoothing": gss.GATED_MHESA,
    "gated_exponential_smoothing_lm": gss.MHESA_MODEL,
    "gated_state_space_lm": gss.MODEL,
    "gated_linear_rnn": gated_rnn.MIXER,
    "gated_linear_rnn_lm": gated_rnn.MODEL,
    "gateloop_attention": gateloop.MIXER,
    "gateloop_author_transformer": gated_rnn.TRANSFORMER,
    "gateloop_full_attention": gateloop.ATTENTION,
    "gateloop_jax": gateloop.JAX_LAYER,
    "gateloop_jax_transformer": gateloop.JAX_MODEL,
    "gateloop_transformer": gateloop.MODEL,
    "gla": gla.MODEL,
    "gla_mixer": gla.MIXER,
    "gss_block": gss.BLOCK,
    "hgrn2_lm": hgrn2.MODEL,
    "hgru2_1d": hgrn2.MIXER,
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
    "simple_gate_loop": gateloop.SIMPLE_LAYER,
    "rwkv": rwkv.MODEL,
    "rwkv_channel_mix": rwkv.CHANNEL_MIX,
    "rwkv_time_mix": rwkv.TIME_MIX,
}
