"""What the optimizer is to Keras: its class, its arguments, its variables, its files."""

from __future__ import annotations

import importlib
import unittest
import warnings

import keras
import numpy as np
import pytest

from halfstep.errors import LossScaleError, LossScaleWarning
from halfstep.keras import DynamicLossScale, FixedLossScale, LossScaleOptimizer


def test_it_is_one_of_keras():
    optimizer = LossScaleOptimizer("adam")
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(optimizer, keras.optimizers.Optimizer)
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.Adam)
    assert keras.optimizers.get(optimizer) is optimizer


def test_what_tests_of_keras_assert_holds(capfd):
    """All of Keras' tests of its own optimizer, but one line: its config has four entries.

    Ours has the loss scale too, and what to import.
    """
    module = importlib.import_module("keras.src.optimizers.loss_scale_optimizer_test")
    theirs = module.LossScaleOptimizer
    module.LossScaleOptimizer = LossScaleOptimizer
    case = module.LossScaleOptimizerTest
    assert_len = case.assertLen
    case.assertLen = lambda self, config, count: assert_len(self, config, count + 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    finally:
        module.LossScaleOptimizer = theirs
        case.assertLen = assert_len
    assert result.testsRun >= 25
    assert [str(test) + trace for test, trace in (*result.errors, *result.failures)] == []


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        ({}, DynamicLossScale()),
        ({"loss_scale": "dynamic"}, DynamicLossScale()),
        ({"loss_scale": 1024}, FixedLossScale(1024)),
        ({"loss_scale": DynamicLossScale(8)}, DynamicLossScale(8)),
        ({"initial_scale": 8.0}, DynamicLossScale(8)),
        ({"initial_scale": 8.0, "dynamic_growth_steps": 3}, DynamicLossScale(8, 3)),
        ({"dynamic": False, "initial_scale": 8.0}, FixedLossScale(8)),
    ],
)
def test_all_words_for_a_loss_scale(arguments, scale):
    optimizer = LossScaleOptimizer("sgd", **arguments)
    assert optimizer.loss_scale == scale
    assert optimizer.initial_scale == scale.rule.first_scale
    assert optimizer.dynamic is isinstance(scale, DynamicLossScale)
    for made in (
        LossScaleOptimizer.from_config(optimizer.get_config()),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
    ):
        assert type(made) is LossScaleOptimizer
        assert made.loss_scale == scale
        assert made.get_config() == optimizer.get_config()


def test_a_config_of_keras_own_is_read():
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0)
    config = theirs.get_config()
    before = dict(config)
    made = LossScaleOptimizer.from_config(config)
    assert made.loss_scale == DynamicLossScale(8)
    assert config == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossScaleOptimizer(LossScaleOptimizer("sgd")), "wrapped already"),
        (
            lambda: LossScaleOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())),
            "wrapped already",
        ),
        (lambda: LossScaleOptimizer("sgd", 8, initial_scale=8.0), "give one"),
        (lambda: LossScaleOptimizer("sgd", dynamic=False), "takes initial_scale"),
        (lambda: LossScaleOptimizer("sgd", True), "a number"),
        (lambda: LossScaleOptimizer("sgd", initial_scale=0.0), "initial_scale"),
        (lambda: LossScaleOptimizer("sgd", dynamic_growth_steps=0), "growth_interval"),
        (lambda: LossScaleOptimizer(None), "name of one"),
        (lambda: LossScaleOptimizer("sgd").minimize(lambda: 1.0), "no gradients"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words, backend):
    if words == "no gradients" and backend == "tensorflow":
        pytest.skip("this backend has a tape")
    with pytest.raises(LossScaleError, match=words):
        make()


def test_a_factor_of_the_users_is_not_dropped_in_silence():
    inner = keras.optimizers.SGD(loss_scale_factor=1024.0)
    with pytest.warns(LossScaleWarning, match=r"loss_scale_factor=1024\.0") as caught:
        LossScaleOptimizer(inner)
    assert caught[0].filename == __file__


def test_the_learning_rate_is_the_inner_ones():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5))
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25


def test_all_state_is_in_the_variables(variable):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9), 8)
    weights = [variable(1.0)]
    optimizer.build(weights)
    optimizer.build(weights)
    names = [each.name for each in optimizer.variables]
    assert names == [
        *("iteration", "learning_rate", "step_counter", "dynamic_scale"),
        *("bad_steps", "skipped_steps"),
        *(each.name for each in optimizer.inner_optimizer.variables),
    ]


def _used(make, variable, gradients=(1.0, np.inf, 1.0)):
    optimizer, weight = make(keras.optimizers.SGD(0.5, momentum=0.9)), variable(1.0)
    for gradient in gradients:
        optimizer.scale_loss(1.0)
        optimizer.apply([keras.ops.convert_to_tensor(np.float32([gradient]))], [weight])
    return optimizer


def test_its_variables_are_saved_and_read(variable):
    before = _used(lambda inner: LossScaleOptimizer(inner, DynamicLossScale(16)), variable)
    store: dict[str, np.ndarray] = {}
    before.save_own_variables(store)
    after = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9), DynamicLossScale(16))
    after.build([variable(1.0)])
    after.load_own_variables(store)
    assert after.loss_scale_state() == before.loss_scale_state() == (8.0, 1, 0, 1)
    for one, other in zip(before.variables, after.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_file_without_loss_scaling_is_read(variable):
    """A run in float32 may go on in mixed_float16: the inner optimizer's state is taken."""
    before = _used(lambda inner: inner, variable, (1.0, 2.0))
    store: dict[str, np.ndarray] = {}
    before.save_own_variables(store)
    after = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9))
    after.build([variable(1.0)])
    after.load_own_variables(store)
    assert int(after.iterations) == 2
    for one, other in zip(before.variables, after.inner_optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert after.loss_scale == DynamicLossScale()


def test_a_file_of_keras_own_optimizer_is_read(variable, backend):
    if backend == "jax":
        pytest.skip("Keras' own cannot step outside of jit on this backend")
    before = _used(keras.optimizers.LossScaleOptimizer, variable)
    store: dict[str, np.ndarray] = {}
    before.save_own_variables(store)
    after = LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9))
    after.build([variable(1.0)])
    after.load_own_variables(store)
    assert after.loss_scale_state() == (2.0**14, 1, 0, 0)
    assert int(after.iterations) == 2


def test_a_file_of_something_else_is_told(variable):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5))
    optimizer.build([variable(1.0)])
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.load_own_variables({"0": np.float32(1.0)})


def test_minimize_on_tensorflow(backend, variable):
    if backend != "tensorflow":
        pytest.skip("the others have no tape")
    optimizer, weight = LossScaleOptimizer(keras.optimizers.SGD(0.5)), variable(1.0)
    optimizer.minimize(lambda: weight.value * 2.0, [weight])
    np.testing.assert_array_equal(weight.numpy(), [0.0])
    assert int(optimizer.iterations) == 1


def test_sparse_gradients_on_tensorflow(backend):
    if backend != "tensorflow":
        pytest.skip("the others have dense ones")
    import tensorflow as tf

    table = keras.Variable(np.ones((4, 2), "float32"))
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=8)
    for value, expected in ((np.inf, 1.0), (8.0, 0.5)):
        optimizer.scale_loss(1.0)
        sparse = tf.IndexedSlices(tf.fill((1, 2), np.float32(value)), [2], (4, 2))
        optimizer.apply([sparse], [table])
        np.testing.assert_array_equal(table.numpy()[2], [expected, expected])
        np.testing.assert_array_equal(table.numpy()[1], [1.0, 1.0])
