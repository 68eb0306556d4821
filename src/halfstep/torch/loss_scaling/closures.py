"""Closures: optimizers that evaluate the loss themselves, once or many times."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from .fusion import own_step

Closure = Callable[[], Any]

_ONCE = {
    inspect.unwrap(kind.step)
    for kind in (
        *(ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, RAdam),
        *(RMSprop, Rprop, SparseAdam),
    )
}


def evaluates_once(optimizer: Optimizer) -> bool:
    """Whether ``step(closure)`` calls the closure once, before anything else.

    All of torch.optim does, except LBFGS. Of an optimizer from elsewhere nothing is known.
    """
    return own_step(optimizer) in _ONCE


class NotFinite(Exception):
    """Ends a step early, and never leaves this package: an evaluation was not finite."""


@dataclass(frozen=True)
class Snapshot:
    """The parameters, the state and the settings of an optimizer, to go back to bit for bit."""

    parameters: list[tuple[Tensor, Tensor]]
    state: dict[Any, Any]
    settings: list[dict[str, Any]]

    @classmethod
    @torch.no_grad()
    def of(cls, optimizer: Optimizer) -> Snapshot:
        """Copy everything that a step may change."""
        groups = optimizer.param_groups
        # the parameters themselves stand for themselves, in state that refers to them too
        own = {id(p): p for group in groups for p in group["params"]}
        return cls(
            parameters=[(p, p.detach().clone()) for p in own.values()],
            state={key: copy.deepcopy(value, dict(own)) for key, value in optimizer.state.items()},
            settings=[
                {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
                for group in groups
            ],
        )

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Put everything back."""
        for parameter, value in self.parameters:
            parameter.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(self.state)
        for group, setting in zip(optimizer.param_groups, self.settings, strict=True):
            group.update(setting)


def step_or_restore(optimizer: Optimizer, evaluate: Closure) -> Any:
    """Step with a closure that raises `NotFinite` to take the whole step back.

    Returns:
        What ``optimizer.step`` returned, or None if it was taken back.
    """
    before = Snapshot.of(optimizer)
    try:
        return optimizer.step(evaluate)
    except NotFinite:
        before.restore(optimizer)
        return None


def closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of ``step``: by keyword, or the first by position."""
    first = kwargs.get("closure", args[0] if args else None)
    return first if callable(first) else None
