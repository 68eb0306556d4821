"""Blame, asked for in advance: when the loss scale is exhausted, the error says what broke."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import LossScaleExhausted
from .generators import Generators
from .replay import LossFn
from .search import blame

_NOTHING = (
    "A replay of this step is finite. On an accelerator the error comes a few steps after the one "
    "that it is about: blame() that one."
)


@contextmanager
def blame_on_exhausted(model: nn.Module, loss_fn: LossFn, batch: Any) -> Iterator[None]:
    """Take a training step in a ``with`` block; if the loss scale gives up, say what broke.

    A :class:`~halfstep.LossScaleExhausted` that leaves the block, from a ``LossScaleOptimizer`` or
    a ``GradScaler``, carries the finding of :func:`blame` in its text and as ``fault``. The step
    is replayed with the random numbers that the block began with. Until then the block costs a
    copy of the generators' states.

    Args:
        model: as in :func:`blame`.
        loss_fn: as in :func:`blame`.
        batch: the batch of this step.

    >>> import torch
    >>> from halfstep import DynamicLossScale
    >>> from halfstep.torch import LossScaleOptimizer
    >>> model = nn.Linear(2, 1)
    >>> loss_scale = DynamicLossScale(initial_scale=1, patience=1)
    >>> optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters()), loss_scale)
    >>> def loss_fn(model, batch):
    ...     return (model(batch) * 0).log().mean()
    >>> batch = torch.ones(3, 2)
    >>> try:
    ...     with blame_on_exhausted(model, loss_fn, batch):
    ...         optimizer.backward(loss_fn(model, batch))
    ...         optimizer.step()
    ... except LossScaleExhausted as error:
    ...     print(error.fault.operation, error.fault.cause, sep=": ")
    log: log of 0
    """
    before = Generators.now(model.parameters())
    try:
        yield
    except LossScaleExhausted as error:
        after = Generators.now(model.parameters())
        before.put_back()
        try:
            error.fault = blame(model, loss_fn, batch)
        finally:
            after.put_back()
        error.args = (f"{error}\n\n{_NOTHING if error.fault is None else error.fault}",)
        raise
