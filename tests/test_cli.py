"""The commands: what they print, and one clear line for each input that is invalid."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recur
from recur import train
from recur.blocks.quantise import quantised
from recur.cli import main

TINY = ["--dim", "16", "--depth", "1", "--steps", "4", "--batch", "2", "--length", "16", "--every", "2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    """A finished run of four steps."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    choices = {"text": text_file, "dim": 16, "depth": 1, "steps": 4, "batch": 2, "length": 16}
    train.fit(train.start("lm", out, choices))
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that `recur argv` leaves on stderr."""
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.fullmatch(r"recur: error: [^\n]+\n", printed.err), printed.err
    assert printed.out == ""
    return printed.err


def test_train_reports_and_resumes(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    out = tmp_path / "run"
    assert main(["train", "longhorn", "--text", text_file, "--out", str(out), *TINY]) == 0
    first = capsys.readouterr()
    assert str(recur.presets.longhorn()) in first.out
    assert re.search(r"depth 1, width 16: [\d,]+ parameters", first.out)
    assert re.search(r"valid: loss \d\.\d+ nats per character \(\d\.\d+ bits\)", first.out)
    assert re.search(r"single-token entropy \d\.\d+, pair entropy \d\.\d+", first.out)
    assert re.search(r"loss \d\.\d+, [\d,]+ tokens/s", first.err)
    kept = {"config.json", "curve.csv", "curve.png", "history.json", "step-00000004", "tensorboard"}
    assert {path.name for path in out.iterdir()} == kept
    drawn = first.out.split("-" * 80)[1].strip("\n")
    assert len(drawn) >= 300

    assert main(["train", "longhorn", "--out", str(out), "--resume"]) == 0  # a finished run reports again
    assert capsys.readouterr().out == first.out


def test_generate_is_decided_by_its_seed(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    written = []
    for seed in ("0", "0", "1"):
        assert main(["generate", str(run_folder), "--prompt", "the ", "--max-new-tokens", "40", "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert written[0].startswith("the ")
    assert len(written[0]) == 4 + 40 + 1  # prompt, new characters, end of line
    assert written[0] == written[1] != written[2]
    letter = written[0][14]
    assert main(["generate", str(run_folder), "--prompt", "the ", "--seed", "0", "--stop", letter]) == 0
    assert capsys.readouterr().out == written[0][: written[0].index(letter, 4) + 1] + "\n"


def test_list_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recur.presets.names()
    assert all(len(line.split()) > 1 for line in lines)


def test_show_prints_the_recipe_and_with_a_width_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "longhorn"]) == 0
    assert capsys.readouterr().out.strip() == str(recur.presets.longhorn()).strip()
    assert main(["show", "longhorn", "--dim", "32"]) == 0
    assert capsys.readouterr().out.strip() == str(recur.Mixer(recur.presets.longhorn(), 32)).strip()


def test_check_lists_kept_and_broken_laws(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import recur.testing

    checked = []

    def kept(recipe: recur.Recipe, *, report: Callable[[str], None]) -> None:
        checked.append(recipe)
        report("forms: all forms agree")

    monkeypatch.setattr(recur.testing, "check", kept)
    assert main(["check", "longhorn"]) == 0
    assert capsys.readouterr().out == "forms: all forms agree\nlonghorn: every law that applies holds\n"
    assert checked == [recur.presets.longhorn()]

    def broken(recipe: recur.Recipe, *, report: Callable[[str], None]) -> None:
        raise AssertionError("split at 3 differs by 0.5")

    monkeypatch.setattr(recur.testing, "check", broken)
    assert main(["check", "longhorn"]) == 1
    assert capsys.readouterr().err == "longhorn breaks a law:\nsplit at 3 differs by 0.5\n"


def test_generate_with_weights_in_eight_bits_says_what_they_cost(
    capsys: pytest.CaptureFixture[str], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for torchao, which rounds the weights of the modules it is to change."""
    ask = ["generate", str(run_folder), "--prompt", "the ", "--max-new-tokens", "9", "--quantize", "int8"]
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao is not installed: pip install -e '.[quantize]' in a clone of recur" in refused(capsys, *ask)
    changed = []

    def quantize_(model: torch.nn.Module, configuration: str, filter_fn: Any) -> None:
        for path, module in model.named_modules():
            if filter_fn(module, path):
                changed.append(path)
                module.weight.copy_((module.weight * 8).round() / 8)

    standin = SimpleNamespace(quantize_=quantize_, Int8WeightOnlyConfig=lambda: "int8")
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=standin))
    monkeypatch.setitem(sys.modules, "torchao.quantization", standin)
    assert main(ask) == 0
    before, after = map(float, re.findall(r"\d+\.\d{4}", capsys.readouterr().err))
    assert before != after
    assert any("project" in path for path in changed)
    with pytest.raises(ValueError, match="quantised: kind must be one of int8, fp8, got 'int3'"):
        quantised(recur.LanguageModel("gla:heads=1", vocab_size=3, dim=8, depth=1), "int3")


