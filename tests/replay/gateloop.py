"""GateLoop and GSS."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import recur
from replay import Case, Module, Operator, Result, Run, Vectors, gradients


def gateloop_complex(form: str, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Result:
    log_a = torch.view_as_complex(a).log()
    y, _ = recur.scan(q[:, :, None], k[:, :, None], v[:, :, None], log_a[:, :, None], form=form)
    return y[:, :, 0], {}


def gateloop_real(form: str, q: Tensor, kv: Tensor, a: Tensor) -> Result:
    y, state = recur.gated_scan(kv, a.log(), form=form)
    return q * y, {"output.last_kv": state}


class Flagged(Module):
    """Options may be recorded beside the constructor's arguments: of the call, or made after construction."""

    def make(self, vectors: Vectors) -> Any:
        flags = ("ablate_complex", "ablate_state_transition", "frozen_shared_embedding", "to_logits_layernorm_patch")
        further = {flag: vectors.config[flag] for flag in flags if flag in vectors.config}
        arguments = {**vectors.arguments, **further, **vectors.config.get("call_kwargs", {})}
        return recur.convert.from_official(self.name, vectors.section("param"), arguments)


class Model(Flagged):
    """A model that may be recorded by its loss, and wrapped."""

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        ids = vectors.inputs["0"]
        return ids if vectors.tensors["output"].ndim else ids[:, :-1], {}, ()

    def output(self, vectors: Vectors, y: Tensor) -> Tensor:
        if vectors.tensors["output"].ndim:
            return y
        return F.cross_entropy(y.flatten(0, 1), vectors.inputs["0"][:, 1:].flatten())

    def whole(self, vectors: Vectors, form: str) -> Run:
        run = super().whole(vectors, form)
        prefix = "net." if all(key.startswith("net.") for key in vectors.section("param")) else ""
        return Run(run.results, lambda: {prefix + key: grad for key, grad in run.gradients().items()})


class Generation(Flagged):
    """New tokens alone, each the likeliest after the last tokens that a window holds."""

    def streams(self, vectors: Vectors) -> bool:
        return False

    def whole(self, vectors: Vectors, form: str) -> Run:
        asked, ids = vectors.config["generate"], vectors.inputs["0"]
        options = {
            "temperature": asked["temperature"],
            "top_k": asked["top_k"],
            "window": vectors.config["max_seq_len"],
        }
        text = self.make(vectors).generate(ids, asked["seq_len"], **options)
        return Run({"output": text[:, ids.shape[1] :]})


class Simple(Module):
    """It may be recorded in pieces, with the cache after each."""

    def whole(self, vectors: Vectors, form: str) -> Run:
        module, x = self.make(vectors), vectors.inputs["0"]
        state, ys, caches = None, [], {}
        for number, piece in enumerate(x.split(vectors.config.get("chunks", [x.shape[1]]), dim=1), 1):
            y, state, _ = self.run(module, piece, state, form, {}, ())
            ys.append(y)
            caches[f"output.cache{number}_kv"] = state["parts"]["gated_scan"].reshape(-1, 1)
        return Run({"output": torch.cat(ys, 1), **caches}, lambda: gradients(self.name, module))


RUNNING_PRODUCTS = ("_a",)  # of gates: nothing reads them

CASES: dict[str, Case] = {
    "AutoregressiveWrapper.generate over gss.GatedStateSpacesLM": Generation("gated_state_space_lm"),
    "CausalFullAttention": Flagged("gateloop_full_attention"),
    "GateLoopedAttention": Flagged("gateloop_attention"),
    "SimpleGateLoopLayer": Simple("simple_gate_loop", unread=RUNNING_PRODUCTS),
    "Transformer": Model("gateloop_transformer"),
    "gate_loop_operator": Operator(gateloop_complex),
    "dsconv.EfficientDsConv": Module("ds_conv"),
    "dsconv.GatedDsConv": Module("gated_ds_conv"),
    "dsconv.GatedDsConvLM": Model("gated_ds_conv_lm"),
    "gss.DSS": Module("dss"),
    "gss.GSS": Module("gss_block"),
    "gss.GatedStateSpacesLM": Model("gated_state_space_lm"),
    "gss.GatedStateSpacesLM in AutoregressiveWrapper": Model("gated_state_space_lm"),
    "mhesa.GatedExponentialSmoothingLM": Model("gated_exponential_smoothing_lm"),
    "mhesa.GatedExponentialSmoothingLM in AutoregressiveWrapper": Model("gated_exponential_smoothing_lm"),
    "dsconv.GatedDsConvLM in AutoregressiveWrapper": Model("gated_ds_conv_lm"),
    "mhesa.GatedMHESA": Module("gated_exponential_smoothing"),
    "mhesa.MHESA": Module("exponential_smoothing"),
    "simplified gate_loop_operator": Operator(gateloop_real, unread=RUNNING_PRODUCTS),
}
