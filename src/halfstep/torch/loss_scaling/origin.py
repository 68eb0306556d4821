"""Gradients of a step in which no loss was scaled: of another rank's loss, zeros, or a mistake."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import LossScaleError
from .gradients import Gradients, norm_of
from .spread import Flag
from .traced import in_graph

_DIVIDED = "since the last step: they would be divided by a scale that they never had."
_SCALE_IT = (
    " Use optimizer.backward(loss), or optimizer.scale(loss).backward(). If a GradScaler scaled "
    "it, take the scaler out, or give it optimizer.inner_optimizer."
)
_PIPELINE = " The stages of a pipeline that have no loss need process_group=, the group of all."
_IN_LOSS_FN = (
    " In a pipeline that is the last stage, by loss_fn=lambda *a: optimizer.scale(loss(*a))."
)
_IN_GRAPH = (
    " Nor can the other ranks be asked inside a graph, for the first time: step once outside."
)


class Origin:
    """Knows whether gradients come from a scaled loss, where none was scaled by this optimizer.

    ::

        another rank of process_group scaled a loss -> they do: a pipeline's last stage has it
        all gradients are zero                      -> the same at any scale, but no good step
        otherwise                                   -> an error: the user forgot to scale

    Whether another rank scaled is told in the exchange that a step does anyway. This rank reads
    the answer once: it goes on for as long as it lives, and the rank that scales has its own guard.

    Args:
        told: whether ranks tell each other: there is a ``process_group``.
    """

    def __init__(self, told: bool) -> None:
        self._told = told
        self._elsewhere = False
        self._zero = False
        self.here = True

    def doubt(self, grads: Gradients, home: torch.device) -> None:
        """Take gradients while no loss was scaled.

        Raises:
            LossScaleError: they are not zero, and no other rank can have scaled a loss.
        """
        graph = in_graph(torch.zeros((), device=home))
        if self._told:
            if graph and not self._elsewhere:
                raise LossScaleError(_message(self._told) + _IN_GRAPH)
        elif graph or not _all_zero(grads, home):
            raise LossScaleError(_message(self._told))
        self._zero = not self._told
        self.here = False

    def forget(self) -> None:
        """A loss was scaled, or the step is over."""
        self._zero = False
        self.here = True

    def tell(self, grads: Gradients) -> tuple[bool, bool]:
        """Return whether there are gradients that count, and whether they come from a loss here."""
        present = bool(grads) and not self._zero
        return present, present and self.here

    def settle(self, flag: Flag, grads: Gradients) -> Flag:
        """Look at what the ranks told each other, and return what the step is to be taken for.

        Raises:
            LossScaleError: no rank scaled a loss, and these gradients are not zero.
        """
        if self.here:
            return flag
        if self._zero:
            nothing = torch.zeros_like(flag.found, dtype=torch.bool)
            return flag if flag.taken is not None else flag._replace(taken=nothing)
        if not self._elsewhere:
            self._elsewhere = _is_true(flag.scaled)
            if not self._elsewhere and not _all_zero(grads, flag.found.device):
                self.forget()
                raise LossScaleError(_message(self._told))
        return flag


def _is_true(flag: Tensor | None) -> bool:
    return flag is not None and bool(flag.item())


def _all_zero(grads: Gradients, home: torch.device) -> bool:
    return not grads or norm_of(grads, math.inf, home).item() == 0


def _message(told: bool) -> str:
    if told:
        what = "There are gradients, but no rank of process_group scaled a loss "
        return what + _DIVIDED + _SCALE_IT + _IN_LOSS_FN
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    what = "There are gradients, but no loss was scaled "
    return what + _DIVIDED + _SCALE_IT + (_PIPELINE if several else "")
