"""HGRN, HGRN2 and DenseSSM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import recur
from recur.blocks import Block
from recur.primitives.rotary import rotary_frequencies, rotate
from replay import Case, Module, Run, Vectors, gradients
from replay.longhorn import Parts, matrix, retention


def late_retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded with keys rotated by one token less than ours."""
    states = retention(parts, length)
    before = torch.full(states["kv"].shape[:2], -1)
    frequencies = rotary_frequencies(states["kv"].shape[-1], inclusive=True)
    return {"kv": rotate(states["kv"], before, frequencies), "scale": states["scale"]}


def one_state(parts: Parts, _: int) -> dict[str, Tensor]:
    """Of a real unit: one, or one a direction."""
    if "reverse" not in parts:
        return {"h": parts["gated_scan"]}
    return {"forward": parts["gated_scan"], "reverse": parts["reverse"]["gated_scan"]}


def two_parts(parts: Parts, length: int) -> dict[str, Tensor]:
    """Of a complex unit; theirs is a real and an imaginary part."""
    found = one_state(parts, length)
    return {f"{key}_{part}": getattr(h, part) for key, h in found.items() for part in ("real", "imag")}


def both_matrices(parts: Parts, _: int) -> dict[str, Tensor]:
    return {"kv_forward": parts["outer_scan"], "kv_reverse": parts["reverse"]["outer_scan"]}


class Unit(Module):
    """A unit alone, whose lower bound is an input."""

    def streams_in(self, vectors: Vectors) -> bool:
        return self.streams and vectors.arguments.get("causal", True)

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        given, axes = vectors.inputs, module.recipe.inputs["bound"]
        sizes = module.recipe.site(module.dim).size(axes)
        bound = given.get("lower_bound", given["x"].new_zeros(math.prod(sizes)))
        return self.laid(given["x"]), {"bound": bound.view(1, 1, *sizes)}, ()

    def laid(self, x: Tensor) -> Tensor:
        """Batch first."""
        return x


class TimeFirst(Unit):
    """Recorded as [L B D]."""

    def laid(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def output(self, vectors: Vectors, y: Tensor) -> Tensor:
        return y.transpose(0, 1)


class Image(Unit):
    """Recorded as [H W B D]."""

    def laid(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).transpose(0, 1)

    def output(self, vectors: Vectors, y: Tensor) -> Tensor:
        return y.transpose(0, 1).unflatten(0, vectors.inputs["x"].shape[:2])

    def whole(self, vectors: Vectors, form: str) -> Run:
        module = self.make(vectors)
        x, extra, _ = self.inputs(vectors, module)
        y, _ = module(x, grid=tuple(vectors.inputs["x"].shape[:2]), form=form, **extra)
        return Run({"output": self.output(vectors, y)}, lambda: gradients(self.name, module))


def mode_of(vectors: Vectors) -> str:
    """The form of DenseRetNet that a file was recorded in; only its normaliser differs."""
    return "recurrent" if "recurrent" in vectors.config.get("mode", vectors.config["source"]) else "parallel"


class Dense(Module):
    """Recorded with what the layers below published, oldest first, however many the configuration says."""

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        layers = sum(key.startswith("k_feature.") for key in vectors.section("input"))
        return {**vectors.arguments, "dense_block_layers": max(layers, 1), "mode": mode_of(vectors)}

    def streams_in(self, vectors: Vectors) -> bool:
        return mode_of(vectors) == "recurrent"

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        given, heads, past = vectors.inputs, vectors.arguments["num_attention_heads"], []
        while f"k_feature.{len(past)}" in given:
            past.append({name: given[f"{name}_feature.{len(past)}"].unflatten(-1, (heads, -1)) for name in "kv"})
        return given["x"], {}, tuple(past)

    def run(self, module: Any, x: Tensor, state: Any, form: str, extra: Any, past: Any) -> tuple[Tensor, Any, Any]:
        if isinstance(module, Block):
            y, state, published = module(x, state, form=form, past=past)
            return y, state["mixer"], published
        return super().run(module, x, state, form, extra, past)

    def further(self, vectors: Vectors, y: Tensor, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}_current": published[name].flatten(2) for name in "kv"}


class DenseModel(Module):
    """Recorded with the logits of the other form too; states are of the recurrent one."""

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        return {**vectors.arguments, "mode": mode_of(vectors)}

    def whole(self, vectors: Vectors, form: str) -> Run:
        run, ids = super().whole(vectors, form), vectors.inputs["input_ids"]
        results = dict(run.results)
        for mode in ("parallel", "recurrent"):
            y, state = self.in_mode(vectors, mode)(ids, return_state=True, form=form)
            results |= {f"output_{mode}": y, **self.all_states(vectors, state, ids.shape[1])}
        return Run(results, run.gradients)

    def stepped(self, vectors: Vectors) -> Run:
        ids, module = vectors.inputs["input_ids"], self.in_mode(vectors, "recurrent")
        state = module.init_state(len(ids))
        y = torch.stack([module.step(token, state) for token in ids.unbind(1)], 1)
        name = "output" if mode_of(vectors) == "recurrent" else "output_recurrent"
        return Run({name: y, **self.all_states(vectors, state, ids.shape[1])})

    def in_mode(self, vectors: Vectors, mode: str) -> Any:
        arguments = {**self.arguments(vectors), "mode": mode}
        return recur.convert.from_official(self.name, vectors.section("param"), arguments)


TABLES = ("rel_pos.angle", "rel_pos.log_decay")  # ours come from the position

CASES: dict[str, Case] = {
    "densessm_hidden_projection": Module("densessm_projection"),
    "densessm_layer": Dense("densessm_layer"),
    "densessm_lm": DenseModel("dense_gau_retnet", late_retention),
    "densessm_retention": Dense("densessm_retention", late_retention, unread=TABLES),
    "hgrn2_2d_parallel": Image("hgru2_2d_parallel", streams=False),
    "hgrn2_2d_series": Image("hgru2_2d_series", streams=False),
    "hgrn2_bihgru2_1d": TimeFirst("bihgru2_1d", both_matrices, streams=False),
    "hgrn2_fla_layer": Unit("hgrn2_hub_layer", matrix),
    "hgrn2_fla_lm": Module("hgrn2_hub", matrix),
    "hgrn2_hgru2_1d": TimeFirst("hgru2_1d", matrix),
    "hgrn2_lm": Module("hgrn2_lm", matrix),
    "hgrn_bihgru1d": TimeFirst("bihgru1_1d", two_parts, streams=False),
    "hgrn_bihgru2d": Image("bihgru1_2d", streams=False),
    "hgrn_fla_layer": Unit("hgrn_hub_layer", one_state),
    "hgrn_fla_lm": Module("hgrn_hub", one_state),
    "hgrn_hgru1d": TimeFirst("hgru1_1d", two_parts),
    "hgrn_hgrureal1d": TimeFirst("hgru1_real_v6", one_state),
    "hgrn_real1d": TimeFirst("hgru1_real_1d", one_state),
    "Hgru1dV2": TimeFirst("hgru1_1d_v2", two_parts),
    "Hgru1dV3": TimeFirst("hgru1_1d_v3", two_parts),
    "Hgru2d": Image("hgru1_2d", streams=False),
    "HgruReal2d": Image("hgru1_real_2d", streams=False),
}
