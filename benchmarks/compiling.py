"""What ``torch.compile`` makes of each style: graphs, breaks, recompilations, casts, host time.

The backend is ``aot_eager``, which runs the compiled graph operation by operation: what it counts
holds for every backend, and it compiles in seconds where ``inductor`` takes minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._dynamo.utils import counters

from .measures import Training, count, start, time_together
from .styles import Style, compiled
from .suite import Names, Row, Say, _row, chosen
from .workloads import TINY, Workload

BACKEND = "aot_eager"


def compiled_steps(device: str, seconds: float, say: Say, only: Names = None) -> list[Row]:
    """Measure every tiny workload in every compiled style, bfloat16."""
    rows: list[Row] = []
    for workload in chosen(TINY, only):
        say(f"{workload.name}, compiled")
        trainings, mine = [], []
        for style in compiled(BACKEND, (torch.bfloat16,)):
            training, row = _measure(workload, style, device)
            trainings.append(training)
            mine.append(_row(workload, style) | row)
        times = time_together(trainings, seconds=seconds, steps=5, fewest=9)
        for row in mine:
            row["time"] = dataclasses.asdict(times[row["style"]])
        rows += mine
    return rows


def _measure(workload: Workload, style: Style, device: str) -> tuple[Training, Row]:
    torch.compiler.reset()
    counters.clear()
    training = start(workload, style, device)
    for _ in range(2):
        training.step()
    first = _seen()
    for _ in range(3):
        training.step()
    counts = count(training)
    now = _seen()
    later = {"recompiles": now["graphs"] - first["graphs"]}
    asked = style.kind in ("torch.amp", "halfstep")
    step = {"scaled step": scaled_step(workload, style, device) if asked else None}
    return training, first | later | step | dataclasses.asdict(counts)


def _seen() -> dict[str, Any]:
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
    }


def scaled_step(workload: Workload, style: Style, device: str) -> str:
    """Say whether unscaling, the optimizer and the next scale compile as one graph, in float16.

    After a step outside, which makes the optimizer's state; the model itself is not compiled.
    """
    scaled = dataclasses.replace(style, dtype=torch.float16, backend=None)
    training = start(workload, scaled, device)
    training.step()
    inputs, targets = training.batch
    with scaled.forward(device):
        loss = workload.loss(training.model(inputs), targets)
    training.optimizing.backward(loss)
    step = torch.compile(training.optimizing.update, backend="eager", fullgraph=True)
    try:
        step()
    except Exception as error:  # noqa: BLE001  (what Dynamo raises is no public class)
        return f"no: {_first_words(error)}"
    return "yes"


def _first_words(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
