"""Devices and threads of JAX, by the names that the command line knows."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from ..errors import RecipeError


def pick_device(name: str | None = None) -> str:
    """Return the device to train on: the one given, else JAX's default one.

    Raises:
        RecipeError: a device that JAX does not have here.
    """
    try:
        device = jax.devices()[0] if name is None else device_named(name)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"--device {name}: JAX cannot use it here: {reason}") from None
    if device.platform == "cpu":
        return "cpu"
    # "gpu" is what JAX calls both kinds
    kind = device.platform if name is None else name.partition(":")[0]
    return f"{'cuda' if kind == 'gpu' else kind}:{device.id}"


def device_named(name: str) -> jax.Device:
    """Return the device that ``"cpu"``, ``"cuda:1"`` or ``"tpu"`` names."""
    kind, _, number = name.partition(":")
    return jax.devices(kind)[int(number or 0)]


def describe(device: str) -> dict[str, Any]:
    """Return what the report says about JAX and the device, as plain values."""
    found = device_named(device)
    on_cpu = found.platform == "cpu"
    return {
        "versions": {"jax": jax.__version__},
        "device_name": (platform.processor() or platform.machine()) if on_cpu
        else found.device_kind,
        "threads": _usable_cpus() if on_cpu else None,
    }  # fmt: skip


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on so many of the CPU's cores meanwhile; None leaves them as they are.

    JAX has no number of threads to set, so its threads, those that there are and those that are
    made meanwhile, are held to so many cores.

    Raises:
        RecipeError: a number, on a system that cannot hold a thread to a core.
    """
    if count is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise RecipeError(f"--threads {count}: JAX's threads cannot be limited on this system.")
    before = os.sched_getaffinity(0)
    _hold_to(set(sorted(before)[:count]))
    try:
        yield
    finally:
        _hold_to(before)


def _hold_to(cores: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # a thread that has just ended
            continue
