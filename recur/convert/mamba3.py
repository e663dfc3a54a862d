"""Mamba-3, as released with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from recur.blocks import Mixer
from recur.convert.keys import Keys, merged, under
from recur.convert.official import Official
from recur.presets.mamba3 import GATE, NORM_THEN_GATE, mamba3, mamba3_mimo


def per_head(name: str) -> Callable[[Any, Tensor], Mapping[str, Tensor]]:
    """Ours [H N], or [R H N] with R inputs; theirs [H R N]."""
    return lambda part, weight: {name: weight[:, None] if weight.ndim == 2 else weight.transpose(0, 1)}


KEYS: Keys = {
    "enter.weight": "in_proj.weight",
    "data_decay.dt_bias": "dt_bias",
    "B_norm.weight": "B_norm.weight",
    "C_norm.weight": "C_norm.weight",
    "B_bias.value": per_head("B_bias"),
    "C_bias.value": per_head("C_bias"),
    **{f"{name}.weight": per_head(name) for name in ("mimo_x", "mimo_z", "mimo_o")},
    "skip.D": merged("D"),
    "read_norm.weight": merged("norm.weight"),
    "leave.weight": "out_proj.weight",
}


def mixer(c: Any) -> Mixer:
    if c.rope_fraction not in (0.5, 1.0):
        raise ValueError(f"mamba3: rope_fraction must be 0.5 or 1.0, got {c.rope_fraction}")
    options: dict[str, Any] = {
        "state": c.d_state, "expand": c.expand, "head": c.headdim, "groups": c.ngroups, "rope": c.rope_fraction,
        "floor": c.A_floor, "leave": NORM_THEN_GATE if c.is_outproj_norm else GATE,
    }  # fmt: skip
    return Mixer(mamba3_mimo(rank=c.mimo_rank, **options) if c.is_mimo else mamba3(**options), c.d_model)


CONFIG = {
    "d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "rope_fraction": 0.5, "A_floor": 1e-4,
    "is_outproj_norm": False, "is_mimo": False, "mimo_rank": 4,
}  # fmt: skip
INERT = (
    *("dt_min", "dt_max", "dt_init_floor", "chunk_size", "layer_idx", "n_layer", "device", "dtype"),
    *("dropout", "fuse_pregate_headwise_norm"),
)
MIXER = Official(mixer, under("parts.", "", KEYS), ("d_model",), CONFIG, inert=INERT, only={"layer": ("Mamba3",)})
