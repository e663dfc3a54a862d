"""Published architectures as recipes, one file per paper: functions that return a Recipe. `names()` lists them."""

from recur.presets.comba import comba
from recur.presets.delta_net import delta_net, efla, gated_delta_net, kaczmarz, kda
from recur.presets.delta_product import delta_product, gated_delta_product
from recur.presets.dense import dense_mamba
from recur.presets.dense_retnet import dense_retnet
from recur.presets.dplr import dplr
from recur.presets.forgetting_transformer import forgetting_transformer
from recur.presets.gated_delta_net2 import gated_delta_net2
from recur.presets.gated_oja import gated_oja
from recur.presets.gated_rnn import gated_linear_rnn, gated_rnn
from recur.presets.gateloop import gateloop, gateloop_attention, simple_gateloop
from recur.presets.gla import gla
from recur.presets.griffin import rg_lru
from recur.presets.gsa import gsa
from recur.presets.gss import dss, gated_smoothing, gated_tap_conv, gss, smoothing, tap_conv
from recur.presets.hgrn import hgrn, hgrn_complex
from recur.presets.hgrn2 import hgrn2
from recur.presets.linear_attention import linear_attention
from recur.presets.llama import llama
from recur.presets.log_linear import log_linear_attention
from recur.presets.longhorn import longhorn, longhorn_bidirectional
from recur.presets.mamba import mamba
from recur.presets.mamba2 import mamba2, mamba2_mlp
from recur.presets.mamba3 import mamba3, mamba3_mimo
from recur.presets.mesa_net import mesa_net
from recur.presets.min_gru import min_gru
from recur.presets.mlstm import mlstm
from recur.presets.momentum_delta_net import momentum_delta_net
from recur.presets.retnet import retnet
from recur.presets.rwkv import rwkv
from recur.presets.rwkv7 import rwkv7
from recur.presets.s4d import s4d

PRESETS = (
    comba, delta_net, delta_product, dense_mamba, dense_retnet, dplr, dss, efla, forgetting_transformer,
    gated_delta_net, gated_delta_net2, gated_delta_product, gated_linear_rnn, gated_oja, gated_rnn, gated_smoothing,
    gated_tap_conv, gateloop, gateloop_attention, gla, gsa, gss, hgrn, hgrn2, hgrn_complex, kaczmarz, kda,
    linear_attention, llama, log_linear_attention, longhorn, longhorn_bidirectional, mamba, mamba2, mamba2_mlp,
    mamba3, mamba3_mimo, mesa_net, min_gru, mlstm, momentum_delta_net, retnet, rg_lru, rwkv, rwkv7, s4d,
    simple_gateloop, smoothing, tap_conv,
)  # fmt: skip

__all__ = ["names", *(preset.__name__ for preset in PRESETS)]


def names() -> list[str]:
    """The name of every preset.

    >>> "hgrn2" in recur.presets.names()
    True
    """
    return [preset.__name__ for preset in PRESETS]
