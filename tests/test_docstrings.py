"""Every public name is on a page of the API, and its docstring has one argument per line and an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import recur
from recur import blocks, convert, hf, presets, testing, train

PAGES = sorted((Path(__file__).parent.parent / "docs" / "api").glob("*.md"))
NAMES = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]
MEMBERS = [
    f"{name}.{member}"
    for page in PAGES
    for name, members in re.findall(
        r"^::: (\S+)\n    options: \{.*members: \[(.*?)\]", page.read_text(encoding="utf-8"), re.M
    )
    for member in members.split(", ")
]
CALLS = [name for name in NAMES if name != "recur.train.TASKS"] + MEMBERS
HOMES = (recur, blocks, convert, hf, presets, testing, train)
RUNS = {
    "Settings",
    "Training",
    "evaluate",
    "finish",
    "fit",
    "prepare",
}  # of recur.train: the example is that of `start`


def found(name: str) -> Any:
    """The object of a name with dots, a method included."""
    if name in MEMBERS:
        home, _, method = name.rpartition(".")
        return getattr(found(home), method)
    home, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(home), attribute)


def parameters(subject: Any) -> list[str]:
    """What a caller may pass, but for the `name` that every part has."""
    if isinstance(subject, type) and issubclass(subject, BaseException):
        return []
    names = [name for name in inspect.signature(subject).parameters if name not in ("draw", "self")]
    is_part = isinstance(subject, type) and issubclass(subject, recur.Part) and subject is not recur.Part
    return [name for name in names if not (is_part and name == "name")]


def documented(subject: Any) -> list[str]:
    """The names in the section "Args:", or "Attributes:" of a NamedTuple, one at the start of each of its lines."""
    head = "Attributes" if hasattr(subject, "_fields") else "Args"
    _, _, section = (inspect.getdoc(subject) or "").partition(f"\n{head}:\n")
    lines = section.split("\n\n")[0].splitlines()
    return [line.partition(":")[0].strip() for line in lines if line.startswith("    ") and line[4] != " "]


def example(subject: Any, name: str) -> doctest.DocTest:
    known = {"recur": recur, "torch": torch}
    return doctest.DocTestParser().get_doctest(inspect.getdoc(subject) or "", known, name, None, None)


def test_every_public_name_is_on_a_page() -> None:
    assert len(NAMES) == len(set(NAMES))
    listed = {id(found(name)) for name in NAMES}
    public = [(home, name) for home in HOMES for name in home.__all__]
    missing = [f"{home.__name__}.{name}" for home, name in public if id(getattr(home, name)) not in listed]
    assert missing == [
        "recur.convert",
        "recur.presets",
        "recur.testing",
        "recur.testing.laws",
        "recur.testing.strategies",
    ]


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_one_per_line(name: str) -> None:
    subject = found(name)
    assert not re.search(r"Args: *\S", inspect.getdoc(subject) or ""), "names belong on lines of their own"
    if subject not in (train.Settings, train.Training):  # whose fields say what they are where they stand
        assert sorted(documented(subject)) == sorted(parameters(subject))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("name", [name for name in CALLS if name.rpartition(".")[2] not in RUNS])
def test_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = example(found(name), name)
    assert case.examples, f"{name} has no example"
    printed: list[str] = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(case, out=printed.append)
    assert not failed, "".join(printed)
