"""Imports run one way: no file needs itself through others, late and type-only imports included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
FILES = {
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file
    for file in SRC.rglob("*.py")
}


def imports(name: str) -> Iterator[str]:
    """Yield what a module names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = source(name, node)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in FILES else module


def source(name: str, node: ast.ImportFrom) -> str:
    """Return the whole name of what ``from ..x import`` takes from."""
    if not node.level:
        return node.module or ""
    package = name.split(".")
    up = node.level - (FILES[name].name == "__init__.py")
    return ".".join([*package[: len(package) - up], *filter(None, [node.module])])


def test_no_file_imports_itself_through_others():
    graph = {name: {each for each in imports(name) if each in FILES} - {name} for name in FILES}
    assert "halfstep.compare.recipe" in graph["halfstep.compare.run"]  # relative ones are seen
    order = list(TopologicalSorter(graph).static_order())  # it raises, naming the circle
    assert set(order) == set(FILES)
