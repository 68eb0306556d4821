"""The loss scale that a histogram of gradients asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import LossScaleError
from ..formats import format_of
from .bins import PARTS, flushed_key, overflow_key
from .histogram import ExponentHistogram, FormatFit, percent

HEADROOM = 2
TOLERANCE = 0.001
MOST_WORST = 8
"""The most tensors that an advice names."""


@dataclass(frozen=True)
class LossScaleAdvice:
    """What the gradients of a model say about a fixed loss scale; ``print`` it.

    Attributes:
        format: the format that the gradients are to be held in.
        scale: the largest power of two that leaves ``headroom`` below the format's largest number;
            None where there was no gradient to judge by.
        fits: whether the format can hold the gradients: at ``scale`` none overflows, and at most
            ``tolerance`` of them become zero.
        lowest: the smallest power of two at which none overflows and at most ``tolerance`` are
            lost; None where no scale does that.
        highest: the largest one.
        headroom: binades that were left free, for steps whose gradients are larger.
        tolerance: the share that may be lost.
        unscaled: what happens without a loss scale.
        scaled: what happens at ``scale``.
        bfloat16: what happens in bfloat16 without a loss scale.
        zeros: the share of exact zeros among all finite gradients.
        not_finite: how many gradients were infinite or NaN; they have no part in the scale.
        worst: the tensors of which more than ``tolerance`` is lost at ``scale``, with the share,
            the worst first; empty where one histogram was given.
    """

    format: str
    scale: float | None
    fits: bool
    lowest: float | None
    highest: float | None
    headroom: int
    tolerance: float
    unscaled: FormatFit
    scaled: FormatFit
    bfloat16: FormatFit
    zeros: float
    not_finite: int
    worst: tuple[tuple[str, float], ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for JSON, the explanation under ``text``."""
        return {**asdict(self), "worst": [list(pair) for pair in self.worst], "text": str(self)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def advise_loss_scale(
    gradients: ExponentHistogram | Mapping[str, ExponentHistogram],
    format: str = "float16",
    *,
    headroom: int = HEADROOM,
    tolerance: float = TOLERANCE,
) -> LossScaleAdvice:
    """Choose a fixed loss scale from the histograms of unscaled gradients.

    ::

        scale   = the largest power of two with  max|gradient| * scale * 2**headroom < 65504
        lowest  = the smallest power of two at which at most `tolerance` become zero
        highest = the largest power of two at which none overflows    (one infinity skips a step)
        fits    = at `scale`, at most `tolerance` of the gradients become zero

    The gradients of activations are what float16 must hold; those of weights follow from them.
    Record them in float32 or bfloat16: in float16 what is too small is a zero already, which no
    histogram can tell from a real one.

    Args:
        gradients: one histogram, or one for each tensor by name. Unscaled:
            ``histogram.scaled(1 / scale)`` takes a scale away.
        format: the format that is to hold them.
        headroom: binades to leave free, at least 0; 2 allows for gradients four times as large.
        tolerance: the share of gradients that may be lost, at least 0 and below 1.

    Raises:
        LossScaleError: a headroom or a tolerance outside of these limits.
        PolicyError: no such format.

    Sources: Micikevicius et al. 2017, "Mixed Precision Training", arXiv:1710.03740, section 3.2;
    NVIDIA, "Train With Mixed Precision", the section on choosing a scaling factor (a constant whose
    product with the largest absolute gradient is below 65,504).

    >>> gradients = ExponentHistogram.from_array([2.0**-e for e in range(8, 28)])
    >>> print(advise_loss_scale(gradients))
    A fixed loss scale of 2097152 (2**21) puts the gradients into float16: 0% overflow, ...
    Any power of two from 8 to 8388608 does: none overflows, at most 0.1% become zero.
    Without a loss scale: float16: 0% overflow, 15% flushed to zero, 50% subnormal, of 20 numbers.
    """
    if not headroom >= 0 or headroom != int(headroom):
        raise LossScaleError(f"headroom={headroom!r}: it must be a whole number, at least 0.")
    if not 0 <= tolerance < 1:
        raise LossScaleError(f"tolerance={tolerance!r}: it must be at least 0 and below 1.")
    named = gradients if isinstance(gradients, Mapping) else {}
    merged = ExponentHistogram.merged(named.values()) if named else gradients
    if isinstance(merged, Mapping):
        merged = ExponentHistogram()
    lowest, highest = _range(merged, format, tolerance)
    scale = None if merged.highest is None else math.ldexp(1.0, _ceiling(merged, format) - headroom)
    scaled = merged.fit(format, 1.0 if scale is None else scale)
    return LossScaleAdvice(
        format=format,
        scale=scale,
        fits=scale is not None and scaled.lost_share <= tolerance,
        lowest=lowest,
        highest=highest,
        headroom=int(headroom),
        tolerance=tolerance,
        unscaled=merged.fit(format),
        scaled=scaled,
        bfloat16=merged.fit("bfloat16"),
        zeros=merged.zeros / max(1, merged.zeros + merged.nonzero),
        not_finite=merged.infinities + merged.nans,
        worst=_worst(named, format, scale, tolerance),
    )


def _ceiling(histogram: ExponentHistogram, format: str) -> int:
    """The exponent of the largest scale at which nothing overflows."""
    largest = next(reversed(histogram.bins))
    # the largest s with largest + s * PARTS < the border
    return (overflow_key(format_of(format)) - 1 - largest) // PARTS


def _range(
    histogram: ExponentHistogram, format: str, tolerance: float
) -> tuple[float | None, float | None]:
    if not histogram.bins:
        return None, None
    described = format_of(format)
    highest = _ceiling(histogram, format)
    border = flushed_key(described)
    # no scale beyond these two brings anything: all is flushed, or nothing
    keys = list(histogram.bins)
    first = (border - keys[-1]) // PARTS - 1
    for exponent in range(first, highest + 1):
        flushed = histogram.below(border - exponent * PARTS)
        if flushed <= tolerance * histogram.nonzero:
            return math.ldexp(1.0, exponent), math.ldexp(1.0, highest)
    return None, None


def _worst(
    named: Mapping[str, ExponentHistogram], format: str, scale: float | None, tolerance: float
) -> tuple[tuple[str, float], ...]:
    if scale is None:
        return ()
    shares = [(name, found.fit(format, scale).lost_share) for name, found in named.items()]
    bad = sorted((pair for pair in shares if pair[1] > tolerance), key=lambda pair: -pair[1])
    return tuple(bad[:MOST_WORST])


def _power(scale: float) -> str:
    return f"{scale:g} (2**{math.frexp(scale)[1] - 1})"


def _lines(advice: LossScaleAdvice) -> list[str]:
    if advice.scale is None:
        return ["No gradient that is finite and not zero: there is nothing to choose a scale by."]
    effect = str(advice.scaled).partition(": ")[2]
    tolerated = percent(advice.tolerance)
    if advice.fits:
        lines = [
            f"A fixed loss scale of {advice.scale:.0f} (2**{math.frexp(advice.scale)[1] - 1}) puts "
            f"the gradients into {advice.format}: {effect}."
            if advice.scale >= 1
            else f"A fixed loss scale of {_power(advice.scale)} puts the gradients into "
            f"{advice.format}: {effect}."
        ]
    else:
        lines = [
            f"{advice.format} cannot hold these gradients within {tolerated}: at a loss scale of "
            f"{_power(advice.scale)} {effect}. Use bfloat16 (there {advice.bfloat16})."
        ]
    lines.append(_range_in_words(advice, tolerated))
    lines.append(f"Without a loss scale: {advice.unscaled}.")
    if advice.worst:
        named = ", ".join(f"{name} ({percent(share)})" for name, share in advice.worst)
        lines.append(f"More than {tolerated} is lost at that scale in: {named}.")
    if advice.not_finite:
        lines.append(
            f"{advice.not_finite} gradients were infinite or NaN and have no part in this."
        )
    return lines


def _range_in_words(advice: LossScaleAdvice, tolerated: str) -> str:
    if advice.lowest is None or advice.highest is None:
        return f"No scale loses at most {tolerated} without an overflow."
    return (
        f"Any power of two from {_plain(advice.lowest)} to {_plain(advice.highest)} does: none "
        f"overflows, at most {tolerated} become zero."
    )


def _plain(scale: float) -> str:
    return f"{scale:.0f}" if 1 <= scale < 2**53 else f"{scale:g}"
