"""Results of ``python -m benchmarks.gpu`` as tables, each row beside what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .machine import sentence
from .tables import Table

Row = dict[str, Any]

HEAD = (
    "style", "ms", "quartiles", "/ float32", "/ torch.amp", "GB", "/ float32", "% of peak",
    "casts", "MB", "saved MB", "launches", "host reads",
)  # fmt: skip


def rows_table(workload: str, rows: list[Row]) -> Table:
    """Return the table of one workload; rows without numbers are left to `skipped`."""
    mine = [row for row in rows if row["workload"] == workload and row["why"] is None]
    return Table(workload, HEAD, [_cells(row, mine) for row in mine])


def _cells(row: Row, rows: list[Row]) -> list[str]:
    base = next((other for other in rows if other["style"] == "float32"), None)
    rival = rival_of(row, rows)
    share, casts = row["share_of_peak"], sum(row["casts"].values()) + row["groups"]
    return [
        row["style"],
        f"{row['seconds'] * 1e3:.2f}",
        " - ".join(f"{value * 1e3:.2f}" for value in row["quartiles"]),
        _ratio(row, base, "seconds"),
        "" if row is rival else _ratio(row, rival, "seconds"),
        "" if row["memory"] is None else f"{row['memory'] / 1e9:.2f}",
        _ratio(row, base, "memory"),
        "" if share is None else f"{100 * share:.1f}",
        str(casts),
        f"{(row['cast_bytes'] + row['group_bytes']) / 1e6:,.1f}",
        f"{row['saved_bytes'] / 1e6:,.1f}",
        f"{row['launches']:,}",
        str(row["host_reads"]),
    ]


def rival_of(row: Row, rows: list[Row]) -> Row | None:
    """Return the row of torch.amp in the same dtype, compiled where this one is."""
    found = [
        other
        for other in rows
        if (other["kind"], other["dtype"], other["compiled"])
        == ("torch.amp", row["dtype"], row["compiled"])
    ]
    return found[0] if found and row["dtype"] != "float32" else None


def _ratio(row: Row, other: Row | None, what: str) -> str:
    if other is None or not other[what] or row[what] is None:
        return ""
    return f"{row[what] / other[what]:.2f}"


def skipped(rows: list[Row]) -> Table:
    """Return what has no numbers, and why."""
    cells = [[row["workload"], row["style"], row["why"]] for row in rows if row["why"] is not None]
    return Table("not measured", ("model", "style", "why"), cells, words=3)


def worse(rows: list[Row]) -> Table:
    """Return the rows of ours in which a step takes longer than torch.amp's."""
    return Table("worse", ("model", "style", "time / torch.amp"), list(_worse(rows)), words=2)


def _worse(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        mine = [other for other in rows if other["workload"] == row["workload"]]
        rival = rival_of(row, [other for other in mine if other["why"] is None])
        ours = row["kind"].startswith("halfstep") and row["why"] is None
        if ours and rival is not None and row["quartiles"][0] > rival["quartiles"][1]:
            yield [row["workload"], row["style"], _ratio(row, rival, "seconds")]


INTRODUCTION = """\
### {device}

Written by `{command}` in {seconds:.0f} s: {machine}

- *ms* is the median of a step (forward, backward, optimizer), with quartiles; */ float32* divides
  it, and the peak memory, by the row float32 without TF32; */ torch.amp* by the row of torch.amp in
  the same dtype, compiled where the row is.
- *% of peak*: the model's products and convolutions a second, of {peak:.0f} Tflop/s ({source}).
- Casts, bytes and launches are counted as on the page of the CPU's benchmarks, in one step.
"""


def page(results: Row) -> str:
    """Return all tables in Markdown."""
    rows, peak = results["rows"], results["peak"]
    parts = [
        INTRODUCTION.format(
            device=results["machine"]["device"] + (" (tiny sizes)" if results["tiny"] else ""),
            command=results["command"],
            seconds=results["seconds"],
            machine=sentence(results["machine"]),
            peak=peak["flops"] / 1e12,
            source=peak["source"],
        )
    ]
    if results["tiny"]:
        parts.append("Tiny sizes, to see that it runs: the times say nothing.")
    for name in dict.fromkeys(row["workload"] for row in rows):
        about = next(row["about"] for row in rows if row["workload"] == name)
        parts += [f"#### {name}", about + ".", rows_table(name, rows).markdown()]
    for heading, table in (("Slower than torch.amp", worse(rows)), ("Not measured", skipped(rows))):
        if table.rows:
            parts += [f"#### {heading}", table.markdown()]
    return "\n\n".join(part.strip() for part in parts) + "\n"
