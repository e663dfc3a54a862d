"""HGRN, HGRN2 and DenseSSM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recur.primitives.rotary import rotary_frequencies, rotate
from replay import Case, Module, Vectors
from replay.longhorn import Parts, matrix, retention


def late_retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded with keys turned one token less than ours."""
    states = retention(parts, length)
    before = torch.full(states["kv"].shape[:2], -1)
    frequencies = rotary_frequencies(states["kv"].shape[-1], inclusive=True)
    return {"kv": rotate(states["kv"], before, frequencies), "scale": states["scale"]}


class TimeFirst(Module):
    """Recorded time first, with the lower bound as an input."""

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        given = vectors.inputs
        x = given["x"].transpose(0, 1)
        bound = given.get("lower_bound", torch.zeros(module.dim, dtype=x.dtype))
        return x, {"bound": bound.view(1, 1, *module.recipe.site(module.dim).size("H K"))}, ()

    def output(self, vectors: Vectors, y: Tensor) -> Tensor:
        return y.transpose(0, 1)


class Dense(Module):
    """Recorded with what the layers below published, oldest first."""

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        given, heads, past = vectors.inputs, module.recipe.axes["H"], []
        while f"k_feature.{len(past)}" in given:
            past.append({name: given[f"{name}_feature.{len(past)}"].unflatten(-1, (heads, -1)) for name in "kv"})
        return given["x"], {}, tuple(past)

    def further(self, vectors: Vectors, y: Tensor, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}_current": published[name].flatten(2) for name in "kv"}


TABLES = ("rel_pos.angle", "rel_pos.log_decay")  # ours come from the position
OTHER_MODE = ("output_parallel",)  # logits of the form that is not this file's

CASES: dict[str, Case] = {
    "densessm_lm_recurrent": Module("dense_gau_retnet", late_retention, unread=OTHER_MODE),
    "densessm_retention_recurrent": Dense("densessm_retention", late_retention, unread=TABLES),
    "hgrn2_hgru2_1d": TimeFirst("hgru2_1d", matrix),
    "hgrn2_lm": Module("hgrn2_lm", matrix),
}
