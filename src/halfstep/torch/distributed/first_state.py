"""The state that an optimizer has before its first step, for checkpoints to be loaded into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..loss_scaling import LossScaleOptimizer
from ..loss_scaling.rests import parameters_of
from ..loss_scaling.shard_lending import shards_lent, steps_on_shards
from ..loss_scaling.wide import gradient_dtype, put_gradient
from ..masters import update_of


@dataclass
class State:
    """Whether an optimizer had state before it was made, and is to have it afterwards."""

    stepped: bool
    keep: bool


@contextmanager
def state_made(optimizer: Optimizer) -> Iterator[State]:
    """Let an optimizer that has no state have it inside of a ``with`` block.

    ``torch.distributed.checkpoint`` makes it by itself, by a step with a learning rate of 0, and
    leaves it there: Adam's counter is at 1 then, and the first update smaller. It does so on the
    model's own parameters: of 16-bit ones the state would have 16 bits, and not every fused kernel
    takes DTensors. And where gradients stand, of a first step that was skipped, it makes none.

    After the block the optimizer has the state that it had before, unless ``keep`` was set inside.
    """
    scaling = optimizer if isinstance(optimizer, LossScaleOptimizer) else None
    if scaling is not None:
        scaling._undo.settled()
    inner = optimizer if scaling is None else scaling.inner_optimizer
    made = State(stepped=bool(inner.state), keep=False)
    try:
        if not made.stepped:
            _make(inner, scaling)
        with _noticed(inner):
            yield made
    finally:
        if not (made.stepped or made.keep):
            inner.state.clear()


@torch.no_grad()
def _make(inner: Optimizer, scaling: LossScaleOptimizer | None) -> None:
    own = parameters_of(inner)
    if scaling is None and any(update_of(parameter) != "plain" for parameter in own):
        return  # it cannot step by itself
    if scaling is not None:
        scaling._wide.follow()
    before = [{key: group[key] for key in group if key != "params"} for group in inner.param_groups]
    for group in inner.param_groups:
        if "lr" in group:
            rate = group["lr"]
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    try:
        with _gradients({p: torch.zeros_like(p) if p.requires_grad else None for p in own}):
            if scaling is not None and scaling._wide:
                # as if it was skipped: what is rounded into the weights is what they were
                scaling._wide.step(lambda: _step(inner), torch.ones((), device=own[0].device))
            else:
                _step(inner)
    finally:
        for group, settings in zip(inner.param_groups, before, strict=True):
            group.update(settings)


def _noticed(inner: Optimizer) -> Any:
    """Keep torch from making state: of an optimizer without any it asks if a gradient stands."""
    own = parameters_of(inner)
    trained = [parameter for parameter in own if parameter.requires_grad]
    if inner.state or not trained or any(parameter.grad is not None for parameter in own):
        return nullcontext()
    smallest = min(trained, key=Tensor.numel)
    return _gradients({smallest: torch.zeros_like(smallest)})


@contextmanager
def _gradients(lent: dict[Tensor, Tensor | None]) -> Iterator[None]:
    """Set the gradients of these parameters aside, and put others there for the time."""
    before = [(parameter, parameter.grad, gradient_dtype(parameter)) for parameter in lent]
    try:
        for parameter, grad in lent.items():
            put_gradient(parameter, grad, parameter.dtype)
        yield
    finally:
        for parameter, grad, dtype in before:
            put_gradient(parameter, grad, dtype)


def _step(inner: Optimizer) -> None:
    with shards_lent(inner) if steps_on_shards(inner) else nullcontext():
        inner.step()
