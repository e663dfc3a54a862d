"""Kernels around the scans on a GPU against their formulas in float64: `python tests/gpu_glue.py [PART OF A NAME...]`.

One line per case: relative errors of outputs and all gradients in every dtype, which two runs must give alike; then
whole models, whose loss and gradients in bfloat16 must be as close to float64 as those of the formulas in torch are.
Only the cases and models whose names contain one of the words, if there are any. Exits with 1 if one passes its limit,
or if there is none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from interpreted import allowed, widen
from torch import Tensor

from recur import LanguageModel, kernel, presets
from recur.primitives.conv import causal_conv, causal_convs
from recur.primitives.gates import biased, lower_bounded_decay, output_gate, polar_gate, sigmoid_decay, weigh
from recur.primitives.loss import linear_cross_entropy
from recur.primitives.norms import normalise
from recur.primitives.rotary import rotary_frequencies, rotate

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # as in gpu_scan.py
NAMES = ("gla", "hgrn2", "gated_delta_net", "retnet", "mamba2", "mamba", "longhorn", "kda", "llama")
MODELS = {name: getattr(presets, name)() for name in NAMES}
MODELS["retnet"] = presets.retnet(eps=1e-4)  # with its own 1e-6, the norm magnifies the rounding of the few y near 0
randn = torch.randn


def leave(gate: str, kind: str) -> Callable[..., Tensor]:
    """Skip, norm and gate in one; its formula is that of the parts."""

    def run(x: Tensor, z: Tensor, u: Tensor, w: Tensor, d: Tensor, form: str) -> Tensor:
        if kernel.fused(form, x):
            shape = {"width": x.shape[2:].numel(), "N": x.shape[2:].numel()}
            return kernel.norm(x, z=z, u=u, weight=w, skip=d, eps=1e-5, kind=kind, gate=gate, act="silu", **shape)
        x = x + d[:, None] * u
        x = output_gate(x, z, form=form) if gate == "before" else x
        x = normalise(x, kind, axes=2, weight=w, form=form)
        return output_gate(x, z, form=form) if gate == "after" else x

    return run


def cases() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """What to run by `form`, and its inputs."""
    found: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
    for kind in ("rms", "layer", "l2", "unit"):
        for N in (1, 7, 64, 256, 1000, 2048, 8192):
            least = 0.5 if N == 1 else 1e-5  # the norm of one number varies only below its eps
            norm = lambda x, w, form, kind=kind, e=least: normalise(x, kind, eps=e, weight=w, form=form)  # noqa: E731
            if N > 1 or kind != "layer":
                found[f"{kind} of {N}"] = (norm, [randn(3, 130, N), randn(N)])
    bias = lambda x, w, b, form: normalise(x, "layer", weight=w, bias=b, form=form)  # noqa: E731
    found["layer with a bias"] = (bias, [randn(4, 300, 1024), randn(1024), randn(1024)])
    groups = lambda x, w, form: normalise(x, groups=8, weight=w, form=form)  # noqa: E731
    found["groups"] = (groups, [randn(4, 300, 1024), randn(1024)])
    eps = torch.rand(1, 300, 4, 1) + 0.01
    each = lambda x, form: normalise(x, eps=eps.to(x.dtype) if x.dtype == torch.float64 else eps, form=form)  # noqa: E731
    found["an eps per row"] = (each, [randn(2, 300, 4, 128)])
    for gate in ("before", "after"):
        for kind in ("rms", "layer"):
            inputs = [*(randn(2, 130, 8, 64) for _ in range(3)), randn(8, 64), randn(8)]
            found[f"skip, {kind} norm, gate {gate}"] = (leave(gate, kind), inputs)
    for act in kernel.GATES:
        gate = lambda y, z, form, act=act: output_gate(y, z, act=act, form=form)  # noqa: E731
        found[f"gate {act}"] = (gate, [randn(2, 333, 2816), 2 * randn(2, 333, 2816)])
    found["log sigmoid"] = (lambda z, form: sigmoid_decay(z, tau=16.0, form=form), [8 * randn(2, 333, 4, 128)])
    for act in ("softplus", "sigmoid"):
        gate = lambda z, b, form, act=act: biased(act, z, b, form=form)  # noqa: E731
        found[act] = (gate, [4 * randn(2, 333, 2000), randn(2000)])
    bounds = (0.02 + 0.97 * torch.rand(8, 128)) * (torch.rand(8, 128) < 0.7)  # d log a / dg <= 1/g, which float16 holds
    found["polar"] = (
        lambda c, form: torch.view_as_real(polar_gate(*c.unbind(-1), form=form)),
        [randn(2, 333, 1024, 2)],
    )
    found["bounded"] = (lambda z, g, form: lower_bounded_decay(z, g, form=form), [8 * randn(2, 333, 8, 128), bounds])
    found["weights of heads"] = (lambda u, w, form: weigh(u, w, form=form), [randn(2, 333, 32, 64), randn(2, 333, 32)])
    for layout in ("half", "interleaved"):
        place, frequencies = torch.randint(0, 1000, (2, 333)), rotary_frequencies(64, device=torch.device("cuda"))
        rotation = lambda x, form, a=place, f=frequencies, to=layout: rotate(x, a, f, layout=to, form=form)  # noqa: E731
        found[f"rotation of {layout}"] = (rotation, [randn(2, 333, 8, 64)])
    for W in (1, 2, 3, 4, 8):
        conv = lambda x, w, b, s, form: causal_conv(x, w, b, initial_state=s, act="silu", form=form)  # noqa: E731
        found[f"convolution of {W}"] = (conv, [randn(3, 515, 300), randn(300, W), randn(300), randn(3, W - 1, 300)])
    borders = torch.tensor([0, 0, 1, 3, 200, 200, 511, 515])
    packed = lambda x, w, s, form: causal_conv(x, w, initial_state=s, cu_seqlens=borders, act="silu", form=form)  # noqa: E731
    found["packed convolution"] = (packed, [randn(1, 515, 300), randn(300, 4), randn(7, 3, 300)])

    def three(a: Tensor, b: Tensor, c: Tensor, w: Tensor, form: str) -> tuple[Tensor, ...]:
        ys, state = causal_convs((a, b, c), w, act="silu", form=form)
        return (*ys, state)

    found["convolution of three"] = (three, [randn(2, 515, 512), randn(2, 515, 64), randn(2, 515, 7), randn(583, 4)])
    target = torch.randint(-1, 5000, (700,))
    loss = lambda x, w, form: linear_cross_entropy(x, w, target, ignore=-1, chunk=256)  # noqa: E731
    found["cross-entropy"] = (loss, [randn(700, 256), randn(5000, 256) / 8])
    return found


def outputs(run: Callable[..., Any], inputs: list[Tensor], form: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradient of every input, the outputs weighed by noise that `dtype` holds."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = run(*leaves, form=form)
    results = list(results) if isinstance(results, tuple) else [results]
    torch.manual_seed(1)
    weights = [torch.randn(y.shape).to(dtype).to(y.dtype) for y in results]
    total = sum((y * w).sum() for y, w in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(total, leaves)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.norm().double().clamp_min(1e-6))


def check(name: str, run: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> bool:
    inputs = [x.to(dtype) for x in inputs]
    want = outputs(run, [widen(x) for x in inputs], "chunked", dtype)
    got, again = (outputs(run, inputs, "auto", dtype) for _ in range(2))
    alike = all(map(torch.equal, got, again))
    errors = [error(g, w) if g.isfinite().all() else math.inf for g, w in zip(got, want, strict=True)]
    if dtype in LIMITS:
        limits = [LIMITS[dtype]] * len(want)
    else:
        own = outputs(run, inputs, "chunked", dtype)
        limits = [allowed(w, (x,), inputs) for w, x in zip(want, own, strict=True)]
    good = alike and all(e <= limit for e, limit in zip(errors, limits, strict=True))
    note = "" if alike else "TWO RUNS DIFFER"
    print("ok " if good else "BAD", name, dtype, note, [f"{e:.1e}" for e in errors], flush=True)
    return good


def model(name: str) -> bool:
    """Loss and gradients in bfloat16, by kernels and by torch, against float64."""
    torch.manual_seed(0)
    lm = LanguageModel(MODELS[name], vocab_size=500, dim=256, depth=2, ffn="swiglu", tie=False)
    ids, errors = torch.randint(500, (2, 200)), {}
    exact = LanguageModel(**lm.arguments).double()
    exact.load_state_dict(lm.to(torch.bfloat16).state_dict())
    want = [loss := exact.loss(ids), *torch.autograd.grad(loss, list(exact.parameters()))]
    norm = torch.stack([w.norm() for w in want]).norm()
    for form in ("auto", "chunked"):
        loss = lm.loss(ids, form=form)
        got = [loss, *torch.autograd.grad(loss, list(lm.parameters()))]
        distance = torch.stack([(g.double() - w).norm() for g, w in zip(got, want, strict=True)]).norm()
        errors[form] = float(distance / norm)
    good = errors["auto"] < 1.5 * errors["chunked"] + 1e-3
    print("ok " if good else "BAD", name, {form: f"{e:.1e}" for form, e in errors.items()}, flush=True)
    return good


def main() -> int:
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    wanted = lambda name: not sys.argv[1:] or any(word in name for word in sys.argv[1:])  # noqa: E731
    good = []
    for name, (run, inputs) in cases().items():
        for dtype in (torch.float32, *LIMITS) if wanted(name) else ():
            try:
                good.append(check(name, run, inputs, dtype))
            except Exception as failure:
                print("BAD", name, dtype, f"{type(failure).__name__}: {str(failure)[:300]}", flush=True)
                good.append(False)
    good += [model(name) for name in MODELS if wanted(name)]
    print(f"{sum(good)} of {len(good)} good")
    return int(not good or not all(good))


if __name__ == "__main__":
    sys.exit(main())
