"""``python -m benchmarks.numerics_overhead``: what each instrument adds to a training step.

All instruments step in turn in one process, so that each ratio is of two steps taken within a
second of each other, and the machine's other work falls on both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from halfstep.torch import LossScaleOptimizer, NumericsMonitor

from .machine import describe, sentence, slug
from .workloads import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
EVERY = 100
VOCABULARY, LENGTH, WIDTH = 1024, 128, 256
NEVER = 10**9

Step = Callable[[], None]


@dataclass(frozen=True)
class Sizes:
    """What is trained: a GPT of 4 blocks.

    Attributes:
        batch: sequences of 128 tokens a step.
        width: of the model.
    """

    batch: int
    width: int


class Run:
    """A model of its own with an optimizer, and a step.

    Args:
        sizes: of the model.
        device: where it is.
        scaled: whether it steps through a LossScaleOptimizer.
    """

    def __init__(self, sizes: Sizes, device: str, scaled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = LanguageModel(VOCABULARY, LENGTH, sizes.width, fused=True).to(device)
        self.tokens = torch.randint(VOCABULARY, (sizes.batch, LENGTH + 1), device=device)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        if scaled:
            self.optimizer = LossScaleOptimizer(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        logits = self.model(self.tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        scaled = isinstance(self.optimizer, LossScaleOptimizer)
        self.optimizer.backward(loss) if scaled else loss.backward()
        self.optimizer.step()


def instruments(sizes: Sizes, device: str, folder: str, stack: contextlib.ExitStack) -> list[Any]:
    """Return the name, the name of the baseline, and the step of each."""
    rows: list[tuple[str, str, Step]] = []
    for scaled in (False, True):
        base = "LossScaleOptimizer" if scaled else "plain"
        rows.append((base, base, Run(sizes, device, scaled).step))
        for what, every in (("between recorded steps", NEVER), ("a recorded step", 1)):
            run = Run(sizes, device, scaled)
            path = f"{folder}/{scaled}-{every}.jsonl"
            monitor = NumericsMonitor(run.model, run.optimizer, every, path)
            stack.enter_context(monitor)
            rows.append((f"NumericsMonitor, {what} ({base})", base, run.step))
    rows.append(("torch.autograd.detect_anomaly", "plain", _anomaly(Run(sizes, device))))
    debug = _debug_underflow(Run(sizes, device))
    if debug is not None:
        rows.append(("DebugUnderflowOverflow (transformers)", "plain", debug))
    return rows


def _anomaly(run: Run) -> Step:
    def step() -> None:
        with torch.autograd.detect_anomaly():
            run.step()

    return step


def _debug_underflow(run: Run) -> Step | None:
    try:
        from transformers.debug_utils import DebugUnderflowOverflow
    except ImportError:
        return None
    DebugUnderflowOverflow(run.model)
    return run.step


def timed(step: Step, device: str) -> float:
    """Return the seconds of one step; on a CPU those of the processor, which may be shared."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    _wait(device)
    begin = clock()
    step()
    _wait(device)
    return clock() - begin


def _wait(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def measure(sizes: Sizes, device: str, rounds: int) -> list[dict[str, Any]]:
    """Step all instruments in turn, and compare each with its baseline of the same round."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        rows = instruments(sizes, device, folder, stack)
        steps = {name: step for name, _, step in rows}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():  # the first step of each is its own: allocations, hooks
            step()
            step()
        names = list(steps)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with contextlib.redirect_stdout(io.StringIO()):
                    seconds[name].append(timed(steps[name], device))
    return [_row(name, base, seconds) for name, base, _ in rows]


def _row(name: str, base: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [own / plain for own, plain in zip(seconds[name], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "instrument": name,
        "baseline": base,
        "milliseconds": 1000 * statistics.median(seconds[name]),
        "ratio": middle,
        "quartiles": [low, high],
        "least": min(seconds[name]) / min(seconds[base]),
    }


def at_default(rows: list[dict[str, Any]], base: str) -> dict[str, Any]:
    """Return what the monitor adds over ``EVERY`` steps: one recorded, the others not."""
    ratio = {row["instrument"]: row["ratio"] for row in rows}
    between = ratio[f"NumericsMonitor, between recorded steps ({base})"]
    recorded = ratio[f"NumericsMonitor, a recorded step ({base})"]
    return {
        "instrument": f"NumericsMonitor(every={EVERY}) ({base})",
        "baseline": base,
        "ratio": 1 + (recorded - 1) / EVERY,
        "with_between": ((EVERY - 1) * between + recorded) / EVERY,
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe(options.device)
    print(sentence(machine))
    sizes = Sizes(options.batch, options.width)
    rows = measure(sizes, options.device, options.rounds)
    rows += [at_default(rows, base) for base in ("plain", "LossScaleOptimizer")]
    for row in rows:
        quartiles = " to ".join(f"{q:.3f}" for q in row.get("quartiles", ()))
        print(f"{row['instrument']:62} x {row['ratio']:.3f}  {quartiles}")
    results = {"machine": machine, "rounds": options.rounds, "sizes": vars(sizes), "rows": rows}
    path = ROOT / "benchmarks" / "results" / f"numerics-overhead-{slug(machine)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
