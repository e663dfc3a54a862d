"""The page on a recurrence of your own runs from top to bottom and prints what it says."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import recur.testing

PAGE = (Path(__file__).parent.parent / "docs" / "own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_code_runs_and_prints_what_the_page_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recur.testing, "check", partial(recur.testing.check, examples=3))
    names: dict[str, object] = {}
    shown = 0
    with torch.random.fork_rng(devices=()):
        for (language, code), (after, text) in pairwise([*BLOCKS, ("", "")]):
            if language == "python":
                exec(code, names)
                printed = capsys.readouterr().out
                assert printed == (text if after == "text" else "")
                shown += after == "text"
    assert shown == 2


def test_its_recurrence_has_at_most_twenty_lines() -> None:
    (code,) = (code for language, code in BLOCKS if language == "python" and "def halfway_delta" in code)
    assert len(code.splitlines()) <= 20
