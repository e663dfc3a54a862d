"""A checkpoint gives back what was saved, is whole or absent, and says so when it was damaged."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from recur.train import InputError, checkpoint

RECORD = checkpoint.Record(
    config={"task": "lm", "recipe": "longhorn", "lr": 1 / 3},
    recipes=[{"parts": []}],
    task={"tokenizer": {"kind": "char", "vocabulary": "\n ab–"}},
    step=2,
    curve=[{"step": 1, "lr": 0.1, "loss": 2 / 3}, {"step": 2, "lr": 0.2, "loss": 0.5, "valid_loss": 0.6}],
)


class Tied(nn.Module):
    """One weight under two names, as an embedding that is also the read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def trained() -> tuple[Tied, torch.optim.Optimizer]:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model.head(model.embedding(torch.arange(5))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int = 2, keep: int = 1, **changes: Any
) -> Path:
    """A checkpoint whose validation loss is lower the later it is, unless `changes` has another curve."""
    rngs = {f"rng0|{kind}": state for kind, state in checkpoint.rng_tensors().items()}
    tensors = checkpoint.trainer_tensors(model, optimizer) | rngs
    curve = RECORD.curve if step == 2 else [*RECORD.curve, {"step": step, "loss": 0.5, "valid_loss": 1 / step}]
    record = replace(RECORD, **{"step": step, "curve": curve, **changes})
    return checkpoint.save(out, record, checkpoint.named(model), tensors, keep)


def curve_of(losses: dict[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0, "valid_loss": loss} for step, loss in losses.items()]


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a changed record with the digest of what it holds now."""
    content = json.loads((folder / checkpoint.RECORD).read_text())
    change(content)
    content["sha256"] = checkpoint._digests(folder, content["record"])
    (folder / checkpoint.RECORD).write_text(json.dumps(content))


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer)
    expected_draw = torch.rand(3)

    folder, record = checkpoint.read_record(tmp_path)
    assert record == RECORD
    again = Tied()
    restored = torch.optim.AdamW(again.parameters())
    checkpoint.load_weights(folder, again)
    checkpoint.load_trainer(folder, again, restored, 0)
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.head.weight, model.head.weight)
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(restored.state_dict()["state"][0][key], value), key
    assert torch.equal(torch.rand(3), expected_draw)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (2, 10, 11, 12):
        save(tmp_path, *trained(), step=step, keep=keep)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        f"step-{step:08d}" for step in (10, 11, 12)[-keep:]
    ]


@pytest.mark.parametrize("crash_in", ["save_file", "_digests", "_flush", "os.replace"])
def test_a_crash_while_saving_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    model, optimizer = trained()
    save(tmp_path, model, optimizer)

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash_in == "os.replace":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(checkpoint, crash_in, crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, step=3)
    assert checkpoint.read_record(tmp_path)[1].step == 2
    save(tmp_path, model, optimizer, step=3)  # what the crash left behind is not in the way
    assert checkpoint.read_record(tmp_path)[1].step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "flipped": flip_a_byte,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINER, checkpoint.RECORD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path, *trained())
    DAMAGES[damage](folder / name)
    with pytest.raises(InputError, match=f"{folder.name} is damaged: .*{name}"):
        checkpoint.read_record(tmp_path)


def test_an_edited_record_is_reported(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    content = json.loads((folder / checkpoint.RECORD).read_text())
    content["record"]["step"] = 7
    (folder / checkpoint.RECORD).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"record\.json changed after it was written"):
        checkpoint.read_record(tmp_path)


def test_weights_of_another_model_are_reported(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    with pytest.raises(InputError, match="weights do not fit its recipe"):
        checkpoint.load_weights(folder, nn.Linear(2, 2))


def test_weights_that_are_no_safetensors_are_reported(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    (folder / checkpoint.MODEL).write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load_weights(folder, Tied())


def test_no_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.read_record(tmp_path / "nowhere")


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(out)]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, keep: int) -> None:
    losses = {3: 0.5, 4: 0.3, 5: 0.6, 6: 0.4, 7: 0.7}
    for step in losses:
        curve = curve_of({at: loss for at, loss in losses.items() if at <= step})
        save(tmp_path, *trained(), step=step, keep=keep, curve=curve)
    assert names(tmp_path) == ["step-00000004", *["step-00000006", "step-00000007"][-keep:]]
    steps = {which: checkpoint.read_record(tmp_path, which)[1].step for which in ("best", "newest", "4")}
    assert steps == {"best": 4, "newest": 7, "4": 4}
    assert checkpoint.read_record(tmp_path / "step-00000004")[1].step == 4
    with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*; there are: 4, "):
        checkpoint.read_record(tmp_path, "5")


def test_a_damaged_best_is_passed_over(tmp_path: Path) -> None:
    for step in (3, 4, 5):
        save(tmp_path, *trained(), step=step, keep=3, curve=curve_of({step: {3: 0.5, 4: 0.3, 5: 0.6}[step]}))
    truncate(tmp_path / "step-00000004" / checkpoint.MODEL)
    said: list[str] = []
    assert checkpoint.read_record(tmp_path, "best", said.append)[1].step == 3
    reason = "model.safetensors changed after it was written"
    assert said == [f"using step-00000003; step-00000004 is damaged: {reason}"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINER, checkpoint.RECORD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_used(tmp_path: Path, name: str, damage: str) -> None:
    for step in (3, 4, 5):
        save(tmp_path, *trained(), step=step, keep=3)
    for step in (4, 5):
        DAMAGES[damage](tmp_path / f"step-0000000{step}" / name)
    said: list[str] = []
    assert checkpoint.read_record(tmp_path, say=said.append)[1].step == 3
    assert len(said) == 1
    assert said[0].startswith("using step-00000003; step-00000005 is damaged: ")
    assert "; step-00000004 is damaged: " in said[0]
    DAMAGES[damage](tmp_path / "step-00000003" / name)
    with pytest.raises(InputError, match=r"no complete checkpoint in .*5 is damaged: .*4 is damaged: .*3 is damaged: "):
        checkpoint.read_record(tmp_path)


def test_a_checkpoint_that_went_while_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run under way saves its next checkpoint and removes the listed one."""
    save(tmp_path, *trained(), step=3)
    read = checkpoint._read

    def late(folder: Path) -> checkpoint.Record:
        if folder.name == "step-00000003":
            save(tmp_path, *trained(), step=4)
        return read(folder)

    monkeypatch.setattr(checkpoint, "_read", late)
    assert checkpoint.read_record(tmp_path)[1].step == 4


