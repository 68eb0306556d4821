"""TensorFlow's graph rewrite: on and off, its loss scale, and what it refuses."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import halfstep.keras as door
from halfstep import LossScaleError, PolicyError, PolicyWarning
from halfstep.keras import experimental, graph_rewrite
from halfstep.keras.graph_rewrite import OPTION

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the rewrite is TensorFlow's"
)


@pytest.fixture(autouse=True)
def off_again():
    yield
    door.disable_mixed_precision_graph_rewrite()


@pytest.fixture
def with_gpu(monkeypatch):
    """As if TensorFlow had a device that it rewrites for."""
    monkeypatch.setattr(graph_rewrite, "_has_device", lambda: True)


def is_on():
    import tensorflow as tf

    return tf.config.optimizer.get_experimental_options().get(OPTION, False)


def model_of(dtype=None):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=dtype)], name="net")


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="it works there")
def test_other_backends_are_told_what_they_have(backend):
    with pytest.raises(PolicyError, match=rf"Keras runs on {backend} here. halfstep.{backend}.aut"):
        door.enable_mixed_precision_graph_rewrite("sgd")
    door.disable_mixed_precision_graph_rewrite()


@on_tensorflow
class TestOnTensorFlow:
    def test_it_is_on_until_it_is_turned_off(self, with_gpu):
        door.enable_mixed_precision_graph_rewrite("sgd")
        assert is_on()
        door.disable_mixed_precision_graph_rewrite()
        assert not is_on()

    def test_the_optimizer_scales_the_loss(self, with_gpu):
        optimizer = door.enable_mixed_precision_graph_rewrite(keras.optimizers.SGD(0.1), 1024)
        assert isinstance(optimizer, door.LossScaleOptimizer)
        assert optimizer.loss_scale == door.FixedLossScale(1024)
        dynamic = door.enable_mixed_precision_graph_rewrite("adam")
        assert dynamic.loss_scale == door.DynamicLossScale()

    def test_an_optimizer_that_scales_already_is_refused_and_nothing_is_turned_on(self, with_gpu):
        scaling = door.LossScaleOptimizer("sgd")
        with pytest.raises(LossScaleError, match="wrapped already"):
            door.enable_mixed_precision_graph_rewrite(scaling)
        assert not is_on()

    def test_a_model_trains_with_it_and_skips_bad_steps(self, with_gpu):
        optimizer = door.enable_mixed_precision_graph_rewrite("sgd")
        model = model_of()
        model.compile(optimizer, "mse", jit_compile=False)
        x, y = np.ones((2, 2), "float32"), np.ones((2, 1), "float32")
        before = model.get_weights()[0]
        model.train_on_batch(x * np.inf, y)
        assert np.array_equal(before, model.get_weights()[0])
        model.train_on_batch(x, y)
        assert not np.array_equal(before, model.get_weights()[0])
        assert optimizer.skipped_steps == 1

    def test_where_no_device_is_rewritten_for_it_says_so(self, monkeypatch):
        monkeypatch.setattr(graph_rewrite, "devices", tuple)
        with pytest.warns(PolicyWarning, match="There is none here: everything will run in float3"):
            door.enable_mixed_precision_graph_rewrite("sgd")
        assert is_on()

    @pytest.mark.parametrize(("capability", "enough"), [((6, 1), False), ((7, 0), True)])
    def test_a_gpu_counts_from_7_0(self, monkeypatch, capability, enough):
        import tensorflow as tf

        monkeypatch.setattr(graph_rewrite, "devices", tuple)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
        details = {"compute_capability": capability}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: details)
        assert graph_rewrite._has_device() is enough


@on_tensorflow
class TestWithPolicies:
    def test_a_16_bit_policy_in_force_is_refused(self):
        with (
            door.policy_scope("mixed_float16"),
            pytest.raises(PolicyError, match='the global policy is <Policy "mixed_float16"'),
        ):
            door.enable_mixed_precision_graph_rewrite("sgd")
        assert not is_on()

    @pytest.mark.parametrize(
        "say",
        [
            door.set_global_policy,
            experimental.set_policy,
            keras.config.set_dtype_policy,
            lambda policy: door.policy_scope(policy).__enter__(),
        ],
    )
    @pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
    def test_a_16_bit_policy_afterwards_is_refused(self, with_gpu, say, policy):
        door.enable_mixed_precision_graph_rewrite("sgd")
        with pytest.raises(PolicyError, match="cannot be combined: the rewrite is on"):
            say(policy)
        assert door.global_policy().compute_dtype == "float32"
        say("float32")
        door.disable_mixed_precision_graph_rewrite()
        door.set_global_policy(policy)
        assert door.global_policy().name == policy

    def test_a_layer_of_16_bits_is_refused_when_its_model_is_compiled(self, with_gpu):
        optimizer = door.enable_mixed_precision_graph_rewrite("sgd")
        with pytest.raises(PolicyError, match="cannot be combined: the rewrite is on, and 'net/de"):
            model_of("mixed_float16").compile(optimizer, "mse", jit_compile=False)

    def test_a_model_that_xla_compiles_is_told_that_it_is_not_rewritten(self, with_gpu):
        optimizer = door.enable_mixed_precision_graph_rewrite("sgd")
        with pytest.warns(PolicyWarning, match="XLA compiles the model 'net'.*jit_compile=False"):
            model_of().compile(optimizer, "mse", jit_compile=True)
