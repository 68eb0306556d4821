"""Where the host can read a value without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_IS_FREE = True
"""A CPU's tensors lie in the host's own memory, and are ready when an operation returns. What is
decided there costs no tiny operations, and no device is waited for. Tests set it to False, to take
an accelerator's ways on a CPU."""


def is_free(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's values right away."""
    return (
        tensor.is_cpu
        and CPU_IS_FREE
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
    )


def number(tensor: Tensor) -> float:
    """Return the value of a 0-dim tensor, past the dispatcher where that is free."""
    value: Any = tensor.tolist() if is_free(tensor) else tensor.item()
    return float(value)
