"""The record of a run: what happened, one JSON object a line, written while it happens.

The first line is a header that names the format and its version; every other line is an event::

    {"event": "header", "format": "halfstep-record", "version": 1, "kind": "compare", ...}
    {"event": "step", "policy": "mixed_float16", "step": 0, "loss": 2.31}

Each line is flushed before the run goes on, so a killed run leaves a readable file; at worst its
last line is torn, and reading leaves that one out. Which kinds of events there are is the business
of who writes them; the format asks only for the key ``event``.

JSON has no NaN and no infinity, which are what a record of mixed precision is often about: a float
that is not finite is written as ``{"$float": "nan"}`` (``"inf"``, ``"-inf"``) and read back as one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeAlias

from ..errors import RecordError

FORMAT = "halfstep-record"
VERSION = 1
"""The version this halfstep writes; it reads this one and every older one."""

Event: TypeAlias = dict[str, Any]
"""One line of a record: plain values, and the key ``event`` that says what it is."""


def to_plain(value: Any) -> Any:
    """Return ``value`` with floats that are not finite in the form that JSON can hold.

    >>> to_plain({"loss": [1.0, float("inf")]})
    {'loss': [1.0, {'$float': 'inf'}]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def _from_plain(value: dict[str, Any]) -> Any:
    return float(value["$float"]) if value.keys() == {"$float"} else value


def dump_line(event: Mapping[str, Any]) -> str:
    r"""Return an event as one line of JSON, its line feed included.

    Raises:
        RecordError: an event without the key ``event``, or a value that JSON cannot hold.

    >>> dump_line({"event": "step", "loss": 0.5})
    '{"event": "step", "loss": 0.5}\n'
    """
    if not isinstance(event.get("event"), str):
        raise RecordError(f"Record: {dict(event)!r} has no 'event' that says what it is.")
    try:
        return json.dumps(to_plain(event), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"Record: the event {event['event']!r} is not JSON: {error}.") from None


class RecordWriter:
    """Writes the record of one run; use it as a context manager.

    Args:
        path: where to write; folders above it are made, a file that is there is replaced.
        kind: what ran, for instance ``"compare"``.
        **header: more plain values for the first line.

    Raises:
        RecordError: a path that cannot be written.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.jsonl"
    >>> with RecordWriter(path, "compare", seed=0) as record:
    ...     record.write({"event": "step", "step": 0, "loss": float("nan")})
    >>> read_record(path).events
    [{'event': 'step', 'step': 0, 'loss': nan}]
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, **header: Any) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self.path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise RecordError(f"{self.path}: cannot write a record there: {error}.") from None
        self.write(
            {"event": "header", "format": FORMAT, "version": VERSION, "kind": kind, **header}
        )

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event; it is in the file, not in a buffer, when this returns."""
        self._file.write(dump_line(event))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Record:
    """A record that was read.

    Attributes:
        header: the first line.
        events: the other lines, in order.
        torn: whether the last line was cut off, as a killed run leaves it, and is left out.
    """

    header: Event
    events: list[Event]
    torn: bool = False


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a record, also one that is still being written or whose run was killed.

    Args:
        path: a file that :class:`RecordWriter` wrote.

    Raises:
        RecordError: no such file, no record, a newer version, or a line that is no event (with
            its number). A last line without its line feed is no error: it was being written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(f"{path}: cannot read this record: {error}.") from None
    whole, _, rest = text.rpartition("\n")
    lines = [parse_line(path, number, line) for number, line in enumerate(whole.split("\n"), 1)]
    check_header(path, lines[0])
    return Record(lines[0], lines[1:], torn=bool(rest))


def parse_line(path: str | os.PathLike[str], number: int, line: str) -> Event:
    """Return the event of one line of a record.

    Raises:
        RecordError: it is none; ``path`` and ``number`` say which.
    """
    try:
        event = json.loads(line, object_hook=_from_plain)
    except ValueError as error:
        raise RecordError(f"{path}, line {number}: not JSON: {error}.") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise RecordError(f"{path}, line {number}: not an event, which is an object with 'event'.")
    return event


def check_header(path: str | os.PathLike[str], header: Event) -> None:
    """Raise for a first line that is no header, or that of a newer version.

    Raises:
        RecordError: it is.
    """
    if header["event"] != "header" or header.get("format") != FORMAT:
        raise RecordError(f"{path}, line 1: not the header of a {FORMAT} file.")
    version = header.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise RecordError(
            f"{path}, line 1: version {version!r} of the format; this halfstep reads 1 to "
            f"{VERSION}. A newer halfstep wrote it."
        )
