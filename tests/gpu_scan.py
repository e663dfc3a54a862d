"""The separable kernel on a GPU against the float64 token loop, in every dtype: `python tests/gpu_scan.py`.

One line a case: relative errors of y, state and all gradients. Exits with 1 if one passes its limit.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from recur import scan

HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])
LEAKY = torch.tensor([0.0, -1e-9, -0.3, -3.0, -5.0])
GATES = (None, "B T H", "B T H K")
LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def gates(axes: tuple[int, ...], kind: str) -> Tensor:
    if kind == "mild":
        return torch.nn.functional.logsigmoid(torch.randn(axes) + 3)
    if kind == "complex":
        return torch.complex(-torch.rand(axes), 3 * torch.randn(axes))
    values = HARD if kind == "hard" else LEAKY
    return values[torch.randint(len(values), axes)]


def case(
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    axes: str | None,
    kind: str,
    dtype: torch.dtype,
    tied: bool = False,
    initial: bool = True,
    borders: tuple[int, ...] | None = None,
    beta: bool = False,
    bonus: bool = False,
    reverse: bool = False,
) -> bool:
    torch.manual_seed(T + K)
    sizes = {"B": B, "T": T, "H": H, "K": K}
    a = None if axes is None else gates(tuple(sizes[axis] for axis in axes.split()), kind)
    if a is not None and axes == "B T H K" and kind == "mild":
        a = a.to(dtype)
    rows, cu = (B, None) if borders is None else (len(borders) - 1, torch.tensor(borders).cuda())
    number = torch.complex64 if kind == "complex" else torch.float32
    inputs = [
        torch.randn(B, T, G, K).to(dtype),
        None if tied else (torch.randn(B, T, G, K) / K**0.5).to(dtype),
        torch.randn(B, T, H, V).to(dtype),
        a,
        torch.randn(rows, H, K, V, dtype=number) if initial else None,
        torch.rand(B, T, H).round(decimals=2).to(dtype) if beta else None,
        torch.randn(H, K) if bonus else None,
    ]
    if beta:
        inputs[1] = torch.nn.functional.normalize(inputs[1].float(), dim=-1).to(dtype)
    inputs = [None if x is None else x.cuda() for x in inputs]
    dy, dstate = torch.randn(B, T, H, V).to(dtype).cuda(), torch.randn(rows, H, K, V, device="cuda")

    def gradients(wide: bool) -> list[Tensor]:
        x = inputs
        if wide:
            x = [None if t is None else t.to(torch.complex128 if t.is_complex() else torch.float64) for t in inputs]
        x = [None if t is None else t.detach().requires_grad_() for t in x]
        options = {"initial_state": x[4], "beta": x[5], "bonus": x[6], "cu_seqlens": cu, "reverse": reverse}
        y, state = scan(*x[:4], **options, scale=0.5, form="recurrent" if wide else "triton")
        loss = (y * dy.to(y.dtype)).sum() + (state.real * dstate).sum()
        return [y, state, *torch.autograd.grad(loss, [t for t in x if t is not None])]

    got, again, want = gradients(False), gradients(False), gradients(True)
    names = [
        "y",
        "state",
        *(n for n, x in zip(("dq", "dk", "dv", "da", "dS", "dbeta", "dbonus"), inputs, strict=True) if x is not None),
    ]
    errors = {
        n: ((g.to(w.dtype) - w).norm() / w.norm().clamp_min(1e-3)).item()
        for n, g, w in zip(names, got, want, strict=True)
    }
    good = all(error < LIMITS[dtype] * (4 if n == "da" else 1) for n, error in errors.items())
    good &= all(torch.equal(g, h) for g, h in zip(got, again, strict=True))
    if kind == "hard":
        good &= bool((got[names.index("da")][inputs[3] <= -700] == 0).all())
    label = f"{(B, T, H, G, K, V)} [{axes}] {kind} {str(dtype)[6:]}"
    label += f"{' tied' * tied}{' beta' * beta}{' bonus' * bonus}{' reverse' * reverse}"
    print("ok " if good else "BAD", label, {n: f"{error:.1e}" for n, error in errors.items()}, flush=True)
    return good


def cases() -> list[dict]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    names = ("B", "T", "H", "G", "K", "V", "axes", "kind", "dtype", "tied", "initial", "borders")
    more = [dict(zip(names, row, strict=False)) for row in ((2, 300, 2, 2, 64, 64), (1, 200, 2, 1, 128, 128))]
    extra = [
        {**sizes, "axes": axes, "kind": kind, "dtype": dtype, "beta": delta, "bonus": not delta, "reverse": reverse}
        for sizes in more
        for axes in GATES
        for kind, dtype in (("mild", bf16), ("hard", bf16), ("hard", fp32))
        for delta in (True, False)
        for reverse in (False, True)
        if (axes or kind == "mild") and (dtype == bf16 or not reverse)
    ]
    extra.append({**more[0], "axes": "B T H", "kind": "complex", "dtype": fp32, "beta": True})
    extra.append({**more[0], "axes": "B T H", "kind": "mild", "dtype": bf16, "beta": True, "borders": (0, 9, 9, 300)})
    extra[-1]["B"] = 1
    extra.append({**more[1], "axes": "B T H K", "kind": "mild", "dtype": bf16, "beta": True, "K": 256, "V": 256})
    rows = [(2, 300, 4, 2, 64, 64, axes, "mild", dtype) for dtype in (bf16, fp32, fp16) for axes in GATES]
    rows += [(1, 200, 2, 2, 64, 64, a, kind, t) for a in GATES[1:] for kind in ("hard", "leaky") for t in (bf16, fp32)]
    rows += [
        (1, 300, 2, 1, *sizes, a, "mild", bf16) for a in GATES[1:] for sizes in ((128, 128), (100, 72), (256, 256))
    ]
    rows += [(1, 2000, 2, 2, 128, 128, a, "mild", bf16, False, a == "B T H") for a in GATES[1:]]
    rows += [(1, 2000, 2, 1, 64, 64, "B T H K", "leaky", bf16), (2, 300, 2, 2, 128, 128, "B T H K", "mild", bf16, True)]
    rows += [(2, 300, 2, 2, 64, 64, a, "mild", bf16) for a in ("H", "H K")]
    rows += [(1, 300, 2, 2, 64, 64, a, "complex", fp32) for a in GATES[1:]]
    rows += [(1, T, 2, 2, 64, 64, "B T H K", "mild", bf16) for T in (1, 15, 16, 17, 63, 64, 65, 130)]
    documents = (0, 0, 5, 130, 300, 300)
    rows += [(1, 300, 2, 2, 64, 64, a, "mild", bf16, False, True, documents) for a in GATES]
    return [dict(zip(names, row, strict=False)) for row in rows] + extra


def run(arguments: dict) -> bool:
    return case(**arguments)


def main() -> int:
    # compiling takes longer than running, so the cases share the processors of the host
    with torch.multiprocessing.get_context("spawn").Pool(15) as pool:
        good = pool.map(run, cases(), chunksize=1)
    print(f"{sum(good)} of {len(good)} good")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
