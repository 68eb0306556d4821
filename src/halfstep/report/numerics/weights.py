"""Which weights move the least, and which updates a 16-bit weight would not see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from .reading import Run
from .shares import label_of, lost_share

SHOWN = 12


@dataclass(frozen=True)
class Moving:
    """How a weight moves.

    Attributes:
        label: its path and name.
        ratio: the median over the recorded steps of the typical ``|update| / |weight|``; 0 for one
            that does not move.
        lost: the largest share of updates that bfloat16 would lose, None where nothing moved.
    """

    label: str
    ratio: float
    lost: float | None

    @property
    def exponent(self) -> int | None:
        """The ratio as a power of two, None for a weight that does not move."""
        return round(math.log2(self.ratio)) if 0 < self.ratio < math.inf else None


def slowest(run: Run, most: int = SHOWN) -> list[Moving]:
    """Return the weights that change the least, the slowest first."""
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for step in run.steps:
        for row in step["rows"]:
            if run.tensors[row["id"]]["kind"] == "update":
                rows.setdefault(row["id"], []).append(row)
    found = [
        Moving(
            label_of(run.tensors[number]),
            median(typical(row) for row in each),
            max((lost_share(row, "bfloat16") or 0.0 for row in each if "counts" in row),
                default=None),
        )
        for number, each in rows.items()
    ]  # fmt: skip
    return sorted(found, key=lambda each: each.ratio)[:most]


def typical(row: Mapping[str, Any]) -> float:
    """Return the power of two below which half of a row's numbers lie, zeros among them.

    >>> typical({"count": 10, "zeros": 2, "low": -3, "counts": [4, 4]})
    0.125
    """
    half, seen = row["count"] / 2, row.get("zeros", 0)
    if seen >= half:
        return 0.0
    for place, count in enumerate(row.get("counts", ())):
        seen += count
        if seen >= half:
            return math.ldexp(1.0, row["low"] + place)
    return math.inf
