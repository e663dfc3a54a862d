"""Imports point one way, presets -> blocks -> primitives -> kernels, without a circle, in functions as at the top."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

# each imports none of those after it
FLOORS = ("recur.kernels", "recur.primitives", "recur.recipe", "recur.blocks", "recur.presets")
LAUNCHES = {"recur.kernel", "recur.counting"}  # which import kernels, inside functions: a CPU needs no Triton
WITHOUT_TRITON = {"recur.kernels.cached", "recur.kernels.packing"}  # which anything may import


def trees(package: str) -> dict[str, ast.Module]:
    """Every module in a package's folder, by name."""
    spec, found = find_spec(package), dict[str, ast.Module]()
    assert spec is not None
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def outside(statement: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules that a statement names."""
    if isinstance(statement, ast.ImportFrom):
        return {statement.module or ""}
    return {alias.name for alias in statement.names}


def statements(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.Import | ast.ImportFrom, int]]:
    """Every import that is run, and in how many functions it stands: none for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, depth
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from statements(child, depth + isinstance(child, ast.FunctionDef))


def origin(package: str, name: str, modules: Mapping[str, ast.Module]) -> str:
    """The module that defines what `from package import name` brings, through the packages that hand it on."""
    if f"{package}.{name}" in modules:
        return f"{package}.{name}"
    for statement, _ in statements(modules[package]):
        if isinstance(statement, ast.ImportFrom) and statement.module in modules:
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return origin(statement.module, alias.name, modules)
    return package


def imports(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports anywhere."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for statement, _ in statements(tree):
            if isinstance(statement, ast.Import):
                found[name] |= {alias.name for alias in statement.names if alias.name in modules}
            elif statement.module in modules:
                found[name] |= {origin(statement.module, alias.name, modules) for alias in statement.names}
        found[name].discard(name)
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another; none if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a higher floor."""
    return [
        f"{name} imports {other}"
        for i, floor in enumerate(FLOORS)
        for name, others in graph.items()
        for other in sorted(others)
        if below(name, floor) and any(below(other, higher) for higher in FLOORS[i + 1 :])
    ]


MODULES = trees("recur") | trees("recur.kernels")  # in a checkout a folder of its own
GRAPH = imports(MODULES)


def test_no_circle() -> None:
    assert circle(GRAPH) == []


def test_imports_point_down() -> None:
    assert upward(GRAPH) == []


def test_kernels_are_imported_where_they_are_launched() -> None:
    found = [
        (name, depth)
        for name, tree in MODULES.items()
        if not below(name, "recur.kernels")
        for statement, depth in statements(tree)
        if any(below(other, "recur.kernels") and other not in WITHOUT_TRITON for other in outside(statement))
    ]
    assert {name for name, _ in found} == LAUNCHES
    assert all(depth > 0 for _, depth in found)


def test_kernels_stand_on_torch_and_triton_alone() -> None:
    assert "recur.kernels.scan" in MODULES
    for name, tree in MODULES.items():
        if below(name, "recur.kernels"):
            allowed = {"torch", *sys.stdlib_module_names} | (set() if name in WITHOUT_TRITON else {"triton"})
            named = {other for statement, _ in statements(tree) for other in outside(statement)}
            beyond = {other for other in named if other.partition(".")[0] not in allowed}
            assert all(below(other, "recur.kernels") for other in beyond), (name, beyond)


@pytest.mark.parametrize("late", ["import recur.blocks.scans", "def f():\n    from recur import Scan"])
def test_what_is_forbidden_is_found(late: str) -> None:
    """A circle through a function and through a package that hands a name on."""
    sources = {
        "recur": "from recur.blocks.scans import Scan",
        "recur.primitives": "",
        "recur.primitives.scan": late,
        "recur.blocks.scans": "import torch\nfrom recur.primitives import scan",
    }
    graph = imports({name: ast.parse(source) for name, source in sources.items()})
    assert set(circle(graph)) == {"recur.primitives.scan", "recur.blocks.scans"}
    assert upward(graph) == ["recur.primitives.scan imports recur.blocks.scans"]
    typed = f"if TYPE_CHECKING:\n    {late}" if late.startswith("import") else ""
    graph = imports({name: ast.parse(source) for name, source in {**sources, "recur.primitives.scan": typed}.items()})
    assert circle(graph) == []
