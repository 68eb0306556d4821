"""What the terminal shows of a comparison: progress while it runs, then the table."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..core.record import Event
from .figures import Row, rows
from .results import RecipeResult, Summary

REDRAW_SECONDS = 0.5
"""Drawing takes time that would be the training's; it is never inside a timed step."""

MEMORY_PHASE = "measuring memory of each policy"

LINE_SECONDS = 10.0
"""Where there is no terminal, a line is printed this often."""


@dataclass
class _Standing:
    """How one policy stands while it runs."""

    step: int = 0
    loss: float | None = None
    metrics: str = ""
    skipped: int = 0
    stopped: str = ""
    memory: float | None = None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    @property
    def ratio(self) -> str:
        return f"{median(self.ratios):.2f}×" if self.ratios else ""


class Progress:
    """Shows a comparison's events as they come: a live table, or plain lines without a terminal.

    Args:
        console: where to.
        clock: seconds; a test gives its own.
    """

    def __init__(self, console: Console, clock: Any = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._standings: dict[str, _Standing] = {}
        self._labels: list[str] = []
        self._title = self._phase = ""
        self._planned: int | None = None
        self._base_seconds: dict[int, float] = {}
        self._shown_at = self._clock()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        handle = getattr(self, f"_on_{event['event']}", None)
        if handle is not None:
            handle(event)

    def _on_header(self, event: Event) -> None:
        self._labels = list(event["policies"])
        machine = event["machine"]
        self._console.print(
            f"[bold]{', '.join(map(escape, self._labels))}[/] side by side on "
            f"{escape(machine['device_name'])} ({escape(machine['device'])})"
        )
        slow = [dtype for dtype, is_fast in machine["fast"].items() if not is_fast]
        if slow:
            self._console.print(
                f"It has no fast matrix units for {' and '.join(slow)}: "
                "expect those policies to take longer than float32.",
                style="yellow",
            )

    def _on_recipe(self, event: Event) -> None:
        self._standings = {label: _Standing() for label in self._labels}
        self._base_seconds.clear()
        self._title, self._planned = event["recipe"], event["steps"]
        self._phase = "preparing"
        length = f"{event['steps']} steps" if event["steps"] else f"{event['epochs']} epochs"
        self._console.print(
            f"[bold]{escape(event['recipe'])}[/]: {escape(event['title'])}, {length}"
        )
        if event["note"]:
            self._console.print(f"  [yellow]{escape(event['note'])}[/]")
        self._draw(force=True)

    def _on_memory(self, event: Event) -> None:
        if self._phase != MEMORY_PHASE and not self._console.is_terminal:
            self._console.print(f"  {MEMORY_PHASE}")
        self._phase = MEMORY_PHASE
        self._standings[event["policy"]].memory = event.get("bytes")
        self._draw(force=True)

    def _on_note(self, event: Event) -> None:
        self._console.print(f"  {escape(event['policy'])}: {escape(event['text'])}")

    def _on_step(self, event: Event) -> None:
        standing, step = self._standings[event["policy"]], event["step"]
        self._phase = "training"
        standing.step, standing.loss = step + 1, event["loss"]
        standing.skipped += event["skipped"]
        standing.seconds.append(event["seconds"])
        if event["policy"] == self._labels[0]:
            self._base_seconds = {step: event["seconds"]}
            for label, seconds in self._waiting(step):
                self._standings[label].ratios.append(seconds / event["seconds"])
        elif step in self._base_seconds:
            standing.ratios.append(event["seconds"] / self._base_seconds[step])
        self._draw()

    def _waiting(self, step: int) -> list[tuple[str, float]]:
        """The policies that took this step before the baseline did, and their times."""
        return [
            (label, each.seconds[-1])
            for label, each in self._standings.items()
            if label != self._labels[0] and each.step == step + 1 and each.seconds
        ]

    def _on_evaluation(self, event: Event) -> None:
        standing, self._phase = self._standings[event["policy"]], "training"
        standing.metrics = ", ".join(
            f"{name} {value:.4g}" for name, value in event["metrics"].items()
        )
        self._draw()

    def _on_stopped(self, event: Event) -> None:
        standing = self._standings[event["policy"]]
        standing.stopped = f"{event['status']} at step {event['step']}"
        self._console.print(
            f"  [red]{escape(event['policy'])} {event['status']} at step {event['step']}:[/] "
            f"{escape(event['reason'])}"
        )

    def _draw(self, force: bool = False) -> None:
        now, terminal = self._clock(), self._console.is_terminal
        if not force and now - self._shown_at < (REDRAW_SECONDS if terminal else LINE_SECONDS):
            return
        if terminal:
            self._shown_at = now
            self._live.update(self._table(), refresh=True)
        elif not force:
            self._shown_at = now
            self._print_line()

    def _print_line(self) -> None:
        parts = [
            f"{label} step {s.step}, loss {s.loss:.4g}" + (f", {s.ratio}" if s.ratio else "")
            for label, s in self._standings.items()
            if s.loss is not None
        ]
        if parts:
            self._console.print(f"  {escape('; '.join(parts))}", soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, title=f"{self._title}: {self._phase}", expand=False)
        table.add_column("policy")
        for name in ("step", "loss", "time/step", "ratio", "skipped", "memory"):
            table.add_column(name, justify="right")
        table.add_column("metrics")
        for label, s in self._standings.items():
            table.add_row(
                label,
                f"{s.step}" + (f"/{self._planned}" if self._planned else ""),
                "" if s.loss is None else f"{s.loss:.4g}",
                f"{median(s.seconds) * 1000:.1f} ms" if s.seconds else "",
                s.ratio,
                str(s.skipped),
                "" if s.memory is None else f"{s.memory / 2**20:.1f} MiB",
                s.stopped or s.metrics,
            )
        return Group(table, Text("Ctrl-C stops and shows what there is so far", style="dim"))


def print_summary(summary: Summary, console: Console) -> None:
    """Print the table and the verdict of every recipe."""
    for recipe in summary["recipes"]:
        console.print()
        console.print(_result_table(recipe))
        console.print(f"[bold]{escape(recipe['verdict'])}[/]")
        if recipe["note"]:
            console.print(escape(recipe["note"]), style="yellow")
        if recipe["error"]:
            console.print(escape(recipe["error"]), style="red")
    if summary["recipes"]:
        console.print(
            f"Time is the median of a step, ratios are step by step against "
            f"{escape(summary['recipes'][0]['baseline'])}, quartiles in brackets.",
            style="dim",
        )


def _result_table(recipe: RecipeResult) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=recipe["name"], title_justify="left", pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    metric = (recipe["metric"] or "metric").partition(" (")[0]
    table.add_column("policy", no_wrap=True)
    for name in ("ms/step", "time ratio", "memory", "ratio", metric, "loss", "skipped"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for row in rows(recipe):
        table.add_row(*map(escape, _cells(row)))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    memory = row.memory.partition(" ±")[0]
    return (
        row.policy, row.milliseconds, row.time_ratio, memory, row.memory_ratio, row.metric,
        row.loss, row.skipped, row.result.partition(":")[0],
    )  # fmt: skip
