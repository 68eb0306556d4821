"""The protocol of torch's fused optimizers: a scale and a skip flag as attributes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def step_on_device(
    optimizer: Optimizer,
    found: Tensor,
    divisor: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Step an optimizer that unscales and skips on the device.

    Args:
        optimizer: one whose kernels read ``grad_scale`` and ``found_inf``.
        found: 1.0 to skip, 0.0 to step.
        divisor: what the kernel divides the gradients by, or None.
        args: for ``optimizer.step``.
        kwargs: for ``optimizer.step``.
    """
    own = getattr(optimizer, "grad_scale", None)  # a user's own factor, as torch.amp takes it
    if own is not None and divisor is not None:
        divisor = divisor * own
    slots: Any = optimizer
    slots.grad_scale, slots.found_inf = own if divisor is None else divisor, found
    try:
        return optimizer.step(*args, **kwargs)
    finally:
        del slots.grad_scale, slots.found_inf
