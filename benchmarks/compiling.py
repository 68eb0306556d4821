"""What ``torch.compile`` makes of each style: graphs, breaks, recompilations, casts, host time.

The backend is ``aot_eager``, which runs the compiled graph operation by operation: what it counts
holds for every backend, and it compiles in seconds where ``inductor`` takes minutes on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
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
    # what is rewritten is compiled already, by itself
    asked = style.kind in ("float32", "torch.amp", "halfstep")
    step = {"whole step": whole_step(workload, style, device) if asked else None}
    return training, first | later | step | dataclasses.asdict(counts)


def _seen() -> dict[str, Any]:
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
    }


def whole_step(workload: Workload, style: Style, device: str) -> str:
    """Say whether a whole step compiles as one graph, in float16 where the style has 16 bits.

    Forward and backward pass, loss scale, optimizer and clearing the gradients, as the style takes
    them without ``torch.compile``, with ``trace_autograd_ops`` and ``fullgraph=True``.
    """
    dtype = style.dtype if style.kind == "float32" else torch.float16
    training = start(workload, dataclasses.replace(style, dtype=dtype, backend=None), device)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    graphs = CompileCounterWithBackend("eager")
    step = torch.compile(training.step, backend=graphs, fullgraph=True)
    made = []
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            for _ in range(5):
                step()
                made.append(graphs.frame_count)
    except Exception as error:  # noqa: BLE001  (what Dynamo raises is no public class)
        return f"no: {_reason(error)}"
    if any(map(torch.equal, before, training.model.parameters())):
        return "no: a parameter got no update"
    return "yes" if made[-1] == made[1] else f"yes, but {made[-1] - made[1]} recompiles"


def _reason(error: Exception) -> str:
    """What Dynamo complains about, and the line of the step where it met it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    inside = [
        after for line, after in itertools.pairwise(lines) if line.startswith(f'File "{_HERE}')
    ]
    first = lines[0] if lines else type(error).__name__
    return f"`{inside[-1].partition('  #')[0]}`: {first}" if inside else first


_HERE = Path(__file__).parent
