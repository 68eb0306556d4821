"""Results as tables, and as ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .machine import sentence
from .tables import Table

Row = dict[str, Any]


def step_tables(results: Row) -> Iterator[tuple[Table, str]]:
    """Yield a table for each workload, and what it is."""
    rows = results["steps"]
    head = (
        "style", "casts fwd", "bwd", "KB", "grouped", "KB", "saved KB",
        "step / float32", "quartiles",
    )  # fmt: skip
    for workload in dict.fromkeys(row["workload"] for row in rows):
        mine = [row for row in rows if row["workload"] == workload]
        yield Table(workload, head, [_step_cells(row) for row in mine]), mine[0]["about"]


def _step_cells(row: Row) -> list[str]:
    return [
        row["style"],
        str(row["casts"]["forward"]),
        str(row["casts"]["backward"]),
        _kb(row["cast_bytes"]),
        str(row["groups"]),
        _kb(row["group_bytes"]),
        _kb(row["saved_bytes"]),
        *_ratio(row["time"]),
    ]


def _kb(number: int) -> str:
    return f"{number / 1000:,.0f}"


def _ratio(time: Row | None) -> tuple[str, str]:
    if time is None:
        return "-", "-"
    return f"{time['ratio']:.2f}", f"{time['low']:.2f} - {time['high']:.2f}"


def host_table(results: Row) -> Table:
    """Time of steps that are all host."""
    rows = [
        [row["workload"], row["style"], f"{row['time']['seconds'] * 1e3:.2f}", *_ratio(row["time"])]
        for row in results["host_time"]
    ]
    head = ("model", "style", "ms a step", "step / float32", "quartiles")
    return Table("host time: models so small that a step is all host", head, rows, words=2)


def accumulation_table(results: Row) -> Table:
    """Casts of one optimizer step over several micro-batches."""
    head = ("style", "casts", "KB", "grouped", "KB")
    rows = [
        [
            row["style"],
            str(sum(row["casts"].values())),
            _kb(row["cast_bytes"]),
            str(row["groups"]),
            _kb(row["group_bytes"]),
        ]
        for row in results["accumulation"]
    ]
    title = f"gradient accumulation: {results['micro_batches']} micro-batches a step, gpt-explicit"
    return Table(title, head, rows)


def reads_table(results: Row) -> Table:
    """Host reads."""
    rows = [
        [
            row["optimizer"] + (" and clipping" if row["max_norm"] else ""),
            *(str(row["reads"][kind]) for kind in ("float32", "torch.amp", "halfstep")),
        ]
        for row in results["host_reads"]
    ]
    head = ("optimizer", "bare, float32", "torch.amp + GradScaler", "LossScaleOptimizer")
    return Table("host reads in one step, as the dispatcher sees them", head, rows)


MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "casts": ("casts", lambda row: sum(row["casts"].values()) + row["groups"]),
    "cast bytes": ("bytes moved by casts", lambda row: row["cast_bytes"] + row["group_bytes"]),
    "saved bytes": ("bytes saved for backward", lambda row: row["saved_bytes"]),
    "time": ("step time", lambda row: row["time"]["ratio"]),
}

REASONS: dict[tuple[str, str], str] = {}
"""Why a measure is worse than torch.amp's, by measure and workload; ``""`` is any workload."""


def worse_rows(rows: list[Row], measures: tuple[str, ...]) -> list[list[str]]:
    """Return where halfstep is worse than torch.amp in the same dtype, with the reason."""
    amp = {
        (row["workload"], row["dtype"]): row
        for row in rows
        if row["kind"] == "torch.amp"
    }  # fmt: skip
    worse = []
    for row in rows:
        if row["kind"] != "halfstep":
            continue
        other = amp[row["workload"], row["dtype"]]
        for measure in measures:
            words, value = MEASURES[measure]
            if value(row) <= 1.005 * value(other) or (measure == "time" and _overlap(row, other)):
                continue
            factor = f"{value(row) / value(other):.2f}x" if value(other) else "more"
            reason = REASONS.get((measure, row["workload"])) or REASONS.get((measure, ""))
            worse.append([row["workload"], row["style"], words, factor, reason or "not known"])
    return worse


