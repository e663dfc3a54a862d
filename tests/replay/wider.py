"""Layers and models of the recurrences of 2025 and 2026, and operators that are more than one scan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import recur
from recur.blocks import ForgettingAttention
from recur.primitives.attention import forgetting_attention
from recur.primitives.columns import oja_scan, slot_gates, slot_scan
from recur.primitives.log_linear import log_linear_scan
from recur.primitives.mesa import mesa_scan
from recur.primitives.momentum import momentum_scan
from recur.primitives.norms import normalise
from recur.primitives.trapezoid import accumulated_angle, rotate_by, trapezoid
from replay import Case, Module, Operator, Result, Run, Streaming, Vectors

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


# ---------------------------------------------------------------------- operators


def mamba3_op(
    form: str,
    C: Tensor,
    B: Tensor,
    x: Tensor,
    adt: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    **more: Any,
) -> Result:
    """One input per head [B T G N], or R of them [B T R G N], whose biases are [H R N]."""
    several, rotation = B.ndim == 5, {"initial_state": more.get("angle_state")}
    q, k = (u.repeat_interleave(x.shape[2] // u.shape[-2], -2) for u in (C, B))
    q, k = (u + (b.transpose(0, 1) if several else b) for u, b in ((q, C_bias), (k, B_bias)))
    theta, angle = accumulated_angle(angles, dt, **rotation)
    q, k = rotate_by(q, theta), rotate_by(k, theta)
    v = x[:, :, None] * more["mimo_x"].transpose(0, 1) if several else x
    before = (more["k_state"], more["v_state"]) if "k_state" in more else None
    keys, values, (last_k, last_v) = trapezoid(k, v, trap, dt, adt, initial_state=before)
    y, ssm = recur.scan(q, keys, values, adt, initial_state=more.get("ssm_state"), form=form)
    y = y if "D" not in more else y + more["D"][:, None] * v
    if more.get("fused_norm"):
        y = normalise(y, eps=more["norm_eps"]) * more["norm_weight"]
    if "z" in more:
        z = more["z"][:, :, None] * more["mimo_z"].transpose(0, 1) if several else more["z"]
        y = y * F.silu(z)
    y = (y * more["mimo_o"].transpose(0, 1)).sum(2) if several else y
    return y, {
        "state.angle": angle,
        "state.ssm": ssm,
        "state.k": last_k,
        "state.v": last_v,
    }


class Turned:
    """Recorded angles are in [0, 2 pi) or not reduced, ours in [-pi, pi]."""

    def recorded(self, key: str, tensor: Tensor) -> Tensor:
        return tensor - 2 * math.pi * (tensor / (2 * math.pi)).round() if key == "state.angle" else tensor


class TurnedOperator(Turned, Streaming):
    pass


class TurnedLayer(Turned, Module):
    pass


def mimo_op(form: str, **inputs: Any) -> Result:
    """States of keys are [H R N], keys [R H N]."""
    heads_first = {key: inputs[key].transpose(1, 2) for key in ("k_state", "v_state") if key in inputs}
    y, states = mamba3_op(form, **{**inputs, **heads_first})
    return y, {**states, **{key: states[key].transpose(1, 2) for key in ("state.k", "state.v")}}


def oja_op(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None) -> Result:
    y, state = oja_scan(q, k, v, g, beta, initial_state=state, scale=q.shape[-1] ** -0.5, form=form)
    return y, {"state.final": state}


def slots_op(form: str, q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None = None, **states: Any) -> Result:
    more = {}
    if g is None:
        s, g, more["state.z"] = slot_gates(s, initial_state=states.get("state_z"))
    before = (states["state_k"], states["state_v"]) if "state_k" in states else None
    y, (keys, values) = slot_scan(q, k, v, s, g, initial_state=before, scale=q.shape[-1] ** -0.5, form=form)
    return y, {"state.k": keys, "state.v": values, **more}


def mesa_op(
    solver: str, form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, **states: Tensor
) -> Result:
    before = (states["state_kk"], states["state_kv"]) if states else None
    y, (kk, kv) = mesa_scan(q, k, v, g, beta, lamb, solver=solver, initial_state=before, form=form)
    return y, {"state.kk": kk, "state.kv": kv}


def forgetting_op(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, window_size: int | None) -> Result:
    return forgetting_attention(q, k, v, g, window=window_size), {}


class Forgetting(Operator):
    """Token by token it is a part, whose cache goes on."""

    @torch.no_grad()
    def stepped(self, vectors: Vectors) -> Run:
        q, k, v, g = (vectors.inputs[name] for name in ("q", "k", "v", "g"))
        axes = dict(zip("HKGV", (*q.shape[2:], *v.shape[2:]), strict=True))
        inputs = {"q": "H K", "k": "G K", "v": "G V", "log_f": "H"}
        part = ForgettingAttention(window=vectors.config["window_size"])
        mixer = recur.Mixer(recur.Recipe(part, axes=axes, inputs=inputs, out="H V"), 1).to(q.dtype)
        tokens = {"q": q, "k": k, "v": v, "log_f": g}
        state, x = mixer.init_state(len(q)), q.new_zeros(len(q), 1)
        # without weights it has no dtype of its own
        ys = [mixer.step(x, state, **{name: t[:, i] for name, t in tokens.items()}) for i in range(q.shape[1])]
        return Run({"output": torch.stack(ys, 1)})


def levels_op(
    form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, state: Any = (None, None)
) -> Result:
    start, seen = state
    y, state = log_linear_scan(q, k, v, g, level_scales, initial_state=start, position=seen, form=form)
    return y, {"state.levels": (state, (0 if seen is None else seen) + torch.ones(len(q), dtype=torch.long))}


def momentum_op(form: str, q: Tensor, k: Tensor, v: Tensor, p: Tensor, **more: Tensor) -> Result:
    gates = (more["log_alpha"], more["log_mu"], more["beta"], more["eta"])
    before = torch.stack([more["state_S"], more["state_M"]], 1) if "state_S" in more else None
    y, state = momentum_scan(q, k, p, v, *gates, initial_state=before, scale=q.shape[-1] ** -0.5)
    return y, {"state.S": state[:, 0], "state.M": state[:, 1]}


MESA = {"state.kk": "state_kk", "state.kv": "state_kv"}
MAMBA3 = {"state.angle": "angle_state", "state.ssm": "ssm_state", "state.k": "k_state", "state.v": "v_state"}
BIASES = ("B_bias", "C_bias", "D")
MIMO = (*BIASES, "mimo_x", "mimo_z", "mimo_o", "norm_weight")


CASES: dict[str, Case] = {
    "forgetting_attn_op": Forgetting(forgetting_op, ("window_size",), streams=True),
    "gated_oja_op": Streaming(oja_op, carried={"state.final": "state"}),
    "gsa_op": Streaming(slots_op, carried={"state.k": "state_k", "state.v": "state_v", "state.z": "state_z"}),
    "log_linear_attn_op": Streaming(levels_op, carried={"state.levels": "state"}),
    "mesa_cg_op": Operator(partial(mesa_op, "conjugate")),
    "mesa_exact_op": Streaming(partial(mesa_op, "exact"), carried=MESA, constant=("lamb",)),
    "mesa_step_op": Streaming(partial(mesa_op, "conjugate_diagonal"), carried=MESA, constant=("lamb",)),
    "momentum_delta_op": Streaming(momentum_op, carried={"state.S": "state_S", "state.M": "state_M"}),
    "mamba3_mimo_op": TurnedOperator(mimo_op, ("fused_norm", "norm_eps"), carried=MAMBA3, constant=MIMO),
    "mamba3_siso_op": TurnedOperator(mamba3_op, carried=MAMBA3, constant=BIASES),
    "mamba3_layer": TurnedLayer("mamba3", mamba3_states),
    "comba_layer": Module("comba_hub_layer", matrix),
    "gated_delta_product_layer": Module("gated_delta_product_hub_layer", matrix),
    "gdn2_layer": Module("gated_delta_net2_hub_layer", matrix),
    "rwkv7_channelmix": TimeMix("rwkv7_channel_mix", shifted),
    "rwkv7_fla_layer": TimeMix("rwkv7_hub_layer", shifted),
    "rwkv7_lm": Rwkv7Model("rwkv7"),
    "rwkv7_timemix": TimeMix("rwkv7_time_mix", shifted),
}
