"""A checkpoint gives back what was saved, is whole or absent, and says so when it was damaged."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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


def save(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int = 2, keep: int = 1) -> Path:
    rngs = {f"rng0|{kind}": state for kind, state in checkpoint.rng_tensors().items()}
    tensors = checkpoint.trainer_tensors(model, optimizer) | rngs
    return checkpoint.save(out, replace(RECORD, step=step), checkpoint.named(model), tensors, keep)


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
def test_damage_is_told(tmp_path: Path, name: str, damage: str) -> None:
    folder = save(tmp_path, *trained())
    DAMAGES[damage](folder / name)
    with pytest.raises(InputError, match=f"{folder.name} is damaged: .*{name}"):
        checkpoint.read_record(tmp_path)


def test_an_edited_record_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    content = json.loads((folder / checkpoint.RECORD).read_text())
    content["record"]["step"] = 7
    (folder / checkpoint.RECORD).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"record\.json changed after it was written"):
        checkpoint.read_record(tmp_path)


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    with pytest.raises(InputError, match="weights do not fit its recipe"):
        checkpoint.load_weights(folder, nn.Linear(2, 2))


def test_weights_that_are_no_safetensors_are_told(tmp_path: Path) -> None:
    folder = save(tmp_path, *trained())
    (folder / checkpoint.MODEL).write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load_weights(folder, Tied())


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.read_record(tmp_path / "nowhere")
