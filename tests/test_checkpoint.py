"""A checkpoint gives back what was saved, is whole or absent, and says so when it was damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from recur.train import InputError, Settings, checkpoint
from recur.train.settings import Point

RECORD = checkpoint.Record(
    settings=Settings(preset="longhorn", lr=1 / 3),
    recipe={"parts": []},
    vocabulary="\n ab–",
    text_sha256="0" * 64,
    step=2,
    curve=[Point(1, 0.1, 2 / 3, None), Point(2, 0.2, 0.5, 0.6)],
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


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, RECORD, model, optimizer)
    expected_draw = torch.rand(3)

    folder, record = checkpoint.read_record(tmp_path)
    assert record == RECORD
    again = Tied()
    restored = torch.optim.AdamW(again.parameters())
    checkpoint.load_weights(folder, again)
    checkpoint.load_trainer(folder, restored)
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.head.weight, model.head.weight)
    for key, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(restored.state_dict()["state"][0][key], value), key
    assert torch.equal(torch.rand(3), expected_draw)


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (2, 10):
        checkpoint.save(tmp_path, checkpoint.Record(**{**vars(RECORD), "step": step}), model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("crash_in", ["save_model", "save_file", "_digests", "_flush", "os.replace"])
def test_a_crash_while_saving_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, RECORD, model, optimizer)
    later = checkpoint.Record(**{**vars(RECORD), "step": 3})

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash_in == "os.replace":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(checkpoint, crash_in, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, later, model, optimizer)
    assert checkpoint.read_record(tmp_path)[1].step == 2
    checkpoint.save(tmp_path, later, model, optimizer)  # what the crash left behind is not in the way
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
def test_damage_is_told(tmp_path: Path, name: str, damage: str) -> None:
    folder = checkpoint.save(tmp_path, RECORD, *trained())
    DAMAGES[damage](folder / name)
    with pytest.raises(InputError, match=f"{folder.name} is damaged: .*{name}"):
        checkpoint.read_record(tmp_path)


def test_an_edited_record_is_told(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, RECORD, *trained())
    content = json.loads((folder / checkpoint.RECORD).read_text())
    content["record"]["vocabulary"] = "\n abc"
    (folder / checkpoint.RECORD).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"record\.json changed after it was written"):
        checkpoint.read_record(tmp_path)


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, RECORD, *trained())
    with pytest.raises(InputError, match="weights do not fit its recipe"):
        checkpoint.load_weights(folder, nn.Linear(2, 2))


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.read_record(tmp_path / "nowhere")
