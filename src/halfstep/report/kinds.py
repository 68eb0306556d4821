"""Which page a file gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..core.numerics.record import KIND as NUMERICS
from ..core.record import check_header, parse_line
from ..errors import RecordError
from .comparison import load, render
from .numerics import render_run

PAGES: dict[str, Callable[[str | os.PathLike[str]], str]] = {
    "compare": lambda path: render(load(path)),
    NUMERICS: render_run,
}
"""What makes the page of a record, by its kind."""


def page(path: str | os.PathLike[str]) -> str:
    """Return the page of a file that a run left behind: one HTML file that loads nothing.

    Args:
        path: a record (``.jsonl``), of ``halfstep compare`` or of a numerics monitor, or what
            ``halfstep compare`` wrote with ``--json``.

    Raises:
        RecordError: none of these.
    """
    if Path(path).suffix == ".json":
        return render(load(path))
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except OSError as error:
        raise RecordError(f"{path}: cannot read this record: {error}.") from None
    header = parse_line(path, 1, first)
    check_header(path, header)
    kind = header.get("kind")
    if kind not in PAGES:
        raise RecordError(f"{path}: a record of kind {kind!r}; allowed are {', '.join(PAGES)}.")
    return PAGES[kind](path)
