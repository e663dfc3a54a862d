"""What the README and the pages of docs/ say is true: code runs, output is real, commands and links exist."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import recur.testing
from recur import presets
from recur.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RUN = [ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "port.md"]
RUN += sorted((ROOT / "docs" / "add").glob("*.md"))


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page, with their languages."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


BLOCKS = blocks(ROOT / "README.md")
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = "".join(code for language, code in BLOCKS if language == "bash")
COMMANDS = [line.partition(" #")[0].strip() for line in SHELL.splitlines()]


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It may seed torch without a trace in later tests; laws are tried briefly, as other tests do it at length."""
    monkeypatch.setattr(recur.testing, "check", partial(recur.testing.check, examples=3))
    with torch.random.fork_rng(devices=()):
        yield


def test_it_opens_with_a_sentence_and_fifteen_lines_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    title, sentence, first = (block for block in re.split(r"\n\n(?=\S)", README)[:3])
    assert title.startswith("# ")
    assert re.fullmatch(r"[^\n]+\.", sentence)
    assert first.startswith("```python\n" + PYTHON[0].splitlines()[0])
    assert len(PYTHON[0].splitlines()) <= 15
    exec(PYTHON[0], {})
    assert capsys.readouterr().out == "same: True\ntorch.Size([2, 30])\n"


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_its_code_runs_from_top_to_bottom(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block of text after a block of code is what that code prints."""
    module = types.ModuleType(page.stem)  # in which dataclasses look their annotations up
    sys.modules[module.__name__], names = module, vars(module)
    for (language, code), (next_language, text) in pairwise([*blocks(page), ("", "")]):
        if language == "python":
            exec(code, names)
            printed = capsys.readouterr().out
            assert next_language != "text" or printed == text


def test_the_path_of_a_query_names_existing_functions() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| \[[^]]*\]\(\.\./([\w/]+\.py)\)", page, flags=re.MULTILINE)
    assert len(rows) > 10
    for name, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), name


def test_its_new_recurrence_is_the_one_of_the_example() -> None:
    (code,) = (code for code in PYTHON if "def corrected_hgrn2" in code)
    function = re.search(r"^def corrected_hgrn2.*?^    \)$", code, flags=re.MULTILINE | re.DOTALL)
    assert function is not None
    assert function[0] in (ROOT / "examples" / "03_new_recurrence.py").read_text(encoding="utf-8")
    assert len(function[0].splitlines()) <= 20


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("recur ")])
def test_its_commands_are_understood(command: str) -> None:
    _parser().parse_args(shlex.split(command)[1:])


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert "demo" in targets
    assert "test" in targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), target
        headings = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in headings], target


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_has_its_equation_on_a_page(name: str) -> None:
    preset = getattr(presets, name)
    home = f"/{preset.__module__.replace('.', '/')}.py)"
    paper = re.search(r"arXiv:([\d.]+\d)", preset().source)
    assert paper is not None
    texts = [page.read_text(encoding="utf-8") for page in PAGES[2:]]
    assert any(home in text and f"https://arxiv.org/abs/{paper[1]}" in text for text in texts)
