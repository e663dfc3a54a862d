"""Forward and backward of the chunked forms on a CPU, against the token loop and against other packages, in one run.

    python benchmarks/cpu.py                      # all cases, T = 512 to 8192, about half an hour on 2 cores
    python benchmarks/cpu.py --lengths 512 2048 --cases selective delta

Every figure is the median over interleaved repeats (ours, theirs, ours, ...) of forward plus backward for all inputs,
in float32. Peak memory is how far a fresh process grew over its inputs. Writes benchmarks/results/cpu.json and cpu.md.
Needs the extra `bench`: gateloop-transformer, gated-state-spaces-pytorch, transformers, scipy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import recur
from recur.primitives.scan import scan

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], torch.Tensor]  # one forward pass, ready for backward


def leaf(*shape: int, scale: float = 1.0, squash: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
    return squash(torch.randn(*shape) * scale).detach().requires_grad_()


def decay(*shape: int) -> torch.Tensor:
    return leaf(*shape, squash=lambda x: F.logsigmoid(x + 2))


# ---------------------------------------------------------------------- cases: T -> {implementation: forward pass}


def diagonal(T: int) -> dict[str, Run]:
    """Real diagonal scan, B=1, D=512."""
    from gateloop_transformer.simplified_gate_loop import gate_loop_operator

    x, log_a = leaf(1, T, 512), decay(1, T, 512)
    return {
        "recur chunked": lambda: recur.gated_scan(x, log_a).y,
        "recur token loop": lambda: recur.gated_scan(x, log_a, form="recurrent").y,
        "gateloop-transformer": lambda: gate_loop_operator(torch.ones_like(x), x, log_a.exp())[0],
    }


def complex_diagonal(T: int) -> dict[str, Run]:
    """GateLoop with one head per channel: q, k, v [1 T 512], one complex gate per channel."""
    from gateloop_transformer.gateloop_transformer import gate_loop_operator

    q, k, v = (leaf(1, T, 512, 1) for _ in range(3))
    log_a, phase = decay(1, T, 512), leaf(1, T, 512)

    def theirs() -> torch.Tensor:
        heads_first = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        gate = torch.polar(log_a.exp(), phase).transpose(1, 2).flatten(0, 1)[..., None, None]
        return gate_loop_operator(*heads_first, gate)

    return {
        "recur chunked": lambda: scan(q, k, v, torch.complex(log_a, phase)).y,
        "recur token loop": lambda: scan(q, k, v, torch.complex(log_a, phase), form="recurrent").y,
        "gateloop-transformer": theirs,
    }


def outer(T: int, kind: str) -> dict[str, Run]:
    """Matrix state, B=1, H=4, K=V=64; decay per head ("scalar") or per key ("keywise")."""
    q, k, v = (leaf(1, T, 4, 64, scale=0.3) for _ in range(3))
    log_a = decay(1, T, 4) if kind == "scalar" else decay(1, T, 4, 64)
    return {form_name: partial(_scan_y, q, k, v, log_a, form) for form_name, form in FORMS.items()}


def delta(T: int) -> dict[str, Run]:
    """Gated delta rule, B=1, H=4, K=V=64, against the pure-torch chunk path of Qwen3-Next in transformers."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v = (leaf(1, T, 4, 64, squash=partial(F.normalize, dim=-1)) for _ in range(3))
    log_a, beta = decay(1, T, 4), leaf(1, T, 4, squash=torch.sigmoid)
    ours = {name: partial(_scan_y, q, k, v, log_a, form, beta=beta) for name, form in FORMS.items()}
    return ours | {"transformers Qwen3-Next": lambda: torch_chunk_gated_delta_rule(q, k, v, log_a, beta)[0]}


def _scan_y(q, k, v, log_a, form, **options):
    return scan(q, k, v, log_a, form=form, **options).y


FORMS = {"recur chunked": "chunked", "recur token loop": "recurrent"}


def selective(T: int) -> dict[str, Run]:
    """Mamba, B=1, V=512, N=16."""
    x, dt = leaf(1, T, 512), leaf(1, T, 512, squash=F.softplus)
    A, B, C = leaf(512, 16, squash=lambda a: -a.exp()), leaf(1, T, 16), leaf(1, T, 16)
    return {name: partial(_first, recur.selective_scan, x, dt, A, B, C, form=form) for name, form in FORMS.items()}


def online(T: int) -> dict[str, Run]:
    """Longhorn, B=1, V=512, N=16."""
    x, rate, k, q = leaf(1, T, 512), leaf(1, T, 512, squash=torch.sigmoid), leaf(1, T, 16), leaf(1, T, 16)
    return {name: partial(_first, recur.online_scan, x, rate, k, q, form=form) for name, form in FORMS.items()}


