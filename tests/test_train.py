"""The trainer: a resumed run equals an unbroken one, spread work equals work in one place, the model learns."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recur import LanguageModel, presets, train
from recur.train import InputError, Settings, Training, checkpoint
from recur.train.plot import draw_comparison, draw_curve, running_mean, spread
from recur.train.trainer import evaluate, learning_rate, mfu
from recur.weights import decay_groups

TINY = {"recipe": "longhorn", "dim": 16, "depth": 1, "steps": 6, "batch": 2, "length": 16, "every": 2}


def begin(out: Path, text_file: str, **choices: Any) -> Training:
    return train.start("lm", out, {**TINY, "text": text_file, **choices})


def weights(run: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.plain_model.state_dict().items()}


def moments(run: Training) -> dict[str, torch.Tensor]:
    return checkpoint.trainer_tensors(run.plain_model, run.optimizer.optimizer)


def assert_equal(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------------- what is decided by settings


def test_warm_up_peak_and_end() -> None:
    settings = Settings(steps=100, lr=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", 0.1 + 0.9 * (1 + 0.0) / 2),
        ("polynomial", 0.1 + 0.9 * 0.5**2),
        ("constant", 1.0),
        ("inverse_sqrt", (20 / 61) ** 0.5),
    ],
)
def test_schedules_halfway(schedule: str, expected: float) -> None:
    settings = Settings(steps=100, warmup=20, lr=1.0, schedule=schedule, power=2.0)
    assert learning_rate(settings, 60) == pytest.approx(expected)  # 40 of the 80 steps after the warm-up


NO_DECAY = ("norm", "bias", "A_log", "dt", "logits", "mu", "rho", "eta", "C_real", "C_imag")


@pytest.mark.parametrize("name", presets.names())
def test_only_matrices_and_taps_decay(name: str) -> None:
    """Gates, A, time constants, norms and biases never do; what does is the weight of a projection or a convolution."""
    model = LanguageModel(getattr(presets, name)(), vocab_size=7, dim=64, depth=2, ffn="swiglu", norm="layer")
    decayed, kept = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    named = {id(weight): name for name, weight in model.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(named)
    for weight in decayed["params"]:
        words = named[id(weight)].split(".")
        assert weight.ndim >= 2, words
        assert words[-1] in ("weight", "down", "up") or words[-1].endswith("_up"), words
        assert not any(word in NO_DECAY for word in words), words
    names = [named[id(weight)].split(".")[-1] for weight in kept["params"]]
    assert "weight" in names  # of the norms
    assert "bias" in names


def test_an_undeclared_weight_is_refused() -> None:
    with pytest.raises(TypeError, match=r"every weight must be declared by a Param, got weight, bias"):
        decay_groups(torch.nn.Linear(2, 2), 0.1)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, text_file: str, stop: int) -> None:
    whole = begin(tmp_path / "whole", text_file, dropout=0.2)  # dropout draws from torch's generator
    train.fit(whole)

    def crash(loss: float, speed: float) -> None:
        if broken.step == stop:
            raise KeyboardInterrupt

    broken = begin(tmp_path / "broken", text_file, dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        train.fit(broken, crash)
    torch.manual_seed(99)  # a new process would not have the old generator either
    resumed = train.start("lm", tmp_path / "broken", {}, resume=True)
    assert resumed.step == stop // 2 * 2
    train.fit(resumed)

    assert resumed.curve == whole.curve
    assert_equal(weights(whole), weights(resumed))
    assert_equal(moments(whole), moments(resumed))


KILLED = """
import os, signal, sys
from pathlib import Path
from recur import train
from recur.train import checkpoint

run = train.start("lm", Path(sys.argv[1]), {choices})
whole = checkpoint.save_file

