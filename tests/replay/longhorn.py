"""Longhorn and the models of its repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import recur
from recur.primitives.retention import retention_decay
from replay import Case, Module, Operator, Result, Run, Vectors, gradients

# ---------------------------------------------------------------------- operators


def longhorn_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, **extra: Tensor) -> Result:
    rate = torch.sigmoid(dt + extra["t_bias"][:, None] if "t_bias" in extra else dt)
    k, q = (weight.movedim(-1, 1) for weight in (k, q))
    y, state = recur.online_scan(u.mT, rate.mT, k, q, form=form)
    return skip_and_gate(y.mT, u, **extra), {"state.last": state}


def longhorn_exact_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Result:
    y, state = recur.online_scan(u.mT, torch.sigmoid(dt).mT, k.mT, q.mT, diagonal=False, form=form)
    return y.mT, {"state.last": state}


def mamba_op(
    form: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool, **extra: Tensor
) -> Result:
    if "delta_bias" in extra:
        delta = delta + extra["delta_bias"][:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (weight if weight.ndim == 2 else weight.movedim(-1, 1) for weight in (B, C))
    y, state = recur.selective_scan(u.mT, delta.mT, A, B, C, form=form)
    return skip_and_gate(y.mT, u, **extra), {"state.last": state}


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None = None, z: Tensor | None = None, **_: Tensor) -> Tensor:
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def gla_op(form: str, q: Tensor, k: Tensor, v: Tensor, gk: Tensor, initial_state: Tensor | None = None) -> Result:
    time_first = (tensor.transpose(1, 2) for tensor in (q, k, v, gk))
    y, state = recur.scan(*time_first, initial_state=initial_state, scale=q.shape[-1] ** -0.5, form=form)
    return y.transpose(1, 2), {"state.final": state}


def mamba2_op(form: str, X: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None) -> Result:
    initial = None if initial_states is None else initial_states[:, 0].mT
    y, state = recur.scan(C, B, X, A, initial_state=initial, form=form)
    return y, {"state.final": state.mT}


# ---------------------------------------------------------------------- states of our parts -> recorded states

Parts = Mapping[str, Tensor]


def elementwise(parts: Parts, _: int) -> dict[str, Tensor]:
    scan = parts["online_scan"] if "online_scan" in parts else parts["selective_scan"]
    return {"ssm": scan, "conv": parts["short_conv"].mT}


def matrix(parts: Parts, _: int) -> dict[str, Tensor]:
    return {"kv": parts["outer_scan"]}


def heads(parts: Parts, _: int) -> dict[str, Tensor]:
    """Recorded value first."""
    return {"ssm": parts["outer_scan"].mT, "conv": parts["short_conv"].mT}


def rwkv(parts: Parts, _: int) -> dict[str, Tensor]:
    return {"kv": parts["outer_scan"], "shift": parts["token_shift"][:, 0]}


def retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded value first, and divided by the square root of how much a plain sum would have grown."""
    state = parts["outer_scan"].transpose(-1, -2)
    log_a = retention_decay(state.shape[1])
    grown = (torch.expm1(length * log_a) / torch.expm1(log_a)).to(state.dtype)
    return {"kv": state / grown.sqrt()[:, None, None], "scale": grown}


class InMode(Module):
    """RetNet computes in a mode that its configuration does not name."""

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        config, given = vectors.config, vectors.arguments
        whole = "chunk" if given.get("chunkwise_recurrent") else "parallel"
        return {**given, "mode": config.get("mode", "recurrent" if config.get("decode") else whole)}

    def streams_in(self, vectors: Vectors) -> bool:
        return self.arguments(vectors)["mode"] == "recurrent"


class OfLayer(Module):
    """Its place in the model is no argument of its configuration."""

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        return {**vectors.arguments, "layer_id": vectors.config["layer_id"]}


