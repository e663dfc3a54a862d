"""`recur convert`: official files in, ours out, and back; one clear line for each file that is no use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recur import LanguageModel, convert, presets
from recur.cli import main
from recur.convert.files import CheckpointError

CONFIG = {"d_model": 8, "n_layer": 2, "vocab_size": 10, "ssm_cfg": {"d_state": 2}}


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return convert.to_official("mamba_lm", LanguageModel(presets.mamba(state=2), vocab_size=16, dim=8, depth=2))


@pytest.fixture
def folder(tmp_path: Path, official: dict[str, Tensor]) -> Path:
    torch.save(official, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_there_and_back(
    ending: str, folder: Path, official: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = folder / "ours.safetensors", folder / f"back.{ending}"
    assert main(["convert", str(folder / "pytorch_model.bin"), str(ours), "--from", "mamba_lm"]) == 0
    assert re.fullmatch(
        r".*ours\.safetensors: mamba_lm as a module of recur, [\d,]+ parameters\n", capsys.readouterr().out
    )
    name, config, module = convert.load_module(ours)
    assert (name, config) == ("mamba_lm", CONFIG)
    ids = torch.arange(10)[None]
    assert torch.equal(module(ids), convert.from_official("mamba_lm", official, CONFIG)(ids))
    assert main(["convert", str(ours), str(back), "--to", "mamba_lm"]) == 0
    assert same(convert.read_checkpoint(back)[0], official)
    assert not list(folder.glob(".*"))


def test_from_one_official_layout_to_another(folder: Path, official: dict[str, Tensor]) -> None:
    source, target = folder / "pytorch_model.bin", folder / "model.safetensors"
    assert main(["convert", str(source), str(target), "--from", "mamba_lm", "--to", "mamba_hf"]) == 0
    renamed = {key.replace(".embedding.", ".embeddings."): tensor for key, tensor in official.items()}
    assert same(load_file(target), renamed)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_training_script_may_have_wrapped_it(key: str, tmp_path: Path, official: dict[str, Tensor]) -> None:
    torch.save({key: official, "step": 7}, tmp_path / "last.pt")
    assert same(convert.read_checkpoint(tmp_path / "last.pt")[0], official)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["convert", *map(str, argv)])
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.fullmatch(r"recur: error: [^\n]+\n", printed.err), printed.err
    return printed.err


def test_what_does_not_fit_is_listed_and_nothing_is_written(
    folder: Path, official: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    partial = {key: tensor for key, tensor in official.items() if not key.endswith("norm_f.weight")}
    save_file({**partial, "extra": torch.zeros(1)}, folder / "odd.safetensors")
    said = refused(capsys, folder / "odd.safetensors", folder / "out.safetensors", "--from", "mamba_lm")
    assert "missing: backbone.norm_f.weight unexpected: extra" in said
    assert not (folder / "out.safetensors").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_pickle_that_runs_code_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Payload()}, folder / "bad.pt")
    said = refused(capsys, folder / "bad.pt", folder / "out.safetensors", "--from", "mamba_lm")
    assert "must hold tensors and nothing that runs" in said


def test_files_that_are_no_use_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out, mamba = folder / "pytorch_model.bin", folder / "out.safetensors", ("--from", "mamba_lm")
    (folder / "torn.safetensors").write_bytes(b"\x10")
    (folder / "torn.bin").write_bytes(good.read_bytes()[:100])
    torch.save([1, 2], folder / "list.pt")
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("{")
    cases = {
        (folder / "none.pt", out, *mamba): "there is no file .*none.pt",
        (folder / "model.gguf", out, *mamba): r"must end in \.safetensors, \.pt, \.pth, \.bin",
        (folder / "torn.safetensors", out, *mamba): r"torn\.safetensors is damaged",
        (folder / "torn.bin", out, *mamba): r"torn\.bin is damaged",
        (folder / "list.pt", out, *mamba): "must hold a state_dict, or one under state_dict, model_state_dict, model",
        (good, folder / "out.txt", *mamba): r"must end in \.safetensors to hold a module of recur",
        (good, folder / "out.txt", *mamba, "--to", "mamba_hf"): r"must end in \.safetensors, \.pt",
        (good, out, *mamba, "--config", folder / "none.json"): "name the constructor's arguments with --config",
        (good, out, *mamba, "--config", folder / "list.json"): "must hold an object, got list",
        (good, out, *mamba, "--config", folder / "text.json"): "is no JSON",
        (good, out): "is no module of recur; say what it is with --from",
        (good, out, *mamba, "--to", "longhorn_lm"): "every parameter must have an official place",
    }
    for argv, words in cases.items():
        assert re.search(words, refused(capsys, *argv)), argv


def test_a_module_of_ours_must_fit_its_own_name(folder: Path, official: dict[str, Tensor]) -> None:
    module = convert.from_official("mamba_lm", official, CONFIG)
    convert.save_module(folder / "ours.safetensors", "mamba_lm", {**CONFIG, "n_layer": 1}, module)
    with pytest.raises(CheckpointError, match=r"does not fit mamba_lm: blocks\.1\.mixer"):
        convert.load_module(folder / "ours.safetensors")


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder / "model.pt"
    target.write_text("precious")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.write_checkpoint(target, {"a": torch.zeros(1)})
    assert target.read_text() == "precious"
    assert not list(folder.glob(".*"))
