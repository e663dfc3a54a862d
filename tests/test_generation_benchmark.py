"""benchmarks/generation.py at toy size: every model is measured, and what it writes says so."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "generation.py"


def test_a_state_grows_with_attention_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests keep theirs
    sizes = ["--dim", "16", "--depth", "4", "--contexts", "8", "16", "--batches", "1", "2", "--tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *sizes, "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    points = json.loads((tmp_path / "generation_cpu.json").read_text())["points"]
    assert (tmp_path / "generation_cpu.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "generation_cpu.png").stat().st_size > 10_000
    assert all(point["step_ms"] > 0 for point in points)
    for name in {point["model"] for point in points}:
        short, long, two = [point["state_bytes"] for point in points if point["model"] == name]
        assert two == short
        assert (long > short) == ("attention" in name), name
    caches = [point["state_bytes"] for point in points if point["model"].startswith("llama")]
    assert caches[1] - caches[0] == pytest.approx(4 * 2 * 8 * 16 * 4)  # layers, keys and values, tokens, D, bytes
