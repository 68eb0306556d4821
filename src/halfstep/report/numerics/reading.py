"""Reading the record of a numerics monitor, however long the run was.

A run of 10,000 recorded steps leaves gigabytes, of which a page can show a few hundred steps. So
the file is gone through twice: once for what is short, and to see where the long lines are, and
once more to read those that were chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.numerics.record import KIND, VERSION
from ...core.record import Event, check_header, parse_line
from ...errors import RecordError

MOST_STEPS = 200
"""The most recorded steps that are read."""

_LONG = '{"event": "numerics",'


@dataclass
class Run:
    """What a monitor wrote.

    Attributes:
        header: the first line.
        tensors: what is counted, by id.
        steps: the ``numerics`` events that were read, in order.
        recorded: how many there are in the file.
        events: all others, in order.
        end: the last line of a run that was not killed.
        torn: whether the file ends in the middle of a line.
    """

    header: Event
    tensors: dict[int, Event] = field(default_factory=dict)
    steps: list[Event] = field(default_factory=list)
    recorded: int = 0
    events: list[Event] = field(default_factory=list)
    end: Event | None = None
    torn: bool = False

    def all(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def last_step(self) -> int:
        """The number of the last step that the record knows of."""
        known = [event.get("step", event.get("last", 0)) for event in (*self.events, *self.steps)]
        return int(max([*known, 0 if self.end is None else self.end["steps"]]))


def read_run(path: str | os.PathLike[str], most_steps: int = MOST_STEPS) -> Run:
    """Read the record of a numerics monitor.

    Args:
        path: the file.
        most_steps: of the recorded steps so many are read, evenly over the run, the first and the
            last among them.

    Raises:
        RecordError: no such file, or not such a record.
    """
    long_lines, run = [], Run({})
    for number, line in _lines(path):
        if not line.endswith("\n"):
            run.torn = True
        elif line.startswith(_LONG):
            long_lines.append(number)
        else:
            _take(run, parse_line(path, number, line), path, number)
    if not run.header:
        raise RecordError(f"{path}: an empty file is no record.")
    run.recorded = len(long_lines)
    wanted = set(spread(long_lines, most_steps))
    for number, line in _lines(path):
        if number in wanted:
            run.steps.append(parse_line(path, number, line))
    return run


def spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the items, evenly, the first and the last among them.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise RecordError(f"{path}: cannot read this record: {error}.") from None


def _take(run: Run, event: Event, path: str | os.PathLike[str], number: int) -> None:
    if number == 1:
        check_header(path, event)
        _check_kind(event, path)
        run.header = event
    elif event["event"] == "tensor":
        run.tensors[event["id"]] = event
    elif event["event"] == "end":
        run.end = event
    else:
        run.events.append(event)


def _check_kind(header: dict[str, Any], path: str | os.PathLike[str]) -> None:
    if header.get("kind") != KIND:
        raise RecordError(f"{path}: a record of kind {header.get('kind')!r}, not of {KIND!r}.")
    version = header.get("numerics")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise RecordError(
            f"{path}: version {version!r} of the numerics; this halfstep reads 1 to {VERSION}."
        )
