"""Three ways to step an optimizer, or not, once the gradients have been judged."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import traced
from .changing import Inside
from .fusion import has_fused_kernels, is_fused, is_sgd, late_momentum, layouts_fit, unfused
from .gradients import Gradients, divide_
from .guards import is_watched
from .host import is_free, number
from .undoing import Undo


class Skip:
    """Whether to skip a step: on the device, and on the host once somebody had to ask.

    Args:
        found: 1.0 to skip, 0.0 to step.
        undo: what takes a step back on the device, where that is wanted.
    """

    def __init__(self, found: Tensor, undo: Undo | None = None) -> None:
        self.found = found
        self.undo = undo
        self._known: bool | None = None

    def on_host(self) -> bool:
        """Return it as a boolean; the first time, this waits for the device."""
        if self._known is None:
            self._known = number(self.found) > 0
        return self._known

    @property
    def by_kernels(self) -> bool:
        """Whether the optimizer's own kernels may unscale and skip."""
        return self.undo is None or self.undo.by_kernels


def take_step(
    optimizer: Optimizer,
    grads: Gradients,
    skip: Skip,
    divisor: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Divide the gradients and step, or leave parameters and state as they are.

    On the device where the optimizer's kernels can skip there. For every other optimizer by one
    flag read on the host; or by undoing, where that is wanted, and inside ``torch.compile``, where
    nothing can be read.

    Args:
        optimizer: whose turn it is.
        grads: what it will step with.
        skip: whether to.
        divisor: what the gradients are to be divided by, or None.
        args: for ``optimizer.step``.
        kwargs: for ``optimizer.step``.

    Returns:
        What ``optimizer.step`` returned; None if it was not called.
    """
    if is_free(skip.found) and skip.on_host():
        return None
    if skip.by_kernels and skips_on_device(optimizer, grads):
        return _on_device(optimizer, skip.found, divisor, *args, **kwargs)
    divide_(grads, divisor)
    if torch.compiler.is_compiling():
        return traced.step_or_undo(optimizer, skip.found, *args, **kwargs)
    inside = _to_undo(optimizer, skip)
    if is_fused(optimizer) and skip.by_kernels:
        with unfused(optimizer):
            return _without_kernels(optimizer, skip, inside, *args, **kwargs)
    return _without_kernels(optimizer, skip, inside, *args, **kwargs)


def _to_undo(optimizer: Optimizer, skip: Skip) -> Inside | None:
    """Return what the step may change, if it is to be taken back on the device."""
    if skip.undo is None or is_free(skip.found):
        return None
    return skip.undo.inside(optimizer, skip.found)


def _without_kernels(
    optimizer: Optimizer, skip: Skip, inside: Inside | None, *args: Any, **kwargs: Any
) -> Any:
    if skip.undo is not None and inside is not None:
        return skip.undo.step(optimizer, inside, skip.found, *args, **kwargs)
    if skip.on_host():  # the one host read of this way
        return None
    return optimizer.step(*args, **kwargs)


def skips_on_device(optimizer: Optimizer, grads: Gradients) -> bool:
    """Whether this step can be left out, and its gradients unscaled, by the optimizer's kernels.

    For torch's own optimizers it depends on their groups and on these gradients. One from
    elsewhere says so by ``_step_supports_amp_scaling``, unless it wants the scaler itself as an
    argument, as the contract was before torch 2.0.
    """
    if torch.compiler.is_compiling():  # Dynamo does not trace the fused kernels
        return False
    if not has_fused_kernels(optimizer):
        return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and (
            "grad_scaler" not in inspect.signature(optimizer.step).parameters
        )
    if not is_fused(optimizer) or grads.sparse or grads.foreign is not None:
        return False
    return layouts_fit(optimizer) and not (is_sgd(optimizer) and late_momentum(optimizer))


def _on_device(
    optimizer: Optimizer, found: Tensor, divisor: Tensor | None, *args: Any, **kwargs: Any
) -> Any:
    own = getattr(optimizer, "grad_scale", None)  # a user's own factor, as torch.amp takes it
    if own is not None and divisor is not None:
        divisor = divisor * own
    slots: Any = optimizer
    slots.grad_scale = own if divisor is None else divisor
    # torch's own kernels need not look at a flag that is known to be 0
    slots.found_inf = None if is_free(found) and has_fused_kernels(optimizer) else found
    try:
        return step_now(optimizer, *args, **kwargs)
    finally:
        del slots.grad_scale
        del slots.found_inf


def step_now(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """Call ``optimizer.step``; inside ``torch.compile`` the function in the middle of it.

    What stands around it in torch.optim breaks the graph on purpose, at both ends.
    """
    if not torch.compiler.is_compiling() or is_watched(optimizer):
        return optimizer.step(*args, **kwargs)
    return traced.step(optimizer, *args, **kwargs)
