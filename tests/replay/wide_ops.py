"""Operators of the wide step: DPLR, RWKV-7, Comba, Gated DeltaNet-2 and DeltaProduct, as `recur.scan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import recur
from replay import Case, Result, Run, Vectors

Scan = Callable[..., Any]  # recur.scan, or the same token by token


def streamed(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, initial_state: Tensor | None, **options: Any
) -> recur.ScanOut:
    """`recur.scan` by steps."""
    (B, T), H, V, K = v.shape[:2], v.shape[-2], v.shape[-1], q.shape[-1]
    state = v.new_zeros(B, H, K, V) if initial_state is None else initial_state.clone()
    ys = []
    for t in range(T):
        now = {name: x[:, t] if isinstance(x, Tensor) else x for name, x in options.items()}
        gate = None if log_decay is None else log_decay[:, t]
        ys.append(recur.step(q[:, t], k[:, t], v[:, t], gate, state, **now))
    return recur.ScanOut(torch.stack(ys, 1), state)


@dataclass(frozen=True)
class WideOperator(Case):
    """A function of the scan and the recorded inputs by name.

    options: entries of the configuration that it takes as well.
    """

    function: Callable[..., Result]
    options: tuple[str, ...] = ()
    streams: bool = field(default=True, kw_only=True)

    def run(self, vectors: Vectors, scan: Scan) -> Run:
        options = {key: vectors.config[key] for key in self.options}
        y, more = self.function(scan, **vectors.inputs, **options)
        return Run({"output": y, **more})

    def whole(self, vectors: Vectors, form: str) -> Run:
        return self.run(vectors, partial(recur.scan, form=form))

    @torch.no_grad()
    def stepped(self, vectors: Vectors) -> Run:
        return self.run(vectors, streamed)


def dplr(
    scan: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
) -> Result:
    """S = (diag(exp g) + b aᵀ) S + k vᵀ."""
    wide = {"erase": -a, "remove": b, "erase_from": "previous", "scale": q.shape[-1] ** -0.5}
    y, final = scan(q, k, v, g, **wide, initial_state=state)
    return y, {"state.final": final}


def rwkv7(
    scan: Scan, r: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor, kappa: Tensor, state: Tensor | None = None
) -> Result:
    """S = diag(exp g) S − (κ ⊙ a)(Sᵀ κ)ᵀ + k vᵀ."""
    wide = {"erase": kappa, "remove": kappa * a, "erase_from": "previous"}
    y, final = scan(r, k, v, g, **wide, initial_state=state)
    return y, {"state.final": final}


def rwkv7_demo(scan: Scan, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, head_size: int) -> Result:
    """Heads side by side in one axis; exp(−exp w) is the decay, a = −κ, b = κ ⊙ rate."""
    r, w, k, v, a, b = (x.unflatten(-1, (-1, head_size)) for x in (r, w, k, v, a, b))
    wide = {"erase": -a, "remove": b, "erase_from": "previous"}
    y, _ = scan(r, k, v, -w.exp(), **wide, initial_state=None)
    return y.flatten(2), {}


def comba(
    erase_from: str,
    scan: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor | None = None,
) -> Result:
    """S = exp(g) S + β k (v − Ŝᵀ p)ᵀ."""
    wide = {"erase": beta[..., None] * p, "write": beta, "erase_from": erase_from, "scale": q.shape[-1] ** -0.5}
    y, final = scan(q, k, v, g, **wide, initial_state=state)
    return y, {"state.final": final}


def gdn2(
    scan: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    w: Tensor,
    g: Tensor,
    state: Tensor | None = None,
) -> Result:
    """S' = diag(exp g) S; S = S' + k (w ⊙ v − S'ᵀ(b ⊙ k))ᵀ."""
    y, final = scan(q, k, v, g, erase=b * k, write=w, scale=q.shape[-1] ** -0.5, initial_state=state)
    return y, {"state.final": final}


def delta_product(
    scan: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
) -> Result:
    """Several delta writes per token."""
    y, final = scan(q, k, v, g, beta=beta, scale=q.shape[-1] ** -0.5, initial_state=state)
    return y, {"state.final": final}


CASES: dict[str, Case] = {
    "comba_op": WideOperator(partial(comba, "previous")),
    "comba_decayed_op": WideOperator(partial(comba, "decayed")),
    "delta_product_op": WideOperator(delta_product),
    "dplr_op": WideOperator(dplr),
    "gated_delta_product_op": WideOperator(delta_product),
    "gdn2_op": WideOperator(gdn2),
    "iplr_op": WideOperator(dplr),
    "rwkv7_demo_op": WideOperator(rwkv7_demo, ("head_size",)),
    "rwkv7_op": WideOperator(rwkv7),
}