def _overlap(row: Row, other: Row) -> bool:
    return bool(row["time"]["low"] <= other["time"]["high"])


def worse_table(results: Row) -> Table:
    """Where halfstep is worse."""
    rows = worse_rows(results["steps"], ("casts", "cast bytes", "saved bytes", "time"))
    rows += worse_rows(results["host_time"], ("time",))
    head = ("model", "style", "measure", "of torch.amp's", "reason")
    return Table("where halfstep is worse than torch.amp", head, rows, words=3)


EMULATED = (
    "\"CUDA's lists\" is torch.amp with CUDA's lists of operations, emulated on the CPU: counted, "
    "not timed."
)

INTRODUCTION = """\
# Benchmarks

This page is written by `python -m benchmarks` (`make bench`), which trains the same small models
in float32, with `torch.amp` and with halfstep, side by side in one process, and counts and times
what an optimizer step does. The numbers of this page: {machine}

How it is measured:

- *Casts* change the dtype of a float tensor. They are counted where they reach the device, below
  autograd and autocast, over a whole step: forward, loss, backward, and an optimizer that makes
  none. *Grouped* casts take many tensors in one call (`_foreach_copy_`), which a GPU runs in a few
  launches. *KB* (1,000 bytes) are read and written by them.
- *Saved* is what the forward pass keeps for the backward pass: every storage once, without the
  model's own parameters and buffers, with 16-bit copies of them.
- *Step / float32* is the median, over rounds that time every style once in rotating order, of the
  time of a step over the time of the same step in float32 in the same round, with the quartiles
  of that ratio. The optimizer is `AdamW(fused=True)`. On a CPU the clock counts the processor
  time of this process, so that other work on the machine does not.
- *CUDA's lists*: on a CPU, `torch.autocast` leaves softmax, norms and most losses in 16 bits; on
  CUDA it sends them to float32. That is emulated here above autocast (`benchmarks/styles.py`),
  and not timed. On CUDA itself, softmax of float16 needs no cast of its own: one kernel reads
  float16 and writes float32.

Step times on a CPU without 16-bit arithmetic say what 16 bits cost there, and nothing about a
GPU: `halfstep doctor --measure` says what they cost on yours.
"""


def page(results: Row) -> str:
    """Return ``docs/benchmarks.md``."""
    parts = [INTRODUCTION.format(machine=sentence(results["machine"])), "## One optimizer step"]
    for table, about in step_tables(results):
        parts += [f"### {table.title}", about[0].upper() + about[1:] + ".", table.markdown()]
    for heading, text, table in (
        ("Host time", HOST_TIME, host_table(results)),
        ("Gradient accumulation", ACCUMULATION, accumulation_table(results)),
        ("Host reads", HOST_READS, reads_table(results)),
        ("Where halfstep is worse", WORSE, worse_table(results)),
    ):
        parts += [f"## {heading}", text, table.markdown()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


HOST_TIME = """
Models so small that a step is what the host does: Python, dispatch and launches. A GPU that waits
for its host waits this long."""

ACCUMULATION = """
Between the micro-batches of a step no weight changes; `weights_unchanged` says so, and their
copies are made once a step. `torch.autocast` keeps its copies only inside one `with` block, here
one a micro-batch, as its documentation advises."""

HOST_READS = """
Every read makes a GPU wait until the host has seen the value. What the bare optimizer reads are
its own step counters, on the CPU: `LossScaleOptimizer` turns the fused kernel on where there is
one, which needs none of them."""

WORSE = """
Each measure of each model in which halfstep does worse than `torch.amp` in the same dtype with
the lists of this device; a time counts where the quartiles do not overlap."""
