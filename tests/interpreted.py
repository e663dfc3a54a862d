"""Laws that need Triton's interpreter, which is chosen before Triton is loaded: they run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_laws(file: str, names: list[str]) -> None:
    """Run `file` as a script with these laws as its arguments; fail with what it printed."""
    done = subprocess.run(
        [sys.executable, file, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
