"""One meaning per word, one word per meaning: the field's terms instead of words that only this code would use.

Folders that are listed as clean stay clean. To clean another one, add it to CLEAN and mend what the tests report.
"""

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
CLEAN = ["kernels"]

# Nowhere, be it a name, a comment or a docstring: what stands in the field's place.
WORDS = {
    "told|tells?|awaited|drawn": "publish, wait, take_ticket",
    "calm|repairs?": "in_range, gradients_exact",
    "strands?": "segment",
    "pace": "cumulative_decay",
    "turn(s|ed|ing)?|LOOK": "rotate, rotated, phase, TRANSPOSE, next_block",
    "walk\\w*|adjoints?": "forward, backward, pass, elementwise",
    "owes?|owed|honest|doors?": "say what is computed",
    "texts?": "sequence, document",
}
# Not as a whole name: common words that once were names of something else.
NAMES = {
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
    r"\b(one|a|an|two|[0-9]+) (gate|number|launch|program|channel|row|token|scale|decay|state|head)s? "
    r"an? (head|key|channel|token|layer|row|launch|chunk|program|text|value)\b"
)


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md"))


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines, with names cut at underscores."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield number, line.replace("_", " ")


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Names in code, without _ptr at their end; a leading underscore is kept out."""
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string.removesuffix("_ptr").lstrip("_")


def found(path: Path) -> list[str]:
    """Every private word in a file, with its place and the term to use."""
    place = path.name
    said = []
    for number, line in prose(path):
        said += [
            f"{place}:{number}: {match[0]!r}; say {better}"
            for word, better in WORDS.items()
            for match in re.finditer(rf"\b({word})\b", line)
        ]
        said += [f"{place}:{number}: {match[0]!r}; say 'per'" for match in PER.finditer(line)]
    for number, name in names(path):
        said += [
            f"{place}:{number}: name {name!r}; say {better}"
            for word, better in NAMES.items()
            if re.fullmatch(word, name)
        ]
    return said


@pytest.mark.parametrize("folder", CLEAN)
def test_only_words_of_the_field(folder: str) -> None:
    assert files(folder), folder
    assert [line for path in files(folder) for line in found(path)] == []


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
    assert any(f"{word!r}" in line for line in found(path))


def test_plain_english_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(
        '"""Write the whole row; logits fall; the sum of squares, near 0. In its place a head reads."""\nx = 1\n'
    )
    assert found(path) == []


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