@pytest.mark.parametrize("command", ["list", "show", "check", "train", "task", "compare", "data", "generate", "bench"])
def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"examples:\n  recur {command}" in capsys.readouterr().out


BENCH = ["bench", "--device", "cpu", "--form", "chunked"]


def test_bench_measures_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    families = ["none", "decode scalar", "gated_delta grouped", "gated_delta packed"]
    shapes = ["1,64,1,2,2", "2,1,2,2", "1,8,1,2,2,2"]
    tiny = ["--families", *families, "--shapes", *shapes, "--out", str(tmp_path)]
    assert main([*BENCH, *tiny]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["family"] for line in printed] == families
    assert all(json.loads(line)["y_error"] < 4e-3 for line in printed)  # one rounding to bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.png"}
    assert "| none | 1×64×1×2×2 | recur |" in (tmp_path / "gpu.md").read_text()
    assert (
        "| decode scalar | 2×1×2×2 | mamba_ssm selective_state_update | not run here |"
        in (tmp_path / "gpu.md").read_text()
    )
    assert main([*BENCH, *tiny, "--have", str(tmp_path / "gpu.json")]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_bench_names_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--families must be of keywise, scalar, " in refused(capsys, *BENCH, "--families", "loud")
    assert "argument --shapes: must be a whole number of at least 1, got 'x'" in refused(capsys, *BENCH, "--shapes=1,x")
    if not torch.cuda.is_available():
        assert "--device cuda is not available here" in refused(capsys, "bench")


BAD_TEXTS = {
    "missing": (None, "cannot read .*: no such file or directory"),
    "empty": (b"", "must hold text, got an empty file"),
    "blank": (b" \n\n", "must hold text, got an empty file"),
    "binary": (b"\x89PNG\r\n\x1a\n\xff", "must be UTF-8 text, got other bytes at offset 0"),
    "zeros": (b"abc\0def", "must be UTF-8 text, got a zero byte at offset 3"),
    "short": (b"too short to learn from", "text must have at least 1290 tokens for --length 128, got 23"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_text_of_no_use(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    content, words = BAD_TEXTS[kind]
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    said = refused(capsys, "train", "longhorn", "--text", path, "--length", 128, "--out", tmp_path / "run")
    assert re.search(words, said), said
    assert not (tmp_path / "run").exists()


def test_a_folder_without_tokens_is_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refused(capsys, "train", "longhorn", "--text", tmp_path, "--out", tmp_path / "run")
    assert "holds no tokens: make them with recur data" in said


@pytest.mark.parametrize("command", ["show", "check", "train"])
def test_an_unknown_preset_brings_near_names(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "no preset is called 'longhron'; did you mean longhorn?" in refused(capsys, command, "longhron")
    assert "'xyz'; known presets: " in refused(capsys, command, "xyz")


def test_an_out_that_is_no_folder_is_refused_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str
) -> None:
    (tmp_path / "file").write_text("taken")
    words = refused(capsys, "train", "longhorn", "--text", text_file, "--length", 16, "--out", tmp_path / "file")
    assert f"cannot write to --out {tmp_path / 'file'}" in words


def test_a_width_that_does_not_divide(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    words = "hgrn2 cannot be built with --dim 7: "
    assert words in refused(capsys, "show", "hgrn2", "--dim", 7)
    arguments = ("--text", text_file, "--length", 16, "--dim", 7, "--out", tmp_path / "run")
    assert words in refused(capsys, "train", "hgrn2", *arguments)


BAD_VALUES = {
    "--dim": ("0", "a whole number of at least 1, got '0'"),
    "--steps": ("many", "a whole number of at least 1, got 'many'"),
    "--lr": ("-1", "a positive number, got '-1'"),
    "--dropout": ("1", "a number from 0 up to but not including 1, got '1'"),
    "--seed": ("-3", "a whole number from 0 to 2^63 - 1, got '-3'"),
}


@pytest.mark.parametrize("option", BAD_VALUES)
def test_a_value_out_of_range(capsys: pytest.CaptureFixture[str], option: str) -> None:
    value, words = BAD_VALUES[option]
    assert f"argument {option}: must be {words}" in refused(capsys, "train", "longhorn", f"{option}={value}")


@pytest.mark.parametrize("argv", [[], ["sing"], ["train"], ["train", "longhorn", "--loud"]])
def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    refused(capsys, *argv)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    arguments = ("train", "longhorn", "--text", text_file, "--length", 16, "--out", tmp_path / "run", "--device")
    assert "--device abacus is not available" in refused(capsys, *arguments, "abacus")
    assert "--device cuda:99 is not available" in refused(capsys, *arguments, "cuda:99")


def test_a_run_is_not_overwritten(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    assert "already holds a run: continue it with --resume" in refused(capsys, "train", "longhorn", "--out", run_folder)


RESUMED = {
    "recipe": (["hgrn2"], "the run was started with recipe longhorn, got hgrn2"),
    "width": (["longhorn", "--dim", "32"], "the run was started with dim 16, got 32"),
    "task": (["longhorn"], "the run was started with task lm, got mqar"),
    "fewer steps": (["longhorn", "--steps", "3"], "started with steps 4, got 3; it has taken 4 already"),
    "higher rate": (["longhorn", "--lr", "1"], "with lr 0.003, got 1.0; a rate may only be lowered: begin a new run"),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_with_other_settings(capsys: pytest.CaptureFixture[str], run_folder: Path, kind: str) -> None:
    words, said = RESUMED[kind]
    command = ("task", "mqar") if kind == "task" else ("train",)
    assert said in refused(capsys, *command, *words, "--resume", "--out", run_folder)


def test_resuming_with_a_file_of_settings(
    capsys: pytest.CaptureFixture[str], run_folder: Path, tmp_path: Path, text_file: str
) -> None:
    """A file, a setup and the run's own edited configuration are compared as flags are."""
    out, file = tmp_path / "run", tmp_path / "some.json"
    shutil.copytree(run_folder, out)
    resume = ("train", "longhorn", "--resume", "--out", out)
    file.write_text('{"dim": 32}')
    assert "the run was started with dim 16, got 32" in refused(capsys, *resume, "--config", file)
    assert "the run was started with dim 16, got 384" in refused(capsys, *resume, "--setup", "shakespeare")
    choices = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**choices, "depth": 2}))
    words = f"the run was started with depth 1, got 2 in {out / 'config.json'}"
    assert words in refused(capsys, *resume)
    file.write_text('{"lr": 0.001, "steps": 5}')
    (out / "config.json").write_text(json.dumps({**choices, "lr": 0.002}))
    assert main([*map(str, resume), "--config", str(file)]) == 0
    assert (
        "recur: resuming after step 4 with steps: 4 -> 5, lr: 0.003 -> 0.001, learning rate" in capsys.readouterr().err
    )
    (out / "config.json").write_text("{")
    assert main([*map(str, resume)]) == 0
    said = capsys.readouterr().err
    assert "recur: ignoring the configuration of the run: " in said
    assert "resuming after" not in said


def test_resuming_with_another_text(capsys: pytest.CaptureFixture[str], run_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else " * 50)
    said = refused(capsys, "train", "longhorn", "--resume", "--out", run_folder, "--text", other)
    assert "needs the data that the run in" in said


def test_a_checkpoint_that_is_missing_or_damaged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str
) -> None:
    out = tmp_path / "run"
    for command in (("train", "longhorn", "--resume", "--out", out), ("generate", out, "--prompt", "the ")):
        assert f"no checkpoint in {out}" in refused(capsys, *command)
    assert main(["train", "longhorn", "--text", text_file, "--out", str(out), *TINY]) == 0
    capsys.readouterr()
    with (out / "step-00000004" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for command in (("train", "longhorn", "--resume", "--out", out), ("generate", out, "--prompt", "the ")):
        assert "is damaged: model.safetensors changed after it was written" in refused(capsys, *command)


def test_generate_takes_the_checkpoint_asked_for(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    ask = ("generate", run_folder, "--prompt", "the ", "--max-new-tokens", 3, "--checkpoint")
    assert main([*map(str, ask), "best"]) == 0
    best = capsys.readouterr()
    assert best.err == ""
    assert main([*map(str, ask), "4"]) == 0
    assert capsys.readouterr().out == best.out
    assert "no checkpoint of step 3 in" in refused(capsys, *ask, 3)
    assert "--checkpoint: must be best, newest or a step, got 'last'" in refused(capsys, *ask, "last")


def test_a_prompt_the_vocabulary_lacks(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    assert "lacks '°' 'ß'" in refused(capsys, "generate", run_folder, "--prompt", "the ß°")
    assert "prompt must have at least one character" in refused(capsys, "generate", run_folder, "--prompt", "")


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "tqdm is not installed: pip install -e '.[train]' in a clone of recur" in refused(
        capsys, "train", "longhorn"
    )


@pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="tomllib came with Python 3.11")
def test_every_package_is_distributed() -> None:
    import tomllib

    top = Path(__file__).parent.parent
    listed = tomllib.loads((top / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(top).parts) for path in top.glob("recur/**/__init__.py")}
    assert set(listed) == found | {"recur.kernels"}
