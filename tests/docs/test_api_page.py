"""Every public name stands on the API page."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split()


def public_names(package: str) -> list[str]:
    """The names that a package re-exports, each as ``from .x import Y as Y``."""
    folder = ROOT / "src" / Path(*package.split("."))
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]


@pytest.mark.parametrize(
    "package",
    ["halfstep", "halfstep.torch", "halfstep.keras", "halfstep.compare", "halfstep.report"],
)
def test_every_public_name_is_on_the_page(package: str) -> None:
    names = public_names(package)
    assert names
    missing = [f"{package}.{name}" for name in names if f"{package}.{name}" not in PAGE]
    assert not missing
