"""Every task: its rule by an independent reading, its models, its command; and comparisons."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recur import train
from recur.train import TASKS, InputError
from recur.train.compare import compare
from recur.train.config import Settings
from recur.train.models import read_recipes, solve_width, with_paper_depth
from recur.train.run import configured
from recur.train.tasks.lra import OPERATORS, SYMBOLS, symbols, tree
from recur.train.tasks.synthetic import group_table
from recur.weights import parameter_count

TINY = {"recipe": "gla:heads=2", "dim": 16, "depth": 1, "steps": 2, "batch": 4, "every": 2, "evaluate": 4}


def opened(task: str, **choices: Any) -> Any:
    """A task with its data, without a run."""
    settings, made = configured(task, TINY, choices)
    made.open(settings)
    return made


def trained(task: str, out: Path, **choices: Any) -> dict[str, dict[str, float]]:
    run = train.start(task, out, {**TINY, **choices})
    train.fit(run)
    return train.finish(run)


# ---------------------------------------------------------------------- recall and copying


@pytest.mark.parametrize("filler", ["zeros", "random"])
def test_mqar_asks_for_what_was_said(filler: str) -> None:
    task = opened("mqar", vocabulary=32, pairs=3, length=24, filler=filler)
    batch = task.batch("train", 0, 200)
    asked = batch["labels"] != -100
    assert asked.sum(1).eq(3).all()
    for ids, labels, at in zip(batch["ids"].tolist(), batch["labels"].tolist(), asked, strict=True):
        said = dict(zip(ids[0:6:2], ids[1:6:2], strict=True))
        assert len(said) == 3
        assert all(1 <= key < 16 <= value < 32 for key, value in said.items())
        places = at.nonzero().flatten().tolist()
        assert all(place >= 6 and place % 2 == 0 for place in places)
        assert {ids[place]: labels[place] for place in places} == said
        if filler == "zeros":
            assert all(ids[place] == 0 for place in range(6, 24) if place not in places)


def test_mqar_gaps_follow_their_law() -> None:
    """The place of the first key's query, drawn first: p_g proportional to (g + 1)^(gap_power - 1)."""
    task = opened("mqar", vocabulary=64, pairs=1, length=22, gap_power=0.3)
    batch = task.batch("train", 0, 20_000)
    gaps = ((batch["labels"] != -100).float().argmax(1) - 2) // 2
    law = (np.arange(10) + 1.0) ** (0.3 - 1)
    found = np.bincount(gaps.numpy(), minlength=10) / 20_000
    assert found == pytest.approx(law / law.sum(), abs=0.01)


