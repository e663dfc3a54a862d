"""Training: data and losses are what they claim, a resumed run equals an unbroken one, the model learns."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from recur import train
from recur.train import Corpus, InputError, Settings, data
from recur.train.plot import draw_curve, running_mean, write_curve
from recur.train.settings import Point
from recur.train.trainer import Training, learning_rate

TINY = {"preset": "longhorn", "dim": 16, "depth": 1, "steps": 6, "batch": 2, "length": 16, "every": 2}


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "text.txt"
    path.write_text(text)
    return str(path)


def weights(run: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def moments(run: Training) -> dict[tuple[int, str], torch.Tensor]:
    slots = run.optimizer.state_dict()["state"]
    return {(index, key): tensor for index, slot in slots.items() for key, tensor in slot.items()}


def assert_equal(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_characters_come_back(text: str) -> None:
    corpus = Corpus.from_text(text, length=16)
    assert len(corpus.valid) == len(text) // 10
    assert data.decode(torch.cat([corpus.train, corpus.valid]), corpus.vocabulary) == text


def test_windows_ask_for_every_character_but_the_first_once() -> None:
    inputs, targets = data.windows(torch.arange(11), 3)  # the eleventh starts a window that is not whole
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_batches_depend_on_seed_and_step_alone() -> None:
    ids = torch.arange(1000)
    drawn = {}
    for seed, step in itertools.product(range(3), range(3)):
        x, y = data.random_batch(ids, batch=4, length=8, seed=seed, step=step)
        again, _ = data.random_batch(ids, batch=4, length=8, seed=seed, step=step)
        assert torch.equal(x, again)
        assert torch.equal(x + 1, y)
        drawn[seed, step] = tuple(x[:, 0].tolist())
    assert len(set(drawn.values())) == 9


def test_batches_reach_both_ends() -> None:
    starts = {
        data.random_batch(torch.arange(5), batch=1, length=3, seed=0, step=step)[0][0, 0].item() for step in range(50)
    }
    assert starts == {0, 1}


def test_counting_losses_by_hand() -> None:
    corpus = Corpus("ab", train=torch.tensor([0, 1, 0, 1, 0]), valid=torch.tensor([0, 1, 1]))
    p_b = (2 + 1) / (5 + 2)
    b_after_a, b_after_b = (2 + p_b) / (2 + 1), (0 + p_b) / (2 + 1)
    unigram, bigram = data.counting_losses(corpus)
    assert unigram == pytest.approx(-math.log(p_b))
    assert bigram == pytest.approx(-(math.log(b_after_a) + math.log(b_after_b)) / 2)


def test_warm_up_peak_and_end() -> None:
    settings = Settings("longhorn", steps=100, lr=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, text_file: str, stop: int) -> None:
    choices = {**TINY, "text": text_file, "dropout": 0.2}  # dropout draws from torch's generator
    whole = train.prepare(tmp_path / "whole", choices)
    train.fit(whole, tmp_path / "whole")

    def crash(loss: float, speed: float) -> None:
        if broken.step == stop:
            raise KeyboardInterrupt

    broken = train.prepare(tmp_path / "broken", choices)
    with pytest.raises(KeyboardInterrupt):
        train.fit(broken, tmp_path / "broken", crash)
    torch.manual_seed(99)  # a new process would not have the old generator either
    resumed = train.prepare(tmp_path / "broken", {}, resume=True)
    assert resumed.step == stop // 2 * 2
    train.fit(resumed, tmp_path / "broken")

    assert resumed.curve == whole.curve
    assert_equal(weights(whole), weights(resumed))
    assert_equal(moments(whole), moments(resumed))


def test_the_seed_decides_the_run(tmp_path: Path, text_file: str) -> None:
    curves = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = train.prepare(tmp_path / name, {**TINY, "text": text_file, "seed": seed})
        train.fit(run, tmp_path / name)
        curves.append(run.curve)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_it_learns_more_than_pairs_tell(tmp_path: Path, text_file: str) -> None:
    choices = {**TINY, "text": text_file, "dim": 32, "steps": 120, "batch": 8, "length": 32, "lr": 1e-2, "every": 120}
    run = train.prepare(tmp_path / "run", choices)
    train.fit(run, tmp_path / "run")
    unigram, bigram = train.counting_losses(run.corpus)
    loss = train.evaluate(run, run.corpus.valid)
    assert loss < bigram < unigram
    model, vocabulary = train.load_model(tmp_path / "run")
    options = {"max_new_tokens": 20, "temperature": 0.0, "seed": 0}
    written = train.sample(model, vocabulary, "the quick", **options)
    assert written.startswith("the quick")
    assert len(written) == 29
    assert written == train.sample(run.model, vocabulary, "the quick", **options)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, text_file: str) -> None:
    run = train.prepare(tmp_path / "run", {**TINY, "text": text_file})

    def poison(loss: float, speed: float) -> None:
        if run.step == 2:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))

    with pytest.raises(InputError, match="loss is nan at step 3: try a smaller --lr"):
        train.fit(run, tmp_path / "run", poison)
    resumed = train.prepare(tmp_path / "run", {}, resume=True)
    assert resumed.step == 2
    assert all(tensor.isfinite().all() for tensor in weights(resumed).values())


def test_running_mean_starts_unbiased_and_follows() -> None:
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
    assert running_mean([0.0, 1.0], keep=0.5) == pytest.approx([0.0, 2 / 3])  # weights 1/4 and 1/2


def test_the_curve_as_numbers_and_as_a_picture(tmp_path: Path) -> None:
    curve = [Point(1, 0.1, 3.0, None), Point(2, 0.1, 2.5, 2.75)]
    write_curve(tmp_path / "curve.csv", curve)
    with (tmp_path / "curve.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "lr": "0.1", "train": "3.0", "validation": ""},
            {"step": "2", "lr": "0.1", "train": "2.5", "validation": "2.75"},
        ]
    draw_curve(tmp_path / "curve.png", curve, title="two steps", unigram=3.1, bigram=2.4)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
