"""Every numbered example runs without a warning and prints the evidence it promises."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import recur.testing

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EVIDENCE = {
    "01_preset": r"right answers to new programs: (100|9\d)\.\d%",
    "02_custom_block": r"equal after JSON: True",
    "03_new_recurrence": r"forms: All forms agree\.[\s\S]*\d\d laws hold",
    "04_whole_then_token_by_token": r"bytes per sequence of any length",
    "05_hybrid": r"continues as it does alone: True",
}


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It may seed torch without a trace in later tests; laws are tried briefly, as other tests do it at length."""
    monkeypatch.setattr(recur.testing, "check", partial(recur.testing.check, examples=3))
    with torch.random.fork_rng(devices=()):
        yield


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_its_evidence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(EVIDENCE[path.stem], printed), printed
    for difference in re.findall(r"largest difference: ([-+.e\d]+)", printed):
        assert float(difference) < 1e-4, printed  # float32 rounding of sums over a hundred tokens


def test_every_example_is_here_and_says_its_idea_first() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(EVIDENCE)
    for path in EXAMPLES:
        idea = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        assert idea[:1], path.name
        assert idea[0].endswith("."), path.name
