from __future__ import annotations

import copy
import gc
import pickle

import keras
import numpy as np
import pytest

import halfstep
from halfstep.errors import LossScaleError
from halfstep.keras import DynamicLossScale, FixedLossScale, LossScale, LossScaleOptimizer
from halfstep.keras.loss_scale import as_loss_scale

SCALES = [
    FixedLossScale(1024),
    FixedLossScale(0.5, patience=3),
    DynamicLossScale(),
    DynamicLossScale(8, 3, 4),
    DynamicLossScale(growth_factor=1.5, hysteresis=2, max_scale=2**20, patience=30),
]


def test_it_prints_as_in_the_guide():
    assert repr(DynamicLossScale()) == (
        "DynamicLossScale(current_loss_scale=32768.0, num_good_steps=0, "
        "initial_loss_scale=32768.0, increment_period=2000, multiplier=2.0)"
    )
    assert repr(FixedLossScale(1024)) == "FixedLossScale(1024.0)"


def test_it_prints_what_the_guide_has_no_word_for():
    shown = repr(DynamicLossScale(growth_factor=4, hysteresis=2, min_scale=0.25))
    assert "growth_factor=4.0, backoff_factor=0.5, hysteresis=2, min_scale=0.25)" in shown
    assert repr(FixedLossScale(8, patience=3)) == "FixedLossScale(8.0, patience=3)"


def test_both_sets_of_names_make_the_same():
    ours = DynamicLossScale(
        initial_scale=8, growth_interval=3, growth_factor=4, backoff_factor=0.25
    )
    guide = DynamicLossScale(initial_loss_scale=8, increment_period=3, multiplier=4)
    assert ours == guide == DynamicLossScale(8, 3, 4)
    assert ours.rule == halfstep.DynamicLossScale(8, 3, 4, 0.25)
    assert FixedLossScale(loss_scale_value=8) == FixedLossScale(8)


@pytest.mark.parametrize("multiplier", [2, 3, 10])
def test_a_multiplier_is_printed_as_one(multiplier):
    assert f"multiplier={float(multiplier)}" in repr(DynamicLossScale(multiplier=multiplier))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DynamicLossScale(8, initial_loss_scale=8), "initial_scale=8 and initial_loss_sc"),
        (lambda: DynamicLossScale(multiplier=2, growth_factor=2), "multiplier"),
        (lambda: DynamicLossScale(multiplier=1), "above 1"),
        (lambda: DynamicLossScale(period=4), "unknown argument 'period'"),
        (lambda: DynamicLossScale(0.5), "initial_scale=0.5"),
        (lambda: FixedLossScale(), "positive number"),
        (lambda: FixedLossScale(-1), "positive number"),
        (lambda: as_loss_scale("dynamo"), "'dynamic'"),
        (lambda: FixedLossScale.from_config(DynamicLossScale().get_config()), "another kind"),
    ],
)
def test_what_is_wrong_is_said(make, words):
    with pytest.raises(LossScaleError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_it_is_a_value(scale):
    saved = keras.saving.serialize_keras_object(scale)
    for other in (
        keras.saving.deserialize_keras_object(saved),
        type(scale).from_config(scale.get_config()),
        LossScale.from_config(scale.get_config()),
        pickle.loads(pickle.dumps(scale)),
        copy.deepcopy(scale),
        as_loss_scale(scale.rule),
    ):
        assert other == scale
        assert hash(other) == hash(scale)
        assert type(other) is type(scale)
        assert repr(other) == repr(scale)
    assert scale != FixedLossScale(3)


def test_what_tensorflow_2_1_saved_is_read():
    saved = {"initial_loss_scale": 8.0, "increment_period": 100, "multiplier": 2.0}
    assert DynamicLossScale.from_config(saved) == DynamicLossScale(8, 100)
    assert FixedLossScale.from_config({"loss_scale_value": 8.0}) == FixedLossScale(8)


def test_what_stands_for_a_loss_scale():
    assert as_loss_scale("dynamic") == DynamicLossScale()
    assert as_loss_scale(1024) == FixedLossScale(1024)
    assert as_loss_scale(None) is None
    assert as_loss_scale(halfstep.NoLossScale()) is None
    scale = DynamicLossScale()
    assert as_loss_scale(scale) is scale


def test_it_shows_the_state_of_the_optimizer_that_took_it(variable):
    scale = DynamicLossScale(initial_scale=16)
    optimizer = LossScaleOptimizer("sgd", scale)
    weights = [variable(1.0)]
    for gradient in (1.0, np.inf, 1.0, 1.0):
        optimizer.scale_loss(1.0)
        optimizer.apply([np.float32([gradient])], weights)
    assert "current_loss_scale=8.0, num_good_steps=2, initial_loss_scale=16.0" in repr(scale)
    assert (scale.current_loss_scale, float(scale), scale(), scale.num_good_steps) == (8, 8, 8, 2)
    assert repr(optimizer.loss_scale) == repr(scale)
    # its value is its configuration: it is not another one for having been used
    assert scale == DynamicLossScale(initial_scale=16)


def test_it_keeps_no_optimizer_alive(variable):
    scale = DynamicLossScale()
    optimizer = LossScaleOptimizer("sgd", scale)
    optimizer.scale_loss(1.0)
    optimizer.apply([np.float32([np.inf])], [variable(1.0)])
    assert scale.current_loss_scale == 2**14
    del optimizer
    gc.collect()
    assert scale.current_loss_scale == 2**15
