"""Dynamic loss scaling is that of TensorFlow 2: tf_keras still has it, and says each number."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

from halfstep.keras import DynamicLossScale, LossScaleOptimizer

if keras.backend.backend() != "tensorflow":
    pytest.skip("tf_keras computes on TensorFlow", allow_module_level=True)

import tensorflow as tf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf_keras = pytest.importorskip("tf_keras")


def sequences(count=6, steps=24):
    random = np.random.default_rng(7)
    for _ in range(count):
        share = random.choice([0.1, 0.5, 0.95])
        gradients = random.normal(size=steps).astype("float32")
        bad = random.random(steps) < share
        gradients[bad] = random.choice([np.inf, -np.inf, np.nan], size=bad.sum())
        yield float(2.0 ** random.integers(0, 20)), int(random.integers(1, 8)), gradients


def test_scale_counter_and_weights_are_the_same_after_every_step():
    for number, (initial, period, gradients) in enumerate(sequences()):
        scale = DynamicLossScale(initial, period, max_scale=2.0**120, patience=1000)
        ours = LossScaleOptimizer(keras.optimizers.SGD(0.125, momentum=0.5), scale)
        theirs = tf_keras.mixed_precision.LossScaleOptimizer(
            tf_keras.optimizers.SGD(0.125, momentum=0.5),
            initial_scale=initial,
            dynamic_growth_steps=period,
        )
        weight, other = keras.Variable([1.0]), tf.Variable([1.0])
        for gradient in gradients:
            loss = tf.constant(gradient)
            scaled = ours.get_scaled_loss(loss)
            expected = theirs.get_scaled_loss(loss)
            np.testing.assert_array_equal(scaled, expected)
            if number % 2:  # the guide's way, and that of Keras 3
                grads = ours.get_unscaled_gradients([scaled[None]])
                ours.apply_gradients(zip(grads, [weight], strict=True))
            else:
                ours.apply([scaled[None]], [weight])
            unscaled = theirs.get_unscaled_gradients([expected[None]])
            theirs.apply_gradients(zip(unscaled, [other], strict=True))
            assert scale.current_loss_scale == float(theirs.loss_scale)
            assert scale.num_good_steps == int(theirs.dynamic_counter)
            np.testing.assert_array_equal(weight.numpy(), other.numpy())
