"""On a GPU, by `pytest -m gpu` only: the scripts beside this file, which print one line per case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = {
    "gpu_scan.py": [],
    "gpu_elementwise.py": [],
    "gpu_glue.py": [],
    "gpu_explain.py": [],
    "gpu_laws.py": [],
    "gpu_step.py": ["check"],
    "gpu_generate.py": [],
    "gpu_large.py": [],
    "gpu_compile.py": [],
}


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_kernels_on_a_gpu(script: str) -> None:
    done = subprocess.run([sys.executable, HERE / script, *SCRIPTS[script]], cwd=HERE.parent, check=False)
    assert done.returncode == 0


def test_no_script_is_forgotten() -> None:
    assert sorted(SCRIPTS) == sorted(path.name for path in HERE.glob("gpu_*.py"))
