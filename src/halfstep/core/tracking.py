"""Whether one training run's loss tracks another's: the acceptance test of ``tune``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

WINDOWS = 10
"""Into so many parts a run is divided; the mean loss of each is compared."""

TOLERANCE = 0.01
"""The share of the loss by which it may differ: as much as counts as the same in ``compare``."""

NOISE_FACTOR = 2.0
"""How many times the noise of float32 training is allowed on top."""


@dataclass(frozen=True)
class Tracking:
    """How a run's loss compares with the baseline's.

    Attributes:
        tracks: whether it does, by the rule of :func:`compare_losses`.
        deviation: the worst difference of two windows' means, as a share of the baseline's.
        allowed: what was allowed there.
        window: which one, from 0.
        reason: why not, in words; empty where it tracks.
    """

    tracks: bool
    deviation: float
    allowed: float
    window: int
    reason: str = ""


def compare_losses(
    losses: Sequence[float],
    baseline: Sequence[float],
    noise: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
) -> Tracking:
    """Say whether a run's loss tracks the baseline's.

    ::

        m[j], b[j], n[j] = mean loss in window j (of 10) of the run, the baseline, the noise run
        spread[j]        = max over i <= j of |n[i] - b[i]|
        allowed[j]       = tolerance * |b[j]| + 2 * spread[j]
        tracks           = every loss is finite, and |m[j] - b[j]| <= allowed[j] for every j

    The windows smooth what single batches do. The noise run is the baseline's training again, in
    float32, with weights that keep only the digits of the 16-bit format in every forward pass, but
    float32's range: what that changes, no choice of layers can be blamed for. Differences between
    two trainings grow, so the spread never shrinks. Both directions count: a loss that is lower
    than float32's does not track it either.

    Args:
        losses: one a step; fewer than the baseline's if the run broke off.
        baseline: those of float32, on the same batches from the same weights.
        noise: those of the noise run; None allows for none.
        tolerance: the share of the baseline's loss that is allowed.

    Raises:
        ValueError: no baseline, or one that is not finite.

    >>> baseline = [2.0, 1.5, 1.2, 1.0]
    >>> compare_losses([2.0, 1.51, 1.21, 1.0], baseline).tracks
    True
    >>> compare_losses([2.0, 1.51, 1.3, 1.3], baseline).reason
    "in window 4 of 4 the loss differs by 30.00% of the baseline's, 1.00% is allowed"
    """
    if not baseline or not all(map(math.isfinite, baseline)):
        raise ValueError("the baseline must have losses, all of them finite")
    if len(losses) < len(baseline) or not all(map(math.isfinite, losses)):
        step = next((i for i, x in enumerate(losses) if not math.isfinite(x)), len(losses))
        return Tracking(False, math.inf, tolerance, 0, f"no finite loss at step {step}")
    if noise is None or len(noise) != len(baseline) or not all(map(math.isfinite, noise)):
        noise = baseline
    spread, worst = 0.0, Tracking(True, 0.0, tolerance, 0)
    runs = zip(_windows(losses), _windows(baseline), _windows(noise), strict=True)
    for window, (mine, theirs, noisy) in enumerate(runs):
        spread = max(spread, abs(noisy - theirs))
        size = max(abs(theirs), 1e-30)
        deviation = abs(mine - theirs) / size
        allowed = tolerance + NOISE_FACTOR * spread / size
        if deviation / max(allowed, 1e-30) > worst.deviation / max(worst.allowed, 1e-30):
            worst = Tracking(deviation <= allowed, deviation, allowed, window)
    if worst.tracks:
        return worst
    reason = _words(worst, min(WINDOWS, len(baseline)))
    return replace(worst, reason=reason)


def _words(worst: Tracking, count: int) -> str:
    return (
        f"in window {worst.window + 1} of {count} the loss differs by {worst.deviation:.2%} of the "
        f"baseline's, {worst.allowed:.2%} is allowed"
    )


def _windows(losses: Sequence[float]) -> list[float]:
    """The means of at most :data:`WINDOWS` parts, as equal as can be."""
    count = min(WINDOWS, len(losses))
    edges = [round(index * len(losses) / count) for index in range(count + 1)]
    return [fmean(losses[start:end]) for start, end in pairwise(edges)]
