"""Layers and models of the recurrences of 2025 and 2026, and operators that are more than one scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from replay import Case, Module, Vectors

FIRST = "ValueResidual.v"


class TimeMix(Module):
    """RWKV-7's, whose values of layer 0 are an input of deeper layers and a result of the first."""

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        known = ("n_embd", "head_size", "layer_id", "dim_ffn")
        return {**{key: vectors.config[key] for key in known if key in vectors.config}, **vectors.arguments}

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        x, given, heads = vectors.inputs["x"], vectors.inputs, len(vectors.section("param").get("r_k", ()))
        return x, {}, ({FIRST: given["v_first"].unflatten(-1, (heads, -1))},) if "v_first" in given else ()

    def given(self, vectors: Vectors, module: Any) -> Any:
        return self.start(vectors, module, len(vectors.inputs["x"])) if "kv" in vectors.inputs else None

    def start(self, vectors: Vectors, module: Any, batch: int) -> Any:
        state = module.init_state(batch)
        if "kv" in vectors.inputs:
            kv, shift = (vectors.inputs[key].detach().clone() for key in ("kv", "shift"))
            state["parts"] = {"token_shift": shift[:, None], "wide_scan": kv}
        return state

    def further(self, vectors: Vectors, y: Tensor, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"output.v_first": published[FIRST].flatten(2)} if FIRST in published else {}


class Rwkv7Model(Module):
    """Its channel mix has a state too."""

    def all_states(self, vectors: Vectors, state: Any, length: int) -> dict[str, Tensor]:
        found = {}
        for i, layer in enumerate(state["layers"]):
            mixed = shifted(layer["mixer"]["parts"], length)
            found |= {f"state.kv.{i}": mixed["kv"], f"state.shift_att.{i}": mixed["shift"]}
            found[f"state.shift_ffn.{i}"] = layer["ffn"]["parts"]["token_shift"][:, 0]
        return found


Parts = Mapping[str, Tensor]


def shifted(parts: Parts, _: int) -> dict[str, Tensor]:
    kv = {"kv": parts["wide_scan"]} if "wide_scan" in parts else {}
    return {**kv, "shift": parts["token_shift"][:, 0]}


def matrix(parts: Parts, _: int) -> dict[str, Tensor]:
    """Of the one scan that a layer has."""
    (kv,) = (state for name, state in parts.items() if name.endswith("_scan"))
    return {"kv": kv}


def mamba3_states(parts: Mapping[str, Any], _: int) -> dict[str, Tensor]:
    return {"angle": parts["data_rotary"], "ssm": parts["outer_scan"], **parts["trapezoid"]}


CASES: dict[str, Case] = {
    "mamba3_layer": Module("mamba3", mamba3_states),
    "comba_layer": Module("comba_hub_layer", matrix),
    "gated_delta_product_layer": Module("gated_delta_product_hub_layer", matrix),
    "gdn2_layer": Module("gated_delta_net2_hub_layer", matrix),
    "rwkv7_channelmix": TimeMix("rwkv7_channel_mix", shifted),
    "rwkv7_fla_layer": TimeMix("rwkv7_hub_layer", shifted),
    "rwkv7_lm": Rwkv7Model("rwkv7"),
    "rwkv7_timemix": TimeMix("rwkv7_time_mix", shifted),
}
