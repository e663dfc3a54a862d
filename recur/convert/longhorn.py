"""Longhorn, as its authors release it: Mamba's frame around the online update, and what only its kernels have."""

from __future__ import annotations

from typing import Any

from recur.blocks import Norm
from recur.convert.keys import Keys
from recur.convert.mamba import LAYER, mixer_of, model_of
from recur.presets.longhorn import longhorn, longhorn_bidirectional
from recur.recipe import Recipe

KEYS: Keys = {**LAYER, "project_2.rate_up": "dt_head.weight", "online_scan.rate_bias": "dt_head.bias"}


def normed(**options: Any) -> Recipe:
    """With a norm before its output gate."""
    return longhorn(norm=(Norm("y", eps=1e-6),), **options)


MIXER = mixer_of(longhorn, KEYS)
MODEL = model_of({"Longhorn": MIXER}, KEYS, prefix="transformer.", ignored=("d_intermediate", "attn_layer_idx"))
NORM_GATE = mixer_of(normed, {**KEYS, "norm.weight": "norm_weight"})
BIDIRECTIONAL = mixer_of(
    longhorn_bidirectional, {**KEYS, "norm.weight": "norm_weight", "norm_2.weight": "norm_weight_backward"}
)
