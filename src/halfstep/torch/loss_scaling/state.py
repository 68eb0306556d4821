"""The state of the loss scale, as one small tensor on the device."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ...core.loss_scale import DynamicLossScale, LossScale, LossScaleState
from .host import is_free, number


class ScaleState:
    """The four numbers of a `LossScaleState`, packed into one float32 tensor of shape (4,).

    One tensor, so that a single copy carries all of it to the host. It is made on the first use,
    where the parameters are by then: a model may be built on the meta device and moved later.
    """

    def __init__(self, rule: LossScale, values: LossScaleState) -> None:
        self.rule = rule
        self._values = values
        self._packed: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """Return the packed state, on ``device`` from now on."""
        if self._packed is None:
            self._packed = torch.tensor(self._values, dtype=torch.float32, device=device)
        elif self._packed.device != device:
            self._packed = self._packed.to(device)
        return self._packed

    @property
    def packed(self) -> Tensor | None:
        """The packed state where it is, or None before the first use."""
        return self._packed

    def at(self, device: torch.device) -> Tensor:
        """Return the packed state where it is; made on ``device`` if this is the first use."""
        return self.on(device) if self._packed is None else self._packed

    def set_scale(self, value: float | Tensor) -> None:
        """Replace the scale, and nothing else."""
        if self._packed is None:
            self._values = self._values._replace(scale=float(value))
        elif isinstance(value, Tensor):
            self._packed[0].copy_(value)
        else:
            self._packed[0].fill_(value)

    def advance(self, found: Tensor, taken: Tensor | None = None) -> Tensor:
        """Let the rule make the next state, in place, and return it packed.

        Args:
            found: 1.0 if the gradients were not finite, else 0.0.
            taken: a boolean; where it is False the state stays. None means True.
        """
        packed = self.on(found.device)
        if taken is None and is_free(packed):
            before = LossScaleState(*packed.tolist())
            packed.numpy()[:] = self.rule.update(before, number(found) == 0)
            return packed
        if taken is None and _fits_torch(self.rule):
            return _advance_as_torch(packed, self.rule, found)
        before = LossScaleState(*packed.unbind())
        after = self.rule.update(before, found == 0)
        if taken is not None:
            after = LossScaleState(
                *(torch.where(taken, new, old) for new, old in zip(after, before, strict=True))
            )
        # stacked first: the fields of `before` are views of what is written
        packed.copy_(torch.stack([field.to(torch.float32) for field in after]))
        return packed

    def read(self) -> LossScaleState:
        """Return the state as Python floats; this waits for the device."""
        if self._packed is not None:
            return LossScaleState(*self._packed.tolist())
        return self._values


def _fits_torch(rule: LossScale) -> TypeGuard[DynamicLossScale]:
    """Whether torch.amp's own kernel, with limits put around it, does what the rule says."""
    return isinstance(rule, DynamicLossScale) and rule.hysteresis == 1


def _advance_as_torch(packed: Tensor, rule: DynamicLossScale, found: Tensor) -> Tensor:
    """Update the state in place with 6 launches; the rule as it is written takes some 20."""
    scale, finite_steps, counts = packed[0], packed[1], packed[2:]
    tracker = finite_steps.to(torch.int32)
    torch._amp_update_scale_(
        scale, tracker, found, rule.growth_factor, rule.backoff_factor, rule.growth_interval
    )
    scale.clamp_(rule.min_scale, rule.max_scale)
    finite_steps.copy_(tracker)
    counts.add_(found)  # bad steps in a row, and skipped ones in all
    counts[0].mul_(found)
    return packed
