"""A histogram of exponents that answers exactly what a format would lose."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ...errors import RecordError
from ..formats import Format, format_of
from .bins import LAST, PARTS, bits_key, exponent_of, flushed_key, keys_of, overflow_key

_FIRST_NORMAL = -126  # of float32


@dataclass(frozen=True)
class FormatFit:
    """What rounding to a format does to the numbers of a histogram.

    Attributes:
        format: the name of the format.
        scale: what the numbers are multiplied by first.
        count: the finite numbers that are not zero; the shares below are of these.
        overflow: how many become infinite (NaN in a format without infinities).
        flushed: how many become zero.
        subnormal: how many stay, but are subnormal: they keep only some of their bits.

    >>> fit = ExponentHistogram.from_array([70000.0, 1.0, 1e-6, 1e-9]).fit("float16")
    >>> print(fit)
    float16: 25% overflow, 25% flushed to zero, 25% subnormal, of 4 numbers
    """

    format: str
    scale: float
    count: int
    overflow: int
    flushed: int
    subnormal: int

    @property
    def lost(self) -> int:
        """How many do not survive: overflow and flushed together."""
        return self.overflow + self.flushed

    def share(self, count: int) -> float:
        """Return ``count`` as a share of all; 0 where there is nothing."""
        return count / self.count if self.count else 0.0

    @property
    def lost_share(self) -> float:
        """The share of :attr:`lost`."""
        return self.share(self.lost)

    def __str__(self) -> str:
        scaled = "" if self.scale == 1 else f" at scale {self.scale:g}"
        return (
            f"{self.format}{scaled}: {percent(self.share(self.overflow))} overflow, "
            f"{percent(self.share(self.flushed))} flushed to zero, "
            f"{percent(self.share(self.subnormal))} subnormal, of {self.count} numbers"
        )


def percent(share: float) -> str:
    """Return a share in words: a small one never reads as none, a large one never as all.

    >>> percent(0), percent(0.25), percent(1e-9), percent(0.99999), percent(1)
    ('0%', '25%', '<0.01%', '>99.9%', '100%')
    """
    if 0 < share < 1e-4:
        return "<0.01%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.3g}%"


@dataclass(frozen=True)
class ExponentHistogram:
    """How many numbers have which exponent, fine enough to answer exactly for every format.

    For each number that is finite and not zero it counts its binary exponent and, within it, one
    of 27 parts whose borders are those that rounding draws (:mod:`halfstep.core.numerics.bins`).
    Both zeros count as zero, and the sign of the others is left out.

    *Exact* means: what :meth:`fit` and its parts say is what rounding each number (to nearest,
    ties to even) and counting would say, for numbers of float32 and narrower, for every format
    and every scale that is a power of two; numbers of float64 too, but for the answers about
    float64 itself at scales below 1.

    Attributes:
        bins: counts by key, ``exponent * 32 + part``.
        zeros: how many are 0 or -0.
        infinities: how many are infinite, of either sign.
        nans: how many are no number.

    >>> histogram = ExponentHistogram.from_array([1.0, 1.5, 3.0, 0.0, -0.0, 65519.0, 65520.0])
    >>> histogram.exponents
    {0: 2, 1: 1, 15: 2}
    >>> histogram.zeros, histogram.overflow("float16")
    (2, 1)
    """

    bins: Mapping[int, int] = field(default_factory=dict)
    zeros: int = 0
    infinities: int = 0
    nans: int = 0

    def __post_init__(self) -> None:
        kept = {key: self.bins[key] for key in sorted(self.bins) if self.bins[key]}
        object.__setattr__(self, "bins", MappingProxyType(kept))

    def __hash__(self) -> int:
        return hash((tuple(self.bins.items()), self.zeros, self.infinities, self.nans))

    def __reduce__(self) -> tuple[Any, ...]:
        # the read-only view of the counts cannot be pickled
        return type(self), (dict(self.bins), self.zeros, self.infinities, self.nans)

    # ------------------------------------------------------------------ making one

    @classmethod
    def from_array(cls, array: ArrayLike) -> ExponentHistogram:
        """Count the numbers of an array.

        Args:
            array: any shape; NumPy's floats and integers, and those of ml_dtypes. What is no
                float is read as float64; complex numbers count as their two parts.

        >>> ExponentHistogram.from_array([[0.25, float("inf")], [float("nan"), -0.0]])
        ExponentHistogram({-2: 1}, zeros=1, infinities=1, nans=1)
        """
        values = np.asarray(array)
        if np.iscomplexobj(values):
            values = np.stack([values.real, values.imag])
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            wide = values.astype(np.float64).ravel()
        nans = int(np.isnan(wide).sum())
        infinities = int(np.isinf(wide).sum())
        counted = wide[np.isfinite(wide) & (wide != 0)]
        keys, counts = np.unique(keys_of(counted), return_counts=True)
        bins = dict(zip(keys.tolist(), counts.tolist(), strict=True))
        return cls(bins, wide.size - nans - infinities - counted.size, infinities, nans)

    @classmethod
    def merged(cls, histograms: Iterable[ExponentHistogram]) -> ExponentHistogram:
        """Return the histogram of everything that was counted in several.

        >>> ExponentHistogram.merged(ExponentHistogram.from_array(x) for x in ([1.0], [2.0, 0.0]))
        ExponentHistogram({0: 1, 1: 1}, zeros=1)
        """
        bins: Counter[int] = Counter()
        zeros = infinities = nans = 0
        for histogram in histograms:
            bins.update(histogram.bins)
            zeros += histogram.zeros
            infinities += histogram.infinities
            nans += histogram.nans
        return cls(bins, zeros, infinities, nans)

    def __add__(self, other: ExponentHistogram) -> ExponentHistogram:
        return self.merged((self, other))

    def scaled(self, scale: float) -> ExponentHistogram:
        """Return the histogram of the same numbers times ``scale``, as if no format limited them.

        Args:
            scale: a power of two.

        Raises:
            LossScaleError: another scale.

        >>> ExponentHistogram.from_array([1.0, 3.0]).scaled(2**-10).exponents
        {-10: 1, -9: 1}
        """
        shift = exponent_of(scale) * PARTS
        bins = {key + shift: count for key, count in self.bins.items()}
        return ExponentHistogram(bins, self.zeros, self.infinities, self.nans)

    # ------------------------------------------------------------------ what it counted

    @cached_property
    def _sums(self) -> tuple[list[int], list[int]]:
        return list(self.bins), [0, *accumulate(self.bins.values())]

    def below(self, key: int) -> int:
        """Return how many finite numbers that are not zero have a smaller key."""
        keys, sums = self._sums
        return sums[bisect_left(keys, key)]

    @property
    def exponents(self) -> dict[int, int]:
        """Counts by exponent, from small to large."""
        counts: Counter[int] = Counter()
        for key, count in self.bins.items():
            counts[key // PARTS] += count
        return dict(counts)

    @property
    def nonzero(self) -> int:
        """How many are finite and not zero."""
        return self._sums[1][-1]

    @property
    def total(self) -> int:
        """How many numbers were counted, of every kind."""
        return self.nonzero + self.zeros + self.infinities + self.nans

    @property
    def subnormals(self) -> int:
        """How many are subnormal in float32: below 2**-126, and not zero."""
        return self.below(_FIRST_NORMAL * PARTS)

    @property
    def lowest(self) -> int | None:
        """The smallest exponent, None where nothing has one."""
        return next(iter(self.bins)) // PARTS if self.bins else None

    @property
    def highest(self) -> int | None:
        """The largest exponent, None where nothing has one."""
        return next(reversed(self.bins)) // PARTS if self.bins else None

    # ------------------------------------------------------------------ what a format would lose

    def overflow(self, name: str | Format, scale: float = 1) -> int:
        """Return how many finite numbers, times ``scale``, round past the largest of a format.

        Args:
            name: the format, or its name.
            scale: a power of two.

        >>> histogram = ExponentHistogram.from_array([1.0, 60000.0])
        >>> histogram.overflow("float16"), histogram.overflow("float16", scale=2)
        (0, 1)
        """
        return self.nonzero - self.below(overflow_key(_format(name)) - PARTS * exponent_of(scale))

    def flushed(self, name: str | Format, scale: float = 1) -> int:
        """Return how many numbers that are not zero, times ``scale``, round to zero.

        Args:
            name: the format, or its name.
            scale: a power of two.

        >>> histogram = ExponentHistogram.from_array([2**-25, 2**-25 * 1.001])
        >>> histogram.flushed("float16"), histogram.flushed("float16", scale=2)
        (1, 0)
        """
        return self.below(flushed_key(_format(name)) - PARTS * exponent_of(scale))

    def fewer_bits(self, name: str | Format, bits: int | None = None, *, scale: float = 1) -> int:
        """Return how many, times ``scale``, keep fewer than ``bits`` mantissa bits, but some value.

        A subnormal that is ``n`` times the smallest one has ``floor(log2(n))`` mantissa bits after
        its leading one. What becomes zero is not counted here.

        Args:
            name: the format, or its name.
            bits: from 1 to the format's mantissa bits; left out, it is all of them, so that the
                answer is how many are subnormal.
            scale: a power of two.

        Raises:
            ValueError: ``bits`` that the format does not have.

        >>> histogram = ExponentHistogram.from_array([2**-24, 2**-20, 1.0])
        >>> histogram.fewer_bits("float16"), histogram.fewer_bits("float16", 2)
        (2, 1)
        """
        described, shift = _format(name), PARTS * exponent_of(scale)
        bits = described.mantissa_bits if bits is None else bits
        return self.below(bits_key(described, bits) - shift) - self.flushed(described, scale)

    def fit(self, name: str | Format, scale: float = 1) -> FormatFit:
        """Return what rounding to a format, after multiplication by ``scale``, does to them all.

        Args:
            name: the format, or its name.
            scale: a power of two.

        Raises:
            LossScaleError: another scale.
            PolicyError: no such format.
        """
        described = _format(name)
        return FormatFit(
            format=described.name,
            scale=float(scale),
            count=self.nonzero,
            overflow=self.overflow(described, scale),
            flushed=self.flushed(described, scale),
            subnormal=self.fewer_bits(described, scale=scale),
        )

    # ------------------------------------------------------------------ in words and as JSON

    def __repr__(self) -> str:
        rest = "".join(
            f", {name}={getattr(self, name)}"
            for name in ("zeros", "infinities", "nans")
            if getattr(self, name)
        )
        return f"ExponentHistogram({self.exponents}{rest})"

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for JSON: for each exponent the counts of its parts.

        >>> ExponentHistogram.from_array([0.5, 0.75, 0.0]).to_plain()
        {'exponents': {'-1': [1, 0, 1]}, 'zeros': 1, 'infinities': 0, 'nans': 0}
        """
        exponents: dict[str, list[int]] = {}
        for key, count in self.bins.items():
            exponent, part = divmod(key, PARTS)
            parts = exponents.setdefault(str(exponent), [])
            parts += [0] * (part - len(parts)) + [count]
        rest = {name: getattr(self, name) for name in ("zeros", "infinities", "nans")}
        return {"exponents": exponents, **rest}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ExponentHistogram:
        """Return the histogram that :meth:`to_plain` described.

        Raises:
            RecordError: something else.

        >>> ExponentHistogram.from_plain({"exponents": {"-1": [1, 0, 1]}, "zeros": 1})
        ExponentHistogram({-1: 2}, zeros=1)
        """
        try:
            bins = {
                int(exponent) * PARTS + part: _count(count)
                for exponent, parts in plain["exponents"].items()
                for part, count in enumerate(parts)
            }
            if any(key % PARTS > LAST for key in bins):
                raise ValueError(f"an exponent has more than {LAST + 1} parts")
            rest = [_count(plain.get(name, 0)) for name in ("zeros", "infinities", "nans")]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(
                f"ExponentHistogram.from_plain: not a histogram: {error!r}."
            ) from None
        return cls(bins, *rest)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _format(name: str | Format) -> Format:
    return name if isinstance(name, Format) else format_of(name)
