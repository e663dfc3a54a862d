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


class EitherWay(Module):
    """It may read right to left."""

    def streams_in(self, vectors: Vectors) -> bool:
        return not vectors.arguments.get("reverse", vectors.arguments.get("reverse_seq", False))


class Model(Module):
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


class Generation(Module):
    """New tokens alone, each the most likely after the last tokens that a window holds."""

    def whole(self, vectors: Vectors, form: str) -> Run:
        asked, ids = vectors.config["generate"], vectors.inputs["0"]
        options = {
            "temperature": asked["temperature"],
            "top_k": asked["top_k"],
            "window": vectors.config["max_seq_len"],
        }
        text = self.make(vectors).generate(ids, asked["seq_len"], **options)
        return Run({"output": text[:, ids.shape[1] :]})


def carried(state: Any, carry: Tensor) -> Any:
    """The state of the author's unit that holds this [B E], or of a model of it [B layers E]."""
    if "layers" in state:
        layers = [{**layer, "mixer": carried(layer["mixer"], carry[:, i])} for i, layer in enumerate(state["layers"])]
        return {**state, "layers": layers}
    scan = {"gated_scan": carry}
    return {**state, "parts": {"loop": {"last": carry, "parts": scan}} if "loop" in state["parts"] else scan}


def carry_of(state: Any) -> Tensor:
    """What such a state holds."""
    if "layers" in state:
        return torch.stack([carry_of(layer["mixer"]) for layer in state["layers"]], 1)
    parts = state["parts"]
    return (parts["loop"]["parts"] if "loop" in parts else parts)["gated_scan"]


class Recurrent(Module):
    """The author's unit or a model of it: it may be given a state, and leaves one."""

    def start(self, vectors: Vectors, module: Any, batch: int) -> Any:
        state, given = module.init_state(batch), vectors.inputs
        return carried(state, given["carry"].detach().clone()) if "carry" in given else state

    def given(self, vectors: Vectors, module: Any) -> Any:
        given = vectors.inputs
        return carried(module.init_state(len(given["carry"])), given["carry"]) if "carry" in given else None

    def all_states(self, vectors: Vectors, state: Any, length: int) -> dict[str, Tensor]:
        return {"output.carry": carry_of(state)}


class Simple(EitherWay):
    """It may be recorded in pieces, with the cache after each."""

    def whole(self, vectors: Vectors, form: str) -> Run:
        module, x = self.make(vectors), vectors.inputs["0"]
        state, ys, caches = None, [], {}
        for number, piece in enumerate(x.split(vectors.config.get("chunks", [x.shape[1]]), dim=1), 1):
            y, state, _ = self.run(module, piece, state, form, {}, ())
            ys.append(y)
            if "chunks" in vectors.config:
                caches[f"output.cache{number}_kv"] = state["parts"]["gated_scan"].reshape(-1, 1)
        return Run({"output": torch.cat(ys, 1), **caches}, lambda: gradients(self.name, module))


RUNNING_PRODUCTS = ("_a",)  # of gates: nothing reads them

LANGUAGE_MODELS = {
    "dsconv.GatedDsConvLM": "gated_ds_conv_lm",
    "gss.GatedStateSpacesLM": "gated_state_space_lm",
    "mhesa.GatedExponentialSmoothingLM": "gated_exponential_smoothing_lm",
}
CASES: dict[str, Case] = {
    **{module: Model(name) for module, name in LANGUAGE_MODELS.items()},
    **{f"{module} in AutoregressiveWrapper": Model(name) for module, name in LANGUAGE_MODELS.items()},
    **{f"AutoregressiveWrapper.generate over {m}": Generation(n, streams=False) for m, n in LANGUAGE_MODELS.items()},
    "CausalFullAttention": Module("gateloop_full_attention"),
    "GateLoopedAttention": Module("gateloop_attention"),
    "SimpleGateLoopLayer": Simple("simple_gate_loop", unread=RUNNING_PRODUCTS),
    "Transformer": Model("gateloop_transformer"),
    "gateloop_transformer_jax.GateLoop": Module("gateloop_jax"),
    "gateloop_transformer_jax.GateLoopTransformer": Module("gateloop_jax_transformer"),
    "gate_loop_operator": Operator(gateloop_complex),
    "dsconv.EfficientDsConv": Module("ds_conv"),
    "dsconv.GatedDsConv": EitherWay("gated_ds_conv"),
    "flax_gated_linear_rnn.GatedLinearRNN": Recurrent("gated_linear_rnn"),
    "flax_gated_linear_rnn.GatedLinearRNNLM": Recurrent("gated_linear_rnn_lm"),
    "flax_gated_linear_rnn.TransformerLM": Model("gateloop_author_transformer"),
    "gss.DSS": Module("dss"),
    "gss.GSS": EitherWay("gss_block"),
    "mhesa.GatedMHESA": Module("gated_exponential_smoothing"),
    "mhesa.MHESA": EitherWay("exponential_smoothing"),
    "simplified gate_loop_operator": Operator(gateloop_real, unread=RUNNING_PRODUCTS),
}
