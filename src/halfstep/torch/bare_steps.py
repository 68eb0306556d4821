"""Optimizers that step by themselves, where a policy promised more than they do.

Under ``"master_bfloat16"`` a bare ``torch.optim.AdamW`` would train, and lose most updates without
a word; under ``"mixed_float16"`` it would lose small gradients, unless somebody scales the loss.
It cannot be seen when the policy is applied, so a hook looks once at each optimizer.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core.policy import Policy
from ..errors import LossScaleWarning, PolicyError
from .masters import update_of
from .registry import policy_of_parameter


class _Watch:
    """Which optimizers were looked at since a policy was applied last."""

    def __init__(self) -> None:
        self._installed = False
        self._time = 0
        self._seen: WeakKeyDictionary[Optimizer, tuple[int, int]] = WeakKeyDictionary()
        self.lent: set[int] = set()
        self.wrapped: WeakSet[Optimizer] = WeakSet()

    def begin(self) -> None:
        """Look at every optimizer, again, when it steps next."""
        self._time += 1
        if not self._installed:
            register_optimizer_step_pre_hook(refuse_bare_step)
            self._installed = True

    def look(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self.lent:
            return
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        seen = self._time, id(next(parameters, None))
        if self._seen.get(optimizer) == seen:
            return
        scaled = None
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if update_of(parameter) != "plain":
                _refuse(optimizer, parameter)
            policy = policy_of_parameter(parameter)
            if policy is not None and policy.loss_scale.skips:
                scaled = policy
        self._seen[optimizer] = seen
        if scaled is not None and optimizer not in self.wrapped and not _in_scaler():
            _warn_unscaled(optimizer, scaled)


_watch = _Watch()


@contextmanager
def lending(optimizer: Optimizer) -> Iterator[None]:
    """Let ``optimizer`` step inside the block: what has a gradient in it has float32 values."""
    if torch.compiler.is_compiling():  # nothing looks at it there
        yield
        return
    _watch.lent.add(id(optimizer))
    try:
        yield
    finally:
        _watch.lent.discard(id(optimizer))


def watch_steps() -> None:
    """Raise from now on when an optimizer steps a weight whose policy wants more than it does."""
    _watch.begin()


def wrapped(optimizer: Optimizer) -> None:
    """Take note that a `LossScaleOptimizer` stands before ``optimizer``: it knows of the scale."""
    _watch.wrapped.add(optimizer)


def _in_scaler() -> bool:
    """Whether a ``GradScaler``, torch's or ours, takes this step; asked once an optimizer."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            return True
        frame = frame.f_back
    return False


def refuse_bare_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """The hook, before the step of any optimizer of torch's.

    Raises:
        PolicyError: the policy of one of its parameters wants float32 values that it has not.

    Warns:
        LossScaleWarning: the policy of one of its parameters wants a loss scale, and there is none.
    """
    if not torch.compiler.is_compiling():
        _watch.look(optimizer)


def _refuse(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    name = type(optimizer).__name__
    policy = policy_of_parameter(parameter)
    raise PolicyError(
        f"{name}.step: a weight of shape {tuple(parameter.shape)} has the policy {policy}, and "
        f"{name} by itself would round its updates to {parameter.dtype}, where most are lost. Step "
        f"with halfstep.torch.LossScaleOptimizer({name}(...)), which needs no loss scale for it."
    )


def _warn_unscaled(optimizer: Optimizer, policy: Policy) -> None:
    name = type(optimizer).__name__
    warnings.warn(
        f"{name}.step: its parameters have the policy {policy}, and nobody scales the loss: small "
        f"gradients are 0 in float16. Step with halfstep.torch.LossScaleOptimizer({name}(...)), or "
        "say that you scale it yourself, or want none: "
        f"Policy({policy.name!r}, loss_scale=None).",
        LossScaleWarning,
        stacklevel=5,
    )
