"""Which policy pays on this machine: what the data sheets say, and what the stopwatch says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.device import Device

_LOW = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
_PAYS = 0.9  # of float32's time; a noisy machine moves a ratio by several percent
_BUSY = " (The machine was busy meanwhile, times vary by half: measure again when it is idle.)"
_ALIKE = 1.1  # two dtypes closer than this cost the same


class Timed(Protocol):
    """What a verdict needs of a timing."""

    @property
    def operation(self) -> str:
        """``'product'`` or ``'convolution'``."""

    @property
    def dtype(self) -> str:
        """What it was computed in."""

    @property
    def seconds(self) -> float:
        """How long it took; NaN where it could not be done."""

    @property
    def spread(self) -> float:
        """The distance between the quartiles of what was timed."""


def recommendation(machine: Sequence[Device]) -> str:
    """Return one sentence on what to use, from what the devices are known to be fast in.

    It speaks of the best accelerator that a framework can use, or of the CPU where there is none.

    >>> from halfstep.core.accelerators import nvidia
    >>> recommendation([nvidia("Tesla V100", (7, 0), None, "torch")])
    'On Tesla V100 use mixed_float16: float16 is the 16-bit format that it is fast in.'
    """
    usable = [device for device in machine if device.usable]
    candidates = [device for device in usable if device.kind != "cpu"] or usable
    best = max(candidates, key=lambda device: len(device.fast), default=None)
    fast = [] if best is None else [name for name, dtype in _LOW.items() if dtype in best.fast]
    if best is None or not fast:
        return (
            "Use float32: nothing here is known to be faster in 16 bits; "
            "`halfstep doctor --measure` tells for certain."
        )
    if len(fast) == len(_LOW):
        return (
            f"On {best.name} use mixed_bfloat16: it needs no loss scaling and has matrix units as "
            "fast as float16's; mixed_float16 where a model needs the 3 more bits of precision."
        )
    low = _LOW[fast[0]]
    return f"On {best.name} use {fast[0]}: {low} is the 16-bit format that it is fast in."


def ratios(timings: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """Return time over float32's time by dtype and operation, for what could be computed."""
    base = {t.operation: t.seconds for t in timings if t.dtype == "float32"}
    found: dict[str, dict[str, float]] = {}
    for timing in timings:
        ratio = timing.seconds / base.get(timing.operation, math.nan)
        if timing.dtype != "float32" and math.isfinite(ratio):
            found.setdefault(timing.dtype, {})[timing.operation] = ratio
    return found


@dataclass(frozen=True)
class Verdict:
    """What was measured on one device, in one sentence.

    Attributes:
        device: its name.
        policy: the policy that pays, ``'float32'`` where none does.
        sentence: the ratios and the advice.
    """

    device: str
    policy: str
    sentence: str


def measured(device: str, timings: Sequence[Timed]) -> Verdict:
    """Return which policy pays on a device, from what :func:`halfstep.torch.devices.measure` gave.

    A policy pays where the geometric mean of its ratios to float32 is below 0.9; of two that cost
    the same (within 10 %) bfloat16 wins, for it needs no loss scaling.

    Args:
        device: what to call it, for instance ``'this CPU'``.
        timings: of that device, those of float32 among them.
    """
    found = ratios(timings)
    means = {
        policy: math.prod(found[dtype].values()) ** (1 / len(found[dtype]))
        for policy, dtype in _LOW.items()
        if dtype in found
    }
    if not means:
        words = f"On {device} nothing could be computed in 16 bits: use float32."
        return Verdict(device, "float32", words)
    first, *others = (dtype for dtype in ("float16", "bfloat16") if dtype in found)
    figures = [f"{first} {_figures(found[first])} the time of float32"]
    figures += [f"{dtype} {_figures(found[dtype])}" for dtype in others]
    policy, advice = _advice(means)
    busy = _BUSY if any(t.spread > t.seconds / 2 for t in timings if t.dtype == "float32") else ""
    return Verdict(device, policy, f"On {device} {', '.join(figures)}: {advice}{busy}")


def _figures(by_operation: Mapping[str, float]) -> str:
    """For instance ``products take 3.1x and convolutions 9.8x``."""
    (first, ratio), *others = by_operation.items()
    return " and ".join(
        [f"{first}s take {_times(ratio)}", *(f"{name}s {_times(more)}" for name, more in others)]
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x"


def _advice(means: Mapping[str, float]) -> tuple[str, str]:
    best = min(means, key=lambda policy: means[policy])
    if means.get("mixed_bfloat16", math.inf) <= means[best] * _ALIKE:
        best = "mixed_bfloat16"
    if means[best] < _PAYS:
        scaling = " (no loss scaling needed)" if best == "mixed_bfloat16" else ""
        return best, f"use {best}, which pays here{scaling}."
    if means[best] > 1 / _PAYS:
        return "float32", (
            f"mixed precision will be slower here; use float32, or {best} only to save memory."
        )
    return "float32", f"mixed precision changes little here; use {best} only to save memory."
