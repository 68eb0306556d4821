"""How a step is taken once a loss is there: plainly, with a GradScaler, with halfstep."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep.torch import LossScaleOptimizer


class Plain:
    """A step without a loss scale."""

    def __init__(self, optimizer: Optimizer, max_norm: float | None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """What follows the backward pass, but for clearing the gradients."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.max_norm)
        self.optimizer.step()

    def step(self) -> None:
        self.update()
        self.optimizer.zero_grad()


class Amp(Plain):
    """A step with torch.amp.GradScaler."""

    def __init__(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, max_norm: float | None
    ) -> None:
        super().__init__(optimizer, max_norm)
        self.scaler = scaler

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        if self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Halfstep(Plain):
    """A step with halfstep's LossScaleOptimizer, which clips by itself."""

    optimizer: LossScaleOptimizer

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        super().__init__(optimizer, None)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.backward(loss)


Optimizing = Plain


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