class Step(Module):
    """Steps from a recorded cache."""

    def start(self, vectors: Vectors, module: Any, batch: int) -> Any:
        given = vectors.inputs
        cache = {"short_conv": given["conv_state"][..., 1:].mT, "online_scan": given["ssm_state"]}
        return {**module.init_state(batch), "parts": {key: tensor.detach().clone() for key, tensor in cache.items()}}

    def whole(self, vectors: Vectors, form: str) -> Run:
        """In one piece, after the same cache."""
        module, x = self.make(vectors), vectors.inputs["hidden_states"]
        y, state, _ = self.run(module, x, self.start(vectors, module, len(x)), form, {}, ())
        return Run({"output": y, **self.all_states(vectors, state, x.shape[1])})


class Fused(Module):
    """A function of the projected input and of all weights, recorded as inputs: the mixer without in_proj."""

    def whole(self, vectors: Vectors, form: str) -> Run:
        weights, config, xz = dict(vectors.inputs), vectors.config, vectors.inputs["xz"]
        del weights["xz"]
        state = {theirs: weights[ours].detach() for ours, theirs in FUSED.items() if ours in weights}
        d, E = state["out_proj.weight"].shape
        state["in_proj.weight"] = xz.new_zeros(2 * E, d)
        sizes = {key: config[key] for key in ("d_model", "d_state", "d_conv", "dt_rank")} | {
            "expand": E // d,
            "conv_bias": "conv1d_bias" in weights,
        }
        mixer = recur.convert.from_official(self.name, state, sizes)
        recipe, chain = mixer.recipe, mixer.recipe.body
        parts = [replace(part, name=key) for key, part in zip(chain.keys(), chain.parts, strict=True)][1:]
        rest = recur.Mixer(recur.Recipe(*parts, axes=recipe.axes, inputs={"u": "E", "z": "E"}), d).to(xz.dtype)
        rest.parts.load_state_dict({k: w for k, w in mixer.parts.state_dict().items() if not k.startswith("project.")})
        u, z = xz.mT.chunk(2, -1)
        y = rest(xz.new_zeros(*u.shape[:2], d), u=u, z=z, form=form).y

        def found() -> dict[str, Tensor]:
            for name, weight in rest.parts.named_parameters():
                mixer.parts.get_parameter(name).grad = weight.grad
            official = gradients(self.name, mixer)
            return {ours: official[theirs] for ours, theirs in FUSED.items() if ours in weights}

        return Run({"output": y}, weights=found)


FUSED = {  # recorded name -> key of the module
    "D": "D",
    "conv1d_bias": "conv1d.bias",
    "conv1d_weight": "conv1d.weight",
    "delta_bias": "dt_head.bias",
    "delta_proj_weight": "dt_head.weight",
    "norm_weight": "norm_weight",
    "norm_weight_backward": "norm_weight_backward",
    "out_proj_weight": "out_proj.weight",
    "x_proj_weight": "x_proj.weight",
}

CASES: dict[str, Case] = {
    "gla_lm": Module("gla", matrix),
    "gla_mixer": Module("gla_mixer", matrix),
    "gla_op": Operator(gla_op),
    "llama_attn": Module("llama_attention"),
    "llama_lm": Module("llama"),
    "longhorn_bidir": Fused("longhorn_bidirectional", streams=False),
    "longhorn_exact_op": Operator(longhorn_exact_op),
    "longhorn_lm": Module("longhorn_lm", elementwise),
    "longhorn_mixer": Module("longhorn", elementwise),
    "longhorn_normgate": Fused("longhorn_norm_gate", streams=False),
    "longhorn_op": Operator(longhorn_op),
    "longhorn_step": Step("longhorn", elementwise),
    "mamba2_hf_lm": Module("mamba2_hf"),
    "mamba2_lm": Module("mamba_lm", heads),
    "mamba2_mixer": Module("mamba2", heads),
    "mamba2_op": Operator(mamba2_op),
    "mamba_hf_lm": Module("mamba_hf"),
    "mamba_lm": Module("mamba_lm", elementwise),
    "mamba_mixer": Module("mamba", elementwise),
    "mamba_op": Operator(mamba_op, ("delta_softplus",)),
    "retnet_lm": InMode("retnet", retention),
    "retnet_retention": InMode("retnet_retention", retention),
    "rwkv_channelmix": OfLayer("rwkv_channel_mix"),
    "rwkv_lm": Module("rwkv", matrix),
    "rwkv_timemix": OfLayer("rwkv_time_mix", rwkv),
}
