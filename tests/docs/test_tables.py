"""The tables of the docs that are made from the library's data say all of it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from halfstep import FORMATS
from halfstep.torch import rules

TABLES: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "tables.py"))


@pytest.mark.parametrize("name", TABLES["TABLES"])
def test_a_table_can_be_made_and_has_no_holes(name: str) -> None:
    made = TABLES["TABLES"][name]()
    assert made.count("\n") >= 2
    assert "{" not in made
    assert "|  |" not in made


def test_every_rule_has_its_row() -> None:
    rows = TABLES["module_rules"]().splitlines()[2:]
    assert len(rows) == len(rules.RULES) + 3  # the leaves, other layers, modules without weights
    assert "BatchNorm*d" in rows[[c for c, _ in rules.RULES].index((rules._NormBase,))]


def test_every_format_has_its_row_with_its_largest_number() -> None:
    made = TABLES["formats"]()
    assert all(f"`{name}`" in made for name in FORMATS)
    assert "65504" in made
    assert "57344" in made
