"""Runs: one process per folder, nothing good is overwritten, a run goes on from what it was or says what changed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recur import convert, presets, train
from recur.cli import main
from recur.train import InputError, Training, checkpoint, lock, trainer
from recur.train import digest as digest_module
from recur.train.digest import changes, differences, digests
from recur.train.events import Events
from recur.train.lock import hold

TINY = {"recipe": "min_gru", "dim": 8, "depth": 1, "steps": 6, "batch": 2, "length": 16, "every": 2, "evaluate": 4}


def begin(out: Path, text_file: str, **choices: Any) -> Training:
    return train.start("lm", out, {**TINY, "text": text_file, **choices})


def flags(out: Path, text_file: str, **choices: Any) -> list[str]:
    """The same by the command line."""
    named = {**TINY, "text": text_file, **choices, "out": out}
    recipe = str(named.pop("recipe"))
    return ["train", recipe, *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


def taken_up(out: Path, **choices: Any) -> tuple[Training, list[str]]:
    """The run in `out` and what is said about it."""
    said: list[str] = []
    settings, task = train.run.configured("lm", choices)
    return train.prepare(task, settings, out, resume=choices, say=said.append), said


def after_step(step: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `act` called when the update of this step has been made."""
    update = trainer._update

    def acting(run: Training, rate: float) -> tuple[torch.Tensor, int]:
        made = update(run, rate)
        if run.step + 1 == step:
            act()
        return made

    monkeypatch.setattr(trainer, "_update", acting)


def damage(folder: Path) -> None:
    os.truncate(folder / checkpoint.MODEL, 20)


# ---------------------------------------------------------------------- one process per folder


def test_a_folder_in_use_is_refused(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    words = f"run is in use by process {os.getpid()} on {platform.node()}, since 2.*: wait until it ends, or choose"
    for resume in (False, True):
        with pytest.raises(InputError, match=words):
            train.start("lm", tmp_path / "run", {**TINY, "text": text_file, "seed": 1}, resume=resume)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    train.fit(run)
    assert not (tmp_path / "run" / lock.LOCK).exists()
    taken_up(tmp_path / "run")  # and forgotten: what nobody uses any more is released
    train.fit(taken_up(tmp_path / "run")[0])


def test_a_comparison_and_tokens_hold_their_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str
) -> None:
    with hold(tmp_path):
        for command in (["compare", "min_gru"], ["data", text_file]):
            with pytest.raises(SystemExit):
                main([*command, "--out", str(tmp_path)])
            assert "is in use by process" in capsys.readouterr().err


def test_refusal_before_training_releases_the_folder(tmp_path: Path, text_file: str) -> None:
    train.fit(begin(tmp_path / "run", text_file))
    for _ in range(2):
        with pytest.raises(InputError, match="already holds a run"):
            begin(tmp_path / "run", text_file)
    assert not (tmp_path / "run" / lock.LOCK).exists()
    with pytest.raises(InputError, match="--out must be the folder of a run, got one of its checkpoints"):
        taken_up(tmp_path / "run" / "step-00000006")


