"""Longhorn, as its authors release it: Mamba's frame around the online update."""

from __future__ import annotations

from recur.convert.keys import Keys
from recur.convert.mamba import LAYER, mixer_of, model_of
from recur.presets.longhorn import longhorn

KEYS: Keys = {**LAYER, "project_2.rate_up": "dt_head.weight", "online_scan.rate_bias": "dt_head.bias"}
MIXER = mixer_of(longhorn, KEYS)
MODEL = model_of(MIXER, KEYS, prefix="transformer.")
