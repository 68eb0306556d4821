from __future__ import annotations

import copy
import logging
import pickle

import keras
import numpy as np
import pytest

import halfstep
from halfstep import PolicyError
from halfstep.core.compatibility import reset_compatibility_check
from halfstep.keras import DynamicLossScale, FixedLossScale, Policy
from halfstep.keras.policy import NAMES, as_policy


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_policy_of_keras_with_the_dtypes_of_the_core(name):
    policy, rule = Policy(name), halfstep.Policy(name)
    assert isinstance(policy, keras.DTypePolicy)
    assert (policy.name, policy.compute_dtype, policy.variable_dtype, policy.rule) == (
        name,
        rule.compute_dtype,
        rule.variable_dtype,
        rule,
    )
    assert policy.quantization_mode is None


def test_a_layer_computes_and_keeps_its_variables_as_it_says():
    policy = Policy("mixed_float16")
    layer = keras.layers.Dense(2, dtype=policy)
    out = layer(np.ones((1, 3), "float32"))
    assert layer.dtype_policy is policy
    assert keras.backend.standardize_dtype(out.dtype) == "float16"
    assert layer.kernel.dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            {"name": "mixed_float16"},
            '<Policy "mixed_float16", loss_scale=DynamicLossScale(current_loss_scale=32768.0, '
            "num_good_steps=0, initial_loss_scale=32768.0, increment_period=2000, multiplier=2.0)>",
        ),
        ({"name": "float32"}, '<Policy "float32", loss_scale=None>'),
        (
            {"name": "mixed_float16", "loss_scale": None},
            '<Policy "mixed_float16", loss_scale=None>',
        ),
        (
            {"name": "mixed_float16", "loss_scale": 1024},
            '<Policy "mixed_float16", loss_scale=FixedLossScale(1024.0)>',
        ),
    ],
)
def test_it_prints_as_the_policy_of_the_guide(arguments, shown):
    assert repr(Policy(**arguments)) == str(Policy(**arguments)) == shown


def test_its_loss_scale_is_one_object_that_shows_what_the_optimizer_does():
    policy = Policy("mixed_float16", loss_scale=DynamicLossScale(8, 2))
    assert policy.loss_scale is policy.loss_scale
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=policy)])
    model.compile(keras.optimizers.SGD(1e-3), "mse", run_eagerly=True)
    for _ in range(3):
        model.train_on_batch(np.ones((2, 2), "float32"), np.ones((2, 1), "float32"))
    assert policy.loss_scale.current_loss_scale == 16
    assert "current_loss_scale=16.0, num_good_steps=1" in repr(policy)


def test_it_takes_policies_of_the_core_of_keras_and_its_own():
    core = halfstep.Policy("mixed_float16", loss_scale=64)
    assert Policy(core).rule == core
    assert Policy(keras.DTypePolicy("mixed_float16")) == Policy("mixed_float16")
    first = Policy(core)
    assert Policy(first).loss_scale is first.loss_scale
    assert Policy(core, loss_scale=None).loss_scale is None
    assert as_policy(first) is first


def test_without_a_name_it_is_the_global_policy_of_that_moment():
    keras.config.set_dtype_policy("mixed_bfloat16")
    policy = Policy()
    keras.config.set_dtype_policy("float32")
    assert policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("name", ["flaot32", "mixed_float32", "int8", "int8_from_float32", ""])
def test_an_unknown_name_is_refused_and_the_allowed_ones_named(name):
    with pytest.raises(PolicyError, match="Cannot convert.*Allowed are float16, bfloat16"):
        Policy(name)


@pytest.mark.parametrize("name", ["master_float16", halfstep.Policy("kahan_bfloat16")])
def test_a_policy_that_keras_has_no_optimizer_for_is_refused(name):
    with pytest.raises(PolicyError, match="wants an optimizer.*Keras has none"):
        Policy(name)


@pytest.mark.parametrize("name", [16, np.float16, ["float16"]])
def test_a_name_that_is_no_string_is_a_type_error(name):
    with pytest.raises(TypeError, match="'name' must be a string"):
        Policy(name)


def test_a_policy_that_quantizes_is_no_precision_to_train_in():
    with pytest.raises(PolicyError, match="keras.config.set_dtype_policy"):
        as_policy(keras.dtype_policies.QuantizedDTypePolicy("int8", "float32"))


def test_equal_policies_are_equal_and_hash_alike():
    one, same = Policy("mixed_float16", loss_scale=64), Policy("mixed_float16", FixedLossScale(64))
    assert one == same
    assert len({one, same, Policy("mixed_float16"), Policy("mixed_float16", 32)}) == 3
    assert one != Policy("mixed_float16")
    assert one != "mixed_float16"


@pytest.mark.parametrize("kind", [keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy])
def test_it_equals_the_policy_of_keras_that_does_the_same(kind):
    assert Policy("mixed_float16") == kind("mixed_float16")
    assert kind("mixed_float16") == Policy("mixed_float16")
    # Keras would scale it dynamically
    assert Policy("mixed_float16", loss_scale=1024) != kind("mixed_float16")
    assert kind("mixed_float16") != Policy("mixed_float16", loss_scale=1024)
    assert Policy("float32") != kind("int32")


@pytest.mark.parametrize("attribute", ["name", "_name", "_compute_dtype", "loss_scale", "anything"])
def test_nothing_of_it_can_be_set(attribute):
    policy = Policy("mixed_float16")
    with pytest.raises(PolicyError, match="is frozen"):
        setattr(policy, attribute, "float32")
    with pytest.raises(PolicyError, match="is frozen"):
        delattr(policy, attribute)
    assert policy == Policy("mixed_float16")


def test_a_map_of_keras_does_not_blank_its_name():
    """Keras' own policies are called None from then on."""
    ours, theirs = Policy("mixed_float16"), keras.DTypePolicy("mixed_float16")
    for policy in (ours, theirs):
        policies = keras.dtype_policies.DTypePolicyMap()
        policies["head"] = policy
        policies.get_config()
    assert ours.name == "mixed_float16"
    assert theirs.name is None  # if this fails, Keras was repaired, and our guard can go


@pytest.mark.parametrize("loss_scale", ["default", None, 1024, DynamicLossScale(8, 2, 4)])
@pytest.mark.parametrize(
    "travel",
    [
        lambda policy: Policy.from_config(policy.get_config()),
        lambda policy: keras.dtype_policies.get(keras.dtype_policies.serialize(policy)),
        lambda policy: keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(policy)
        ),
        lambda policy: pickle.loads(pickle.dumps(policy)),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_it_survives_every_way_of_saving_it(travel, loss_scale):
    policy = Policy("mixed_float16", loss_scale)
    back = travel(policy)
    assert back == policy
    assert type(back) is Policy
    assert repr(back.loss_scale) == repr(policy.loss_scale)


def test_the_compatibility_check_is_logged_with_the_first_policy_and_once(caplog):
    reset_compatibility_check()
    with caplog.at_level(logging.INFO, "halfstep"):
        Policy("float32")
        assert not caplog.records
        Policy("mixed_float16")
        Policy("mixed_float16")
        keras.layers.Dense(1, dtype=Policy("mixed_float16", 1024))
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("Mixed precision compatibility check (mixed_float16): ")
