"""Loss scaling in Keras on torch, ours beside Keras': ``python -m benchmarks.keras_loss_scaling``.

Three optimizers step the same model in turn, in one process: the inner one alone, ours around it,
and Keras' own ``LossScaleOptimizer``. A ratio is that of two steps taken side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.keras import LossScaleOptimizer

from .machine import describe, sentence, slug
from .tables import Table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- keras tables -->", "<!-- end of keras tables -->"
SHAPE, BATCH = (784, 1024, 1024, 10), 256
WAYS = ("none", "halfstep", "keras")
INNER: dict[str, Callable[[], Any]] = {
    "SGD, momentum 0.9": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-6),
}
Step = Callable[[], None]


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        read = func.overloadpacket is torch.ops.aten._local_scalar_dense
        self.launches += not read and not func.is_view
        return func(*args, **(kwargs or {}))


def wrapped(way: str, inner: Any) -> Any:
    """The optimizer of one of the ways."""
    if way == "none":
        return inner
    return (LossScaleOptimizer if way == "halfstep" else keras.optimizers.LossScaleOptimizer)(inner)


def applying(way: str, inner: Callable[[], Any]) -> Step:
    """``apply`` alone, with the gradients that a backward pass left."""
    random_numbers = np.random.default_rng(0)
    shapes = [s for i, o in itertools.pairwise(SHAPE) for s in ((i, o), (o,))]
    variables = [keras.Variable(random_numbers.normal(size=s).astype("float32")) for s in shapes]
    optimizer = wrapped(way, inner())
    optimizer.build(variables)
    grads = [torch.randn(variable.shape) for variable in variables]
    for variable, grad in zip(variables, grads, strict=True):
        variable.value.grad = grad
    loss = torch.ones(())

    def step() -> None:
        with torch.no_grad():
            optimizer.apply(grads, variables)

    def scaled() -> None:
        optimizer.scale_loss(loss)
        step()

    return step if way == "none" else scaled


def training(way: str, inner: Callable[[], Any]) -> Step:
    """One ``train_on_batch`` in mixed_float16."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, activation="relu", dtype="mixed_float16") for n in SHAPE[1:-1]]
    last = keras.layers.Dense(SHAPE[-1], dtype="float32")
    model = keras.Sequential([keras.Input(SHAPE[:1]), *layers, last])
    model.compile(
        wrapped(way, inner()),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        auto_scale_loss=False,
    )
    x = np.random.default_rng(0).normal(size=(BATCH, SHAPE[0])).astype("float32")
    y = np.arange(BATCH) % SHAPE[-1]
    return lambda: model.train_on_batch(x, y)


def together(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Time one step of each way, in a random order each round."""
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds + 3):
        ways = list(steps)
        random.shuffle(ways)
        for way in ways:
            begin = time.perf_counter()
            steps[way]()
            if number >= 3:
                taken[way].append(1e3 * (time.perf_counter() - begin))
    return taken


def counted(step: Step) -> dict[str, int]:
    """Launches and host reads of one step, as on an accelerator."""
    # where reading waits for nothing, ours reads its four numbers instead of launching on them
    with mock.patch("halfstep.keras.scale_variables._is_near", return_value=False):
        return _counted(step)


def _counted(step: Step) -> dict[str, int]:
    with Launches() as seen:
        step()
    # some reads, such as those of as_tensor([tensor, ...]), pass below every dispatch mode
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    reads = sum(event.count for event in profile.key_averages() if event.key == "aten::item")
    return {"launches": seen.launches, "reads": reads}


def compare(make: Callable[[str, Callable[[], Any]], Step], rounds: int) -> dict[str, Any]:
    """All ways under each inner optimizer."""
    found: dict[str, Any] = {}
    for name, inner in INNER.items():
        steps = {way: make(way, inner) for way in WAYS}
        taken = together(steps, rounds)
        found[name] = {
            way: {
                "ms": statistics.median(times),
                "best_ms": min(times),
                "ratio": statistics.quantiles(
                    [a / b for a, b in zip(times, taken["none"], strict=True)], n=4
                ),
                **counted(steps[way]),
            }
            for way, times in taken.items()
        }
    return found


def table(title: str, results: dict[str, Any]) -> Table:
    """The table of one comparison."""
    rows = []
    for name, ways in results.items():
        for way, found in ways.items():
            low, middle, high = found["ratio"]
            rows.append(
                [
                    name if way == "none" else "",
                    {"none": "alone", "halfstep": "halfstep", "keras": "Keras 3"}[way],
                    f"{found['ms']:.2f}",
                    f"{found['best_ms']:.2f}",
                    "1" if way == "none" else f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    str(found["launches"]),
                    str(found["reads"]),
                ]
            )
    head = ["inner optimizer", "loss scaling", "ms", "best ms", "ratio (quartiles)",
            "launches", "host reads"]  # fmt: skip
    return Table(title, head, rows, words=2)


def main() -> None:
    """Measure, print, and write the results and the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.keras_loss_scaling", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe("cpu") | {"keras": keras.__version__}
    print(sentence(machine))
    found = {
        "machine": machine,
        "apply": compare(applying, 4 * options.rounds),
        "train_on_batch": compare(training, options.rounds),
    }
    tables = [
        table("One apply, 1.9 million weights", found["apply"]),
        table("One train_on_batch, mixed_float16, batch 256", found["train_on_batch"]),
    ]
    for each in tables:
        each.show()
    path = ROOT / "benchmarks" / "results" / f"keras-loss-scaling-{slug(machine)}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs" / "keras-speed.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    where = f"{machine['device']}, {options.threads} thread, keras {keras.__version__}, torch "
    where += f"{machine['torch']}, {machine['date']}"
    parts = [f"{each.title} ({where}):\n\n{each.markdown()}" for each in tables]
    page.write_text("\n\n".join((before + BEGIN, *parts, END + after)), encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}, {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
