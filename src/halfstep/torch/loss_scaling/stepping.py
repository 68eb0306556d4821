"""Three ways to step an optimizer, or not, once the gradients have been judged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import LossScaleError
from .fusion import has_fused_kernels, is_fused, is_sgd, late_momentum, unfused
from .gradients import Gradients, divide_, moved
from .guards import is_watched
from .host import is_free, number


class Skip:
    """Whether to skip a step: on the device, and on the host once somebody had to ask.

    Args:
        found: 1.0 to skip, 0.0 to step.
    """

    def __init__(self, found: Tensor) -> None:
        self.found = found
        self._known: bool | None = None

    def on_host(self) -> bool:
        """Return it as a boolean; the first time, this waits for the device."""
        if self._known is None:
            self._known = number(self.found) > 0
        return self._known


def take_step(
    optimizer: Optimizer,
    grads: Gradients,
    skip: Skip,
    divisor: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Divide the gradients and step, or leave parameters and state as they are.

    On the device where the optimizer's kernels can skip there; by one flag read on the host for
    every other optimizer; and inside ``torch.compile``, where nothing can be read, by undoing.

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
    if skips_on_device(optimizer, grads):
        return _on_device(optimizer, skip.found, divisor, *args, **kwargs)
    divide_(grads, divisor)
    step: Callable[..., Any] = _undone
    if not torch.compiler.is_compiling():
        if skip.on_host():  # the one host read of this way
            return None
        step = _plainly
    if is_fused(optimizer):
        with unfused(optimizer):
            return step(optimizer, skip.found, *args, **kwargs)
    return step(optimizer, skip.found, *args, **kwargs)


def skips_on_device(optimizer: Optimizer, grads: Gradients) -> bool:
    """Whether this step can be left out, and its gradients unscaled, by the optimizer's kernels.

    For torch's own optimizers it depends on their groups and on these gradients. One from
    elsewhere says so by ``_step_supports_amp_scaling``, unless it wants the scaler itself as an
    argument, as the contract was before torch 2.0.
    """
    if not has_fused_kernels(optimizer):
        return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and (
            "grad_scaler" not in inspect.signature(optimizer.step).parameters
        )
    if not is_fused(optimizer) or grads.sparse or grads.foreign is not None:
        return False
    if torch.compiler.is_compiling():  # Dynamo does not trace the fused kernels
        return False
    return not (is_sgd(optimizer) and late_momentum(optimizer))


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
    step: Any = type(optimizer).step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    with torch.no_grad():
        return step(optimizer, *args, **kwargs)


def _plainly(optimizer: Optimizer, _: Tensor, *args: Any, **kwargs: Any) -> Any:
    return optimizer.step(*args, **kwargs)


def _undone(optimizer: Optimizer, found: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Step, and choose between what was and what is, on the device."""
    before = [(tensor, tensor.detach().clone()) for tensor in _changed_by(optimizer)]
    result = step_now(optimizer, *args, **kwargs)
    if len(_changed_by(optimizer)) != len(before):
        raise LossScaleError(
            f"{type(optimizer).__name__} made its state inside torch.compile, where a skipped step "
            "cannot take it back. Run one step outside first."
        )
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(torch.where(moved(found, tensor.device) > 0, value, tensor))
    return result


def _changed_by(optimizer: Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in parameters if p in optimizer.state]
    return [
        *parameters,
        *(value for state in states for value in state.values() if isinstance(value, Tensor)),
    ]
