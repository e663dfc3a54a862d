"""Another Triton than the pinned one: a few programs compile and a few laws hold. `make test-tritons` runs it.

More than one version is supported. This tries the oldest and the newest, from folders of their own, and is kept short;
the pinned one has all of test_kernel_compiles.py and of the laws of test_kernel_*.py.
"""

from __future__ import annotations

from pathlib import Path

import triton
from interpreted import run_laws
from test_kernel_compiles import CASES, SHARED, compiled, launches, resources

HERE = Path(__file__).parent
ROWS = ("gla", "gated-delta-net", "longhorn")
# Bytes per thread that programs spill, measured; what is not named spills none.
SPILLS: dict[str, dict[str, int]] = {
    "3.4": {"gla gradients_exact": 1576, "gated-delta-net forward": 32, "gated-delta-net backward_states": 96},
    "3.9": {
        "gla backward_inputs": 32,
        "gla gradients_exact": 1448,
        "gated-delta-net solve_tril": 72,
        "gated-delta-net backward_states": 24,
        "gated-delta-net backward_inputs": 256,
    },
}
LAWS = {
    "test_kernel_scan.py": ["two_runs_are_one"],
    "test_kernel_elementwise.py": ["second_order_is_refused"],
    "test_kernel_step.py": ["matrix_states"],
    "test_kernel_glue.py": ["norms_are_their_formulas"],
}


def spilled() -> dict[str, int]:
    """What each program of these rows spills; every program fits in shared memory."""
    found: dict[str, int] = {}
    for row, case in CASES.values():
        for launch in launches(case, int(row["sm"])) if row["name"] in ROWS else []:
            program = compiled(launch, int(row["sm"]))
            _, bytes_, shared = resources(program)
            assert shared <= SHARED[int(row["sm"])], f"{row['name']} {launch[0].fn.__name__}: {shared} shared bytes"
            name = f"{row['name']} {launch[0].fn.__name__}"
            found[name] = max(bytes_, found.get(name, 0))
    return {name: bytes_ for name, bytes_ in found.items() if bytes_}


if __name__ == "__main__":
    for file, names in LAWS.items():
        run_laws(str(HERE / file), names)
    now, known = spilled(), SPILLS.get(".".join(triton.__version__.split(".")[:2]), {})
    more = {name: bytes_ for name, bytes_ in now.items() if bytes_ > known.get(name, 0)}
    assert not more, f"Triton {triton.__version__}: more bytes spilled than before: {more}"
    print(
        f"Triton {triton.__version__}: {sum(map(len, LAWS.values()))} laws hold, programs of {', '.join(ROWS)} compile"
    )
