"""Every command of the pages on training and tasks runs, at toy size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from recur.cli import _parser, main
from recur.train import data
from recur.train.run import TASKS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in ("training.md", "tasks.md")]
BLOCKS = [block for page in PAGES for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
HERE = [line for line in COMMANDS if line.startswith("recur ")]
TOY = "--dim 16 --depth 1 --steps 2 --batch 4 --accumulate 1 --every 2 --evaluate 4 --device cpu --precision float32"
SHORT = {"lm": "--length 16", "extrapolation": "--length 8 --factor 2", "text": "--length 24"}
SHORT |= {"retrieval": "--length 24", "distillation": "--length 16 --tokenizer byte", "tracking": "--factor 2"}
SHORT |= {"listops": "--examples 50 --nesting 4"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A folder with a small one of everything that the commands read."""
    from PIL import Image
    from transformers import GPT2Config, GPT2LMHeadModel

    here = tmp_path_factory.mktemp("docs")
    (here / "book.txt").write_text("The text.\n" + text)
    (here / "run.yaml").write_text("lr: 3e-4\nbetas: [0.9, 0.95]\n")
    for part, kind in ((p, k) for p in ("train", "test") for k in ("neg", "pos")):
        (here / "aclImdb" / part / kind).mkdir(parents=True)
        (here / "aclImdb" / part / kind / "0.txt").write_text(f"a {kind} film")
    (here / "aan").mkdir()
    for part in ("train", "eval", "test"):
        (here / "aan" / f"new_aan_pairs.{part}.tsv").write_text("1.0\tA\tB\tone text\tanother text\n0.0\tC\tD\tx\ty\n")
    (here / "cifar-10-batches-bin").mkdir()
    for name in ("data_batch_1", "test_batch"):
        np.tile(np.arange(4, dtype=np.uint8)[:, None], (1, 3073)).tofile(here / "cifar-10-batches-bin" / f"{name}.bin")
    metadata = here / "curv_contour_length_14" / "metadata"
    metadata.mkdir(parents=True)
    metadata.joinpath("0.npy").write_text("".join(f". {i}.png {i} {i % 2}\n" for i in range(6)))
    for i in range(6):
        Image.new("L", (8, 8), i).save(here / "curv_contour_length_14" / f"{i}.png")
        (here / "pictures" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(here / "pictures" / str(i % 2) / f"{i}.png")
    small = GPT2Config(vocab_size=256, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(small).save_pretrained(here / "gpt2")
    (here / "hub").mkdir()
    lines = "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())
    for part in ("train", "validation"):
        (here / "hub" / f"{part}.jsonl").write_text(lines)
    return here


def toy(command: str) -> list[str]:
    """The words of a command with flags that make it small after its own, and nothing that needs a network."""
    words = shlex.split(command)[1:]
    if words[0] == "data":
        return [*words, "--tokenizer", "byte"]
    if words[0] == "generate" or "--resume" in words:
        return words
    if words[0] == "compare":
        task = words[words.index("--task") + 1]
        words = [words[0], *words[1:3], *words[words.index("--task") :]]  # two recipes are enough
        sizes = {"--parameters": "60000"} if task == "lm" else {}
        words = [sizes.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    else:
        task = words[1] if words[0] == "task" else "lm"
    size = TOY if words[0] != "compare" else TOY.replace("--dim 16 ", "")
    return [*words, *size.split(), *SHORT.get(task, "").split()]


def test_the_commands_of_the_pages_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as a reader types them: later ones use what earlier ones wrote."""
    monkeypatch.chdir(place)
    monkeypatch.setitem(data.HUB, "openwebtext", (str(place / "hub"), None, None, "text"))
    for command in HERE:
        assert main(toy(command)) == 0, command
        capsys.readouterr()
    assert {path.name for path in (place / "runs" / "book").iterdir()} >= {"config.json", "curve.png", "tensorboard"}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("accelerate ")])
def test_launched_commands_are_understood(command: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    words = shlex.split(command)
    launch = launch_command_parser().parse_args(words[2:])
    assert (launch.module, launch.training_script) == (True, "recur")
    _parser().parse_args(launch.training_script_args)


def test_every_task_is_on_the_page() -> None:
    page = PAGES[1].read_text()
    for name, task in TASKS.items():
        assert re.search(rf"^\| \[[^]]*\b{name}\b", page, re.M), name
        assert f"recur task {name} " in page or f"--task {name} " in page, name
        assert all(f"`{setup}`" in page for setup in task.setups), name


def test_no_command_is_of_another_kind() -> None:
    assert all(line.startswith(("recur ", "accelerate launch ")) for line in COMMANDS)
