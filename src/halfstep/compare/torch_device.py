"""Devices and threads of torch, by the names that the command line knows."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import RecipeError


def pick_device(name: str | None = None) -> str:
    """Return the device to train on: the one given, else CUDA where there is one, else the CPU.

    Raises:
        RecipeError: a device that torch does not have here.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"--device {wanted}: torch cannot use it here: {reason}") from None
    return str(torch.device(wanted))


def describe(device: str) -> dict[str, Any]:
    """Return what the report says about torch and the device, as plain values."""
    info: dict[str, Any] = {"versions": {"torch": torch.__version__}}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["device_name"] = properties.name
        info["capability"] = f"{properties.major}.{properties.minor}"
        info["device_memory"] = properties.total_memory
        info["versions"]["cuda"] = torch.version.cuda
    else:
        info["threads"] = torch.get_num_threads()
        info["device_name"] = platform.processor() or platform.machine()
    return info


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads meanwhile; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
