"""What a floating-point format can hold, and rounding to it.

Every figure follows from four facts about a format: how many exponent and mantissa bits it has,
whether it has infinities, and which NumPy dtype stores it. Sources: IEEE 754-2019 (float16,
float32, float64), the bfloat16 and tensorfloat32 definitions of Google and NVIDIA, and Micikevicius
et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, table 1 (float8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import PolicyError, nearest

FloatArray: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
"""What :meth:`Format.round` returns."""


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: a sign, exponent bits and mantissa bits.

    A normal number is ``(-1)**s * 2**(e - bias) * (1 + m / 2**mantissa_bits)`` with
    ``bias = 2**(exponent_bits - 1) - 1``; exponent field 0 holds zero and the subnormals. With
    infinities the highest exponent field is theirs and NaN's, as in IEEE 754; without them
    (float8_e4m3fn) it holds numbers too, and only its all-ones mantissa is NaN.

    Attributes:
        name: the name the frameworks use, for instance ``'float16'``.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field, without the implicit leading bit.
        has_infinity: whether there are infinities; what is past :attr:`max` rounds to them, to
            NaN where there are none.
        dtype: the NumPy dtype that stores it, ``None`` for a compute format (tensorfloat32 is
            stored as float32 and shortened inside the matrix units).

    >>> float16 = format_of("float16")
    >>> float16.max, float16.smallest_normal, float16.smallest_subnormal, float16.epsilon
    (65504.0, 6.103515625e-05, 5.960464477539063e-08, 0.0009765625)
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True
    dtype: np.dtype[Any] | None = field(default=None, compare=False)

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa together: 19 for tensorfloat32, which is stored in 32."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest number."""
        return self.bias if self.has_infinity else self.bias + 1

    # cached: round() and the numerics ask for them per call, and math.ldexp is not free
    @cached_property
    def max(self) -> float:
        """The largest finite number."""
        # without infinities the all-ones mantissa of the top exponent is NaN
        below_two = 1 if self.has_infinity else 2
        return math.ldexp(2.0 - math.ldexp(below_two, -self.mantissa_bits), self.max_exponent)

    @cached_property
    def smallest_normal(self) -> float:
        """The smallest positive number with full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @cached_property
    def smallest_subnormal(self) -> float:
        """The smallest positive number; half of it, and less, rounds to zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def epsilon(self) -> float:
        """The distance from 1 to the next larger number."""
        return math.ldexp(1.0, -self.mantissa_bits)

    def round(self, x: ArrayLike) -> FloatArray:
        """Return ``x`` rounded to this format: to the nearest value, ties to the even mantissa.

        ::

            e = max(exponent of x, min_exponent)
            step = 2**(e - mantissa_bits)          # the distance between neighbours there
            y = round_half_even(x / step) * step
            |y| > max  ->  infinity, or NaN in a format that has none

        Each value is rounded once, also from float64. (``astype`` of ml_dtypes 0.6 goes from
        float64 through float32, and so rounds ``1 + 2**-8 + 2**-40`` to the wrong bfloat16.)

        Args:
            x: numbers of any shape; read as float32 where that holds them, else as float64.

        Returns:
            The values in float32, which holds every value of the narrower formats, and in float64
            for float64. NaN stays NaN and a zero keeps its sign.

        >>> format_of("float16").round([1 + 2**-12, 65519.0, 65520.0, 2**-25])
        array([1.0000e+00, 6.5504e+04,        inf, 0.0000e+00], dtype=float32)
        >>> format_of("float8_e4m3fn").round([300.0, 464.0, 465.0])
        array([288., 448.,  nan], dtype=float32)
        """
        values = np.asarray(x)
        if self.name == "float64":
            return values.astype(np.float64)
        if _fits_float32(values.dtype):
            return self._round_float32(values.astype(np.float32))
        return self._round_float64(values.astype(np.float64))

    def _round_float32(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.dtype is None:
            return self._round_float64(values.astype(np.float64))
        # one direct conversion, which ml_dtypes and NumPy round correctly, in C
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(self.dtype).astype(np.float32)

    def _round_float64(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        exponent = np.maximum(np.frexp(values)[1] - 1, self.min_exponent)
        shift = exponent - self.mantissa_bits
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rounded = np.ldexp(np.rint(np.ldexp(values, -shift)), shift)
            past = np.copysign(np.inf, values) if self.has_infinity else np.nan
            rounded = np.where(np.abs(rounded) > self.max, past, rounded)
            return np.asarray(rounded, dtype=np.float32)


def _fits_float32(dtype: np.dtype[Any]) -> bool:
    """Whether float32 holds every value of ``dtype`` (asked without NumPy's warning on float8)."""
    return dtype in (np.float16, np.float32, np.bool_) or dtype in _STORED


def _stored(name: str, exponent_bits: int, mantissa_bits: int, has_infinity: bool = True) -> Format:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    return Format(name, exponent_bits, mantissa_bits, has_infinity, dtype)


FORMATS: dict[str, Format] = {
    described.name: described
    for described in (
        _stored("float64", 11, 52),
        _stored("float32", 8, 23),
        Format("tensorfloat32", 8, 10),
        _stored("bfloat16", 8, 7),
        _stored("float16", 5, 10),
        _stored("float8_e5m2", 5, 2),
        _stored("float8_e4m3fn", 4, 3, has_infinity=False),
    )
}
"""Every format by name, from wide to narrow."""

_STORED = frozenset(f.dtype for f in FORMATS.values() if f.dtype is not None and f.bits <= 16)


def format_of(name: str) -> Format:
    """Return the format of a name, as the frameworks spell it.

    Args:
        name: one of ``float64``, ``float32``, ``tensorfloat32``, ``bfloat16``, ``float16``,
            ``float8_e5m2``, ``float8_e4m3fn``.

    Raises:
        PolicyError: another name, with the nearest one.

    >>> format_of("bfloat16").max
    3.3895313892515355e+38
    """
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise PolicyError(
        f"format_of({name!r}): unknown format. Allowed are {', '.join(FORMATS)}."
        + nearest(str(name), FORMATS)
    )
