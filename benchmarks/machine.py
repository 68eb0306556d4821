"""What the numbers were taken on, in words that say nothing about whose machine it is."""

from __future__ import annotations

import datetime
import os
import platform
import re
from typing import Any

import torch

import halfstep
from halfstep.core.hardware import devices


def describe(device: str) -> dict[str, Any]:
    """Return the device, the versions and the date."""
    kinds = ("cpu",) if device == "cpu" else ("cuda", "rocm")
    used = next(each for each in devices() if each.kind in kinds)
    return {
        "device": used.name,
        "kind": used.kind,
        "features": [*used.features, *used.units],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "halfstep": halfstep.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def slug(machine: dict[str, Any]) -> str:
    """Return a name for files about this machine: the device's.

    >>> slug({"device": "AMD EPYC", "cores": 2, "kind": "cpu"})
    'amd-epyc-2-cores'
    """
    words = machine["device"]
    if machine["kind"] == "cpu":
        words += f" {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def sentence(machine: dict[str, Any]) -> str:
    """Say it in one sentence."""
    cores = f"{machine['cores']} cores, " if machine["kind"] == "cpu" else ""
    features = ", ".join(machine["features"]) or "no 16-bit units"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{machine['device']} ({cores}{features}), {threads},\n"
        f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}, "
        f"{machine['date']}."
    )