def test_what_is_no_checkpoint_does_no_harm(tmp_path: Path) -> None:
    save(tmp_path, *trained(), step=3)
    for stray in ("step-notes", "step-0000.bak", "step-00000009.bak", "step-", "step-7"):
        (tmp_path / stray).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert names(tmp_path) == ["step-00000003"]
    save(tmp_path, *trained(), step=8)
    assert names(tmp_path) == ["step-00000008-2"]
    assert checkpoint.read_record(tmp_path)[1].step == 8
    assert (tmp_path / "step-00000008").read_text() == "a file"
    assert len(list(tmp_path.iterdir())) == 7


def test_newer_checkpoints_and_spared_ones_stay(tmp_path: Path) -> None:
    for step in (3, 9):
        save(tmp_path, *trained(), step=step, keep=3)
    truncate(tmp_path / "step-00000009" / checkpoint.MODEL)
    record = replace(RECORD, step=5, curve=curve_of({5: 0.1}))
    checkpoint.save(tmp_path, record, {}, {}, 1, [tmp_path / "step-00000003"])
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000009"]
    save(tmp_path, *trained(), step=9)  # a run that reaches the step again
    assert names(tmp_path) == ["step-00000009", "step-00000009-2"]
    said: list[str] = []
    assert checkpoint.read_record(tmp_path, "9", said.append)[0].name == "step-00000009-2"
    assert said == []