def test_two_that_start_at_once(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one came and went while this one read its data."""
    opened = train.run.TASKS["lm"].open

    def slow(task: Any, settings: Any) -> None:
        monkeypatch.setattr(train.run.TASKS["lm"], "open", opened)
        train.fit(begin(tmp_path / "run", text_file))
        opened(task, settings)

    monkeypatch.setattr(train.run.TASKS["lm"], "open", slow)
    with pytest.raises(InputError, match="already holds a run"):
        begin(tmp_path / "run", text_file, seed=1)
    assert checkpoint.read_record(tmp_path / "run")[1].config["seed"] == 0


def sign(folder: Path, **holder: Any) -> None:
    (folder / lock.LOCK).write_text(
        json.dumps({"pid": os.getpid(), "host": platform.node(), "since": "then", **holder})
    )


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    said: list[str] = []
    sign(tmp_path, pid=1)
    hold(tmp_path, said.append).release()
    (tmp_path / lock.LOCK).write_text("no JSON")
    hold(tmp_path, said.append).release()
    assert said == []
    sign(tmp_path, pid=7, host="elsewhere")
    with hold(tmp_path, said.append):
        assert said == [
            f"{tmp_path / 'lock'} was left behind by process 7 on elsewhere, since then: "
            "if that is still running, stop it"
        ]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_under_its_holder(tmp_path: Path) -> None:
    first = hold(tmp_path)
    (tmp_path / lock.LOCK).unlink()
    with hold(tmp_path):
        first.release()
        assert (tmp_path / lock.LOCK).exists()  # of the second


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with hold(tmp_path), pytest.raises(InputError, match="is in use by process"):
        hold(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    sign(tmp_path, pid=child)
    hold(tmp_path).release()
    sign(tmp_path, host="elsewhere")
    with pytest.raises(InputError, match=r"is in use by process .* on elsewhere"):
        hold(tmp_path)

    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(InputError, match=f"cannot write to --out {tmp_path}: input/output error"):
        hold(tmp_path)


# ---------------------------------------------------------------------- what is not finite is not saved


@pytest.mark.parametrize("kind", ["weight", "moment", "validation"])
def test_what_is_not_finite_never_replaces_a_checkpoint(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = begin(tmp_path / "run", text_file)
    name, weight = next(iter(checkpoint.named(run.plain_model).items()))

    def poison() -> None:
        with torch.no_grad():
            if kind == "weight":
                weight[0, 0] = torch.nan
            elif kind == "moment":
                run.optimizer.optimizer.state[weight]["exp_avg_sq"][0, 0] = torch.inf
        if kind == "validation":
            monkeypatch.setattr(trainer, "evaluate", lambda run, split: {"loss": float("inf")})

    after_step(4, poison, monkeypatch)
    problem = {
        "weight": rf"weights or moments are not finite after step 4 \({name}\)",
        "moment": rf"weights or moments are not finite after step 4 \(exp_avg_sq of {name}\)",
        "validation": "the validation loss is inf after step 4",
    }
    last = tmp_path / "run" / "step-00000002"
    with pytest.raises(
        InputError, match=f"{problem[kind]}: try a smaller --lr; the last good checkpoint is {last}: continue"
    ):
        train.fit(run)
    monkeypatch.undo()
    resumed, said = taken_up(tmp_path / "run", lr=1e-4)
    assert resumed.step == 2
    assert len(said) == 1
    assert said[0].startswith("resuming after step 2 with lr: 0.003 -> 0.0001, learning rate of the next step: 0.00")
    train.fit(resumed)
    assert resumed.curve[-1]["lr"] < 1e-4
    assert all(tensor.isfinite().all() for tensor in resumed.plain_model.state_dict().values())


def test_the_first_loss_is_no_number(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file)
    with torch.no_grad():
        next(run.model.parameters()).fill_(torch.nan)
    with pytest.raises(
        InputError, match="the loss is nan at step 1: try a smaller --lr; there is no checkpoint yet: start"
    ):
        train.fit(run)
    train.fit(begin(tmp_path / "run", text_file))


# ---------------------------------------------------------------------- signals and full disks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    out, whole = tmp_path / "a run", tmp_path / "whole"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        after_step(3, lambda: os.kill(os.getpid(), number), patch)
        assert main(flags(out, text_file)) == 128 + number
    assert signal.getsignal(number) is before
    kept, command = out / "step-00000003", f"recur train min_gru --out '{out}' --resume"
    said = capsys.readouterr().out
    assert said.endswith(f"\nstopped by {number.name} at step 3 of 6: {kept} is kept; continue with: {command}\n")
    assert main(shlex.split(command)[1:]) == 0
    assert main(flags(whole, text_file)) == 0
    curves = [json.loads((folder / "history.json").read_text())["curve"] for folder in (out, whole)]
    assert curves[0] == curves[1]


def test_a_second_interrupt_stops_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    after_step(3, twice, monkeypatch)
    assert main(flags(tmp_path / "run", text_file)) == 130
    said = capsys.readouterr().out
    assert f"stopped by SIGINT at step 2 of 6: {tmp_path / 'run' / 'step-00000002'} is kept" in said
    assert {path.name for path in (tmp_path / "run").glob("*step*")} == {"step-00000002"}
    assert main(flags(tmp_path / "other", text_file, every=6)) == 130
    assert "stopped by SIGINT at step 2 of 6: nothing is kept" in capsys.readouterr().out


def test_a_signal_while_saving(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that is being written is finished."""
    flush = checkpoint._flush

    def signalled(path: Path) -> None:
        monkeypatch.setattr(checkpoint, "_flush", flush)
        os.kill(os.getpid(), signal.SIGTERM)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", signalled)
    assert main(flags(tmp_path / "run", text_file, steps=2)) == 143
    assert checkpoint.read_record(tmp_path / "run")[1].step == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_a_disk_that_is_full_when_the_report_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recur.train.plot.write_history", full)
        with pytest.raises(SystemExit):
            main(flags(tmp_path / "run", text_file))
    expected = (
        f"recur: error: cannot write the report in {tmp_path / 'run'}: no space left on device; --resume writes it"
    )
    assert expected in capsys.readouterr().err
    assert main(["train", "min_gru", "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_a_disk_that_is_full_stops_a_run_with_one_line(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run", text_file)

    def full(tensors: object, place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    after_step(3, lambda: monkeypatch.setattr(checkpoint, "save_file", full), monkeypatch)
    last = tmp_path / "run" / "step-00000002"
    with pytest.raises(
        InputError, match=f"cannot save step 4 in .*: no space left on device; the last good .* is {last}: "
    ):
        train.fit(run)


def test_events_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write to .*/nowhere/tensorboard: no such file"):
        Events(tmp_path / "nowhere" / "tensorboard", 0)
    events = Events(tmp_path / "tensorboard", 0)
    events._file.close()
    events._file = open("/dev/full", "ab", 0)  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot write to .*/tensorboard: no space left on device"):
        events.add([{"step": 1, "loss": 0.5}])
    events.close()


# ---------------------------------------------------------------------- going on


def test_a_finished_run_goes_on(tmp_path: Path, text_file: str) -> None:
    train.fit(begin(tmp_path / "run", text_file, schedule="constant", warmup=0))
    run, said = taken_up(tmp_path / "run", steps=9, every=3)
    assert said == [
        "resuming after step 6 with steps: 6 -> 9, every: 2 -> 3, learning rate of the next step: 0.003 -> 0.003"
    ]
    train.fit(run)
    whole = begin(tmp_path / "whole", text_file, schedule="constant", warmup=0, steps=9)
    train.fit(whole)
    assert [point["loss"] for point in run.curve] == [point["loss"] for point in whole.curve]
    assert taken_up(tmp_path / "run")[1] == []


def test_a_changed_rate_outlives_a_damaged_checkpoint(tmp_path: Path, text_file: str) -> None:
    """The newest choice is in config.json, even if no whole checkpoint has it."""
    run = begin(tmp_path / "run", text_file, keep=4)
    run.signal = signal.SIGTERM
    train.fit(run)
    assert run.step == 1
    train.fit(taken_up(tmp_path / "run", lr=1e-4)[0])
    for step in (4, 6):
        damage(tmp_path / "run" / f"step-0000000{step}")
    damage(tmp_path / "run" / "step-00000002")
    run, said = taken_up(tmp_path / "run")
    assert run.step == 1
    assert run.settings.lr == 1e-4
    assert [line.split(";")[0].split(",")[0] for line in said] == [
        "using step-00000001",
        "resuming after step 1 with lr: 0.003 -> 0.0001",
    ]
    train.fit(run)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")][-3:] == [
        "step-00000004-2", "step-00000006", "step-00000006-2",
    ]  # fmt: skip
    assert taken_up(tmp_path / "run")[0].step == 6


def test_the_recipe_of_a_file_is_compared(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, recipe = tmp_path / "recipe.json", presets.gla().to_dict()
    file.write_text(json.dumps(recipe))
    train.fit(begin(tmp_path / "run", text_file, recipe=f"@{file}", steps=2))
    monkeypatch.chdir(tmp_path)
    assert taken_up(tmp_path / "run", recipe="@recipe.json")[1] == [
        f"resuming after step 2 with recipe: @{file} -> @recipe.json"
    ]
    gate = next(i for i, part in enumerate(recipe["parts"]) if part["part"] == "OutputGate")
    recipe["parts"][gate]["act"] = "sigmoid"
    file.write_text(json.dumps(recipe))
    words = rf"recipe @.* is not the one that .* began with: recipe\[0\].parts\[{gate}\].act 'silu', now 'sigmoid'$"
    with pytest.raises(InputError, match=words):
        taken_up(tmp_path / "run")
    with pytest.raises(InputError, match=f"the run was started with recipe @{file}, got gla"):
        taken_up(tmp_path / "run", recipe="gla")


def test_a_recipe_that_this_version_cannot_read(tmp_path: Path, text_file: str) -> None:
    train.fit(begin(tmp_path / "run", text_file, steps=2))
    folder = checkpoint.read_record(tmp_path / "run")[0]
    content = json.loads((folder / checkpoint.RECORD).read_text())
    content["record"]["recipes"] = [{"parts": [{"part": "Teleport"}], "axes": {}, "inputs": {}, "source": ""}]
    content["sha256"] = checkpoint._digests(folder, content["record"])
    (folder / checkpoint.RECORD).write_text(json.dumps(content))
    for use in (taken_up, train.load_model):
        with pytest.raises(InputError, match=r"this version of recur cannot read the recipe of the run in .*Teleport"):
            use(tmp_path / "run")


def without_frames(out: Path) -> None:
    """Make the run's record one of a version whose recipes held no frame."""
    folder = checkpoint.read_record(out)[0]
    content = json.loads((folder / checkpoint.RECORD).read_text())
    for recipe in content["record"]["recipes"]:
        del recipe["frame"]
    content["sha256"] = checkpoint._digests(folder, content["record"])
    (folder / checkpoint.RECORD).write_text(json.dumps(content))


@pytest.mark.parametrize("recipe", ["gla:heads=2", "gss", "rwkv:heads=2", "min_gru+llama:heads=2"])
def test_a_run_recorded_before_recipes_had_a_frame_loads_as_it_was_trained(
    tmp_path: Path, text_file: str, recipe: str
) -> None:
    run = begin(tmp_path / "run", text_file, recipe=recipe, steps=2, dim=16, depth=2)
    train.fit(run)
    without_frames(tmp_path / "run")
    model, _ = train.load_model(tmp_path / "run")
    assert model.arguments["recipe"] == run.task.recipes(run.settings)
    for name, weight in run.plain_model.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    again, said = taken_up(tmp_path / "run")
    assert said == []
    assert again.step == 2


def test_such_a_run_has_the_norm_it_was_trained_with_though_its_preset_has_none_now(
    tmp_path: Path, text_file: str
) -> None:
    train.fit(begin(tmp_path / "run", text_file, recipe="dss", norm="rms", steps=2))
    without_frames(tmp_path / "run")
    folder = checkpoint.read_record(tmp_path / "run")[0]
    content = json.loads((folder / checkpoint.RECORD).read_text())
    content["record"]["config"]["norm"] = "paper"
    content["sha256"] = checkpoint._digests(folder, content["record"])
    (folder / checkpoint.RECORD).write_text(json.dumps(content))
    assert train.load_model(tmp_path / "run")[0].arguments["norm"] == "rms"


def test_token_bins_are_compared_by_content(tmp_path: Path, text_file: str) -> None:
    bins = tmp_path / "bins"
    assert main(["data", text_file, "--tokenizer", "byte", "--out", str(bins)]) == 0
    train.fit(begin(tmp_path / "run", str(bins), steps=2))
    moved = shutil.copytree(bins, tmp_path / "moved")
    assert taken_up(tmp_path / "run", text=str(moved))[1] == [f"resuming after step 2 with text: {bins} -> {moved}"]
    with (bins / "train.bin").open("r+b") as file:
        file.seek(700)
        file.write(b"?")
    with pytest.raises(
        InputError, match=r"needs the data that the run in .* got a different one: --text: train.bin changed$"
    ):
        taken_up(tmp_path / "run", text=str(bins))


def test_a_stream_is_compared_by_name() -> None:
    """It has no digest, so another place may hold another text."""
    record = checkpoint.Record(config={}, recipes=[], task={"tokenizer": {}}, step=1, curve=[], data={})
    assert not trainer._may_change("text", "hub:one", "hub:other", record)


def test_digests_see_content_size_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "BLOCK", 4)
    monkeypatch.setattr(digest_module, "BLOCKS", 3)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(12))
    large.write_bytes(bytes(100))
    (tmp_path / ".hidden").write_text("")
    before = digests(tmp_path)
    assert before.keys() == {"small", "large"}
    for at in range(12):
        small.write_bytes(bytes(at) + b"x" + bytes(11 - at))
        assert changes(before, digests(tmp_path)) == ["small changed"]
    small.write_bytes(bytes(12))
    seen = []
    for at in range(100):
        large.write_bytes(bytes(at) + b"x" + bytes(99 - at))
        seen += [at] * (digests(tmp_path) != before)
    assert seen == [0, 1, 2, 3, 48, 49, 50, 51, 96, 97, 98, 99]
    large.write_bytes(bytes(101))
    small.rename(tmp_path / "other")
    assert changes(before, digests(tmp_path)) == ["large changed", "small is gone", "other is new"]
    assert changes(digests(small), digests(large)) == ["the file is new"]
    monkeypatch.setattr(digest_module, "NAMED", 1)
    monkeypatch.setattr(digest_module, "SAMPLED", 2)
    (tmp_path / "z").write_text("last")
    many = digests(tmp_path)
    assert many.keys() == {"3 files"}
    (tmp_path / "z").write_text("LAST")
    assert digests(tmp_path) != many


def test_differences_are_named_by_place() -> None:
    before = {"a": [1, {"b": "x"}], "gone": 1, "long": "y" * 50, "list": [1]}
    now = {"a": [1, {"b": "z"}], "long": "w" * 50, "list": [1, 2], "new": 2}
    assert list(differences(before, now)) == [
        "a[1].b 'x', now 'z'",
        "gone is gone",
        f"long '{'y' * 36}..., now '{'w' * 36}...",
        "list of 1, now of 2",
        "new is new",
    ]


# ---------------------------------------------------------------------- beginning with weights


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path, text_file: str) -> None:
    first = begin(tmp_path / "first", text_file)
    train.fit(first)
    second = begin(tmp_path / "second", text_file, init=str(tmp_path / "first"), seed=5, lr=1.0)
    assert second.step == 0
    for name, weight in first.plain_model.state_dict().items():
        assert torch.equal(second.plain_model.state_dict()[name], weight)
    train.fit(second)
    assert taken_up(tmp_path / "second")[1] == []  # the weights of the run, not those it began with
    with pytest.raises(InputError, match=r"--init: the weights in .*first do not fit this model: misshapen: embedding"):
        begin(tmp_path / "third", text_file, init=str(tmp_path / "first"), dim=4)
    assert not (tmp_path / "third").exists()


