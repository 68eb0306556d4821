"""Which layer of a Keras model computes in what: a table to print, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import keras


class Row(NamedTuple):
    """One layer."""

    path: str
    kind: str
    compute_dtype: str
    variable_dtype: str


@dataclass(frozen=True)
class Explanation:
    """The layers of a model under their policies; it prints as a table.

    Attributes:
        rows: the layers that compute, in the order of the model.
        checked: what :func:`halfstep.keras.check_model` says about it, as text.
    """

    rows: tuple[Row, ...]
    checked: str

    @classmethod
    def of(cls, model: Any, checked: object) -> Self:
        """Return what there is to say about a built model."""
        from halfstep.keras import _internals

        return cls(
            tuple(
                Row(path, type(layer).__name__, layer.compute_dtype, _stored(layer))
                for layer, path in _internals.parts_of(model).items()
            ),
            str(checked),
        )

    @property
    def low(self) -> int:
        """How many layers compute in 16 bits."""
        return sum(row.compute_dtype in ("float16", "bfloat16") for row in self.rows)

    def __str__(self) -> str:
        table = [("layer", "class", "compute", "variables"), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        counts = Counter(row.compute_dtype for row in self.rows).most_common()
        total = ", ".join(f"{count} in {dtype}" for dtype, count in counts)
        return "\n".join([*lines, f"{len(self.rows)} layers: {total}", "", self.checked])


def _stored(layer: Any) -> str:
    from halfstep.keras import _internals

    stored = dict.fromkeys(
        keras.backend.standardize_dtype(variable.dtype)
        for variable in _internals.own_variables(layer)
    )
    return "+".join(stored) or "-"
