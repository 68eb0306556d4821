"""Formats against a slow reference that reads every bit pattern by the definition, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import halfstep
from halfstep.core.formats import FORMATS, Format, format_of

# name: exponent bits, mantissa bits, infinities, written out again on purpose
LAYOUTS = {
    "float64": (11, 52, True),
    "float32": (8, 23, True),
    "tensorfloat32": (8, 10, True),
    "bfloat16": (8, 7, True),
    "float16": (5, 10, True),
    "float8_e5m2": (5, 2, True),
    "float8_e4m3fn": (4, 3, False),
}
NARROW = ("bfloat16", "float16", "float8_e5m2", "float8_e4m3fn")


def decoded(name: str, pattern: int) -> Fraction | float:
    """The value of a bit pattern: a Fraction, or a float where it is zero, infinite or NaN."""
    exponent_bits, mantissa_bits, has_infinity = LAYOUTS[name]
    mantissa = pattern % 2**mantissa_bits
    exponent = pattern // 2**mantissa_bits % 2**exponent_bits
    sign = -1 if pattern >> (exponent_bits + mantissa_bits) else 1
    bias = 2 ** (exponent_bits - 1) - 1
    highest = 2**exponent_bits - 1
    if has_infinity and exponent == highest:
        return math.nan if mantissa else sign * math.inf
    if not has_infinity and exponent == highest and mantissa == 2**mantissa_bits - 1:
        return math.nan
    fraction = Fraction(mantissa, 2**mantissa_bits)
    if exponent == 0:
        value = fraction * Fraction(2) ** (1 - bias)
        return sign * value if value else sign * 0.0
    return sign * (1 + fraction) * Fraction(2) ** (exponent - bias)


def patterns(name: str) -> range:
    exponent_bits, mantissa_bits, _ = LAYOUTS[name]
    return range(2 ** (1 + exponent_bits + mantissa_bits))


def finite_positive(name: str) -> list[Fraction]:
    """All positive finite values in order; a pattern and its neighbour differ by one."""
    half = len(patterns(name)) // 2
    values = (decoded(name, pattern) for pattern in range(1, half))
    return [value for value in values if isinstance(value, Fraction)]


def reference_round(name: str, x: Fraction) -> Fraction | float:
    """Round a positive fraction to the nearest value of the format, ties to the even mantissa."""
    exponent_bits, mantissa_bits, has_infinity = LAYOUTS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    exponent = 1 - bias
    while x >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa_bits)
    rounded = round(x / step) * step  # Python rounds a Fraction half to even
    if rounded > Fraction(FORMATS[name].max):
        return math.inf if has_infinity else math.nan
    return rounded


def same(found: float, expected: Fraction | float) -> bool:
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(found)
    return found == expected and math.copysign(1, found) == math.copysign(1, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_and_derived_figures(name):
    exponent_bits, mantissa_bits, has_infinity = LAYOUTS[name]
    fmt = format_of(name)
    assert fmt.name == name
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (exponent_bits, mantissa_bits)
    assert fmt.has_infinity is has_infinity
    assert fmt.bits == 1 + exponent_bits + mantissa_bits


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
def test_figures_agree_with_numpy(name):
    info, fmt = np.finfo(name), format_of(name)
    assert fmt.max == info.max
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.smallest_subnormal == info.smallest_subnormal
    assert fmt.epsilon == info.eps


@pytest.mark.parametrize("name", NARROW)
def test_figures_agree_with_every_bit_pattern(name):
    fmt, values = format_of(name), finite_positive(name)
    mantissa_bits = LAYOUTS[name][1]
    assert values == sorted(values)
    assert fmt.max == values[-1]
    assert fmt.smallest_subnormal == values[0]
    assert fmt.smallest_normal == values[2**mantissa_bits - 1]
    one = values.index(Fraction(1))
    assert fmt.epsilon == values[one + 1] - values[one]


@pytest.mark.parametrize("name", NARROW)
def test_the_dtype_stores_what_the_definition_says(name):
    unsigned = np.uint8 if format_of(name).bits == 8 else np.uint16
    stored = np.arange(len(patterns(name)), dtype=unsigned).view(format_of(name).dtype)
    values = stored.astype(np.float32).tolist()
    assert all(same(value, decoded(name, p)) for p, value in enumerate(values))


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("name", NARROW)
def test_round_is_the_identity_on_every_pattern(name, wide):
    values = np.array([float(decoded(name, p)) for p in patterns(name)], wide)
    rounded = format_of(name).round(values)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, values)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(values))


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("name", NARROW)
def test_midpoints_go_to_even_and_their_neighbours_to_the_nearest(name, wide):
    values = [Fraction(0), *finite_positive(name)]
    low, high = np.array(values[:-1], wide), np.array(values[1:], wide)
    # exact: a midpoint needs one bit more than the format has; so far out float32 has subnormals
    middle = (
        low / 2 + high / 2 if wide is np.float64 else ((low.astype("d") + high) / 2).astype("f")
    )
    exact = middle.astype("d") * 2 == low.astype("d") + high
    assert exact.all()
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)  # a pattern's last bit is its parity
    fmt = format_of(name)
    for sign in (1, -1):
        np.testing.assert_array_equal(fmt.round(sign * middle), sign * even)
        np.testing.assert_array_equal(fmt.round(sign * np.nextafter(middle, wide(0))), sign * low)
        above = np.nextafter(middle, wide(np.inf))
        np.testing.assert_array_equal(fmt.round(sign * above), sign * high)


@pytest.mark.parametrize("name", NARROW)
def test_overflow_threshold(name):
    fmt, values = format_of(name), finite_positive(name)
    # the threshold is the middle between max and the value that would follow it
    threshold = np.float64((values[-1] + (values[-1] + (values[-1] - values[-2]))) / 2)
    past = np.inf if fmt.has_infinity else np.nan
    ties_away = len(values) % 2 == 1  # an odd last mantissa: the tie goes up, out of the format
    for wide in (np.float32, np.float64):
        edge = wide(threshold)
        assert edge == threshold
        found = fmt.round(
            np.array([np.nextafter(edge, wide(0)), edge, np.nextafter(edge, wide(np.inf))])
        )
        np.testing.assert_array_equal(found, [fmt.max, past if ties_away else fmt.max, past])
        np.testing.assert_array_equal(fmt.round(wide([np.inf, -np.inf])), [past, -past])


def test_thresholds_by_hand():
    assert format_of("float16").round(65519.99) == 65504
    assert format_of("float16").round(65520) == np.inf
    assert format_of("float8_e4m3fn").round(464) == 448
    assert np.isnan(format_of("float8_e4m3fn").round(464.1))
    assert format_of("float8_e5m2").round(61439) == 57344
    assert format_of("float8_e5m2").round(-61440) == -np.inf
    assert format_of("float16").round(2.0**-25) == 0
    assert format_of("float16").round(2.0**-25 * 1.0001) == 2.0**-24


def test_nan_zero_signs_and_shapes():
    for fmt in FORMATS.values():
        found = fmt.round([[np.nan, -0.0], [0.0, -1.0]])
        assert found.shape == (2, 2)
        assert np.isnan(found[0, 0])
        assert np.signbit(found[0, 1])
        assert not np.signbit(found[1, 0])
        assert fmt.round(1).shape == ()
        assert fmt.round(np.zeros((0, 3))).shape == (0, 3)


def test_float64_is_rounded_once():
    # through float32 both would land on the midpoint and then on the even neighbour below
    assert format_of("bfloat16").round(1 + 2.0**-8 + 2.0**-40) == 1 + 2.0**-7
    assert format_of("float8_e4m3fn").round(1 + 2.0**-4 + 2.0**-40) == 1 + 2.0**-3
    assert np.float64(1 + 2.0**-8 + 2.0**-40).astype(ml_dtypes.bfloat16) == 1  # why we do not


def test_float64_keeps_float64_and_integers_are_taken():
    x = np.array([0.1, 1e300])
    found = format_of("float64").round(x)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, x)
    np.testing.assert_array_equal(format_of("float16").round([2049, 2051]), [2048, 2052])
    np.testing.assert_array_equal(
        format_of("float8_e5m2").round(np.array([1.1], ml_dtypes.bfloat16)), [1.0]
    )


def test_float32_from_float64():
    x = np.random.default_rng(0).standard_normal(1000)
    x = np.concatenate([x, x * 1e-40, x * 1e38, [2.0**-150, 2.0**-150 * 1.01, 2.0**-149]])
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(format_of("float32").round(x), x.astype(np.float32))


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool))
def test_tensorfloat32_against_fractions(x):
    expected = reference_round("tensorfloat32", abs(Fraction(x)))
    found = float(format_of("tensorfloat32").round(np.float32(x)))
    assert abs(found) == expected
    assert math.copysign(1, found) == math.copysign(1, x)


@pytest.mark.parametrize("name", [*NARROW, "tensorfloat32", "float32"])
def test_random_values_against_fractions(name):
    rng = np.random.default_rng(7)
    fmt = format_of(name)
    low, high = math.log2(fmt.smallest_subnormal) - 2, math.log2(fmt.max) + 1
    x = np.exp2(np.clip(rng.uniform(low, high, 400), -1000, 127.99))
    for value, found in zip(x.tolist(), fmt.round(x).tolist(), strict=True):
        assert same(found, reference_round(name, Fraction(value)))


@settings(deadline=None)
@given(st.floats(allow_nan=True), st.sampled_from(sorted(LAYOUTS)))
def test_round_is_idempotent_and_odd(x, name):
    fmt = format_of(name)
    once = fmt.round(x)
    np.testing.assert_array_equal(fmt.round(once), once)
    np.testing.assert_array_equal(fmt.round(-x), -once)


def test_no_warning_is_raised_for_what_overflows_or_underflows():
    with np.errstate(all="raise"):
        for fmt in FORMATS.values():
            fmt.round(np.array([1e30, 1e-40, np.inf, np.nan], np.float32))
            if fmt.name != "float64":
                fmt.round(np.array([1e300, 1e-320, np.inf, np.nan]))


def test_format_is_a_value():
    assert format_of("float16") == FORMATS["float16"]
    assert Format("float16", 5, 10) == format_of("float16")
    assert len({format_of(name) for name in FORMATS}) == len(FORMATS)
    assert halfstep.format_of is format_of


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(halfstep.PolicyError, match=r"format_of\('bfloat61'\).*mean 'bfloat16'"):
        format_of("bfloat61")
    with pytest.raises(halfstep.PolicyError, match="float8_e4m3fn"):
        format_of(16)
