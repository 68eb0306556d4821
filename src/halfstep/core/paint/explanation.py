"""What was painted and why, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Row:
    """One operation.

    Attributes:
        source: the line of the model's code, ``file.py:12``; empty where it is not known.
        path: the layer's path, or an empty string.
        operation: what the framework calls it.
        shape: the shape of its first result, for instance ``'8x128'``.
        dtype: the dtype that it runs in.
        why: the rule that decided.
        flops: multiplications and additions of a matrix product or convolution, else 0.
    """

    source: str
    path: str
    operation: str
    shape: str
    dtype: str
    why: str
    flops: int = 0


@dataclass(frozen=True)
class Explanation:
    """A row per operation on float32 numbers, and totals; ``print`` shows it as a table.

    Attributes:
        rows: the operations, in the order of the program.
        dtype: the 16-bit dtype.
        casts: how many casts the graph holds; one in a loop counts once.
        cast_bytes: bytes that the casts write, over all iterations of loops.

    >>> rows = (Row("net.py:3", "mlp", "dot", "8x4", "bfloat16", "on the allow list", 100),)
    >>> print(Explanation(rows, "bfloat16", casts=2, cast_bytes=128))
    line      layer  operation  shape  dtype     why
    net.py:3  mlp    dot        8x4    bfloat16  on the allow list
    <BLANKLINE>
    matrix products in bfloat16: 1 of 1, 100.0 % of their operations
    operations in bfloat16: 1 of 1
    casts: 2, writing 128 B
    """

    rows: tuple[Row, ...]
    dtype: str
    casts: int
    cast_bytes: int

    @property
    def low_rows(self) -> tuple[Row, ...]:
        """The operations in 16 bits."""
        return tuple(row for row in self.rows if row.dtype == self.dtype)

    @property
    def low_products(self) -> tuple[int, int]:
        """Matrix products and convolutions in 16 bits, and all of them."""
        return _products(self.low_rows), _products(self.rows)

    @property
    def low_flops_share(self) -> float:
        """The share of the operations of all matrix products that run in 16 bits, 0 to 1."""
        total = sum(row.flops for row in self.rows)
        return sum(row.flops for row in self.low_rows) / total if total else 0.0

    def count(self) -> dict[tuple[str, str], int]:
        """Operations by name and dtype."""
        return dict(Counter((row.operation, row.dtype) for row in self.rows))

    def __str__(self) -> str:
        low, products = self.low_products
        totals = (
            f"matrix products in {self.dtype}: {low} of {products}, "
            f"{100 * self.low_flops_share:.1f} % of their operations",
            f"operations in {self.dtype}: {len(self.low_rows)} of {len(self.rows)}",
            f"casts: {self.casts}, writing {_bytes(self.cast_bytes)}",
        )
        return "\n".join((_table(self.rows), "", *totals))


def _products(rows: tuple[Row, ...]) -> int:
    return sum(row.flops > 0 for row in rows)


def _table(rows: tuple[Row, ...]) -> str:
    head = ("line", "layer", "operation", "shape", "dtype", "why")
    cells = [head, *((r.source, r.path, r.operation, r.shape, r.dtype, r.why) for r in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _bytes(count: int) -> str:
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
