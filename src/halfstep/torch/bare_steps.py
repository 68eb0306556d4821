"""Refusing an optimizer that steps 16-bit weights by itself, where a policy promised it would not.

Under ``"master_bfloat16"`` a bare ``torch.optim.AdamW`` would train, and lose most updates without
a word. It cannot be seen when the policy is applied, so a hook looks once at each optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import PolicyError
from .masters import update_of
from .registry import policy_of_parameter


class _Watch:
    """Which optimizers were looked at since a policy was applied last."""

    def __init__(self) -> None:
        self._installed = False
        self._time = 0
        self._seen: WeakKeyDictionary[Optimizer, tuple[int, int]] = WeakKeyDictionary()
        self.lent: set[int] = set()

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
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if update_of(parameter) != "plain":
                _refuse(optimizer, parameter)
        self._seen[optimizer] = seen


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


def refuse_bare_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """The hook, before the step of any optimizer of torch's.

    Raises:
        PolicyError: the policy of one of its parameters wants float32 values that it has not.
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
