"""Where a scaled step stands, between two calls."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Stage(Enum):
    """Where a step stands."""

    IDLE = "nothing was scaled since the last step"
    SCALED = "a loss was scaled; the gradients are"
    UNSCALED = "the gradients are unscaled"


@dataclass
class Now:
    """Where an optimizer stands between two calls.

    An object of its own, because Dynamo forgets what a compiled function assigns to an attribute
    of an optimizer (2.13), but not to one of an object in it.

    Attributes:
        steps: calls of ``step()``.
        stage: what the gradients are.
        found: of unscaled gradients, what unscaling saw.
        last_found: 1.0 if the last step was skipped.
        last_norm: the norm of the last step's unscaled gradients, before clipping.
        called: whether ``step()`` was called since this was made.
    """

    steps: int
    stage: Stage = Stage.IDLE
    found: Tensor | None = None
    last_found: Tensor | None = None
    last_norm: Tensor | None = None
    called: bool = False
