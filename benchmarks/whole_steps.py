"""The time of a whole optimizer step that is one graph, beside what torch.amp can compile.

With the backend ``inductor``, because only a compiler that fuses shows what one graph is good for.
It takes minutes on a CPU, so that one model stands for all where none is named.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from halfstep.torch import LossScaleOptimizer

from .measures import Training, in_turns, ratio, start
from .optimizing import Halfstep
from .styles import LOW, Style
from .suite import Names, Row, Say, chosen
from .tables import Table
from .workloads import TINY, Workload

BACKEND = "inductor"


def whole_steps(device: str, seconds: float, say: Say, only: Names = None) -> list[Row]:
    """Time whole steps in one graph, in both dtypes; ``only`` names other models."""
    rows: list[Row] = []
    for workload in TINY[:1] if only is None else chosen(TINY, only):
        for dtype in LOW:
            say(f"{workload.name}, {str(dtype).removeprefix('torch.')}, whole steps in one graph")
            with torch._dynamo.config.patch(trace_autograd_ops=True), fresh_cache():
                rows += _measured(workload, dtype, device, seconds)
    return rows


def _measured(workload: Workload, dtype: torch.dtype, device: str, seconds: float) -> list[Row]:
    torch.compiler.reset()
    contenders: dict[str, Callable[[], None]] = {}
    first: dict[str, float] = {}
    for name, step in _contenders(workload, dtype, device):
        begin = time.perf_counter()
        for _ in range(3):  # the first makes the optimizer's state, which the second is made for
            step()
        first[name] = time.perf_counter() - begin
        contenders[name] = step
    took = in_turns(contenders, device, seconds=seconds, steps=5, fewest=9)
    eager, compiled, *_ = took.values()
    return [
        {
            "workload": workload.name,
            "style": name,
            "first_steps": first[name],
            "seconds": statistics.median(times),
            "to_amp": dataclasses.asdict(ratio(times, eager)),
            "to_compiled_amp": dataclasses.asdict(ratio(times, compiled)),
        }
        for name, times in took.items()
    ]


def _contenders(
    workload: Workload, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each name and its step, when the one before is compiled; torch.amp's two come first."""
    amp = Style("torch.amp", dtype)
    yield amp.name, start(workload, amp, device).step
    compiled = dataclasses.replace(amp, backend=BACKEND)
    yield f"{amp.name}, model compiled", start(workload, compiled, device).step
    ours = Style("halfstep", dtype, "compute")
    compiled = dataclasses.replace(ours, backend=BACKEND)
    yield f"{ours.name}, model compiled", start(workload, compiled, device).step
    whole = start(workload, ours, device)
    _wrap(whole)
    step: Any = torch.compile(whole.step, backend=BACKEND, fullgraph=True)
    yield f"{ours.name}, whole step compiled", step


def _wrap(training: Training) -> None:
    """Take steps with LossScaleOptimizer: without a loss scale it is what lets Dynamo pass."""
    if not isinstance(training.optimizing, Halfstep):
        training.optimizing = Halfstep(LossScaleOptimizer(training.optimizing.optimizer))


def table(results: Row) -> Table:
    """Time of whole steps in one graph."""
    head = (
        "model", "style", "first 3 steps, s", "ms a step", "time / torch.amp (quartiles)",
        "time / torch.amp, model compiled",
    )  # fmt: skip
    rows = [
        [
            row["workload"],
            row["style"],
            f"{row['first_steps']:.1f}",
            f"{row['seconds'] * 1e3:.2f}",
            *(_cell(row[key]) for key in ("to_amp", "to_compiled_amp")),
        ]
        for row in results["whole_steps"]
    ]
    return Table("a whole step in one graph, backend inductor", head, rows, words=2)


def _cell(found: Row) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} - {found['high']:.2f})"


ABOUT = """
What a compiler gains from a step that it sees whole: forward and backward pass, loss scale,
optimizer and clearing the gradients. With `LossScaleOptimizer` all of it is one graph of
`torch.compile(step, fullgraph=True)` ([how](loss-scaling.md)); with `torch.amp` the model can be
compiled, and the scaler and the optimizer stay outside. The backend is Inductor, with empty
caches; on a CPU it compiles for long, which the first three steps show. Made by
`python -m benchmarks --part whole_steps`, and for other models by `--only NAME` with it."""
