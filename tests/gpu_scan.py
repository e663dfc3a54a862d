"""The separable kernel on a GPU against the float64 token loop, in every dtype: `python tests/gpu_scan.py`, or
`python tests/gpu_scan.py wide` for states of more than 256 rows or columns alone, `... erasing` for erase keys and
several writes or reads.

One line per case: relative errors of y, state and all gradients, which two runs must give alike. Exits with 1 if one
passes its limit. The cases of test_kernel_compiles.py, in which every pair of values of every axis meets, are among
them; the others vary what no specialisation depends on, lengths, borders and gates from mild to resets.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import specialisations
import torch
from interpreted import allowed, off_by, widen
from torch import Tensor

import recur
from recur import ScanOut

HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])
LEAKY = torch.tensor([0.0, -1e-9, -0.3, -3.0, -5.0])
GATES = (None, "B T H", "B T H K")
# In 16 bits, where kernels round between their products as torch does not; in float32 see `allowed`.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = (torch.float32, *LIMITS)


class Case(NamedTuple):
    """Sizes are B T H G K V; axes and kind those of the gates, in `dtype` if narrow; borders of packed documents.

    erase: "decayed" or "previous", the state that an erase key reads from; remove: there is a removal key as well;
    write: axes of the write gate; writes, reads: per token, 0 for one without an axis of their own.
    """

    sizes: tuple[int, ...]
    axes: str | None
    kind: str = "mild"
    dtype: torch.dtype = torch.bfloat16
    tied: bool = False
    initial: bool = True
    borders: tuple[int, ...] = ()
    beta: bool = False
    bonus: bool = False
    reverse: bool = False
    narrow: bool = False
    erase: str = ""
    remove: bool = False
    write: str = ""
    writes: int = 0
    reads: int = 0

    def gates(self) -> Tensor | None:
        if self.axes is None:
            return None
        shape = [dict(zip("BTHGKV", self.sizes, strict=True))[axis] for axis in self.axes.split()]
        if self.kind == "complex":
            return torch.complex(-torch.rand(shape), 3 * torch.randn(shape))
        if self.kind == "mild":
            mild = torch.nn.functional.logsigmoid(torch.randn(shape) + 3)
            return mild.to(self.dtype) if self.narrow else mild
        values = HARD if self.kind == "hard" else LEAKY
        return values.to(torch.get_default_device())[torch.randint(len(values), shape)]

    def inputs(self) -> dict[str, Tensor]:
        """What `recur.scan` takes by name."""
        torch.manual_seed(sum(self.sizes))
        B, T, H, G, K, V = self.sizes
        several, queries = (B, T) + (self.writes,) * (self.writes > 0), (B, T) + (self.reads,) * (self.reads > 0)

        def key(heads: int) -> Tensor:
            return torch.nn.functional.normalize(torch.randn(*several, heads, K), dim=-1)

        k = key(G)

        def near() -> Tensor:
            """Not far from k, or the state would grow from token to token."""
            return torch.nn.functional.normalize(k + key(G) / 2, dim=-1)

        number = torch.complex64 if self.kind == "complex" else torch.float32
        inputs = {
            "q": torch.randn(*queries, G, K).to(self.dtype),
            "k": None if self.tied else k.to(self.dtype),
            "v": torch.randn(*several, H, V).to(self.dtype),
            "log_decay": self.gates(),
            "initial_state": torch.randn(len(self.borders[1:]) or B, H, K, V, dtype=number) if self.initial else None,
            "beta": torch.rand(*several, H).round(decimals=2).to(self.dtype) if self.beta else None,
            "erase": (near() * torch.rand(*several, G, 1)).to(self.dtype) if self.erase else None,
            "remove": near().to(self.dtype) if self.remove else None,
            "write": torch.rand(*several, *([H, V] if self.write == "H V" else [H])).to(self.dtype)
            if self.write
            else None,
            "bonus": torch.randn(H, K) if self.bonus else None,
        }
        return {name: x for name, x in inputs.items() if x is not None}

    def run(self, form: str, **tensors: Tensor) -> ScanOut:
        cu = torch.tensor(self.borders) if self.borders else None
        return recur.scan(
            **{"k": None, **tensors}, **self.erased(), cu_seqlens=cu, reverse=self.reverse, scale=0.5, form=form
        )

    def erased(self) -> dict[str, str]:
        return {"erase_from": self.erase} if self.erase else {}

    def steps(self, **tensors: Tensor) -> dict[str, Tensor]:
        """y of the first token alone; the state is float32, or bfloat16 where one is given, or complex."""
        B, _, H, _, K, V = self.sizes
        dtype = torch.bfloat16 if self.initial else torch.float32
        state = torch.randn(B, H, K, V, dtype=torch.complex64 if self.kind == "complex" else dtype)
        state = widen(state) if tensors["v"].dtype == torch.float64 else state
        still = ("bonus",) if self.axes and self.axes.startswith("B T") else ("bonus", "log_decay")
        tokens = {name: t if name in still else t[:, 0] for name, t in tensors.items() if name != "initial_state"}
        given = {"k": None, "log_decay": None, **tokens, **self.erased()}
        return {"step": recur.step(**given, state=state, scale=0.5)}


def listed() -> list[Case]:
    """The specialisations of the kernel."""
    found = []
    for row in specialisations.SCAN.rows:
        more, packed = row["segments"] == "more", row["rows"] == "packed"
        delta, axes = row["write"] == "delta", "B T H" if row["time"] == "token" else "H"
        erases = row["write"] in ("delta", "erase", "previous")
        T, H = ((3100 if erases else 1100), 2) if more else (130, 4)
        found.append(
            Case(
                (
                    1 if more or packed else 2,
                    T,
                    H,
                    H // 2 if row["heads"] == "group" else H,
                    int(row["K"]),
                    int(row["V"]),
                ),
                {"none": None, "one": axes, "key": axes + " K"}[row["decay"]],
                "complex" if row["phase"] == "yes" else "mild",
                getattr(torch, row["dtype"]),
                tied=row["keys"] == "tied",
                initial=row["states"] == "given",
                borders=(0, 0, 70, T) if packed else (),
                beta=delta,
                bonus=row["write"] == "bonus",
                erase={"erase": "decayed", "previous": "previous"}.get(row["write"], ""),
                reverse=row["way"] == "left",
                narrow=row["gates"] == "narrow",
            )
        )
    return found


def outputs(case: Any, form: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y, state, the gradient of every input, the outputs weighed by noise in the dtype of the tokens; and the step."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    results = case.run(form, **leaves)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape).to(case.dtype).to(t.real.dtype) for t in results]
    loss = sum((t * w).sum().real for t, w in zip(results, weights, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {**results._asdict(), **named, **case.steps(**tensors)}


def errors(case: Any, limits: dict[torch.dtype, float], slack: float) -> dict[str, tuple[float, float]]:
    """Relative errors against the token loop in float64, infinite where two runs differ or a reset has a gradient; and
    what they may be."""
    tensors = case.inputs()
    wide = {name: widen(t) for name, t in tensors.items()}
    got, again = (outputs(case, "triton", tensors) for _ in range(2))
    want = outputs(case, "recurrent", wide)
    found = {name: off_by(got[name], exact) for name, exact in want.items()}
    if case.dtype in limits:
        most = {name: limits[case.dtype] * (slack if name == "dlog_decay" else 1) for name in want}
    else:  # steps have the kernel alone
        torchs = outputs(case, "chunked", tensors)
        others = {name: () if "step" in name else (torchs[name],) for name in want}
        most = {name: allowed(exact, others[name], tensors.values()) for name, exact in want.items()}
    again |= case.run("triton", **tensors)._asdict()  # which keeps nothing for a backward
    found |= {f"{name} again": math.inf for name in got if not torch.equal(got[name], again[name])}
    gates = tensors.get("log_decay", torch.zeros(()))
    if not gates.is_complex() and (gates <= -700).any() and got["dlog_decay"][gates <= -700].any():
        found["dlog_decay"] = math.inf
    return {name: (error, most.get(name, 0.0)) for name, error in found.items()}


def cases() -> list[Case]:
    """Few tokens and many, borders, odd sizes, and gates from mild to resets."""
    bf16, fp32 = torch.bfloat16, torch.float32
    sizes = [(2, 300, 2, 2, 64, 64), (1, 200, 2, 1, 128, 128)]
    found = [
        Case(size, axes, kind, dtype, beta=delta, bonus=not delta, reverse=reverse, narrow=kind == "mild")
        for size in sizes
        for axes in GATES
        for kind, dtype in (("mild", bf16), ("hard", bf16), ("hard", fp32))
        for delta in (True, False)
        for reverse in (False, True)
        if (axes or kind == "mild") and (dtype == bf16 or not reverse)
    ]
    found += [Case((2, 300, 4, 2, 64, 64), axes, dtype=dtype) for dtype in DTYPES for axes in GATES]
    found += [Case((1, 300, 2, 2, 64, 64), axes, borders=(0, 0, 5, 130, 300, 300)) for axes in GATES]
    found += [Case((1, T, 2, 2, 64, 64), "B T H K", narrow=True) for T in (1, 15, 16, 17, 63, 64, 65)]
    for axes in GATES[1:]:
        found += [
            Case((1, 200, 2, 2, 64, 64), axes, kind, dtype) for kind in ("hard", "leaky") for dtype in (bf16, fp32)
        ]
        found += [Case((1, 300, 2, 1, K, V), axes) for K, V in ((100, 72), (256, 256))]
        found += [Case((1, 2000, 2, 2, 128, 128), axes, initial=axes == "B T H")]
    found += [Case((1, 2000, 2, 1, 64, 64), "B T H K", "leaky")]
    found += [  # long enough for segments
        Case((1, 3100, 2, 1, 64, 64), axes, kind, dtype, beta=True, initial=not reverse, reverse=reverse)
        for axes in GATES
        for kind, dtype, reverse in (("mild", bf16, False), ("hard", bf16, True), ("mild", fp32, True))
        if axes or kind == "mild"
    ]
    found += [Case((1, 3100, 2, 1, 64, 64), "B T H K", "complex", beta=True)]
    return [*found, Case((1, 200, 2, 1, 256, 256), "B T H K", beta=True, narrow=True)]


def wide() -> list[Case]:
    """More columns than a program of the gradient has, rows in parts, and two rows per complex key."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = [
        Case((1, 200, 2, 1, K, V), axes, beta=delta, narrow=axes == "B T H K", reverse=delta)
        for K, V in ((256, 512), (384, 1536), (320, 1280), (512, 1024))
        for axes in GATES
        for delta in (False, True)
    ]
    found += [
        Case((1, 200, 2, 2, 512, 300), axes, "hard", dtype, beta=delta, bonus=not delta)
        for axes in GATES[1:]
        for dtype in (bf16, fp32)
        for delta in (False, True)
    ]
    found += [
        Case((1, 200, 2, 1, 256, 512), axes, "complex", beta=delta) for axes in GATES[1:] for delta in (False, True)
    ]
    found += [Case((1, 200, 2, 2, 300, 520), "B T H K", tied=True, borders=(0, 0, 5, 130, 200, 200))]
    found += [Case((1, 200, 2, 1, 200, 40), "B T H", "complex", borders=(0, 70, 200), reverse=True)]
    found += [Case((1, 3100, 2, 1, 512, 300), axes, beta=delta) for axes in GATES for delta in (False, True)]
    found += [Case((2, 130, 2, 1, 400, 1000), axes, dtype=torch.float16, beta=True) for axes in GATES]
    return found


