"""Options: from dataclass to flag, file and back; the error names the rule that was broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recur.cli import _parser, main
from recur.train.config import InputError, Settings, checked, known, plain, read_file, resolved
from recur.train.run import TASKS, configured, load_model, setup
from recur.train.tasks import LM, MQAR

OPTIONS = known(Settings, LM)


def written(tmp_path: Path, name: str, content: str) -> Path:
    (tmp_path / name).write_text(content)
    return tmp_path / name


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    # 1e-3 is text in YAML
    words = "task: lm\nlr: 1e-3\nmin-lr: 0.2\nbetas: [0.9, 0.99]\nwarmup: null\nschedule: polynomial\n"
    values = {"task": "lm", "lr": 0.001, "min_lr": 0.2, "betas": [0.9, 0.99], "warmup": None, "schedule": "polynomial"}
    one = read_file(written(tmp_path, "a.yaml", words), OPTIONS, "lm")
    other = read_file(written(tmp_path, "a.json", json.dumps(values)), OPTIONS, "lm")
    assert one == other
    assert one == {"lr": 1e-3, "min_lr": 0.2, "betas": (0.9, 0.99), "warmup": None, "schedule": "polynomial"}


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    settings, task = configured("mqar", {"recipe": "gla", "lr": 0.02, "pairs": 4, "betas": (0.8, 0.9)})
    file = written(tmp_path, "config.json", json.dumps({"task": "mqar", **plain(settings, task)}))
    chosen = read_file(file, known(Settings, MQAR), "mqar")
    assert (resolved(Settings, chosen), resolved(MQAR, chosen)) == (settings, task)


@pytest.mark.parametrize("task", TASKS)
def test_no_option_has_the_name_of_a_setting(task: str) -> None:
    assert not known(TASKS[task]).keys() & known(Settings).keys()


@pytest.mark.parametrize("task", TASKS)
def test_every_option_is_a_flag_of_its_task(task: str) -> None:
    """The default's own words, given as a flag, are the default."""
    options = known(Settings, TASKS[task])
    words = {name: option.default for name, option in options.items() if option.default is not None}
    flags: list[str] = []
    for name, value in words.items():
        if name != "recipe":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{name.replace('_', '-')}={text}")
    parsed = vars(_parser().parse_args(["task", task, "longhorn", *flags]))
    assert all(parsed[name] == words[name] for name in words if "data" not in name)


def test_flags_win_over_the_file_and_the_file_over_the_setup(tmp_path: Path, text_file: str) -> None:
    file = written(tmp_path, "run.yaml", "dim: 24\ndepth: 2\n")
    small = ["--length", "16", "--batch", "2", "--steps", "1", "--evaluate", "2", "--every", "1"]
    sources = ["--setup", "shakespeare", "--config", str(file), "--depth", "1"]
    assert main(["train", "longhorn", "--text", text_file, "--out", str(tmp_path / "run"), *sources, *small]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["depth"], saved["dim"], saved["warmup"]) == (1, 24, 100)  # flag, file, setup
    assert (saved["task"], saved["recipe"], saved["clip"]) == ("lm", "longhorn", 1.0)


BAD: dict[str, tuple[str, str, str]] = {
    "unknown": ("a.json", '{"lrr": 1}', "a.json: no option is called 'lrr'; did you mean lr"),
    "rule": ("a.json", '{"lr": -1}', "a.json: lr must be a positive number, got '-1'"),
    "choice": ("a.yaml", "schedule: linear", "schedule must be one of cosine, polynomial, inverse_sqrt, constant, got"),
    "pair": ("a.yaml", "betas: 0.9", "betas must be 2 values separated by commas, got '0.9'"),
    "null": ("a.yaml", "lr: null", "lr must be a positive number, got 'None'"),
    "list": ("a.yaml", "- 1", "must hold keys and values, got list"),
    "json": ("a.json", "{", "a.json is not valid JSON: "),
    "yaml": ("a.yaml", "a: [", "a.yaml is not valid YAML: "),
    "task": ("a.yaml", "task: mqar", "a.yaml is of another task than lm"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_of_no_use(tmp_path: Path, kind: str) -> None:
    name, content, words = BAD[kind]
    with pytest.raises(InputError, match=re.escape(words)):
        read_file(written(tmp_path, name, content), OPTIONS, "lm")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing\.yaml: no such file"):
        read_file(tmp_path / "nothing.yaml", OPTIONS, "lm")


def test_an_unknown_setup_brings_those_there_are() -> None:
    with pytest.raises(InputError, match="task copying has no setup 'big'; there are: mamba"):
        setup("copying", "big")
    with pytest.raises(InputError, match="task images has no setup 'big'; there are: none"):
        setup("images", "big")


def test_choices_of_a_call_are_read_by_the_same_rules() -> None:
    with pytest.raises(InputError, match="steps must be a whole number of at least 1, got '0'"):
        checked({"steps": 0}, OPTIONS, "here")


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit):
        main([str(word) for word in argv])
    return capsys.readouterr().err


def test_choices_that_cannot_be_met(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    command = ("train", "longhorn", "--text", text_file, "--length", 16, "--dim", 16, "--out", tmp_path / "run")
    assert "--batch must be a multiple of 1 processes times --accumulate 3, got 16" in refused(
        capsys, *command, "--accumulate", 3
    )
    assert "--device tpu is not available; here: cpu" in refused(capsys, *command, "--device", "tpu")
    assert "argument RECIPE: gla cannot be built with size=3" in refused(capsys, "train", "gla:size=3")
    assert "invalid choice: 'sing'" in refused(capsys, "task", "sing", "longhorn")


def test_a_run_of_another_task_writes_no_text(tmp_path: Path) -> None:
    from recur import train

    tiny: dict[str, Any] = {"recipe": "gla:heads=2", "dim": 16, "depth": 1, "steps": 1, "batch": 2, "evaluate": 2}
    train.fit(train.start("copying", tmp_path, {**tiny, "length": 16}))
    with pytest.raises(InputError, match="holds a run of task copying, which writes no text"):
        load_model(tmp_path)