def test_copying_keeps_the_order() -> None:
    batch = opened("copying", vocabulary=8, copies=5, length=30).batch("train", 0, 50)
    assert batch["ids"].shape == (50, 35)
    for ids, labels in zip(batch["ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert [token for token in ids[:30] if token != 0] == labels[30:]
        assert ids[30:] == [1] * 5
        assert labels[:30] == [-100] * 30


# ---------------------------------------------------------------------- groups


def test_parity_is_the_sum_so_far() -> None:
    batch = opened("tracking", group="parity", length=20).batch("train", 0, 10)
    assert torch.equal(batch["labels"], batch["ids"].cumsum(1) % 2)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_table_is_that_of_a_group(n: int) -> None:
    table = group_table(n)
    size = len(table)
    assert size == {2: 2, 3: 6, 5: 120}[n]
    every = np.arange(size)
    assert (table[0] == every).all()
    assert (table[:, 0] == every).all()
    assert all(sorted(row) == every.tolist() for row in table.tolist())
    draw = np.random.default_rng(0)
    a, b, c = draw.integers(0, size, (3, 100))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (n < 3) == bool((table == table.T).all())  # from three things on the order matters


def test_s5_by_permuting_things() -> None:
    task = opened("tracking", group="s5", length=12)
    batch = task.batch("valid", 0, 3)
    elements = list(itertools.permutations(range(5)))
    for ids, labels in zip(batch["ids"].tolist(), batch["labels"].tolist(), strict=True):
        state = tuple(range(5))
        for x, y in zip(ids, labels, strict=True):
            state = tuple(elements[x][i] for i in state)
            assert elements[y] == state
    assert task.batch("4x", 0, 3)["ids"].shape == (3, 48)
    assert task.finals == ["1x", "2x", "4x"]


# ---------------------------------------------------------------------- regression


def test_regression_rows_are_linear_and_least_squares_finds_it() -> None:
    task = opened("regression", features=3, length=20)
    batch = task.batch("train", 0, 5)
    x, y = batch["x"][:, 0::2, :3], batch["labels"]
    assert torch.equal(batch["x"][:, 1::2, 3], y)
    assert batch["x"][:, 0::2, 3].abs().sum() + batch["x"][:, 1::2, :3].abs().sum() == 0
    w = torch.linalg.lstsq(x[:, :3], y[:, :3, None]).solution
    torch.testing.assert_close((x @ w)[..., 0], y, rtol=1e-3, atol=1e-3)
    level = task.levels()["least squares"]
    assert 0 < level < 1  # nothing is left after three of ten examples, about all before the first
    outputs = torch.zeros(5, 20, 1)
    assert task.score(outputs, batch)["loss"] == pytest.approx((y.square().sum() / 3).item(), rel=1e-6)


# ---------------------------------------------------------------------- long range arena


def value(text: str) -> int:
    """Read a tree in the benchmark's text form by a stack, in another way than it was made."""
    stack: list[Any] = []
    for word in text.replace("(", " ").replace(")", " ").split():
        if word == "]":
            arguments = []
            while not isinstance(stack[-1], str):
                arguments.append(stack.pop())
            stack.append(OPERATORS[stack.pop()](arguments))
        else:
            stack.append(word if word in OPERATORS else int(word))
    (result,) = stack
    return result


def test_listops_values_and_lengths() -> None:
    import random

    draw, operators = random.Random(1), set()
    for _ in range(300):
        text, result, length = tree(draw, 1, 6, 5, 10**9)
        assert value(text) == result
        assert len(symbols(text)) == length + 1  # and the end
        operators |= {word for word in text.split() if word in OPERATORS}
    assert operators == set(OPERATORS)
    assert OPERATORS["[MED"]([1, 2, 4, 5]) == 3
    assert OPERATORS["[SM"]([9, 8]) == 7
    assert [SYMBOLS[i] for i in symbols("( ( ( [MAX 2 ) 9 ) ] )")] == ["[MAX", "2", "9", "X", "<eos>"]


SMALL = {"examples": 60, "shortest": 3, "longest": 40, "arguments": 4, "nesting": 4, "length": 40}


def test_listops_files_are_made_once_and_read_again(tmp_path: Path) -> None:
    made = opened("listops", data=str(tmp_path / "files"), **SMALL)
    lines = (tmp_path / "files" / "basic_train.tsv").read_text().splitlines()
    assert lines[0] == "Source\tTarget"
    assert len(lines) == 1 + 58
    assert len(set(lines)) == len(lines)
    text, target = lines[1].split("\t")
    assert value(text) == int(target)
    again = opened("listops", data=str(tmp_path / "files"), **SMALL | {"examples": 7})  # what is there is not made anew
    straight = opened("listops", **SMALL)
    for task in (again, straight):
        assert task.batch("valid", 0, 1)["x"].tolist() == made.batch("valid", 0, 1)["x"].tolist()
    with pytest.raises(InputError, match="only 10 of 60 trees fit between the lengths asked for"):
        opened("listops", **SMALL | {"nesting": 1, "shortest": 0})


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    """Files as the benchmark's, a few of each."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, kind, i in itertools.product(("train", "test"), ("neg", "pos"), range(3)):
        folder = tmp_path / "imdb" / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}_7.txt").write_text(f"a {kind} film, number {i}")
    (tmp_path / "aan").mkdir()
    for part in ("train", "eval", "test"):
        rows = [f"{i % 2}.0\tA{i}\tB{i}\tfirst text {i}\tsecond text {'!' * i}" for i in range(5)]
        (tmp_path / "aan" / f"new_aan_pairs.{part}.tsv").write_text("\n".join(rows))
    (tmp_path / "cifar").mkdir()
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        rows = draw.integers(0, 256, (10, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(10)
        rows.tofile(tmp_path / "cifar" / f"{name}.bin")
    (tmp_path / "path" / "metadata").mkdir(parents=True)
    (tmp_path / "path" / "imgs" / "0").mkdir(parents=True)
    lines = []
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"path/imgs/0/{i}.png")
        lines.append(f"imgs/0 {i}.png {i} {i % 2} 0 1")
    (tmp_path / "path/imgs/0/9.png").write_bytes(b"")  # as one of the benchmark's is
    (tmp_path / "path/metadata/0.npy").write_text("\n".join(lines))
    return tmp_path


ARENA = {
    "text": ("imdb", {"length": 32}),
    "retrieval": ("aan", {"length": 24}),
    "image": ("cifar", {}),
    "pathfinder": ("path", {}),
}


@pytest.mark.parametrize("task", ARENA)
def test_arena_files_train(arena: Path, tmp_path: Path, task: str) -> None:
    folder, choices = ARENA[task]
    finals = trained(task, tmp_path / "run", data=str(arena / folder), **choices)
    assert finals.keys() == {"valid", "test"}
    assert all(np.isfinite(values["loss"]) and 0 <= values["accuracy"] <= 1 for values in finals.values())


def test_arena_rows_are_the_files(arena: Path) -> None:
    text = opened("text", data=str(arena / "imdb"), length=32)
    batch = text.batch("valid", 0, 4)
    words = bytes(int(i) - 1 for i in batch["x"][0, : batch["lengths"][0] - 1]).decode()
    assert (words, batch["labels"].tolist()) == ("a neg film, number 0", [0, 0, 0, 1])
    assert batch["x"][0, batch["lengths"][0] - 1] == 257
    assert batch["x"][0, batch["lengths"][0] :].sum() == 0

    pair = opened("retrieval", data=str(arena / "aan"), length=24).batch("test", 0, 4)
    assert pair["x"].shape == (4, 2, 24)
    assert pair["labels"].tolist() == [0, 1, 0, 1]
    assert pair["lengths"].tolist() == [[13, 13], [13, 14], [13, 15], [13, 16]]

    assert opened("image", data=str(arena / "cifar")).batch("test", 0, 4)["x"].shape == (4, 1024, 1)
    colour = opened("image", data=str(arena / "cifar"), color="rgb")
    raw = np.fromfile(arena / "cifar" / "test_batch.bin", np.uint8).reshape(10, 3073)
    x = colour.batch("test", 0, 4)["x"] * torch.tensor(colour._std) + torch.tensor(colour._mean)
    assert (x[2, 33] * 255).tolist() == pytest.approx(raw[2, [1 + 33, 1 + 1024 + 33, 1 + 2048 + 33]].tolist(), abs=0.01)

    path = opened("pathfinder", data=str(arena / "path"))
    assert sum(path.rows(split) or len(path._parts[split].labels) for split in ("train", "valid", "test")) == 11


MISSING = {
    "text": "text: the train and valid and test part must have rows, got none",
    "retrieval": "cannot read .*new_aan_pairs.train.tsv: no such file",
    "image": "must hold data_batch_1.bin and more of CIFAR-10's binary version, got none",
    "pathfinder": "must hold metadata/.* that name pictures, got none",
    "images": "must hold one folder of pictures per class, got none",
    "listops": "cannot read .*basic_val.tsv",
}


@pytest.mark.parametrize("task", MISSING)
def test_files_that_are_not_there(tmp_path: Path, task: str) -> None:
    if task == "listops":
        (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n1\t1\n")
    with pytest.raises(InputError, match=MISSING[task]):
        opened(task, data=str(tmp_path), length=8)


def test_padding_is_not_read(arena: Path) -> None:
    """The mean is over a row's own tokens: with a causal recipe more padding changes nothing."""
    short, long = (opened("text", data=str(arena / "imdb"), length=length) for length in (32, 48))
    model = short.build(short.settings).eval()
    one, other = (task.inputs(task.batch("valid", 0, 4)) for task in (short, long))
    torch.testing.assert_close(model(**one), model(**other))


# ---------------------------------------------------------------------- pictures


def test_digits_by_pixels_and_in_a_grid(tmp_path: Path) -> None:
    task = opened("images")
    assert task.batch("train", 0, 4)["x"].shape == (4, 64, 1)
    assert [task.rows(split) for split in ("valid", "test")] == [179, 179]
    finals = trained("images", tmp_path / "run", recipe="hgrn2:heads=2,scan=in_grid", batch=128)
    assert finals["test"].keys() == {"loss", "accuracy"}


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    from PIL import Image

    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (6 + i, 6), (value, value, value // 2)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(InputError, match="holds pictures of 5 sizes: scale them with --side"):
        opened("images", data=str(tmp_path))
    task = opened("images", data=str(tmp_path), side=4, color="rgb")
    batch = task.batch("train", 0, 16)
    assert batch["x"].shape == (16, 16, 3)
    assert ((batch["x"][:, 0, 0] > 0) == (batch["labels"] == 1)).all()


# ---------------------------------------------------------------------- language


def test_extrapolation_reads_longer_windows(tmp_path: Path, text_file: str) -> None:
    choices = {"text": text_file, "length": 8, "factor": 16}
    finals = trained("extrapolation", tmp_path / "run", **choices)
    assert list(finals) == ["1x", "2x", "4x", "8x", "16x"]
    assert (tmp_path / "run" / "lengths.png").exists()
    task = opened("extrapolation", **choices)
    assert task.batch("16x", 0, 1)["ids"].shape == (1, 128)
    with pytest.raises(InputError, match="must have more than 512 tokens for --factor 64, got 200"):
        opened("extrapolation", **choices | {"factor": 64})


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2Config(vocab_size=256, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_distillation_alternates(tmp_path: Path, text_file: str, teacher: str) -> None:
    choices = {"teacher": teacher, "tokenizer": "byte", "text": text_file, "length": 16, "temperature": 2.0}
    task = opened("distillation", **choices)
    assert [bool(task.batch("train", i, 2)["taught"].all()) for i in range(4)] == [False, True, False, True]
    assert not task.batch("valid", 1, 2)["taught"].any()
    batch = task.batch("train", 1, 2)
    own = task._teacher(batch["ids"]).logits
    assert task.score(own, batch)["loss"].item() == pytest.approx(0, abs=1e-3)  # a student that is the teacher
    logits = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))
    p, q = (x.double().div(2).softmax(-1) for x in (own, logits))
    assert task.score(logits, batch)["loss"].item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-4)
    trained("distillation", tmp_path / "run", **choices)
    with pytest.raises(InputError, match="is not a folder here and not on the hub"):
        opened("distillation", **choices | {"teacher": str(tmp_path / "nobody")})
    with pytest.raises(InputError, match="distillation reads whole rows: leave --packing none"):
        opened("distillation", **choices | {"packing": "documents"}).score(logits, batch)


def test_a_model_of_ours_teaches(tmp_path: Path, text_file: str) -> None:
    """In a process of its own, where nothing else has registered such models with transformers."""
    from recur.hf import RecurConfig, RecurForCausalLM

    RecurForCausalLM(RecurConfig(recipe="gla", vocab_size=256, dim=8, depth=1)).save_pretrained(tmp_path / "ours")
    choices = ["--teacher", str(tmp_path / "ours"), "--tokenizer", "byte", "--text", text_file, "--length", "16"]
    toy = f"--dim 16 --depth 1 --steps 2 --batch 4 --device cpu --out {tmp_path / 'run'}".split()
    command = [sys.executable, "-m", "recur", "task", "distillation", "gla", *choices, *toy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_teacher_that_knows_too_little(text_file: str, teacher: str) -> None:
    config = Path(teacher) / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 256', '"vocab_size": 100'))
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config.from_pretrained(teacher)).save_pretrained(teacher)
    with pytest.raises(InputError, match="the teacher knows 100 tokens, the tokenizer makes 256"):
        opened("distillation", teacher=teacher, tokenizer="byte", text=text_file, length=16)


def test_a_recipe_that_looks_ahead_is_no_language_model(tmp_path: Path, text_file: str) -> None:
    with pytest.raises(InputError, match="reads right to left as well, so it cannot predict the next token"):
        train.start("lm", tmp_path, {**TINY, "text": text_file, "length": 16, "recipe": "longhorn_bidirectional"})


BAD = {
    "odd": ("mqar", {"length": 63}, "--length and --vocabulary must be even, got 63, 256"),
    "crowded": ("mqar", {"pairs": 30}, "--length must be at least 4 --pairs = 120, got 64"),
    "keyless": ("mqar", {"vocabulary": 8, "pairs": 4}, "--vocabulary 8 has too few keys for --pairs 4"),
    "copies": ("copying", {"copies": 200}, "--copies must be at most --length and --vocabulary at least 3, got 200"),
    "examples": ("regression", {"length": 7}, "--length must be even, two tokens per example, got 7"),
}


@pytest.mark.parametrize("kind", BAD)
def test_sizes_that_do_not_fit(kind: str) -> None:
    task, choices, words = BAD[kind]
    with pytest.raises(InputError, match=words):
        opened(task, **choices)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_what_it_is_and_its_setups_are_read(task: str) -> None:
    cls = TASKS[task]
    assert cls.name == task
    assert cls.about.endswith(".")
    assert (cls.__doc__ or "").strip()
    for choices in cls.setups.values():
        settings, _ = configured(task, choices)
        assert settings.batch % settings.accumulate == 0


UNFINISHED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "model": (lambda task: task.build(Settings()), "a task must build a model"),
    "data": (lambda task: task.batch("train", 0, 1), "a task must have data"),
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_an_unfinished_task_says_what_is_missing(kind: str) -> None:
    from recur.train.task import Task

    call, words = UNFINISHED[kind]
    with pytest.raises(NotImplementedError, match=words):
        call(Task())


def test_unfinished_readers_say_what_is_missing() -> None:
    from recur.train.tasks.images import PictureTask
    from recur.train.tasks.lra import ReadTask

    with pytest.raises(NotImplementedError, match="a task must have pictures"):
        PictureTask().read(Settings())
    with pytest.raises(NotImplementedError, match="a task must have rows"):
        ReadTask().read(Settings(), "train")


# ---------------------------------------------------------------------- recipes and comparisons


def test_recipes_by_words(tmp_path: Path) -> None:
    from recur import presets

    assert read_recipes("hgrn2:heads=2+longhorn") == [presets.hgrn2(heads=2), presets.longhorn()]
    (tmp_path / "own.json").write_text(json.dumps(presets.gla(rank=4).to_dict()))
    assert read_recipes(f"@{tmp_path / 'own.json'}") == [presets.gla(rank=4)]
    with pytest.raises(InputError, match="no preset is called 'longhron'; did you mean longhorn"):
        read_recipes("longhron")
    with pytest.raises(InputError, match="gla cannot be built with size=3: "):
        read_recipes("gla:size=3")
    with pytest.raises(InputError, match="cannot read a recipe from nowhere"):
        read_recipes("@nowhere")


def test_the_width_for_a_size() -> None:
    task = opened("mqar")
    for recipe in ("longhorn", "hgrn2:heads=2", "gss:state=8", "llama:heads=2,bias=true"):
        settings = solve_width(task, Settings(recipe=recipe, depth=2), 60_000)
        model = task.build(settings)
        assert parameter_count(model) == pytest.approx(60_000, rel=0.1)
        model(**task.inputs(task.batch("valid", 0, 1)))  # llama rotates pairs of a head's channels: they must be even
    with pytest.raises(InputError, match=r"no width of longhorn has about 100 parameters: the nearest is [\d,]+ at"):
        solve_width(task, Settings(recipe="longhorn"), 100)


def test_a_mixer_without_feed_forward_has_twice_the_layers() -> None:
    for words, depth in (("longhorn", 6), ("hgrn2", 3)):
        assert with_paper_depth(Settings(recipe=words, depth=3), read_recipes(words)).depth == depth
        assert with_paper_depth(Settings(recipe=words, depth=3, ffn="none"), read_recipes(words)).depth == 6
        assert with_paper_depth(Settings(recipe=words, depth=3, ffn="gelu"), read_recipes(words)).depth == 3


def test_comparisons(tmp_path: Path) -> None:
    layers = [{**TINY, "length": 16, "pairs": 2, "vocabulary": 16}]
    said: list[str] = []
    recipes = ["longhorn", "gla:heads=2", "hgrn2:heads=3"]
    options: dict[str, Any] = {"seeds": 2, "widths": (16,)}
    with pytest.raises(InputError, match="hgrn2:heads=3 cannot be built with --dim 16: axes: K = D/H must be"):
        compare("mqar", recipes, layers, tmp_path / "a", **options, report=said.append)
    assert said == []  # every size is tried before the first run
    assert not (tmp_path / "a").exists()
    recipes.pop()
    report = compare("mqar", recipes, layers, tmp_path / "a", **options, report=said.append)
    assert re.search(r"^\| longhorn \| [\d,]+ \| 16 \| 2 \| 128 \| \d\.\d{4} \(\d\.\d{4} to \d\.\d{4}\) ", report, re.M)
    assert re.search(
        r"No better than chance \(0\.125\) at width 16: (longhorn, gla:heads=2|gla:heads=2, longhorn)\.", report
    )
    assert "best first" not in report
    assert re.search(r"- longhorn ahead of gla at width 16 \(Liu et al.*\): both at chance\.", report)
    assert len(said) == 4
    assert (tmp_path / "a" / "report.md").read_text() == report
    for name in ("curves.png", "widths.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(b"\x89PNG")
    compare("mqar", recipes[1:2], layers, tmp_path / "b", **options)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["runs"] for name in "ab")
    alike = [[run[key] for key in ("final", "valid", "train")] for run in one if run["recipe"] == "gla:heads=2"]
    assert alike == [[run[key] for key in ("final", "valid", "train")] for run in two]  # equal seeds, equal runs
    assert alike[0] != alike[1]
    said.clear()
    assert compare("mqar", recipes[:2], layers, tmp_path / "a", **options, report=said.append).startswith("# mqar")
    assert said == []  # all of it was there
    with pytest.raises(InputError, match="holds a comparison of other choices: choose another --out"):
        compare("mqar", recipes[:2], [{**layers[0], "steps": 3}], tmp_path / "a", **options)


def test_comparisons_at_a_size_and_at_lengths(tmp_path: Path, text_file: str) -> None:
    layers = [{**TINY, "length": 8, "text": text_file, "factor": 2}]
    report = compare("extrapolation", ["gla:heads=2", "mamba"], layers, tmp_path, parameters=60_000)
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^\| \S+ \| ([\d,]+) \|", report, re.M)]
    assert sizes == [pytest.approx(60_000, rel=0.1)] * 2
    assert (tmp_path / "lengths.png").exists()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([0.9, 0.8], [0.7, 0.6], "seen, with every seed"),
        ([0.9, 0.6], [0.7, 0.5], "seen in the mean, within the spread of seeds"),
        ([0.9], [0.7], "seen"),
        ([0.5, 0.6], [0.7, 0.5], "not seen"),
        ([1.0], [1.0], "equal here"),
    ],
)
def test_what_is_said_of_a_claim(first: list[float], second: list[float], words: str) -> None:
    from recur.train.compare import _seen

    assert _seen(first, second, max) == words
    assert _seen([-x for x in first], [-x for x in second], min) == words


