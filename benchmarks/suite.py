"""The measurements of ``python -m benchmarks``, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halfstep.errors import PolicyError
from halfstep.torch import weights_unchanged
from halfstep.torch.loss_scaling import host

from .measures import Counts, MakeOptimizer, Training, count, kept_on_cpu, start, time_together
from .styles import LOW, RIVALS, Style, styles_of
from .workloads import TINY, Workload, workloads_for

Row = dict[str, Any]
Say = Callable[[str], None]
Names = Collection[str] | None
"""Names of workloads; None is all."""

MICRO_BATCHES = 8


def steps(device: str, seconds: float, say: Say, only: Names = None) -> list[Row]:
    """Casts, bytes and time of a step, for every workload in every style."""
    rows: list[Row] = []
    for workload in chosen(workloads_for(device), only):
        say(f"{workload.name}: {workload.about}")
        styles = styles_of(device, workload.stream)
        started = [_started(workload, style, device) for style in styles]
        able = [training for training, _, why in started if why is None]
        times = time_together([t for t in able if t.style.timed], seconds=seconds)
        for training, counts, why in started:
            row = _row(workload, training.style) | {"why": why}
            timing = None if why is not None else times.get(training.style.name)
            row |= {} if counts is None else dataclasses.asdict(counts)
            rows.append(row | {"time": None if timing is None else dataclasses.asdict(timing)})
    return rows


def _started(
    workload: Workload, style: Style, device: str
) -> tuple[Training, Counts | None, str | None]:
    """Return a training, what a step of it does, and why it can take none."""
    training = start(workload, style, device)
    try:
        return training, count(training), None
    except (RuntimeError, PolicyError) as error:
        return training, None, str(error).splitlines()[0].split(". ")[0]


def chosen(workloads: Iterable[Workload], only: Names) -> list[Workload]:
    """Return the workloads that are named; all where none are."""
    return [each for each in workloads if only is None or each.name in only]


def host_time(device: str, seconds: float, say: Say, only: Names = None) -> list[Row]:
    """Time of a step that is all host and no arithmetic."""
    rows: list[Row] = []
    for workload in chosen(TINY, only):
        say(f"{workload.name}: {workload.about}")
        styles = [style for style in styles_of(device) if style.timed]
        styles += [Style("16 bits throughout", dtype) for dtype in LOW]
        trainings = [start(workload, style, device) for style in styles]
        times = time_together(trainings, seconds=seconds, steps=5, fewest=9)
        rows += [
            _row(workload, style) | {"time": dataclasses.asdict(times[style.name])}
            for style in styles
        ]
    return rows


def accumulation(device: str, say: Say, only: Names = None) -> list[Row]:
    """Casts of an optimizer step over several micro-batches, for every workload."""
    rows: list[Row] = []
    for workload in chosen(workloads_for(device), only):
        say(f"{workload.name}, {MICRO_BATCHES} micro-batches a step")
        for style in styles_of(device, workload.stream):
            if style.dtype is not torch.bfloat16:
                continue
            for kept in (False, True) if style.kind in RIVALS else (False,):
                rows += _accumulated(workload, style, device, kept)
    return rows


def _accumulated(workload: Workload, style: Style, device: str, kept: bool) -> list[Row]:
    training = start(workload, style, device)
    training.micro_batches = MICRO_BATCHES
    if kept:
        training.around = _unchanged(training)
    label = {"style": style.name + (", weights_unchanged" if kept else "")}
    try:
        counts = dataclasses.asdict(count(training))
    except RuntimeError:
        return []  # the table of its steps says why
    return [_row(workload, style) | counts | label]


def _unchanged(training: Training) -> Callable[[], Any]:
    return lambda: weights_unchanged(training.model)


Optimizers = Iterable[tuple[str, MakeOptimizer]]

OPTIMIZERS: Optimizers = (
    ("AdamW", lambda p: torch.optim.AdamW(p, 1e-4)),
    ("AdamW(fused=True)", lambda p: torch.optim.AdamW(p, 1e-4, fused=True)),
    ("SGD", lambda p: torch.optim.SGD(p, 1e-4)),
    ("Adagrad", lambda p: torch.optim.Adagrad(p, 1e-4)),
    ("SGD(dampening=0.5)", lambda p: torch.optim.SGD(p, 1e-4, 0.9, dampening=0.5)),
    ("RMSprop", lambda p: torch.optim.RMSprop(p, 1e-4)),
    ("Rprop", lambda p: torch.optim.Rprop(p, 1e-4)),
    ("Adadelta", lambda p: torch.optim.Adadelta(p, 1e-4)),
    ("Adamax", lambda p: torch.optim.Adamax(p, 1e-4)),
    ("NAdam", lambda p: torch.optim.NAdam(p, 1e-4)),
    ("RAdam", lambda p: torch.optim.RAdam(p, 1e-4)),
    ("ASGD", lambda p: torch.optim.ASGD(p, 1e-4)),
    ("Adafactor", lambda p: torch.optim.Adafactor(p, 1e-4)),
)


def host_reads(device: str, say: Say) -> list[Row]:
    """Values that a step in float16 reads on the host, for several optimizers."""
    say("host reads of a step with float16 and a dynamic loss scale")
    styles = (
        Style("float32"),
        Style("torch.amp", torch.float16),
        Style("halfstep", torch.float16, "compute"),
        Style("halfstep, skip='device'", torch.float16, "compute"),
    )
    rows: list[Row] = []
    with _as_on_an_accelerator():
        for name, optimizer in OPTIMIZERS:
            for max_norm in (None, 1.0):
                row = {"optimizer": name, "max_norm": max_norm}
                rows.append(row | _reads(styles, device, optimizer, max_norm))
    return rows


def _reads(
    styles: Iterable[Style], device: str, optimizer: MakeOptimizer, max_norm: float | None
) -> Row:
    """Return the reads of each style, and what the last of them costs beyond the one before."""
    on_cpu = kept_on_cpu(optimizer)
    counts = {s.kind: count(start(TINY[0], s, device, optimizer, max_norm), on_cpu) for s in styles}
    *_, read, undone = counts.values()
    return {
        "reads": {kind: each.host_reads for kind, each in counts.items()},
        "counter_reads": {kind: each.counter_reads for kind, each in counts.items()},
        "more_launches": undone.launches - read.launches,
        "copied_bytes": undone.copied_bytes,
    }


@contextmanager
def _as_on_an_accelerator() -> Iterator[None]:
    """Take no way that only a CPU has: its memory is the host's own, and read for nothing."""
    free = host.CPU_IS_FREE
    vars(host)["CPU_IS_FREE"] = False
    try:
        yield
    finally:
        vars(host)["CPU_IS_FREE"] = free


def _row(workload: Workload, style: Style) -> Row:
    return {
        "workload": workload.name,
        "about": workload.about,
        "style": style.name,
        "kind": style.kind,
        "dtype": str(style.dtype).removeprefix("torch."),
        "functional": style.functional,
        "cast_forward_inputs": style.cast_forward_inputs,
    }
