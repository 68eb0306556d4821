"""What a framework must offer to train its recipes: trainees, what starts them, and their trainer.

These are the shapes alone; ``torch_trainee``, ``jax_trainee`` and ``keras_trainee`` fill them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.policy import Policy, PolicyMap
from .recipe import Recipe

Policies = Mapping[str, Policy | PolicyMap]


@dataclass(frozen=True)
class StepResult:
    """What one training step of one policy was like.

    Attributes:
        seconds: wall time, with the device synchronised before and after.
        loss: the unscaled training loss before the update.
        skipped: whether the update was left out because gradients were not finite.
        scale: the loss scale after the step, None where there is no loss scaling.
    """

    seconds: float
    loss: float
    skipped: bool = False
    scale: float | None = None


class Trainee(Protocol):
    """One model that is trained under one policy.

    Attributes:
        notes: what there is to say about this policy on this model, one string each.
    """

    notes: list[str]

    def step(self, batch: Any, seed: int) -> StepResult:
        """Train on one batch, with every random number drawn from ``seed``."""

    def evaluate(self) -> Mapping[str, float]:
        """Return the metrics."""


class Starter(Protocol):
    """What makes the trainees of one recipe, and measures what they need.

    Attributes:
        recipe: what they train on.
        device: where.
        seed: of weights and batches.
    """

    recipe: Recipe
    device: str
    seed: int

    def __call__(self, policy: Policy | PolicyMap) -> Trainee:
        """Return a new model under a policy, with the weights that all start from."""

    def anew(self) -> Starter:
        """Return another one that makes all again, the weights that all start from too."""

    def measure_memory(self, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
        """Yield one measurement of a few steps after the other, as plain values.

        Yields:
            ``{"policy": label, "bytes": int, "method": str}``, or with ``"error"`` instead of
            ``"bytes"`` where a policy could not be measured.
        """


class Trainer(Protocol):
    """What trains the recipes of one framework: the functions of its module."""

    def pick_device(self, name: str | None = None) -> str:
        """Return the device to train on: the one given, else the fastest there is."""

    def describe(self, device: str) -> dict[str, Any]:
        """Return plain values: ``versions``, the ``device_name``, the CPU's ``threads``."""

    def threads(self, count: int | None) -> AbstractContextManager[None]:
        """Compute on the CPU with so many threads meanwhile; None leaves them as they are."""

    def starter(self, recipe: Recipe, device: str, seed: int) -> Starter:
        """Return what makes the trainees of a recipe; all start from the same weights."""

    def explain(self, recipe: Recipe, policy: Policy | PolicyMap, seed: int) -> object:
        """Return what prints as a table of what the policy does to the recipe's model, and why.

        Raises:
            PolicyError: the policy puts nothing in 16 bits.
        """
