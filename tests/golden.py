"""Replay recorded vectors: python tests/golden.py FILE...

Each file is rebuilt from its own configuration, loaded, and run in the recurrent form, in the chunked form and token by
token. One line per file: its name, the worst relative difference of output, other results and gradients over these
runs, and "ok", "FAIL ..." or "unsupported ...". The exit code is 0 if all are ok and 1 otherwise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from replay import Case, Vectors, compare, gateloop, hgrn, longhorn, wide_ops, wider

CASES: dict[str, Case] = {**longhorn.CASES, **gateloop.CASES, **hgrn.CASES, **wide_ops.CASES, **wider.CASES}


@dataclass(frozen=True)
class Wider:
    """Files whose tolerance is wider than that of their dtype, and why.

    least: what the largest entry of a tensor counts as at least: entries that cancel are as noisy as large ones.
    """

    why: str
    fits: Callable[[Vectors], bool]
    tolerance: Callable[[Vectors], float]
    least: float = 0.0


def measured(vectors: Vectors) -> float:
    """Ten times what float32 and float64 differ by in the original, relative to the largest entry."""
    noted = vectors.config["float32_vs_float64"]
    return 10 * max(noted["grad_max_rel_diff"], noted["output_max_abs_diff"] / max(noted["output_max_abs"], 1e-30))


def is_float64(vectors: Vectors) -> bool:
    return vectors.tensors["output"].dtype == torch.float64


EXCEPTIONS = (
    Wider(
        "rotary and decay constants are built in float32",
        lambda v: v.case.startswith(("retnet", "densessm", "llama")) or v.arguments.get("rotary_emb", False),
        lambda v: 1e-6,
    ),
    Wider(
        "data-dependent relative positions saturate",
        lambda v: v.arguments.get("data_dependent_rel_pos", False),
        lambda v: 1e-6 if is_float64(v) else measured(v),
    ),
    Wider(
        "Heinsen's form goes through logarithms",
        lambda v: v.config.get("heinsen", v.arguments.get("use_heinsen", False)),
        lambda v: 1e-6 if is_float64(v) else measured(v),  # it rounds logarithms to complex64 in either
    ),
    Wider(
        "DenseRetNet's head norm cancels q and k of a first token: 3e-5, absolute",
        lambda v: v.case.startswith("densessm_lm") and not is_float64(v),
        lambda v: 2e-5,
        least=1.5,
    ),
    Wider(
        "ten times what float32 and float64 differ by in the original",
        lambda v: v.path.stem.startswith("wider_") and not is_float64(v),
        measured,
    ),
    Wider("slow modes sum many tokens", lambda v: v.config.get("slow_modes", False) and not is_float64(v), measured),
)


def tolerance(vectors: Vectors) -> float:
    """Relative to the largest entry: 1e-9 in float64, 2e-5 in float32, or wider for a file of EXCEPTIONS."""
    usual = 1e-9 if is_float64(vectors) else 2e-5
    return max([usual, *(row.tolerance(vectors) for row in EXCEPTIONS if row.fits(vectors))])


def case_of(vectors: Vectors) -> Case:
    """The case of the class that the file names as its source, or of the file's case, or the longest name that begins
    it: what follows names sizes and options.

    Raises: NotImplementedError for a module that is in no table.
    """
    source = re.match(r"(?:\w+\.)*(\w+)", vectors.config.get("source", ""))
    if source and source[1] in CASES:
        return CASES[source[1]]
    near = [name for name in CASES if vectors.case.startswith(name)]
    if not near:
        raise NotImplementedError(f"no case {vectors.case!r}")
    return CASES[max(near, key=len)]


def forms(path: Path) -> tuple[str, ...]:
    """The runs of a file: whole in two forms, and "step", token by token, where the module streams."""
    vectors = Vectors(path)
    streams = case_of(vectors).streams_in(vectors)
    return ("recurrent", "chunked", "step") if streams else ("recurrent", "chunked")


def replay(path: Path, form: str) -> dict[str, float]:
    """Every result and gradient of one run to its distance from the recorded.

    Raises: Mismatch for what ours does not have, and what the library raises.
    """
    vectors = Vectors(path)
    case = case_of(vectors)
    if form == "step":
        run = case.stepped(vectors)
        found = compare(case, vectors, run, only=run.results)
    else:
        found = compare(case, vectors, case.whole(vectors, form))
    least = max([1e-30, *(row.least for row in EXCEPTIONS if row.fits(vectors))])
    largest = {key: tensor.double().abs().max().item() for key, tensor in vectors.tensors.items() if tensor.numel()}
    return {key: error * min(1.0, max(largest.get(key, 0.0), 1e-30) / least) for key, error in found.items()}


def line(path: Path) -> str:
    """What is printed of one file."""
    worst: dict[str, float] = {}
    try:
        for form in forms(path):
            for key, error in replay(path, form).items():
                kind = key if key == "output" else "gradients" if key.startswith("grad.") else "other results"
                worst[kind] = max(worst.get(kind, 0.0), error)
        limit = tolerance(Vectors(path))
    except NotImplementedError as refusal:
        return f"{path.stem}: unsupported {' '.join(str(refusal).split())}"
    except Exception as error:  # whatever goes wrong stands in the file's line, and the others are replayed
        return f"{path.stem}: FAIL {type(error).__name__}: {' '.join(str(error).split())}"
    numbers = ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items())
    wide = [kind for kind, error in worst.items() if not error <= limit]
    return f"{path.stem}: {numbers} " + (f"FAIL above {limit:.1e}: {', '.join(wide)}" if wide else "ok")


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)  # so many tensors so small are slower on two
    all_ok = bool(paths)
    for path in paths:
        said = line(Path(path))
        all_ok &= said.endswith(" ok")
        print(said, flush=True)
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