def erasing() -> list[Case]:
    """Erase and removal keys, write gates, several writes and reads per token."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found = [
        Case((2, 300, 2, 1, K, K), axes, kind, dtype, erase=source, reverse=dtype == fp32, initial=dtype == bf16)
        for K in (64, 128)
        for axes in GATES
        for kind, dtype in (("mild", bf16), ("hard", bf16), ("hard", fp32))
        for source in ("decayed", "previous")
        if axes or kind == "mild"
    ]
    found += [
        Case((2, 300, 2, 2, 64, 64), axes, kind, bf16, erase="previous", remove=True, write=write)
        for axes in GATES[1:]
        for kind, write in (("mild", ""), ("leaky", "H V"), ("complex", "H"))
    ]
    found += [
        Case((2, 300, 2, 1, 128, 128), axes, beta=True, writes=M, reads=R)
        for axes in GATES
        for M, R in ((2, 0), (3, 2))
    ]
    found += [Case((2, 200, 2, 2, 64, 64), "B T H K", write="H V", writes=2, reads=4, reverse=True)]
    borders = (0, 0, 5, 130, 300, 300)
    found += [Case((1, 300, 2, 1, 64, 64), axes, erase="previous", remove=True, borders=borders) for axes in GATES]
    found += [Case((1, 3100, 2, 2, 64, 64), axes, erase="previous", remove=axes is not None) for axes in GATES]
    found += [Case((1, 200, 2, 1, K, V), "B T H K", erase="previous") for K, V in ((100, 72), (256, 512), (384, 300))]
    return [*found, Case((2, 300, 2, 2, 64, 64), "B T H K", dtype=torch.float16, erase="decayed", remove=True)]


def attempt(job: tuple[Any, dict[torch.dtype, float], float]) -> bool:
    case, limits, slack = job
    torch.set_default_device("cuda")
    label = " ".join(f"{name}={value}" for name, value in case._asdict().items() if value not in (False, ()))
    try:
        found = errors(case, limits, slack)
    except Exception as error:  # whatever it is, the other cases are to be tried
        print("BAD", label, type(error).__name__, error, flush=True)
        return False
    good = all(error <= limit for error, limit in found.values())
    print("ok " if good else "BAD", label, {name: f"{error:.1e}" for name, (error, _) in found.items()}, flush=True)
    return good


def main(cases: list[Any], limits: dict[torch.dtype, float], slack: float = 1) -> int:
    """In parallel, because compiling takes longer than running; in 16 bits gradients of gates may err `slack` times as
    much."""
    with torch.multiprocessing.get_context("spawn").Pool(
        15, maxtasksperchild=1
    ) as pool:  # one process per case: an illegal access ends it
        good = pool.map(attempt, [(case, limits, slack) for case in cases], chunksize=1)
    print(f"{sum(good)} of {len(good)} good")
    return int(not all(good))


if __name__ == "__main__":
    sets = {"wide": wide, "erasing": erasing}
    chosen = [case for name in sys.argv[1:] for case in sets[name]()] or listed() + cases() + wide() + erasing()
    sys.exit(main(chosen, LIMITS, slack=4))  # differences of sums, added up over time