# ---------------------------------------------------------------------- chance, colours, samples


def test_chance_of_every_task_by_counting() -> None:
    assert opened("mqar", vocabulary=16, pairs=2).chance() == 1 / 8
    assert opened("copying").chance() == 1 / 14
    assert opened("tracking").chance() == 1 / 2
    assert opened("tracking", group="s4").chance() == 1 / 24
    assert opened("regression", density=1.0, noise=0.0).chance() == pytest.approx(1.0, rel=0.15)
    digits = opened("images")
    labels = digits._parts["valid"].labels
    assert digits.chance() == max(np.bincount(labels)) / len(labels)
    lm = opened("lm")
    assert lm.chance() == lm.levels()["single-token entropy"]


def result(recipe: str, value: float, shown: str = "accuracy") -> dict[str, Any]:
    return {"recipe": recipe, "width": None, "final": {"valid": {shown: value}}}


def test_guesses_are_not_ordered() -> None:
    from recur.train.compare import Guess, _order

    done = [result("longhorn", 0.53), result("gla", 0.54), result("retnet", 0.56)]
    said = "\n".join(_order("mqar", done, "accuracy", max, Guess(0.5, 900)))  # 0.5 + 3 x 0.0167
    assert "Order by accuracy, best first: retnet 0.5600." in said
    assert "No better than chance (0.5): gla, longhorn." in said
    assert re.search(r"longhorn ahead of gla \(.*\): both at chance\.", said)
    assert re.search(r"longhorn ahead of retnet \(.*\): not seen\.", said)
    losses = [result("longhorn", 2.99, "loss"), result("gla", 2.5, "loss")]
    said = "\n".join(_order("lm", losses, "loss", min, Guess(3.0, 900)))
    assert "best first: gla 2.5000." in said
    assert "No better than chance (3): longhorn." in said
    said = "\n".join(_order("lm", [result("gla", 0.1)], "accuracy", max, Guess(None, 900)))
    assert said.startswith("Order by accuracy, best first: gla 0.1000.")


