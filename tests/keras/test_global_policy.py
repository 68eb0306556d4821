from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
from keras import layers

import halfstep
from halfstep import PolicyError
from halfstep.keras import Policy, PolicyMap, global_policy, policy_scope, set_global_policy


@pytest.fixture
def in_a_worker():
    """Run something in a thread that was there before the policies of the test were set."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(keras.config.dtype_policy).result()  # Keras keeps float32 for the thread
        yield lambda function: pool.submit(function).result()


def test_layers_without_a_policy_get_it_in_every_thread(in_a_worker):
    policy = Policy("mixed_float16", 64)
    set_global_policy(policy)
    assert layers.Dense(1).dtype_policy is policy
    assert in_a_worker(lambda: layers.Dense(1).dtype_policy) is policy
    assert in_a_worker(keras.config.dtype_policy) is global_policy() is policy


def test_a_layer_built_in_a_new_thread_gets_it():
    set_global_policy("mixed_bfloat16")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: layers.Dense(1).compute_dtype).result() == "bfloat16"


def test_it_is_one_with_the_global_policy_of_the_core():
    set_global_policy(Policy("mixed_float16", 64))
    assert halfstep.global_policy() == halfstep.Policy("mixed_float16", 64)
    halfstep.set_global_policy("mixed_bfloat16")
    assert global_policy() == keras.config.dtype_policy() == Policy("mixed_bfloat16")
    assert global_policy() is global_policy()
    assert layers.Dense(1).compute_dtype == "bfloat16"


def test_what_keras_was_told_holds_and_is_not_lost():
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert global_policy() == Policy("mixed_bfloat16")
    assert global_policy() is global_policy()
    with policy_scope("float16"):
        assert layers.Dense(1).compute_dtype == "float16"
    assert keras.config.dtype_policy().name == layers.Dense(1).dtype_policy.name == "mixed_bfloat16"
    # and it stays a policy of Keras', for files that need no halfstep
    assert type(keras.config.dtype_policy()) is keras.DTypePolicy


def test_the_last_word_wins(in_a_worker):
    set_global_policy("mixed_float16")
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert global_policy().name == "mixed_bfloat16"
    # Keras speaks for its own thread
    assert in_a_worker(lambda: global_policy().name) == "mixed_float16"
    assert halfstep.global_policy().name == "mixed_float16"
    set_global_policy("float64")
    assert global_policy().name == in_a_worker(lambda: global_policy().name) == "float64"


def test_setting_the_very_same_policy_again_counts():
    policy = halfstep.Policy("mixed_float16")
    halfstep.set_global_policy(policy)
    keras.config.set_dtype_policy("float32")
    halfstep.set_global_policy(policy)
    assert keras.config.dtype_policy().name == "mixed_float16"


def test_until_somebody_sets_one_it_follows_the_floatx_of_keras():
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx("float64")
    try:
        assert keras.config.dtype_policy().name == "float64"
    finally:
        keras.config.set_floatx("float32")


def test_clearing_the_session_does_not_end_it():
    set_global_policy("mixed_bfloat16")
    keras.utils.clear_session(free_memory=False)
    assert layers.Dense(1).compute_dtype == "bfloat16"


class TestScopes:
    def test_a_scope_shadows_and_ends(self):
        set_global_policy("mixed_float16")
        with policy_scope(Policy("mixed_bfloat16")) as outer:
            assert keras.config.dtype_policy() is outer
            with pytest.raises(ZeroDivisionError), policy_scope("float64"):
                _ = layers.Dense(1).compute_dtype == "float64" and 1 / 0
            assert keras.config.dtype_policy() is outer
        assert keras.config.dtype_policy().name == "mixed_float16"

    def test_a_scope_of_the_core_is_one_too(self):
        with halfstep.policy_scope("mixed_bfloat16"):
            assert layers.Dense(1).compute_dtype == "bfloat16"
        assert layers.Dense(1).compute_dtype == "float32"

    def test_what_keras_is_told_inside_ends_with_it(self):
        policy = Policy("mixed_float16")
        for _ in range(2):
            with policy_scope(policy):
                assert keras.config.dtype_policy() is policy
                keras.config.set_dtype_policy("float64")
                assert layers.Dense(1).compute_dtype == "float64"
            assert keras.config.dtype_policy().name == "float32"

    def test_it_holds_in_its_own_thread_alone(self, in_a_worker):
        with policy_scope("mixed_bfloat16"):
            assert in_a_worker(lambda: layers.Dense(1).compute_dtype) == "float32"

    def test_it_holds_in_its_own_task_alone(self):
        async def task(name):
            with policy_scope(name):
                await asyncio.sleep(0)
                return layers.Dense(1).compute_dtype

        async def both():
            return await asyncio.gather(task("mixed_bfloat16"), task("float64"))

        assert asyncio.run(both()) == ["bfloat16", "float64"]


def test_a_map_can_be_the_global_policy():
    policies = PolicyMap("mixed_float16", {"head": "float32"})
    set_global_policy(policies)
    assert global_policy() is policies
    assert halfstep.global_policy() == policies.rule


def test_a_policy_that_only_keras_knows_comes_back_as_it_is():
    for name in ("int8_from_float32", "int32"):
        keras.config.set_dtype_policy(name)
        assert global_policy() is keras.config.dtype_policy()
        assert global_policy().name == name


@pytest.mark.parametrize(
    "policy", ["int32", "flaot16", keras.dtype_policies.get("int8_from_float32")]
)
def test_what_is_no_precision_to_train_in_is_refused_and_changes_nothing(policy):
    set_global_policy("mixed_bfloat16")
    with pytest.raises(PolicyError):
        set_global_policy(policy)
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
