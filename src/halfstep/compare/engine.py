"""Train one recipe under several policies, step by step in turn.

All policies live in one process and take step ``i`` before any takes step ``i + 1``, in an order
that is rotated each time::

    for step, batch in enumerate(batches):
        for policy in rotated(policies, step):
            set the random seed of this step
            train one step on the batch, and time it

So what slows the machine down for a second slows all of them, and the ratio of two policies, taken
step by step, holds where two runs after each other would differ by what else the machine did.

The engine knows no framework: a :class:`~halfstep.compare.trainee.Trainee` is one model under one
policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..core.record import Event
from ..errors import LossScaleExhausted, RecipeError
from .recipe import Recipe
from .trainee import StepResult, Trainee

DIVERGED_AFTER = 5
"""So many steps in a row with a loss that is not finite, and a policy counts as diverged.

A loss scale that is too large leaves the loss alone, it makes *gradients* overflow; a forward pass
that overflows on several batches in a row will not stop doing so.
"""


@dataclass(frozen=True)
class Plan:
    """How long to train and how often to look: ``steps``, else ``epochs``.

    >>> Plan(steps=300).evaluate_every
    37
    """

    steps: int | None = None
    epochs: int | None = None
    seed: int = 0

    @property
    def evaluate_every(self) -> int | None:
        """Steps between evaluations; None: at the end of each epoch."""
        return max(1, self.steps // 8) if self.steps else None

    def step_seed(self, step: int) -> int:
        """The seed of the random numbers of one step, the same for every policy."""
        return (self.seed * 1_000_003 + step + 1) % 2**31

    def batches(self, recipe: Recipe) -> Iterator[tuple[int, Any]]:
        """Yield the number of the epoch and a batch, as long as the plan says.

        Raises:
            RecipeError: ``batches`` raises, or gives nothing to iterate over, or no batch.
        """
        done, epoch = 0, 0
        while (self.steps is None or done < self.steps) and epoch < (self.epochs or math.inf):
            before = done
            for batch in _epoch(recipe, epoch, self.seed):
                yield epoch, batch
                done += 1
                if done == self.steps:
                    return
            if done == before:
                raise RecipeError(
                    f"{recipe.file}: batches({epoch}, {self.seed}) gave no batch; it must return "
                    "an iterable of the training batches of one epoch."
                )
            epoch += 1


def plan_for(
    recipe: Recipe, steps: int | None = None, epochs: int | None = None, seed: int = 0
) -> Plan:
    """Return the plan: what is given, else the recipe's STEPS or EPOCHS, else one epoch."""
    if steps is None and epochs is None:
        steps, epochs = recipe.constant("STEPS"), recipe.constant("EPOCHS")
    return Plan(steps, epochs if steps or epochs else 1, seed)


def first_batch(recipe: Recipe, seed: int) -> Any:
    """Return the first batch of the first epoch."""
    _, batch = next(Plan(steps=1, seed=seed).batches(recipe))
    return batch


def train(trainee: Trainee, recipe: Recipe, seed: int, steps: int) -> None:
    """Train one model alone for a few steps."""
    plan = Plan(steps=steps, seed=seed)
    for step, (_, batch) in enumerate(islice(plan.batches(recipe), steps)):
        trainee.step(batch, plan.step_seed(step))


def _epoch(recipe: Recipe, epoch: int, seed: int) -> Iterator[Any]:
    try:
        yield from recipe.call("batches", epoch, seed)
    except Exception as error:
        raise RecipeError(
            f"{recipe.where(error)}: batches({epoch}, {seed}): {type(error).__name__}: {error}"
        ) from error


@dataclass
class _Lane:
    """One policy's place in the run."""

    label: str
    trainee: Trainee
    # the step at which the present row of losses that are not finite began
    bad_since: int | None = None


@dataclass
class Race:
    """One recipe's training under several policies.

    Args:
        recipe: what is trained.
        trainees: the models, by the label of their policy; the first one is the baseline.
        plan: how long.
        emit: takes every event as it happens.
    """

    recipe: Recipe
    trainees: Mapping[str, Trainee]
    plan: Plan
    emit: Callable[[Event], None]
    _lanes: list[_Lane] = field(default_factory=list)

    def run(self) -> None:
        """Train to the end of the plan, or until no policy is left.

        A policy that diverges or raises leaves the race with an event ``stopped``; the others go
        on.

        Raises:
            RecipeError: the recipe itself is at fault: every policy raised in its first step.
        """
        self._lanes = [_Lane(label, trainee) for label, trainee in self.trainees.items()]
        self._evaluate(0)
        done, epoch_before = 0, 0
        for epoch, batch in self.plan.batches(self.recipe):
            every = self.plan.evaluate_every
            if done and (done % every == 0 if every else epoch != epoch_before):
                self._evaluate(done)
            self._step(done, batch)
            done, epoch_before = done + 1, epoch
            if not self._lanes:
                return
        self._evaluate(done)

    def _step(self, step: int, batch: Any) -> None:
        lanes, seed = list(self._lanes), self.plan.step_seed(step)
        first = step % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            try:
                result = lane.trainee.step(batch, seed)
            except RecipeError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a model or a backend raises under this policy
                self._stop(lane, step, error)
                continue
            self._record(lane, step, result)

    def _record(self, lane: _Lane, step: int, result: StepResult) -> None:
        self._emit(
            "step", lane, step, seconds=result.seconds, loss=result.loss, skipped=result.skipped,
            scale=result.scale,
        )  # fmt: skip
        if math.isfinite(result.loss):
            lane.bad_since = None
            return
        lane.bad_since = step if lane.bad_since is None else lane.bad_since
        if step - lane.bad_since + 1 >= DIVERGED_AFTER:
            reason = f"the loss was not finite for {DIVERGED_AFTER} steps in a row"
            self._leave(lane, lane.bad_since, "diverged", reason)

    def _evaluate(self, done: int) -> None:
        for lane in list(self._lanes):
            try:
                metrics = dict(lane.trainee.evaluate())
            except RecipeError:
                raise
            except Exception as error:  # noqa: BLE001 - as in a step
                self._stop(lane, done, error)
                continue
            examples = metrics.pop("examples", None)
            self._emit("evaluation", lane, done, metrics=metrics, examples=examples)

    def _stop(self, lane: _Lane, step: int, error: Exception) -> None:
        """A policy that raised: exhausted loss scales are divergence, all else is failure."""
        if isinstance(error, LossScaleExhausted):
            self._leave(lane, step, "diverged", str(error))
            return
        reason = f"{type(error).__name__}: {error} ({self.recipe.where(error)})"
        self._leave(lane, step, "failed", reason)
        if step == 0 and not self._lanes:
            raise RecipeError(
                f"{self.recipe.where(error)}: no policy got through the first step: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _leave(self, lane: _Lane, step: int, status: str, reason: str) -> None:
        self._lanes.remove(lane)
        self._emit("stopped", lane, step, status=status, reason=reason)

    def _emit(self, event: str, lane: _Lane, step: int, **values: Any) -> None:
        self.emit(
            {
                "event": event,
                "recipe": self.recipe.name,
                "policy": lane.label,
                "step": step,
                **values,
            }
        )
