"""Where the host can read a value without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

FREE = frozenset({"cpu"})
"""Types of device whose tensors lie in the host's own memory, and are ready when an operation
returns. What is decided there costs no tiny operations, and no device is waited for."""


def is_free(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's values right away."""
    return (
        tensor.device.type in FREE and type(tensor) is Tensor and not torch.compiler.is_compiling()
    )


def number(tensor: Tensor) -> float:
    """Return the value of a 0-dim tensor, past the dispatcher where that is free."""
    if is_free(tensor):
        return float(tensor.detach().numpy())
    return float(tensor.item())
