"""Longhorn and the models of its repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import recur
from replay import Case, Module, Operator, Result, Run, Vectors

# ---------------------------------------------------------------------- operators


def longhorn_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, **extra: Tensor) -> Result:
    rate = torch.sigmoid(dt + extra["t_bias"][:, None] if extra else dt)
    y, state = recur.online_scan(u.mT, rate.mT, k.mT, q.mT, form=form)
    return skip_and_gate(y.mT, u, **extra), {"state.last": state}


def longhorn_exact_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Result:
    return recur.online_scan(u.mT, torch.sigmoid(dt).mT, k.mT, q.mT, diagonal=False, form=form).y.mT, {}


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


def gla_op(form: str, q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Result:
    time_first = (tensor.transpose(1, 2) for tensor in (q, k, v, gk))
    y, state = recur.scan(*time_first, scale=q.shape[-1] ** -0.5, form=form)
    return y.transpose(1, 2), {"state.final": state}


# ---------------------------------------------------------------------- states of our parts -> recorded states

Parts = Mapping[str, Tensor]


def elementwise(parts: Parts, _: int) -> dict[str, Tensor]:
    scan = parts["online_scan"] if "online_scan" in parts else parts["selective_scan"]
    return {"ssm": scan, "conv": parts["short_conv"].mT}


def matrix(parts: Parts, _: int) -> dict[str, Tensor]:
    return {"kv": parts["outer_scan"]}


def retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded value first, and divided by the square root of how much a plain sum would have grown."""
    state = parts["outer_scan"].transpose(-1, -2)
    decay = 1 - 2.0 ** (-5 - torch.arange(state.shape[1], dtype=state.dtype))
    grown = (1 - decay**length) / (1 - decay)
    return {"kv": state / grown.sqrt()[:, None, None], "scale": grown}


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


CASES: dict[str, Case] = {
    "gla_lm": Module("gla", matrix),
    "gla_mixer": Module("gla_mixer", matrix),
    "gla_op": Operator(gla_op),
    "longhorn_exact_op": Operator(longhorn_exact_op),
    "longhorn_lm": Module("longhorn_lm", elementwise),
    "longhorn_mixer": Module("longhorn", elementwise),
    "longhorn_op": Operator(longhorn_op),
    "longhorn_step": Step("longhorn", elementwise),
    "mamba_lm": Module("mamba_lm", elementwise),
    "mamba_mixer": Module("mamba", elementwise),
    "mamba_op": Operator(mamba_op, ("delta_softplus",)),
    "retnet_lm": Module("retnet", retention),
    "retnet_retention": Module("retnet_retention", retention),
}
