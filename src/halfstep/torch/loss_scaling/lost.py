"""Counting the updates that change nothing: what 16-bit weights do to a small step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from ..masters import exact_of

Before: TypeAlias = "list[tuple[Tensor, Tensor, Tensor, Tensor]]"


class LostUpdates:
    """How many weights a step should have moved, and did not.

    An *update* is a weight whose gradient is not zero, in a step that was not skipped. It is
    *lost* if everything that is kept of the weight (its own bits, its master or its compensation)
    is afterwards what it was. It is *unseen* if the weight itself is what it was, whatever is kept
    beside it: without that, it would have been lost.

    bfloat16 has 8 significant bits: adding less than 2**-9 of a weight to it gives the same weight.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    @property
    def updates(self) -> int:
        """Weights with a gradient, summed over steps. Reading it waits for the device."""
        return self._read(0)

    @property
    def lost(self) -> int:
        """Updates that left no trace. Reading it waits for the device."""
        return self._read(1)

    @property
    def unseen(self) -> int:
        """Updates that did not show in the weight itself. Reading it waits for the device."""
        return self._read(2)

    @property
    def share(self) -> float:
        """``lost`` as a share of ``updates``; 0 without any."""
        return self.lost / max(self.updates, 1)

    def __repr__(self) -> str:
        return f"LostUpdates(updates={self.updates}, lost={self.lost}, unseen={self.unseen})"

    def _read(self, place: int) -> int:
        return 0 if self._counts is None else int(self._counts[place])

    def before(self, parameters: Iterable[Tensor]) -> Before:
        """Remember what the parameters with gradients are."""
        return [
            (p, p.detach().clone(), exact_of(p).clone(), _dense(p.grad) != 0)
            for p in parameters
            if p.grad is not None
        ]

    @torch.no_grad()
    def after(self, before: Before, found: Tensor | None) -> None:
        """Count what a step changed; ``found`` is 1.0 if it was skipped."""
        for parameter, low, exact, due in before:
            same = exact_of(parameter) == exact
            unseen = parameter.detach() == low
            counted = torch.stack([_sum(due), _sum(due & same), _sum(due & unseen)])
            if found is not None:
                counted = counted * (found.to(counted.device) == 0)
            total = counted if self._counts is None else self._counts.to(counted.device) + counted
            self._counts = total


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def _sum(flags: Tensor) -> Tensor:
    # of a DTensor, this rank's own weights
    local = flags.to_local() if hasattr(flags, "to_local") else flags
    return local.sum()
