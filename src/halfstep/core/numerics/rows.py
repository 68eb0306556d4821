"""From counts on a device to the rows of a record, with as little to carry as possible.

A device counts into :data:`BINS` bins in the order of magnitude: zeros, then the keys of float32
(:mod:`.bins`) from its smallest subnormal on, then infinities, then NaNs. Of their running sum only
a few hundred places are ever asked for: the borders of the exponents and those of the formats.
These are the *digest* of a tensor, and digests of several tensors add up to that of all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats import format_of
from .bins import PARTS, bits_key, flushed_key, overflow_key
from .histogram import ExponentHistogram
from .record import COUNTED_FORMATS

_LOWEST = -149  # exponents of float32, subnormals included
_ROWS = 277
_INFINITY = 1 + _ROWS * PARTS

BINS = _INFINITY + 2
"""How many bins a device counts into."""

FIRST_KEY = _LOWEST * PARTS
"""The key of bin 1."""


def position(key: int) -> int:
    """Return the bin of a key: what is below all of float32 is bin 1, what is above is infinity.

    >>> position(FIRST_KEY), position(10**9) == BINS - 2
    (1, True)
    """
    return min(max(key - FIRST_KEY + 1, 1), _INFINITY)


def _format_keys() -> list[int]:
    described = [format_of(name) for name in COUNTED_FORMATS]
    return [
        key
        for each in described
        for key in (overflow_key(each), flushed_key(each), bits_key(each, each.mantissa_bits))
    ]


EXPONENT_POSITIONS: NDArray[np.int64] = np.array(
    [1 + row * PARTS for row in range(_ROWS + 1)] + [_INFINITY + 1, BINS], dtype=np.int64
)
"""Where the running sum is asked for the exponents, infinities and NaNs."""

FORMAT_POSITIONS: NDArray[np.int64] = np.array(
    [position(key) for key in _format_keys()], dtype=np.int64
)
"""Where it is asked for the formats: overflow, flushed and subnormal of each."""

DIGEST = len(EXPONENT_POSITIONS) + 2 * len(FORMAT_POSITIONS)
"""The length of a digest: the exponents, the formats, and the formats at another scale."""


def row(digest: NDArray[np.int64], shift: int = 0, scaling: str = "NONE") -> dict[str, Any]:
    """Return a digest as the fields of a row (:mod:`.record`).

    Args:
        digest: how many numbers lie below each position; shape ``(DIGEST,)``. Its last part was
            asked at positions that are ``shift`` exponents higher, or lower where the numbers
            have been divided by the scale.
        shift: the exponent of the loss scale.
        scaling: ``"SCALED"`` if the numbers are multiplied by it, ``"UNSCALED"`` if they have been
            divided by it, ``"NONE"`` if it is nothing to them. The row is of the numbers without
            the scale, with the counters at that scale beside it.
    """
    edges, borders = len(EXPONENT_POSITIONS), len(FORMAT_POSITIONS)
    below = digest[:edges]
    fields: dict[str, Any] = {"count": int(below[-1])}
    counts = np.diff(below[: _ROWS + 1])
    used = np.flatnonzero(counts)
    if used.size:
        fields["low"] = _LOWEST + int(used[0]) - (shift if scaling == "SCALED" else 0)
        fields["counts"] = counts[used[0] : used[-1] + 1].tolist()
    finite = below[_ROWS]
    rest = {"zeros": below[0], "infinities": below[-2] - finite, "nans": below[-1] - below[-2]}
    fields |= {name: int(count) for name, count in rest.items() if count}
    asked = [digest[edges : edges + borders], digest[edges + borders :]]
    here, there = (_counters(each, below[0], finite) for each in asked)
    if scaling == "NONE":
        return fields | here
    unscaled, scaled = (there, here) if scaling == "SCALED" else (here, there)
    return fields | unscaled | ({"scaled": scaled} if scaled else {})


def _counters(below: NDArray[np.int64], zeros: np.int64, finite: np.int64) -> dict[str, list[int]]:
    found = {}
    for name, (fits, flushed, subnormal) in zip(
        COUNTED_FORMATS, below.reshape(-1, 3).tolist(), strict=True
    ):
        counters = [int(finite) - fits, flushed - int(zeros), subnormal - flushed]
        if any(counters):
            found[name] = counters
    return found


def histogram_of(bins: NDArray[np.int64]) -> ExponentHistogram:
    """Return the histogram of all bins of a device, shape ``(BINS,)``.

    >>> bins = np.zeros(BINS, dtype=np.int64)
    >>> bins[0], bins[position(0)], bins[-1] = 5, 2, 1
    >>> histogram_of(bins)
    ExponentHistogram({0: 2}, zeros=5, nans=1)
    """
    used = np.flatnonzero(bins[1:_INFINITY])
    keys = (used + FIRST_KEY).tolist()
    counts = bins[1:_INFINITY][used].tolist()
    return ExponentHistogram(
        dict(zip(keys, counts, strict=True)), int(bins[0]), int(bins[-2]), int(bins[-1])
    )
