"""Outputs, states and gradients recorded from the official code, reproduced in every form (tests/golden.py)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import torch
from replay import Vectors
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "golden"
RUNS = [(path, form) for path in sorted(FOLDER.glob("*.safetensors")) for form in golden.forms(path)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So many tensors so small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("path", "form"), RUNS, ids=[f"{path.stem}-{form}" for path, form in RUNS])
def test_what_is_recorded_is_reproduced(path: Path, form: str) -> None:
    limit = golden.tolerance(Vectors(path))
    assert {key: error for key, error in golden.replay(path, form).items() if not error <= limit} == {}


def changed(folder: Path, stem: str, **edits: object) -> Path:
    """A copy of a recorded file with other tensors or another configuration; None leaves a tensor out."""
    vectors = Vectors(FOLDER / f"{stem}.safetensors")
    config = {**vectors.config, **edits.pop("config", {})}
    tensors = {key: tensor for key, tensor in {**vectors.tensors, **edits}.items() if tensor is not None}
    save_file(tensors, folder / f"{stem}.safetensors", {"config": json.dumps(config)})
    return folder / f"{stem}.safetensors"


def test_tensors_that_lie_anywhere_are_replayed(tmp_path: Path) -> None:
    """Complex arithmetic needs them at 16 bytes, which a header of any length takes from them."""
    vectors = Vectors(FOLDER / "gateloop_op_complex_L100_f64.safetensors")
    for more in (" ", " " * 9):
        path = tmp_path / f"{len(more)}.safetensors"
        save_file(vectors.tensors, path, {"config": json.dumps(vectors.config)})
        size, text = struct.unpack("<Q", path.read_bytes()[:8])[0], path.read_bytes()[8:]
        head, data = text[:size].rstrip(b" "), text[size:]
        head += b" " * (-len(head) % 16) + more.encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + data)
        assert {tensor.data_ptr() % 16 for tensor in Vectors(path).tensors.values()} == {0}
        assert golden.main([str(path)]) == 0


def test_the_tool_says_ok_and_leaves_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(FOLDER / "longhorn_op_L7_plain.safetensors")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("longhorn_op_L7_plain: output ")
    assert said.endswith(" ok\n")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"state.last": torch.ones(2, 5, 3, dtype=torch.float64)}, "FAIL above 1.0e-09: other results"),
        ({"grad.input.q": torch.ones(2, 3, 7, dtype=torch.float64)}, "FAIL above 1.0e-09: gradients"),
        ({"output": torch.ones(2, 5, 7)}, "FAIL Mismatch: output is torch.float64 [2, 5, 7], recorded torch.float32"),
        ({"state.first": torch.ones(2)}, "FAIL Mismatch: state.first is recorded, and ours has none"),
        ({"input.k": None}, "FAIL TypeError"),
        ({"config": {"case": "warp_drive"}}, "unsupported no case 'warp_drive'"),
    ],
)
def test_the_tool_says_what_is_wrong_and_leaves_with_1(
    edits: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = FOLDER / "mamba_op_L7_plain.safetensors", changed(tmp_path, "longhorn_op_L7_plain", **edits)
    assert golden.main([str(wrong), str(right)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert words in first
    assert second.endswith(" ok")


def test_cotangents_of_states_count(tmp_path: Path) -> None:
    stem = "wider_dplr_op_T64_statecot"
    other = {"cotangent.final": torch.ones(1, 1, 6, 5, dtype=torch.float64)}
    assert golden.line(FOLDER / f"{stem}.safetensors").endswith(" ok")
    assert "FAIL above 1.0e-09: gradients" in golden.line(changed(tmp_path, stem, **other))


def test_the_tool_finds_no_agreement_in_no_files() -> None:
    assert golden.main([]) == 1