def test_loss_that_is_not_finite_is_damage(tmp_path: Path) -> None:
    """As runs of earlier versions could leave behind."""
    save(tmp_path, *trained(), step=3, keep=2, curve=curve_of({3: 0.5}))
    save(tmp_path, *trained(), step=4, keep=2, curve=curve_of({4: math.nan}))
    for which in ("newest", "best"):
        said: list[str] = []
        assert checkpoint.read_record(tmp_path, which, said.append)[1].step == 3
        assert said == ["using step-00000003; step-00000004 is damaged: valid_loss is nan"]


def test_a_checkpoint_under_the_name_of_another(tmp_path: Path) -> None:
    (save(tmp_path, *trained(), step=3)).rename(tmp_path / "step-00000007")
    with pytest.raises(InputError, match=r"step-00000007 is damaged: record\.json is of step 3"):
        checkpoint.read_record(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '{"record": []}', '{"record": {}, "sha256": []}', "\udcff"])
def test_a_record_of_another_kind(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, *trained())
    (folder / checkpoint.RECORD).write_text(content, errors="surrogateescape")
    for which in ("newest", "best"):
        with pytest.raises(InputError, match=r"is damaged: record\.json is not what this version of recur writes"):
            checkpoint.read_record(tmp_path, which)


def test_checkpoints_of_other_versions(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())

    def first_layout(content: dict[str, Any]) -> None:
        del content["version"], content["record"]["data"]

    edit_record(folder, first_layout)
    assert checkpoint.read_record(tmp_path)[1] == RECORD
    edit_record(folder, lambda content: content["record"].update(rotation=1))
    with pytest.raises(
        InputError, match=r"another version of recur \(layout 1 with rotation; this one reads layouts 1 and"
    ):
        checkpoint.read_record(tmp_path)
    edit_record(folder, lambda content: (content["record"].pop("rotation"), content.update(version=99)))
    with pytest.raises(InputError, match=r"\(layout 99; this one reads layouts 1 and 2\): update recur"):
        checkpoint.read_record(tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["system", "safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, *trained(), step=3)
    content = (tmp_path / "step-00000003" / checkpoint.MODEL).read_bytes()

    def full(tensors: object, place: Path) -> None:
        place.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"cannot save step 4 in .*: .*no space left on device"):
        save(tmp_path, *trained(), step=4)
    assert os.listdir(tmp_path) == ["step-00000003"]
    assert (tmp_path / "step-00000003" / checkpoint.MODEL).read_bytes() == content


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_whole(tmp_path / "config.json", "old")

    def full(old: Path, new: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*config.json: no space left on device"):
        checkpoint.write_whole(tmp_path / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_prefixes_of_wrappers_are_left_out(tmp_path: Path) -> None:
    model, optimizer = trained()
    wrapped = nn.Sequential()
    wrapped.add_module("module", nn.Sequential())
    wrapped.module.add_module("_orig_mod", model)  # as DDP around a compiled model
    assert checkpoint.named(wrapped).keys() == checkpoint.named(model).keys() == {"embedding.weight"}
    assert checkpoint.trainer_tensors(wrapped, optimizer).keys() == checkpoint.trainer_tensors(model, optimizer).keys()
    again = Tied()
    checkpoint.fill(again, {f"module._orig_mod.{name}": w for name, w in model.named_parameters()}, "no")
    assert torch.equal(again.head.weight, model.head.weight)
    moments = checkpoint.trainer_tensors(model, optimizer)  # as earlier versions saved them
    save_file(
        {name.replace("|embed", "|_orig_mod.embed"): m for name, m in moments.items()}, tmp_path / "trainer.safetensors"
    )
    restored = torch.optim.AdamW(again.parameters())
    checkpoint.load_trainer(tmp_path, again, restored, 0)
    assert torch.equal(restored.state[again.head.weight]["exp_avg"], optimizer.state[model.head.weight]["exp_avg"])


def test_what_does_not_fit_is_listed() -> None:
    given = {"weight": torch.zeros(2, 3), "gate": torch.zeros(1)}
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    expected = r"^these: missing: bias; unexpected: gate; misshapen: weight \[2, 2\], got \[2, 3\]$"
    with pytest.raises(InputError, match=expected):
        checkpoint.fill(model, given, "these")
    assert torch.equal(model.weight, before)
