"""Skipped steps: which of them belong to looking for a loss scale, and which are a fault.

A dynamic loss scale is *meant* to overflow now and then: that is how it learns where the limit is.
So an infinity alone says nothing. What does is the company it keeps::

    the loss itself is not finite                        fault  (the scale comes after the loss)
    the scale is fixed                                   fault  (it does not fit, and will not)
    the scale sits at its floor, or is exhausted         fault
    more than `PATIENT` steps in a row, after a step
        that was finite, though the scale fell           fault
    no step has been finite yet                          probe  (the search for the first scale)
    the scale is above every one that held               probe  (it had grown, to try)
    else                                                 probe  (a lone large gradient)

A scale *held* when it survived a whole growth interval, which is when it grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..loss_scale import DynamicLossScale, FixedLossScale, LossScale, LossScaleState

PATIENT = 4
"""Skipped steps in a row, beyond the rule's hysteresis, that are still no fault: a factor of 16."""

REASONS: dict[str, tuple[str, str]] = {
    "loss": (
        "fault",
        "the loss itself was not finite: look at the forward pass and the data, not at the scale",
    ),
    "fixed": ("fault", "the loss scale is fixed and too large for these gradients, or they are"),
    "floor": ("fault", "the loss scale is at its floor: a smaller one cannot help"),
    "persists": ("fault", "it goes on though the loss scale falls: the scale is not the cause"),
    "search": ("probe", "the loss scale is on its way down from its first value"),
    "growth": ("probe", "the loss scale had grown, to try whether a larger one holds"),
    "spike": ("probe", "a large gradient at a scale that had held: harmless while it is rare"),
}
"""What a skipped step was: the verdict, and the reason in words."""

_FAULTS = tuple(reason for reason, (verdict, _) in REASONS.items() if verdict == "fault")


@dataclass(frozen=True)
class StepOutcome:
    """What came of one step with a loss scale.

    Attributes:
        step: its number.
        skipped: whether it was skipped.
        scale: what its gradients were multiplied by.
        next_scale: what the next step's will be.
        loss: its loss, None where that is not known.
    """

    step: int
    skipped: bool
    scale: float
    next_scale: float
    loss: float | None = None


@dataclass(frozen=True)
class SkipRun:
    """Skipped steps in a row; ``reason`` is a key of :data:`REASONS`."""

    first: int
    last: int
    count: int
    reason: str

    @property
    def verdict(self) -> str:
        """``"probe"`` or ``"fault"``."""
        return REASONS[self.reason][0]

    @property
    def text(self) -> str:
        """The reason in words."""
        return REASONS[self.reason][1]


@dataclass(frozen=True)
class SkipHistory:
    """What judging the next skipped step needs to know; :meth:`after` makes the next one.

    Attributes:
        run: the run of skipped steps that is under way, None after a finite step.
        ever_finite: whether a step has been finite.
        held: the largest scale that survived a whole growth interval.

    >>> history, rule = SkipHistory(), DynamicLossScale()
    >>> history = history.after(StepOutcome(1, True, 2.0**15, 2.0**14), rule)
    >>> history.run.verdict, history.run.reason
    ('probe', 'search')
    >>> history = history.after(StepOutcome(2, True, 2.0**14, 2.0**13, loss=float("nan")), rule)
    >>> history.run.verdict, history.run.reason
    ('fault', 'loss')
    """

    run: SkipRun | None = None
    ever_finite: bool = False
    held: float = 0.0

    def after(self, outcome: StepOutcome, rule: LossScale) -> SkipHistory:
        """Return the history with one more step.

        Args:
            outcome: of the step; steps come in order.
            rule: the rule that makes the scale.
        """
        if not outcome.skipped:
            grew = outcome.next_scale > outcome.scale
            held = max(self.held, outcome.scale) if grew else self.held
            return SkipHistory(None, True, held)
        run = self.run or SkipRun(outcome.step, outcome.step, 0, "")
        run = replace(run, last=outcome.step, count=run.count + 1)
        return replace(self, run=replace(run, reason=self._reason(run, outcome, rule)))

    def _reason(self, run: SkipRun, outcome: StepOutcome, rule: LossScale) -> str:
        if run.reason in _FAULTS and run.reason != "floor":
            return run.reason
        if outcome.loss is not None and not math.isfinite(outcome.loss):
            return "loss"
        if isinstance(rule, FixedLossScale):
            return "fixed"
        floor, patience = 0.0, PATIENT
        if isinstance(rule, DynamicLossScale):
            floor, patience = rule.min_scale, PATIENT + rule.hysteresis - 1
        state = LossScaleState(outcome.next_scale, 0, run.count, 0)
        if outcome.scale <= floor or rule.exhausted(state):
            return "floor"
        if self.ever_finite and run.count > patience:
            return "persists"
        if run.reason:
            return run.reason
        if not self.ever_finite:
            return "search"
        return "growth" if outcome.scale > self.held > 0 else "spike"
