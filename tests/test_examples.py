"""Every numbered example runs without a warning and prints the evidence it promises."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EVIDENCE = {
    "01_preset": r"right answers to new programs: (100|9\d)\.\d%",
    "02_custom_block": r"equal after JSON: True",
    "03_new_recurrence": r"every law that applies holds",
    "04_whole_then_token_by_token": r"bytes a text, of any length",
    "05_hybrid": r"continues as it does alone: True",
}


@pytest.fixture(autouse=True)
def own_random_numbers() -> object:
    """An example may seed torch as a script does, without a trace in the tests after it."""
    with torch.random.fork_rng(devices=()):
        yield


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_its_evidence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(EVIDENCE[path.stem], printed), printed
    for difference in re.findall(r"largest difference\D*: (\S+)", printed):
        assert float(difference.rstrip(",")) < 1e-4, printed  # float32 rounding of sums over a hundred tokens


def test_every_example_is_here_and_says_its_idea_first() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(EVIDENCE)
    for path in EXAMPLES:
        idea = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        assert idea and idea[0].endswith("."), path.name
