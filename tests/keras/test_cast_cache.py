"""A weight that is read many times in one call is cast once (torch; the others merge casts)."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import halfstep.keras  # noqa: F401

if keras.backend.backend() != "torch":
    pytest.skip("JAX and TensorFlow merge equal casts when they compile", allow_module_level=True)

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    """Counts casts of float32 tensors, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].dtype == torch.float32:
            self.shapes.append(tuple(args[0].shape))
        return result


@pytest.fixture
def shared():
    """A ``Dense`` called eight times."""
    dense = keras.layers.Dense(3, dtype="mixed_float16")
    inputs = outputs = keras.Input((3,))
    for _ in range(8):
        outputs = dense(outputs)
    return keras.Model(inputs, outputs)


X = np.ones((2, 3), "float32")


def test_a_shared_layer_casts_its_weights_once(shared):
    with Casts() as seen:
        shared(X)
    assert seen.shapes.count((3, 3)) == 1
    assert seen.shapes.count((3,)) == 1


def test_each_call_casts_anew(shared):
    with torch.no_grad():
        first = shared(X).clone()
    shared(X)
    for weight in shared.trainable_weights:
        weight.assign(weight * 0)
    np.testing.assert_array_equal(shared(X).detach().numpy(), 0)
    assert (first != 0).any()


def test_gradients_are_those_of_the_uncached(shared):
    """They add up in the one cast, in float16, as under torch.autocast."""

    def gradients(model):
        for parameter in model.parameters():
            parameter.grad = None
        model(X).float().square().mean().backward()
        return [weight.value.grad.clone() for weight in model.trainable_weights]

    cached = gradients(shared)
    maybe_cast = keras.src.backend.common.variables.AutocastScope.maybe_cast
    scope = keras.src.backend.common.variables.AutocastScope
    scope.maybe_cast = maybe_cast.__wrapped__
    try:
        plain = gradients(shared)
    finally:
        scope.maybe_cast = maybe_cast
    for one, other in zip(cached, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=1e-4)


def test_a_weight_that_changes_within_a_call_is_cast_again():
    class Changes(keras.layers.Layer):
        def build(self, _):
            self.kernel = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            before = x * self.kernel
            with torch.no_grad():
                self.kernel._value.mul_(2)
            return before, x * self.kernel

    before, after = Changes(dtype="mixed_float16")(np.ones(2, "float32"))
    assert before.tolist() == [1, 1]
    assert after.tolist() == [2, 2]


def test_a_cast_that_was_written_to_is_not_used_again():
    class Writes(keras.layers.Layer):
        def build(self, _):
            self.kernel = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            self.kernel.value.detach().mul_(2)
            return x * self.kernel

    assert Writes(dtype="mixed_float16")(np.ones(2, "float32")).tolist() == [1, 1]


def test_without_gradients_nothing_is_kept(shared):
    """Copies of all weights would be half a model more."""
    with torch.no_grad(), Casts() as seen:
        shared(X)
    assert seen.shapes.count((3, 3)) == 8