def _first(function, *arguments, **options):
    return function(*arguments, **options).y


def gss(T: int) -> dict[str, Run]:
    """Fixed poles, B=1, 256 channels, N=512: the DSS layer of gated-state-spaces-pytorch."""
    from gated_state_spaces_pytorch.gss import DSS

    theirs = DSS(dim=256, kernel_N=512)
    x = leaf(1, T, 256)

    def ours(form: str) -> torch.Tensor:
        u = theirs.norm(x)
        poles = recur.primitives.poles.poles(theirs.Lambda_real, theirs.Lambda_imag.exp())
        readout = torch.complex(theirs.C_real, theirs.C_imag) * recur.primitives.poles.zero_order_hold(poles)
        return recur.fixed_scan(u, poles, readout, form=form).y + u * theirs.param_D

    return {"recur fft": partial(ours, "auto"), "gated-state-spaces-pytorch": lambda: theirs(x)}


def gateloop_layer(T: int) -> dict[str, Run]:
    """The whole GateLoop layer, D=256, one head per channel."""
    from gateloop_transformer.gateloop_transformer import GateLoopedAttention

    theirs = GateLoopedAttention(dim=256, checkpoint_gate_looped_attn=False)
    ours = recur.convert.from_official("gateloop_attention", theirs.state_dict(), {"dim": 256})
    x = leaf(1, T, 256)
    return {"recur chunked": lambda: ours(x).y, "gateloop-transformer": lambda: theirs(x)}


CASES: dict[str, Callable[[int], dict[str, Run]]] = {
    "diagonal": diagonal,
    "complex": complex_diagonal,
    "scalar": partial(outer, kind="scalar"),
    "keywise": partial(outer, kind="keywise"),
    "delta": delta,
    "selective": selective,
    "online": online,
    "gss": gss,
    "gateloop_layer": gateloop_layer,
}


# ---------------------------------------------------------------------- measuring


def once(run: Run) -> float:
    begin = time.perf_counter()
    y = run()
    y.sum().backward()
    return time.perf_counter() - begin


def compare(runs: dict[str, Run], budget: float) -> dict[str, float]:
    """Median seconds of each, interleaved, at least 3 and at most 30 rounds, about `budget` seconds in all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    first = {name: once(run) for name, run in runs.items()}
    rounds = max(3, min(30, int(budget / max(sum(first.values()), 1e-3))))
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(once(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def grown(case: str, name: str, T: int, threads: int) -> float:
    """MiB by which a fresh process grew while it ran one implementation."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (case, name, T, threads))


def _grown(case: str, name: str, T: int, threads: int) -> float:
    torch.set_num_threads(threads)
    once(CASES[case](64)[name])  # libraries load what they load
    run = CASES[case](T)[name]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = _status("VmRSS")
    once(run)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB of one field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def table(rows: list[dict]) -> str:
    lines = ["| case | T | implementation | ms | theirs / ours | MiB |", "|---|--:|---|--:|--:|--:|"]
    for row in rows:
        memory = "" if row["mib"] is None else f"{row['mib']:.0f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}"
        ms = "" if row["ms"] is None else f"{row['ms']:.1f}"
        lines.append(f"| {row['case']} | {row['T']} | {row['name']} | {ms} | {ratio} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=15.0, help="time for one case at one length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-at", type=int, default=4096, help="length at which memory is taken; 0 for none")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    rows = []
    for case in tqdm(settings.cases, desc="cases"):
        for T in tqdm(settings.lengths, desc=case, leave=False):
            torch.manual_seed(0)
            medians = compare(CASES[case](T), settings.seconds)
            ours = next(iter(medians.values()))
            for place, (name, value) in enumerate(medians.items()):
                ratio = value / ours if place else None
                rows.append({"case": case, "T": T, "name": name, "ms": value * 1e3, "ratio": ratio, "mib": None})
        if settings.memory_at:
            for name in CASES[case](64):
                mib = grown(case, name, settings.memory_at, settings.threads)
                rows.append(
                    {"case": case, "T": settings.memory_at, "name": name, "ms": None, "ratio": None, "mib": mib}
                )
    machine = f"{platform.machine()}, {settings.threads} threads, torch {torch.__version__}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    (RESULTS / "cpu.md").write_text(f"# Forward and backward on a CPU\n\n{machine}.\n\n{notes()}\n\n{table(rows)}\n")
    print(table(rows))


def notes() -> str:
    documents = {name: getattr(case, "func", case).__doc__ for name, case in CASES.items()}
    return "\n".join(f"- {name}: {text}" for name, text in documents.items())


if __name__ == "__main__":
    main()
