"""GateLoop and GSS."""

from __future__ import annotations

import torch
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
    "GateLoopedAttention": Module("gateloop_attention"),
    "SimpleGateLoopLayer": Simple("simple_gate_loop", unread=RUNNING_PRODUCTS),
    "Transformer": Module("gateloop_transformer"),
    "gate_loop_operator": Operator(gateloop_complex),
    "gss.DSS": Module("dss"),
    "gss.GSS": Module("gss_block"),
    "gss.GatedStateSpacesLM": Module("gated_state_space_lm"),
    "simplified gate_loop_operator": Operator(gateloop_real, unread=RUNNING_PRODUCTS),
}
