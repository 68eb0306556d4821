"""Switching ``torch.autocast`` on, off or to another dtype around one module's forward.

``torch.autocast`` as a context manager takes about 5 microseconds to enter and leave (measured
on 2.13), and models have hundreds of modules. Here a module that finds autocast as it wants it
changes nothing, and one that does not flips the flags of its own thread directly. Autocast's
cache of weights stays off inside: it is never told when a weight changes, and halfstep keeps its
own copies (``copies.py``). Under ``torch.compile`` the context manager itself is used, which
Dynamo understands and which costs nothing there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

Saved: TypeAlias = "tuple[tuple[tuple[str, bool, torch.dtype | None], ...], bool | None]"


@dataclass(frozen=True)
class Region:
    """How autocast shall be inside a forward: off, or on with a dtype."""

    dtype: torch.dtype | None

    def enter(self, devices: tuple[str, ...]) -> Saved | None:
        """Set autocast for ``devices``; return what :func:`leave` needs, or None if it was so."""
        if self.dtype is None:
            return _switch_off(devices)
        if self._holds(devices[0]) if len(devices) == 1 else all(map(self._holds, devices)):
            return None
        saved = tuple(
            [
                (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in devices
            ]
        )
        cache = torch.is_autocast_cache_enabled()
        for device in devices:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, self.dtype)
        torch.set_autocast_cache_enabled(False)
        return saved, cache

    def _holds(self, device: str) -> bool:
        return (
            torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) is self.dtype
            and not torch.is_autocast_cache_enabled()
        )

    def context(self, device: str) -> torch.autocast:
        """Return the same as a context manager, for ``torch.compile``."""
        return torch.autocast(
            device, dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )


def _switch_off(devices: tuple[str, ...]) -> Saved | None:
    """Switch autocast off where it is on: its dtype and its cache mean nothing then."""
    on = None
    for device in devices:
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)
            on = ((device, True, None), *(on or ()))
    return None if on is None else (on, None)


def leave(saved: Saved | None) -> None:
    """Set autocast back to how :meth:`Region.enter` found it."""
    if saved is None:
        return
    states, cache = saved
    for device, enabled, dtype in states:
        torch.set_autocast_enabled(device, enabled)
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)
    if cache is not None:
        torch.set_autocast_cache_enabled(cache)
