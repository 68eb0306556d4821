"""Tables for the terminal and for the pages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

WIDE = 150
"""Columns of what is no terminal."""


@dataclass(frozen=True)
class Table:
    """A table of words.

    Attributes:
        title: what it shows.
        head: the columns.
        rows: the cells.
        words: how many columns, from the left, hold words and not numbers.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        """Return it for a MyST page, without the title."""
        rule = ["---" if i < self.words else "--:" for i in range(len(self.head))]
        lines = [self.head, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def plain(self) -> str:
        """Return it with aligned columns."""
        columns = list(zip(self.head, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (self.head, *self.rows)
        ]
        return "\n".join(["", self.title, "-" * len(lines[0]), *lines])

    def show(self) -> None:
        """Print it, with rich where it is installed."""
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(self.plain())
            return
        table = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i < self.words else "right", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)
