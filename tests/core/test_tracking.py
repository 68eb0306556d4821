"""When one loss tracks another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.tracking import compare_losses

curves = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@given(curves)
def test_a_curve_tracks_itself(losses):
    assert compare_losses(losses, losses, tolerance=0).tracks


# a share that float64 can tell from rounding, or none
@given(curves, st.just(0.0) | st.floats(1e-6, 0.2), st.booleans())
def test_a_curve_off_by_a_share_tracks_within_that_share_only(losses, share, lower):
    factor = 1 - share if lower else 1 + share
    off = [loss * factor for loss in losses]
    assert compare_losses(off, losses, tolerance=share + 1e-6).tracks
    found = compare_losses(off, losses, tolerance=share / 2)
    assert found.tracks == (share == 0)
    assert found.deviation == pytest.approx(share, abs=1e-9)


def test_single_batches_may_differ_as_long_as_their_windows_do_not():
    baseline = [1.0] * 100
    wobbling = [1.1 if i % 2 else 0.9 for i in range(100)]
    assert compare_losses(wobbling, baseline, tolerance=1e-9).tracks


def test_a_window_that_runs_away_is_named():
    run = [1.0] * 90 + [1.5] * 10
    found = compare_losses(run, [1.0] * 100)
    assert (found.tracks, found.window) == (False, 9)
    assert "in window 10 of 10 the loss differs by 50.00%" in found.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_tracks(bad):
    found = compare_losses([1.0, bad, 1.0], [1.0, 1.0, 1.0], tolerance=1e9)
    assert found.reason == "no finite loss at step 1"


def test_a_run_that_broke_off_never_tracks():
    assert compare_losses([1.0], [1.0, 1.0]).reason == "no finite loss at step 1"


def test_twice_the_noise_of_float32_is_allowed_and_stays_allowed():
    baseline = [1.0] * 10
    noise = [1.0, 1.05] + [1.0] * 8
    assert compare_losses([1.0] * 9 + [1.1], baseline, noise, tolerance=0.001).tracks
    assert not compare_losses([1.0] * 9 + [1.11], baseline, noise, tolerance=0.001).tracks
    # before the noise showed, nothing was allowed
    assert not compare_losses([1.05] + [1.0] * 9, baseline, noise, tolerance=0.001).tracks


@pytest.mark.parametrize("noise", [None, [math.nan] * 4, [1.0]])
def test_a_noise_run_that_is_of_no_use_allows_nothing(noise):
    assert not compare_losses([1.0, 1.0, 1.0, 1.1], [1.0] * 4, noise).tracks


@pytest.mark.parametrize("baseline", [[], [1.0, math.nan]])
def test_a_baseline_must_be_finite(baseline):
    with pytest.raises(ValueError, match="baseline"):
        compare_losses([1.0], baseline)


def test_a_loss_of_zero_tracks_zero_only():
    assert compare_losses([0.0, 0.0], [0.0, 0.0]).tracks
    assert not compare_losses([0.0, 0.1], [0.0, 0.0]).tracks
