"""Published architectures as recipes, one file a paper: functions that return a Recipe. `names()` lists them."""

from recur.presets.delta_net import delta_net, gated_delta_net, kda
from recur.presets.dense import dense_mamba
from recur.presets.dense_retnet import dense_retnet
from recur.presets.gated_rnn import gated_linear_rnn, gated_rnn
from recur.presets.gateloop import gateloop, gateloop_attention, simple_gateloop
from recur.presets.gla import gla
from recur.presets.griffin import rg_lru
from recur.presets.gss import dss, gated_smoothing, gated_tap_conv, gss, smoothing, tap_conv
from recur.presets.hgrn import hgrn, hgrn_complex
from recur.presets.hgrn2 import hgrn2
from recur.presets.linear_attention import linear_attention
from recur.presets.llama import llama
from recur.presets.longhorn import longhorn, longhorn_bidirectional
from recur.presets.mamba import mamba
from recur.presets.mamba2 import mamba2, mamba2_mlp
from recur.presets.min_gru import min_gru
from recur.presets.mlstm import mlstm
from recur.presets.retnet import retnet
from recur.presets.rwkv import rwkv
from recur.presets.s4d import s4d

PRESETS = (
    delta_net, dense_mamba, dense_retnet, dss, gated_delta_net, gated_linear_rnn, gated_rnn, gated_smoothing,
    gated_tap_conv, gateloop, gateloop_attention, gla, gss, hgrn, hgrn2, hgrn_complex, kda, linear_attention, llama,
    longhorn, longhorn_bidirectional, mamba, mamba2, mamba2_mlp, min_gru, mlstm, retnet, rg_lru, rwkv, s4d,
    simple_gateloop, smoothing, tap_conv,
)  # fmt: skip

__all__ = ["names", *(preset.__name__ for preset in PRESETS)]


def names() -> list[str]:
    """The name of every preset.

    >>> "hgrn2" in recur.presets.names()
    True
    """
    return [preset.__name__ for preset in PRESETS]