def test_a_preset_has_one_color_in_all_pictures() -> None:
    from recur import presets
    from recur.train.plot import looks

    alone = dict(zip(presets.names(), (looks([name])[0] for name in presets.names()), strict=True))
    assert len(set(alone.values())) == len(alone)  # color and line
    for names in (["gla", "longhorn", "mamba"], ["mamba", "hgrn2", "gla"]):
        assert looks(names) == [alone[name] for name in names]
    together = looks(["gla:heads=2", "gla:heads=4,rank=8", "gla, 64", "gla, 128"])
    assert {color for color, _ in together} == {alone["gla"][0]}
    assert len(set(together)) == 4
    assert looks(["my_own"]) == looks(["my_own"])


def test_the_drawn_and_the_printed_loss_are_one(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recur import train
    from recur.train import plot

    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plot, "draw_curve", lambda path, curve, **look: drawn.update(look, curve=curve))
    run = train.start("lm", tmp_path, {**TINY, "text": text_file, "length": 16, "steps": 2, "every": 1, "evaluate": 2})
    train.fit(run)
    finals = train.finish(run)
    assert drawn["final"] == finals["valid"]
    assert drawn["final"]["loss"] != drawn["curve"][-1]["valid_loss"]  # of two rows


def test_a_prompt_is_of_whole_lines_of_prose() -> None:
    from recur.train.tasks.lm import prose, whole_lines
    from recur.train.tokenize import Characters

    letters = Characters("\n ab")
    read = lambda text: letters.decode(whole_lines(letters, letters.encode(text).tolist()))  # noqa: E731
    assert read("ab\nba\nab\na") == "ba\nab\n"
    assert read("abab\nab") == "abab\nab"
    assert read("abab") == "abab"
    rows = [letters.encode(text).tolist() for text in ("a\n    b\n", "b\nabab\na", "b\na  a\na", "ab ab\n")]
    assert letters.decode(prose(letters, rows)) == "abab\n"


def test_tables_of_no_use(tmp_path: Path) -> None:
    from recur.train.tasks.lra import _pair_of, _tree_of, parsed

    for content, row, read in (("( [MIN 1 ] )\tx", 0, _tree_of), ("[MIN\t12", 0, _tree_of), ("foo\t1", 0, _tree_of),
                               ("[MIN 1 X\t1\n\n", 1, _tree_of), ("nan\ta\tb\tc\td", 0, _pair_of),
                               ("1.0\ta\tb\tc", 0, _pair_of)):  # fmt: skip
        (tmp_path / "t.tsv").write_text(content)
        with pytest.raises(InputError, match=f"t.tsv: row {row} must hold a row, got another"):
            parsed(tmp_path / "t.tsv", 0, "a row", read)
    with pytest.raises(InputError, match="--longest must be at least 2 above --shortest, got 5 and 5"):
        opened("listops", shortest=5, longest=5)
    with pytest.raises(InputError, match=r"listops: only [0-9]+ of 100000 trees fit between the lengths asked for"):
        opened("listops", shortest=3, longest=5, nesting=2, arguments=2)
