"""Histograms answer exactly, loss scales follow from them, and skipped steps are judged."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep import (
    FORMATS,
    DynamicLossScale,
    ExponentHistogram,
    FixedLossScale,
    LossScaleError,
    PolicyError,
    RecordError,
    advise_loss_scale,
    format_of,
)
from halfstep.core.numerics import record as record_events
from halfstep.core.numerics.bins import PARTS, bits_key, flushed_key, overflow_key
from halfstep.core.numerics.histogram import percent
from halfstep.core.numerics.skips import PATIENT, REASONS, SkipHistory, StepOutcome

PATTERNS = np.arange(2**16, dtype=np.uint16)
RANDOM = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32)
NARROW = [name for name in FORMATS if name != "float64"]
SCALES = [2.0**e for e in (-30, -1, 0, 1, 15, 24)]

DATA = {
    "every float16": PATTERNS.view(np.float16),
    "every bfloat16": PATTERNS.view(ml_dtypes.bfloat16),
    "every float8_e4m3fn": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "every float8_e5m2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2),
    "random float32": RANDOM.view(np.float32),
}


def wide(values):
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def slow(values, name, scale, bits):
    """Round each number and count: overflow, flushed to zero, fewer than ``bits`` bits left."""
    exact = wide(values)
    exact = np.abs(exact[np.isfinite(exact) & (exact != 0)]) * scale
    described = FORMATS[name]
    rounded = described.round(exact).astype(np.float64)
    steps = rounded[np.isfinite(rounded) & (rounded > 0)] / described.smallest_subnormal
    return (
        int(np.sum(~np.isfinite(rounded))),
        int(np.sum(rounded == 0)),
        int(np.sum(steps < 2**bits)),
    )


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("data", DATA)
def test_every_answer_is_that_of_rounding_each_number(data, name):
    values = DATA[data]
    histogram = ExponentHistogram.from_array(values)
    for scale in SCALES:
        for bits in {1, 2, FORMATS[name].mantissa_bits}:
            assert (
                histogram.overflow(name, scale),
                histogram.flushed(name, scale),
                histogram.fewer_bits(name, bits, scale=scale),
            ) == slow(values, name, scale, bits), (scale, bits)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_at_the_borders_of_a_format(name):
    described = FORMATS[name]
    step = math.ldexp(described.epsilon, described.max_exponent)
    tie = described.max + step / 2
    if math.isfinite(tie):
        borders = [described.max, np.nextafter(tie, 0), tie, np.nextafter(tie, np.inf)]
        # the largest number of a format without infinities is even, so its tie stays
        past = 1 if described.has_infinity is False else 2
        assert ExponentHistogram.from_array(borders).overflow(name) == past
    if name != "float64":
        half = described.smallest_subnormal / 2
        near = [np.nextafter(half, 0), half, np.nextafter(half, 1)]
        assert ExponentHistogram.from_array(near).flushed(name) == 2
        tie = described.smallest_normal - half
        near = [np.nextafter(tie, 0), tie, described.smallest_normal]
        assert ExponentHistogram.from_array(near).fewer_bits(name) == 1


def test_the_issue_of_float16s_last_binade():
    histogram = ExponentHistogram.from_array([65504.0, 65519.0, 65520.0, -65520.0, 65536.0])
    assert histogram.exponents == {15: 4, 16: 1}
    assert histogram.overflow("float16") == 3


def test_counts_of_every_kind():
    values = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 2**-149, -(2**-127), 2**-126, 1.0])
    histogram = ExponentHistogram.from_array(values)
    assert (histogram.zeros, histogram.infinities, histogram.nans) == (2, 2, 1)
    assert (histogram.subnormals, histogram.nonzero, histogram.total) == (2, 4, 9)
    assert (histogram.lowest, histogram.highest) == (-149, 0)
    assert histogram.fit("float32").flushed == 0


def test_a_negative_zero_is_no_underflow():
    fit = ExponentHistogram.from_array([-0.0, 0.0, 1e-9]).fit("float16")
    assert (fit.flushed, fit.count, fit.lost_share) == (1, 1, 1.0)


def test_nothing_at_all():
    empty = ExponentHistogram.from_array([])
    assert empty == ExponentHistogram()
    assert (empty.total, empty.lowest, empty.highest, empty.exponents) == (0, None, None, {})
    assert empty.fit("float16").lost_share == 0.0


def test_complex_numbers_count_twice_and_integers_as_numbers():
    assert ExponentHistogram.from_array([1 + 2j]).exponents == {0: 1, 1: 1}
    assert ExponentHistogram.from_array(np.array([0, 3, -4])).exponents == {1: 1, 2: 1}


floats = st.floats(width=32)


@given(st.lists(floats), st.lists(floats))
def test_merging_is_counting_both(one, other):
    merged = ExponentHistogram.from_array(one) + ExponentHistogram.from_array(other)
    assert merged == ExponentHistogram.from_array(one + other)
    assert hash(merged) == hash(ExponentHistogram.from_array(one + other))


@given(st.lists(floats))
def test_json_and_pickle_bring_back_the_same(values):
    histogram = ExponentHistogram.from_array(values)
    assert ExponentHistogram.from_plain(json.loads(json.dumps(histogram.to_plain()))) == histogram
    assert pickle.loads(pickle.dumps(histogram)) == histogram


@given(st.lists(floats.filter(math.isfinite)), st.integers(-60, 60))
def test_a_scale_moves_the_histogram_as_it_moves_the_numbers(values, exponent):
    scaled = ExponentHistogram.from_array(values).scaled(2.0**exponent)
    assert scaled == ExponentHistogram.from_array(np.float64(values) * 2.0**exponent)


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, math.inf, math.nan])
def test_a_scale_that_is_no_power_of_two_is_refused(scale):
    with pytest.raises(LossScaleError, match="power of two"):
        ExponentHistogram.from_array([1.0]).fit("float16", scale)


def test_questions_that_make_no_sense():
    histogram = ExponentHistogram.from_array([1.0])
    with pytest.raises(PolicyError, match="Did you mean 'float16'"):
        histogram.fit("flaot16")
    with pytest.raises(ValueError, match="from 1 to 10"):
        histogram.fewer_bits("float16", 11)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"exponents": {"a": [1]}},
        {"exponents": {"1": [-1]}},
        {"exponents": {"1": [0] * 27 + [1]}},
        {"exponents": {"1": [1]}, "zeros": 0.5},
        {"exponents": [1]},
    ],
)
def test_something_else_than_a_histogram_is_refused(plain):
    with pytest.raises(RecordError, match="not a histogram"):
        ExponentHistogram.from_plain(plain)


def test_the_counts_cannot_be_changed():
    histogram = ExponentHistogram.from_array([1.0])
    with pytest.raises(TypeError):
        histogram.bins[0] = 5
    with pytest.raises(AttributeError):
        histogram.zeros = 5


@pytest.mark.parametrize("name", NARROW)
def test_the_borders_lie_in_order(name):
    described = format_of(name)
    keys = [flushed_key(described)]
    keys += [bits_key(described, bits) for bits in range(1, described.mantissa_bits + 1)]
    keys.append(overflow_key(described))
    assert keys == sorted(set(keys))
    assert all(key % PARTS <= 26 for key in keys)


def test_a_share_is_never_rounded_to_none_or_all():
    assert [percent(x) for x in (0.0, 1e-12, 0.001, 0.5, 0.999999, 1.0)] == [
        "0%", "<0.01%", "0.1%", "50%", ">99.9%", "100%"
    ]  # fmt: skip


# ------------------------------------------------------------------------- the loss scale


def gradients(*exponents, count=1):
    return ExponentHistogram.from_array([1.5 * 2.0**e for e in exponents for _ in range(count)])


@pytest.mark.parametrize("largest", [1.0, 1.999, 65504.0, 65519.0, 1e-7, 3e-30, 448.0])
def test_the_scale_is_the_largest_power_of_two_that_overflows_nothing(largest):
    advice = advise_loss_scale(ExponentHistogram.from_array([largest]), headroom=0)
    float16 = format_of("float16")
    assert np.isfinite(float16.round(largest * advice.scale))
    assert np.isinf(float16.round(2 * largest * advice.scale))
    assert advice.highest == advice.scale
    assert advise_loss_scale(ExponentHistogram.from_array([largest])).scale == advice.scale / 4


def test_the_range_of_scales_that_lose_less_than_a_share():
    histogram = gradients(*range(-30, -10), count=50)
    for tolerance in (0.0, 0.01, 0.1, 0.3):
        advice = advise_loss_scale(histogram, tolerance=tolerance)
        allowed = [
            2.0**e
            for e in range(-10, 40)
            if histogram.overflow("float16", 2.0**e) == 0
            and histogram.flushed("float16", 2.0**e) <= tolerance * histogram.nonzero
        ]
        assert (advice.lowest, advice.highest) == (allowed[0], allowed[-1])


def test_float16_that_cannot_hold_the_gradients_says_so():
    advice = advise_loss_scale(gradients(-60, 10))
    assert not advice.fits
    assert (advice.lowest, advice.highest) == (None, None)
    assert "float16 cannot hold these gradients" in str(advice)
    assert "Use bfloat16" in str(advice)
    assert advice.bfloat16.lost == 0


def test_gradients_that_are_too_large_want_a_scale_below_one():
    advice = advise_loss_scale(gradients(20), headroom=0)
    assert advice.scale == 2.0**-5
    assert advice.fits
    assert "A fixed loss scale of 0.03125 (2**-5)" in str(advice)


def test_the_worst_tensors_are_named_first():
    named = {"deep": gradients(-55), "middle": gradients(-30, -60, -61), "top": gradients(0)}
    advice = advise_loss_scale(named)
    assert [name for name, _ in advice.worst] == ["deep", "middle"]
    assert advice.worst[1][1] == pytest.approx(2 / 3)
    assert "deep (100%), middle (66.7%)" in str(advice)


def test_what_is_not_finite_has_no_part_in_the_scale():
    histogram = gradients(0) + ExponentHistogram.from_array([math.inf, math.nan])
    advice = advise_loss_scale(histogram)
    assert advice.scale == advise_loss_scale(gradients(0)).scale
    assert advice.not_finite == 2
    assert "2 gradients were infinite or NaN" in str(advice)


@pytest.mark.parametrize("nothing", [ExponentHistogram(), {}, gradients() + gradients()])
def test_without_gradients_there_is_no_scale(nothing):
    advice = advise_loss_scale(nothing)
    assert (advice.scale, advice.fits, advice.lowest) == (None, False, None)
    assert "nothing to choose a scale by" in str(advice)


@pytest.mark.parametrize("bad", [{"headroom": -1}, {"headroom": 1.5}, {"tolerance": 1.0}])
def test_limits_of_the_advice(bad):
    with pytest.raises(LossScaleError, match=next(iter(bad))):
        advise_loss_scale(gradients(0), **bad)


def test_an_advice_is_plain_json():
    plain = json.loads(json.dumps(advise_loss_scale({"a": gradients(-60), "b": gradients(0)})
                                  .to_plain()))  # fmt: skip
    assert plain["worst"] == [["a", 1.0]]
    assert plain["text"].startswith("float16 cannot hold")


# ------------------------------------------------------------------------- skipped steps


def judged(scales, rule=None, losses=()):
    """Reasons of the skipped steps of a run; a negative scale is a step that was skipped."""
    rule = DynamicLossScale() if rule is None else rule
    history, reasons = SkipHistory(), []
    following = [*(abs(scale) for scale in scales[1:]), abs(scales[-1])]
    for step, (scale, after) in enumerate(zip(scales, following, strict=True), 1):
        loss = dict(losses).get(step)
        history = history.after(StepOutcome(step, scale < 0, abs(scale), after, loss), rule)
        reasons.append(history.run.reason if history.run else None)
    return reasons


def test_the_first_search_is_a_probe():
    assert judged([-64, -32, -16, 8]) == ["search"] * 3 + [None]


def test_a_skip_after_growth_is_a_probe_and_stays_one_for_its_second_step():
    assert judged([8, 16, -16, 8])[2] == "growth"
    assert judged([8, 16, -16, -8, 4])[2:4] == ["growth", "growth"]


def test_a_lone_skip_at_a_scale_that_held():
    assert judged([8, 16, 32, -32, -16, 8, -8])[6] == "spike"
    assert judged([8, -8])[1] == "spike"


def test_what_goes_on_though_the_scale_falls_is_a_fault():
    reasons = judged([2.0**10, *(-(2.0 ** (10 - i)) for i in range(8))])
    assert reasons[1 : 1 + PATIENT] == ["spike"] * PATIENT
    assert set(reasons[1 + PATIENT :]) == {"persists"}


def test_hysteresis_is_given_its_steps_first():
    rule = DynamicLossScale(hysteresis=4)
    assert judged([8, *[-8] * (PATIENT + 3)], rule)[-1] == "spike"
    assert judged([8, *[-8] * (PATIENT + 4)], rule)[-1] == "persists"


def test_a_loss_that_is_not_finite_is_a_fault_at_once_and_stays_one():
    reasons = judged([-64, -32, -16], losses=[(1, 2.5), (2, math.nan), (3, 2.5)])
    assert reasons == ["search", "loss", "loss"]


def test_the_floor_and_a_fixed_scale_are_faults():
    assert judged([-2, -1, -1]) == ["search", "floor", "floor"]
    assert judged([-8.0, 8.0], FixedLossScale(8)) == ["fixed", None]


def test_every_reason_has_a_verdict_and_words():
    assert {verdict for verdict, _ in REASONS.values()} == {"probe", "fault"}


# ------------------------------------------------------------------------- the record


def test_the_record_documents_every_key_of_its_events():
    words = Path(record_events.__file__).read_text(encoding="utf-8")
    for kind in record_events.KINDS:
        assert f"``{kind}``" in words
    assert all(name in FORMATS for name in record_events.COUNTED_FORMATS)
