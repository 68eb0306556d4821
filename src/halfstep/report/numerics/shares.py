"""What each tensor lost at each step, in few enough characters for a page.

A share of 0 to 1 becomes one character: a page of 300 layers then has a megabyte where JSON
numbers would be five, and a heat map needs no more than the 70 steps of its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...core.record import Event
from .reading import Run, spread

SMALLEST = 1e-6
"""The smallest share that is told from none."""

LEVELS = 70
ABSENT = " "
_FIRST = ord("0")

MOST_CELLS = 3_000_000
"""The most cells of exponents by step of all tensors together."""

KINDS = {
    "activation": "Activations",
    "activation_gradient": "Gradients of activations",
    "weight_gradient": "Gradients of weights",
    "weight": "Weights",
    "update": "Updates, as a share of the weight",
}
"""What can be looked at, in the order of the page."""

SCALED = "float16, at the loss scale"


def encode(share: float | None) -> str:
    """Return a share as one character: a space where there is none, ``'0'`` for 0.

    >>> encode(None), encode(0.0), encode(1.0), encode(1e-9) > encode(0.0)
    (' ', '0', 'v', True)
    """
    if share is None:
        return ABSENT
    if share <= 0:
        return chr(_FIRST)
    depth = math.log(max(share, SMALLEST)) / math.log(SMALLEST)  # 0 for all, 1 for the smallest
    return chr(_FIRST + 1 + round((1 - min(max(depth, 0.0), 1.0)) * (LEVELS - 1)))


@dataclass(frozen=True)
class Layer:
    """One tensor over time.

    Attributes:
        label: its path and name.
        title: the class of its module.
        lost: for each format, a character a step: the share that the format would not hold.
        low: the smallest exponent of ``exponents``.
        exponents: a string a step: a character for each exponent from ``low`` on.
        worst: for each format, the largest share in a step that was not skipped.
        zeros: the largest share of zeros.
    """

    label: str
    title: str
    lost: Mapping[str, str]
    low: int
    exponents: Sequence[str]
    worst: Mapping[str, float]
    zeros: float


@dataclass(frozen=True)
class View:
    """All tensors of one kind.

    Attributes:
        kind: of :data:`KINDS`.
        title: in words.
        formats: what ``lost`` has.
        layers: in the order of the model.
        steps: the numbers of the steps of ``lost``.
        fine_steps: the numbers of the steps of ``exponents``.
    """

    kind: str
    title: str
    formats: tuple[str, ...]
    layers: tuple[Layer, ...]
    steps: tuple[int, ...]
    fine_steps: tuple[int, ...]


def views(run: Run) -> list[View]:
    """Return what there is to look at, one view for each kind that was counted."""
    places = _rows_by_tensor(run)
    every = list(range(len(run.steps)))
    applied = [place for place in every if not run.steps[place]["skipped"]]
    columns = spread(every, max(20, MOST_CELLS // max(1, 40 * len(places))))
    order = {layer["path"]: place for place, layer in enumerate(run.header["layers"])}
    found = []
    for kind, title in KINDS.items():
        ids = [number for number, each in run.tensors.items() if each["kind"] == kind]
        ids.sort(key=lambda number: order.get(run.tensors[number]["path"], len(order)))
        if not any(number in places for number in ids):
            continue
        formats = _formats(run, kind)
        layers = tuple(
            _layer(run.tensors[number], places[number], formats, _Columns(every, columns, applied))
            for number in ids
            if number in places
        )
        steps = tuple(step["step"] for step in run.steps)
        fine = tuple(steps[column] for column in columns)
        found.append(View(kind, title, formats, layers, steps, fine))
    return found


def _formats(run: Run, kind: str) -> tuple[str, ...]:
    if kind == "update":
        return ("bfloat16", "float16")
    scaled = kind.endswith("_gradient") and any(step["scale"] != 1 for step in run.steps)
    return (*([SCALED] if scaled else []), *run.header["formats"])


def _rows_by_tensor(run: Run) -> dict[int, dict[int, Event]]:
    """Rows by id of the tensor and place of the step."""
    places: dict[int, dict[int, Event]] = {}
    for place, step in enumerate(run.steps):
        for row in step["rows"]:
            places.setdefault(row["id"], {})[place] = row
    return places


class _Columns(NamedTuple):
    """Places of steps: all, those whose exponents are shown, those that were not skipped."""

    every: Sequence[int]
    fine: Sequence[int]
    applied: Sequence[int]


def _layer(
    tensor: Event, rows: Mapping[int, Event], formats: Iterable[str], columns: _Columns
) -> Layer:
    shares = {
        name: [lost_share(rows.get(place), name) for place in columns.every] for name in formats
    }
    low, exponents = _exponents([rows.get(place) for place in columns.fine])
    return Layer(
        label=label_of(tensor),
        title=tensor["class"],
        lost={name: "".join(map(encode, each)) for name, each in shares.items()},
        low=low,
        exponents=exponents,
        worst={
            name: max((each[place] or 0.0 for place in columns.applied), default=0.0)
            for name, each in shares.items()
        },
        zeros=max((row.get("zeros", 0) / row["count"] for row in rows.values()), default=0.0),
    )  # fmt: skip


def label_of(tensor: Event) -> str:
    """Return a tensor's path and name, for instance ``'blocks.0.up.weight'``."""
    parts = [part for part in (tensor["path"], tensor["name"]) if part]
    return ".".join(parts) or tensor["class"]


def lost_share(row: Mapping[str, Any] | None, name: str) -> float | None:
    """Return which share of a row's numbers that are finite and not 0 a format would not hold.

    What is not finite already counts as lost. None for a row that is not there.
    """
    if row is None:
        return None
    if "lost" in row:
        return float(row["lost"].get(name, 0) / max(1, sum(row.get("counts", ()))))
    counters = row.get("scaled", {}).get("float16") if name == SCALED else row.get(name)
    overflow, flushed, _ = counters or (0, 0, 0)
    gone = row.get("infinities", 0) + row.get("nans", 0)
    return float((overflow + flushed + gone) / max(1, sum(row.get("counts", ())) + gone))


def _exponents(rows: Sequence[Mapping[str, Any] | None]) -> tuple[int, list[str]]:
    present = [row for row in rows if row is not None and row.get("counts")]
    low = min((row["low"] for row in present), default=0)
    high = max((row["low"] + len(row["counts"]) for row in present), default=low)
    return low, [_column(row, low, high) for row in rows]


def _column(row: Mapping[str, Any] | None, low: int, high: int) -> str:
    if row is None:
        return ABSENT * (high - low)
    counts = row.get("counts", [])
    before = row.get("low", low) - low
    cells = [0] * before + list(counts) + [0] * (high - low - before - len(counts))
    return "".join(encode(count / row["count"]) for count in cells)
