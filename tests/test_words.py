"""One meaning per word, one word per meaning: the field's terms instead of words that only this code would use."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ["kernels", "recur", "tests", "examples", "benchmarks", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
LEFT_OUT = [ROOT / "benchmarks" / "results", ROOT / "tests" / "golden", Path(__file__)]

# Nowhere, be it a name, a comment, a docstring or a page: what stands in the field's place.
WORDS = {
    "told|tells?|awaited": "publish, wait, say, list",
    "calm|repairs?": "in_range, gradients_exact",
    "strands?": "segment",
    "pace": "cumulative_decay",
    "(?<!of a )(?<!many )(?<!whole )turn(s|ed|ing)?": "rotate, rotated, phase, convert",
    r"(?<!\.)(?<!def )walk(s|ed|ing|er)?": "forward, backward, pass, elementwise",
    "owes?|owed|honest|doors?": "say what is computed",
}
# Where scans are written: words that are common elsewhere.
OF_SCANS = {
    "texts?": "sequence, document",
    "drawn": "take_ticket",
    "LOOK": "TRANSPOSE, next_block",
}
# Names in kernels that once were names of something else.
NAMES = {
    "adjoints?": "backward",
    "rise|fall|whole": "log_in, log_out, log_total",
    "write|reach": "k_out, k_in",
    "near|far": "anchor_in, anchor_out",
    "solve|exact_|gradient_": "solve_tril, scores_exact",
    "share|moment": "decay_product, dphase_state",
    "squares?": "chunk_head",
    "word|words": "phase, descriptor",
    "few|FEW|_FEW": "CHUNKS_PER_PROGRAM, underfilled",
}
# "one gate a key" for "one gate per key"
PER = re.compile(
    r"\b(?:(?:one|two|several|many|[0-9]+) (?:(?!where|because|is|by)\w+ )?|(?:bytes|tokens|radians|poles|us|ms) )an? "
    r"(?:head|key|channel|token|layer|row|launch|call|chunk|program|thread|processor|document|segment|second|value)\b(?!-)|"
    r"\b(?:gate|number|bonus|decay|launch|program|scale|state)s? an? (?:head|key|channel|token|layer|row|chunk|value)\b"
)


def files(place: str) -> list[Path]:
    """Every Python file and page in a folder, or the page itself, but for what programs wrote."""
    here = ROOT / place
    found = sorted(here.rglob("*")) if here.is_dir() else [here]
    return [
        x for x in found if x.suffix in (".py", ".md") and not any(x == out or out in x.parents for out in LEFT_OUT)
    ]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines, with names cut at underscores; of the changelog without code, where earlier names stand."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"`[^`]*`", "", line) if path.name == "CHANGELOG.md" else line
        yield number, re.sub(r'"turn(_back)?"', "", line).replace("_", " ")  # names in stored recipes


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Names in code, without _ptr at their end; a leading underscore is kept out."""
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string.removesuffix("_ptr").lstrip("_")


def found(path: Path, *, kernel: bool = False, scan: bool = False) -> list[str]:
    """Every private word in a file, with its place and the term to use."""
    words, said = WORDS | (OF_SCANS if kernel or scan else {}), []
    for number, line in prose(path):
        place = f"{path.name}:{number}"
        for word, better in words.items():
            said += [f"{place}: {match[0]!r}; say {better}" for match in re.finditer(rf"\b(?:{word})\b", line)]
        said += [f"{place}: {match[0]!r}; say 'per'" for match in PER.finditer(line)]
    for number, name in names(path) if kernel else ():
        for word, better in NAMES.items():
            if re.fullmatch(word, name):
                said.append(f"{path.name}:{number}: name {name!r}; say {better}")
    return said


@pytest.mark.parametrize("place", PLACES)
def test_only_words_of_the_field(place: str) -> None:
    assert files(place), place
    scans = ROOT / "recur" / "primitives"
    kernel = place == "kernels"
    assert [line for path in files(place) for line in found(path, kernel=kernel, scan=path.parent == scans)] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("# what the gate is told\n", "told"),
        ("turned_ptr = 1\n", "turned"),
        ("rise = 1\n", "rise"),
        ("square = k * k\n", "square"),
        ('"""One launch, one gate a head."""\n', "one gate a head"),
        ("_walk(x)\n", "walk"),
    ],
)
def test_a_private_word_is_found(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(text)
    assert any(f"{word!r}" in line for line in found(path, kernel=True))


def test_plain_english_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(
        '"""Write the whole row; logits fall; the sum of squares, near 0. In its place a head reads."""\nx = 1\n'
    )
    assert found(path, kernel=True) == []


def test_kernels_import_torch_and_triton_only() -> None:
    """Nothing above them: recur.primitives stands on kernels, not the other way round."""
    for path in files("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                top = module.partition(".")[0]
                own = module == "recur.kernels" or module.startswith("recur.kernels.")
                assert own or top in {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {module}"


def test_kernels_can_be_read() -> None:
    """No function of more than 120 lines, no kernel of more than 24 parameters."""
    for path in files("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                count = len(node.args.args) if jitted else 0
                assert node.end_lineno - node.lineno < 120, f"{path.name}: {node.name} is too long"  # type: ignore[operator]
                assert count <= 24, f"{path.name}: {node.name} has {count} parameters"
