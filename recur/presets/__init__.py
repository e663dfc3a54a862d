"""Published architectures as recipes, one file a paper: functions that return a Recipe. `names()` lists them."""

from recur.presets.dense_retnet import dense_retnet
from recur.presets.gated_rnn import gated_linear_rnn, gated_rnn
from recur.presets.gateloop import gateloop, gateloop_attention, simple_gateloop
from recur.presets.gla import gla
from recur.presets.gss import dss, gated_smoothing, gated_tap_conv, gss, smoothing, tap_conv
from recur.presets.hgrn2 import hgrn2
from recur.presets.longhorn import longhorn
from recur.presets.mamba import mamba
from recur.presets.retnet import retnet

PRESETS = (
    dense_retnet, dss, gated_linear_rnn, gated_rnn, gated_smoothing, gated_tap_conv, gateloop, gateloop_attention,
    gla, gss, hgrn2, longhorn, mamba, retnet, simple_gateloop, smoothing, tap_conv,
)  # fmt: skip

__all__ = ["names", *(preset.__name__ for preset in PRESETS)]


def names() -> list[str]:
    """The name of every preset."""
    return [preset.__name__ for preset in PRESETS]
