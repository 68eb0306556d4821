"""The random generators that a training step may draw from: torch's, NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Generators:
    """Where the generators stood.

    >>> before = Generators.now([])
    >>> first = torch.rand(3), np.random.rand(), random.random()
    >>> before.put_back()
    >>> again = torch.rand(3), np.random.rand(), random.random()
    >>> bool((first[0] == again[0]).all()), first[1:] == again[1:]
    (True, True)
    """

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]
    numpy: Any
    python: Any

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> Generators:
        """Return where they stand: the CPU's, and those of the devices of ``tensors``."""
        devices = {tensor.device for tensor in tensors} - {torch.device("cpu")}
        states = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if hasattr(torch.get_device_module(device), "get_rng_state")
        ]
        return cls(torch.get_rng_state(), tuple(states), np.random.get_state(), random.getstate())

    def put_back(self) -> None:
        """Set them to where they stood."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_all(seed: int) -> None:
    """Seed every generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