def half(tensors, place):
    whole(tensors, place)
    if run.step == 4 and place.name == {name!r}:
        os.truncate(place, place.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = half
train.fit(run)
"""


@pytest.mark.parametrize("name", [checkpoint.TRAINER])
def test_killed_in_the_middle_of_a_write(tmp_path: Path, text_file: str, name: str) -> None:
    """kill -9 while the checkpoint of step 4 is half on the disk: the run goes on from step 2, bit for bit."""
    whole = begin(tmp_path / "whole", text_file)
    train.fit(whole)
    script = KILLED.replace("{choices}", repr({**TINY, "text": text_file})).replace("{name!r}", repr(name))
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], capture_output=True, timeout=240)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert ".step-00000004.partial" in left
    assert "step-00000004" not in left
    resumed = train.start("lm", tmp_path / "killed", {}, resume=True)
    assert resumed.step == 2
    train.fit(resumed)
    assert resumed.curve == whole.curve
    assert_equal(weights(whole), weights(resumed))
    assert_equal(moments(whole), moments(resumed))
    assert ".step-00000004.partial" not in os.listdir(tmp_path / "killed")


def test_the_seed_decides_the_run(tmp_path: Path, text_file: str) -> None:
    curves = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = begin(tmp_path / name, text_file, seed=seed)
        train.fit(run)
        curves.append(run.curve)
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


# ---------------------------------------------------------------------- the same numbers by other ways


def losses(run: Training) -> list[float]:
    train.fit(run)
    return [point["loss"] for point in run.curve]


@pytest.mark.parametrize(
    "choices",
    [{"accumulate": 2}, {"recompute": "layers"}, {"compile": "eager"}],
    ids=["accumulation", "recomputation", "compilation"],
)
def test_it_changes_the_cost_alone(tmp_path: Path, text_file: str, choices: dict[str, Any]) -> None:
    plain = losses(begin(tmp_path / "plain", text_file, recipe="hgrn2:heads=2"))
    other = losses(begin(tmp_path / "other", text_file, recipe="hgrn2:heads=2", **choices))
    assert other == pytest.approx(plain, rel=1e-4)


def test_bfloat16_is_near_float32_and_not_it(tmp_path: Path, text_file: str) -> None:
    wide = losses(begin(tmp_path / "wide", text_file))
    low = losses(begin(tmp_path / "low", text_file, precision="bfloat16"))
    assert low == pytest.approx(wide, rel=3e-2)
    assert low != wide


LAUNCHED = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(out: Path, text_file: str, *flags: str) -> list[dict[str, Any]]:
    """The curve of a run of two processes (`accelerate launch --cpu` starts one where there is no MPI)."""
    tiny = [word for name, value in TINY.items() if name != "recipe" for word in (f"--{name}", str(value))]
    command = ["-m", "recur", "train", "dense_retnet", "--text", text_file, "--out", str(out), *tiny, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*LAUNCHED, *command], capture_output=True, timeout=280, env=environment, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("checkpoint: ") == 1  # the main process alone speaks
    saved = load_file(checkpoint.read_record(out)[0] / checkpoint.TRAINER)
    assert {name.partition("|")[0] for name in saved} == {"optimizer", "rng0", "rng1"}
    return json.loads((out / "history.json").read_text())["curve"]


def test_two_processes_equal_one(tmp_path: Path, text_file: str) -> None:
    """DDP over gloo, one weight of the first layer without a gradient; a checkpoint of two resumes in one."""
    alone = begin(tmp_path / "alone", text_file, recipe="dense_retnet", dim=32, depth=2)
    train.fit(alone)
    curve = launched(tmp_path / "two", text_file, "--dim", "32", "--depth", "2")
    for mine, other in zip(curve, alone.curve, strict=True):
        assert mine.keys() == other.keys()
        assert list(mine.values()) == pytest.approx(list(other.values()), rel=1e-4)
    resumed = train.start("lm", tmp_path / "two", {}, resume=True)
    assert resumed.step == 6
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- learning, and its report


def test_it_learns_more_than_pairs_of_characters(tmp_path: Path, text_file: str) -> None:
    choices = {"dim": 32, "steps": 120, "batch": 8, "length": 32, "lr": 1e-2, "every": 120}
    run = begin(tmp_path / "run", text_file, **choices)
    train.fit(run)
    unigram, bigram = run.task.levels().values()
    loss = evaluate(run, "valid", full=True)["loss"]
    assert loss < bigram < unigram
    model, tokenizer = train.load_model(tmp_path / "run")
    ids = torch.from_numpy(tokenizer.encode("the quick"))[None]
    options = {"max_new_tokens": 20, "temperature": 0.0, "seed": 0}
    written = model.generate(ids, **options)
    assert len(tokenizer.decode(written[0].tolist())) == 29
    assert torch.equal(written, run.plain_model.generate(ids, **options))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file)

    def poison(loss: float, speed: float) -> None:
        if run.step == 2:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))

    with pytest.raises(InputError, match="loss is nan at step 3: try a smaller --lr"):
        train.fit(run, poison)
    resumed = train.start("lm", tmp_path / "run", {}, resume=True)
    assert resumed.step == 2
    assert all(tensor.isfinite().all() for tensor in weights(resumed).values())


def test_seconds_end_a_run_with_a_checkpoint(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file, steps=10_000, every=10_000, seconds=1e-9)
    train.fit(run)
    assert run.stopped
    assert run.step == 1
    assert "valid_loss" in run.curve[-1]
    assert checkpoint.read_record(tmp_path / "run")[1].step == 1


def test_the_report_of_a_run(tmp_path: Path, text_file: str) -> None:
    run = begin(tmp_path / "run", text_file)
    train.fit(run)
    finals = train.finish(run)
    with (tmp_path / "run" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456")
    assert [bool(row["valid_loss"]) for row in rows] == [False, True] * 3
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history == {"curve": run.curve, "final": finals}
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert mfu(run, 1000.0) is None  # no GPU, no share of its peak


def test_tensorboard_holds_the_curve(tmp_path: Path, text_file: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin(tmp_path / "run", text_file)
    train.fit(run)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses_of(run), rel=1e-6)
    assert [event.step for event in events.Scalars("valid_loss")] == [2, 4, 6]


def losses_of(run: Training) -> list[float]:
    return [point["loss"] for point in run.curve]


def test_running_mean_starts_unbiased_and_follows() -> None:
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
    assert running_mean([0.0, 1.0], keep=0.5) == pytest.approx([0.0, 2 / 3])  # weights 1/4 and 1/2


def test_the_spread_of_seeds() -> None:
    at, low, middle, high = spread([[(1, 1.0), (2, 4.0)], [(1, 3.0), (2, 2.0), (3, 9.0)]])
    assert (at, low, middle, high) == ([1, 2], [1.0, 2.0], [2.0, 3.0], [3.0, 4.0])


def test_pictures(tmp_path: Path) -> None:
    curve = [
        {"step": 1, "lr": 0.1, "loss": 3.0},
        {"step": 2, "lr": 0.1, "loss": 2.5, "valid_loss": 2.7, "valid_a": 0.5},
    ]
    look = {"title": "two steps", "unit": "nats", "metrics": ("a",), "levels": {"unigram": 3.1}, "rows": 8}
    draw_curve(tmp_path / "one.png", curve, **look, final={"loss": 2.6, "a": 0.6})
    runs = {"one": [[(1, 2.0), (2, 1.0)], [(1, 2.5), (2, 1.5)]], "other": [[(1, 3.0), (2, 2.0)]]}
    draw_comparison(tmp_path / "two.png", runs, title="two", x="width", y="nats", log=True)
    for name in ("one", "two"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


SHARDED = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from recur import LanguageModel, presets
from recur.train import checkpoint
from recur.weights import decay_groups

dist.init_process_group("gloo")
mesh, folder, rank = init_device_mesh("cpu", (2,)), Path(sys.argv[1]), dist.get_rank()
torch.manual_seed(0)
model = LanguageModel(presets.hgrn2(heads=2), vocab_size=11, dim=16, depth=2, ffn="swiglu")
ids = torch.randint(11, (4, 9))
whole = model(ids).detach()
for part in (*model.blocks, model):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-2)


def update():
    model(ids).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def tensors():
    weights = {name: checkpoint.whole(weight) for name, weight in checkpoint.named(model).items()}
    both = weights, checkpoint.trainer_tensors(model, optimizer)
    return [{name: tensor.clone() for name, tensor in content.items()} for content in both]


assert torch.equal(model(ids), whole)
update()
saved = tensors()
if rank == 0:
    for name, content in zip((checkpoint.MODEL, checkpoint.TRAINER), saved):
        save_file(content, folder / name)
dist.barrier()
update()
expected = tensors()
checkpoint.load_weights(folder, model)
checkpoint.load_trainer(folder, model, optimizer, rank)
for one, other in zip(saved, tensors()):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
update()
for one, other in zip(expected, tensors()):
    assert all(torch.equal(one[name], other[name]) for name in one)
print("sharded, saved and resumed")
dist.destroy_process_group()
"""


def test_shards_of_two_processes_are_saved_whole_and_resumed(tmp_path: Path) -> None:
    """FSDP's sharding over gloo, under the trainer's own groups and checkpoints."""
    (tmp_path / "script.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, timeout=240, env=environment, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("sharded, saved and resumed") == 2
