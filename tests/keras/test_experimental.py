"""The names of TensorFlow 2.1, as its guide uses them."""

from __future__ import annotations

import keras
import pytest

from halfstep import PolicyError
from halfstep.keras import experimental as mixed_precision


def test_the_guides_lines_about_the_policy():
    policy = mixed_precision.Policy("mixed_float16")
    mixed_precision.set_policy(policy)
    assert mixed_precision.global_policy() is policy
    assert f"Compute dtype: {policy.compute_dtype}" == "Compute dtype: float16"
    assert f"Variable dtype: {policy.variable_dtype}" == "Variable dtype: float32"
    assert f"Loss scale: {policy.loss_scale}" == (
        "Loss scale: DynamicLossScale(current_loss_scale=32768.0, num_good_steps=0, "
        "initial_loss_scale=32768.0, increment_period=2000, multiplier=2.0)"
    )
    new_policy = mixed_precision.Policy("mixed_float16", loss_scale=1024)
    assert repr(new_policy.loss_scale) == "FixedLossScale(1024.0)"


def test_loss_scales_take_the_arguments_of_then():
    scale = mixed_precision.DynamicLossScale(
        initial_loss_scale=64, increment_period=3, multiplier=4
    )
    assert scale == mixed_precision.DynamicLossScale(64, 3, 4)
    assert repr(scale) == (
        "DynamicLossScale(current_loss_scale=64.0, num_good_steps=0, initial_loss_scale=64.0, "
        "increment_period=3, multiplier=4.0)"
    )
    assert mixed_precision.FixedLossScale(loss_scale_value=8) == mixed_precision.FixedLossScale(8)


def test_the_optimizer_takes_both_by_place():
    optimizer = mixed_precision.LossScaleOptimizer(keras.optimizers.RMSprop(), "dynamic")
    assert optimizer.loss_scale == mixed_precision.DynamicLossScale()
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def test_no_policy_is_that_of_the_floatx():
    mixed_precision.set_policy("mixed_bfloat16")
    mixed_precision.set_policy(None)
    assert mixed_precision.global_policy().name == keras.config.floatx() == "float32"


def test_what_is_no_precision_to_train_in_is_refused():
    with pytest.raises(PolicyError):
        mixed_precision.set_policy("int32")


def test_the_policy_of_a_layer():
    mixed_precision.set_policy("mixed_bfloat16")
    layer = keras.layers.Dense(1)
    assert mixed_precision.get_layer_policy(layer) is mixed_precision.global_policy()
    assert (
        mixed_precision.get_layer_policy(keras.layers.Dense(1, dtype="float16")).name == "float16"
    )
    quantized = keras.layers.Dense(1, dtype="int8_from_float32")
    assert mixed_precision.get_layer_policy(quantized) is quantized.dtype_policy
    with pytest.raises(TypeError, match="it takes a Keras layer"):
        mixed_precision.get_layer_policy("dense")