def test_weights_of_other_characters_are_refused(tmp_path: Path, text_file: str, text: str) -> None:
    """A vocabulary of the same size would fit, and mean something else."""
    train.fit(begin(tmp_path / "first", text_file, steps=2))
    (tmp_path / "other.txt").write_text(text.replace("q", "Q"))
    with pytest.raises(InputError, match="were trained with another tokenizer: vocabulary "):
        begin(tmp_path / "second", str(tmp_path / "other.txt"), init=str(tmp_path / "first"))


def test_another_recipe_of_the_same_weights_is_named(tmp_path: Path, text_file: str) -> None:
    file, recipe = tmp_path / "recipe.json", presets.gla().to_dict()
    file.write_text(json.dumps(recipe))
    train.fit(begin(tmp_path / "first", text_file, recipe=f"@{file}", steps=2))
    gate = next(i for i, part in enumerate(recipe["parts"]) if part["part"] == "OutputGate")
    recipe["parts"][gate]["act"] = "sigmoid"
    file.write_text(json.dumps(recipe))
    with pytest.warns(
        UserWarning, match=rf"recipe is not the one of .*first: recipe\[0\].parts\[{gate}\].act 'silu', now"
    ):
        begin(tmp_path / "second", text_file, recipe=f"@{file}", init=str(tmp_path / "first"))


