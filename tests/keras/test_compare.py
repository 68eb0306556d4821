"""A recipe runs on whatever backend Keras has; what compare does with it is in tests/compare."""

from __future__ import annotations

import keras
import pytest

from halfstep.compare import Settings, compare, keras_device, keras_trainee, load_recipe
from halfstep.core.policy import Policy
from halfstep.errors import RecipeError

RECIPE = """
import keras
import numpy as np

FRAMEWORK = "keras"
STEPS = 3
BATCH_SIZE = 4

def make_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, dtype=None)])
    model.add(keras.layers.Activation("linear", dtype="float32"))
    model.layers[0].kernel.assign(np.full((3, 1), 0.01))
    jit = keras.backend.backend() == "jax"
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    return model

def data():
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    x[bad] = np.inf
    return x[:12], x[:12, 0] / 100, x[12:], x[12:, 0] / 100

bad = []
"""


@pytest.fixture
def recipe(tmp_path):
    def make(added=""):
        file = tmp_path / "mine.py"
        file.write_text(RECIPE + added)
        return load_recipe(file)

    return make


def test_each_policy_trains_and_says_its_scale(recipe, backend):
    summary = compare(recipe(), None, Settings(memory=False))
    assert summary["status"] == "finished"
    policies = summary["recipes"][0]["policies"]
    assert {each["status"] for each in policies.values()} == {"finished"}
    assert policies["mixed_float16"]["scale"][-1][1] == 2.0**15
    assert policies["mixed_bfloat16"]["scale"] == []
    first = [each["losses"][0] for each in policies.values()]
    assert first == pytest.approx([first[0]] * 3, rel=0.05)
    assert backend in summary["machine"]["versions"]


def test_a_bad_batch_is_a_skipped_step(recipe):
    summary = compare(recipe("bad = [0]"), "mixed_float16", Settings(memory=False))
    policy = summary["recipes"][0]["policies"]["mixed_float16"]
    assert (policy["skipped"], policy["scale"][-1][1]) == (1, 2.0**14)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's plan is JAX's")
def test_the_plan_of_the_compiled_step_is_the_memory_on_jax(recipe):
    start = keras_trainee.starter(recipe(), "cpu", 0)
    policies = {"float32": Policy("float32"), "mixed_float16": Policy("mixed_float16")}
    found = {each["policy"]: each for each in start.measure_memory(policies, 2)}
    # weights, batch, and the state of the loss scale
    assert 0 < found["float32"]["bytes"] < found["mixed_float16"]["bytes"] < 10_000


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(RecipeError, match="--device"):
        keras_device.pick_device("cuda:7")
    assert keras_device.pick_device("cpu") == "cpu"
