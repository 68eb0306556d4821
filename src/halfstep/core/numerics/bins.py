"""Bins that no rounding can split: where between two powers of two a number lies, as far as needed.

Counts per exponent cannot say how many values overflow a format: 65519 rounds to float16's
largest value and 65520 to infinity, and both have exponent 15. Every border that rounding to the
nearest draws in a binary format lies at one of a few places of a binade, the same at every scale
that is a power of two. With ``f`` in [0, 1) for a number ``2**e * (1 + f)``:

- ``f = 0``: half the smallest subnormal is a tie, and becomes zero; what is above does not.
- ``f = 1 - 2**-k``: from here on a result of ``k - 1`` bits is rounded up to one of ``k`` bits, and
  with ``k = mantissa_bits + 1`` the largest number to infinity.
- ``f = 0.8125``: what is above 464 overflows float8_e4m3fn, whose largest mantissa is NaN's.

So a bin is an exponent and one of these 27 parts, in the order of magnitude::

    part 0        f == 0
    part 1        0 < f < 1/2
    part 2        1/2 <= f < 3/4             one leading 1 in the mantissa
    part 3        3/4 <= f <= 13/16          two
    part 4        13/16 < f < 7/8            two
    part L + 2    1 - 2**-L <= f < 1 - 2**-(L + 1),   L = 3 ... 23
    part 26       1 - 2**-24 <= f            (float64 only)

A key is ``exponent * PARTS + part``: keys are ordered as magnitudes are, and a power-of-two scale
adds a multiple of ``PARTS``. That makes every answer a count of keys below a border.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...errors import LossScaleError
from ..formats import Format

PARTS = 32
"""The distance between the keys of two exponents; 27 are in use."""

LAST = 26
_MOST_ONES = 24


def part_of_ones(ones: int) -> int:
    """Return the first part whose mantissas begin with ``ones`` ones (at least one).

    >>> part_of_ones(1), part_of_ones(2), part_of_ones(3), part_of_ones(24)
    (2, 3, 5, 26)
    """
    return ones + 1 + (ones > 2)


def exponent_of(scale: float) -> int:
    """Return the exponent of a scale that is a power of two.

    Raises:
        LossScaleError: another scale: it would move the borders into the bins.

    >>> exponent_of(1024)
    10
    """
    if not is_power_of_two(scale):
        raise LossScaleError(
            f"scale={scale!r}: it must be a power of two, which a histogram of exponents answers "
            "for exactly."
        )
    return math.frexp(scale)[1] - 1


def is_power_of_two(scale: float) -> bool:
    """Whether a number is a power of two.

    >>> is_power_of_two(0.25), is_power_of_two(1000), is_power_of_two(0)
    (True, False, False)
    """
    return math.frexp(scale)[0] == 0.5


def _border(exponent: int, ones: int) -> int:
    """The first key at ``2**exponent * (2 - 2**-ones)``, or above."""
    if ones > _MOST_ONES:  # only float64 asks, and a float64 has no bits to lose there
        return (exponent + 1) * PARTS
    return exponent * PARTS + part_of_ones(ones)


def overflow_key(described: Format) -> int:
    """Return the first key that a format cannot hold: its values round past the largest number.

    >>> from halfstep import format_of
    >>> divmod(overflow_key(format_of("float16")), PARTS)  # 65520 = 2**15 * (2 - 2**-11)
    (15, 13)
    """
    if described.has_infinity:
        return _border(described.max_exponent, described.mantissa_bits + 1)
    return described.max_exponent * PARTS + 4


def flushed_key(described: Format) -> int:
    """Return the first key that does not round to zero.

    >>> from halfstep import format_of
    >>> divmod(flushed_key(format_of("float16")), PARTS)  # just above 2**-25
    (-25, 1)
    """
    return (described.min_exponent - described.mantissa_bits - 1) * PARTS + 1


def bits_key(described: Format, bits: int) -> int:
    """Return the first key that keeps at least ``bits`` mantissa bits; all of them is normal.

    >>> from halfstep import format_of
    >>> divmod(bits_key(format_of("float16"), 10), PARTS)  # 2**-15 * (2 - 2**-10) rounds to 2**-14
    (-15, 12)
    """
    if not 1 <= bits <= described.mantissa_bits:
        raise ValueError(
            f"bits={bits!r}: {described.name} has {described.mantissa_bits} mantissa bits, so it "
            f"must be from 1 to {described.mantissa_bits}."
        )
    lowest = described.min_exponent - described.mantissa_bits
    return _border(lowest + bits - 1, bits)


def keys_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the key of each finite value that is not zero.

    Args:
        values: float64 of any shape; its subnormals have exponents down to -1074.
    """
    mantissa, exponent = np.frexp(np.abs(values))  # in [0.5, 1)
    fraction = 2 * mantissa - 1
    # the distance to 1 says how many ones the mantissa begins with, exactly
    distance, power = np.frexp(1 - fraction)
    ones = np.minimum(np.where(distance == 0.5, 1 - power, -power), _MOST_ONES)
    part = ones + 1 + (fraction > 0.8125) - (fraction == 0)
    return np.asarray((exponent.astype(np.int64) - 1) * PARTS + part)