def test_a_run_begins_with_a_converted_checkpoint(tmp_path: Path, text_file: str) -> None:
    size = train.start("lm", tmp_path / "size", {**TINY, "text": text_file}).task.corpus_tokenizer.size
    config = {"d_model": 16, "n_layer": 1, "vocab_size": size, "pad_vocab_size_multiple": 1}
    module = convert.build("longhorn_lm", config)
    convert.save_module(tmp_path / "official.safetensors", "longhorn_lm", config, module)
    begun = begin(tmp_path / "run", text_file, recipe="longhorn", dim=16, init=str(tmp_path / "official.safetensors"))
    weights = dict(module.named_parameters())
    assert weights.keys() == checkpoint.named(begun.plain_model).keys()
    for name, weight in checkpoint.named(begun.plain_model).items():
        assert torch.equal(weight, weights[name])
    with pytest.raises(InputError, match=r"--init: there is no file .*nothing.safetensors"):
        begin(tmp_path / "other", text_file, init=str(tmp_path / "nothing.safetensors"))
    weights[next(iter(weights))].data.fill_(torch.nan)
    convert.write_checkpoint(tmp_path / "nan.pt", weights)
    with pytest.raises(InputError, match=f"nan.pt are not finite: {next(iter(weights))}"):
        begin(tmp_path / "other", text_file, recipe="longhorn", dim=16, init=str(tmp_path / "nan.pt"))


def test_a_compiled_run_has_plain_names(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file, steps=2)
    run.model = torch.compile(run.model, backend="eager")
    train.fit(run)
    plain = begin(tmp_path / "plain", text_file)
    saved = checkpoint.load_tensors(tmp_path / "run" / "step-00000002")
    assert saved.keys() == checkpoint.named(plain.plain_model).keys()
    assert all(not name.startswith("_orig_mod") for name in saved)
    assert taken_up(tmp_path / "run")[0].step == 2
