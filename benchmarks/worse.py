"""Where halfstep does worse than torch.amp, in all that was measured, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .styles import RIVALS
from .tables import Table

Row = dict[str, Any]

MEASURES: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("casts", lambda row: sum(row["casts"].values()) + row["groups"]),
    ("bytes moved by casts", lambda row: row["cast_bytes"] + row["group_bytes"]),
    ("bytes saved for backward", lambda row: row["saved_bytes"]),
    ("launches", lambda row: row["launches"]),
)

SAME = 1.005
"""A scalar that the loss scale saves is no difference."""

COMPILED_RIVALS = {"halfstep": "torch.amp", "halfstep rewrite": "torch.amp"}
"""Compiled rows that are ours, and what they are compared with."""

REASONS: tuple[str, ...] = (
    "Every module with a policy runs a few lines of Python around its forward, and every step "
    "makes the weights' copies by a Python autograd node; `torch.autocast` is written in C++.",
    "As (1), and what `LossScaleOptimizer` does around the optimizer's step is Python too.",
    "A part is the host's, (1) or (2): 0.1 to 0.5 ms where it is measured alone, on the tiny "
    "models. The rest of these 1 to 2 % is not explained.",
    "Not explained: the graph holds no more casts than that of `torch.amp`.",
    "Inductor compiles forward, backward, loss scale and optimizer, in two graphs, and for "
    "`torch.amp` the model alone. It does so once for each shape, here with empty caches.",
)
"""Why halfstep is slower or needs more."""

HOST_BOUND = ("tiny-mlp", "tiny-gpt", "tiny-convnet", "mlp")
"""Where what the host does is a large enough part of a step to explain a slower one."""

ABOUT = """
Each measure of each model in which halfstep does worse than `torch.amp` in the same dtype with
the same lists; a time counts where the lower quartile of the ratio is above 1. Compiled rows are
compared with `torch.amp` compiled: its model by the same backend, its scaler and its optimizer
outside."""


def table(results: Row) -> Table:
    """Where halfstep is worse."""
    eager = (*results["steps"], *results["host_time"])
    rows = [
        *_worse(eager, results["steps"], RIVALS, _reason),
        *_worse(results.get("compiled", ()), results.get("compiled", ()), COMPILED_RIVALS, _not),
        *_whole_steps(results.get("whole_steps", ())),
    ]
    head = ("model", "style", "measure", "of torch.amp's", "reason")
    return Table("where halfstep is worse than torch.amp", head, rows, words=5)


def reasons() -> str:
    """Return the reasons that the table names."""
    return "\n".join(f"{number}. {reason}" for number, reason in enumerate(REASONS, 1))


def _worse(
    rows: Iterable[Row],
    among: Iterable[Row],
    rivals: dict[str, Any],
    reason: Callable[[str, Row], str],
) -> Iterator[list[str]]:
    for row in rows:
        if row["kind"] not in rivals or row.get("why") is not None:
            continue
        compiled = ", compiled" if "graphs" in row else ""
        for name, ratio in (*_more(row, among, rivals), *_slower(row)):
            yield [row["workload"], row["style"] + compiled, name, ratio, reason(name, row)]


def _slower(row: Row, key: str = "to_amp") -> Iterator[tuple[str, str]]:
    ratio = None if row["time"] is None else row["time"][key]
    if ratio is not None and ratio["low"] > 1:
        yield "time", f"{ratio['median']:.2f}x"


def _more(row: Row, among: Iterable[Row], rivals: dict[str, Any]) -> Iterator[tuple[str, str]]:
    amp = [
        other
        for other in among
        if (other["workload"], other["dtype"], other["kind"])
        == (row["workload"], row["dtype"], rivals[row["kind"]])
        and other.get("why") is None
    ]
    for name, value in MEASURES if amp else ():
        mine, theirs = value(row), value(amp[0])
        if mine > theirs * SAME:
            yield name, f"{mine / theirs:.2f}x" if theirs else "more"


def _whole_steps(rows: Iterable[Row]) -> Iterator[list[str]]:
    rival: Row = {}
    for row in rows:
        if row["style"].startswith("torch.amp"):
            rival = row  # the compiled one comes last
            continue
        where = [row["workload"], row["style"]]
        for name, ratio in _slower({"time": row}, "to_compiled_amp"):
            yield [*where, name, ratio, "(2)" if " float16" in row["style"] else "(1)"]
        times = row["first_steps"] / rival["first_steps"]
        if times > SAME:
            yield [*where, "first 3 steps, compiling", f"{times:.2f}x", "(5)"]


def _reason(measure: str, row: Row) -> str:
    if measure != "time" or row["workload"] not in HOST_BOUND:
        return "(3)"
    return "(2)" if row["dtype"] == "float16" else "(1)"


def _not(measure: str, row: Row) -> str:
    return "(4)"
