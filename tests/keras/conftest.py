"""Keras for these tests, on the one backend of this process, and ways to take a scaled step."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
keras = pytest.importorskip("keras")

BACKEND = keras.backend.backend()

from halfstep.core.global_policy import UNSET, install  # noqa: E402  (after the skip)


@pytest.fixture
def backend() -> str:
    """The backend of this process."""
    return BACKEND


@pytest.fixture
def run_python(tmp_path):
    """Run a piece of Python in a process of its own, on this backend; return what it printed."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "KERAS_BACKEND": BACKEND, "JAX_PLATFORMS": "cpu", **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def _eager(optimizer, variables, grads, style):
    scale = optimizer.scale_loss(keras.ops.convert_to_tensor(1.0))
    scaled = [None if grad is None else keras.ops.convert_to_tensor(grad) * scale for grad in grads]
    _finish(optimizer, variables, scaled, style)


def _finish(optimizer, variables, scaled, style):
    if style == "guide":
        unscaled = optimizer.get_unscaled_gradients(scaled)
        optimizer.apply_gradients(zip(unscaled, variables, strict=True))
    else:
        optimizer.apply(scaled, variables)


def _by_tensorflow(made, optimizer, variables, grads, style):
    import tensorflow as tf

    if not made:
        optimizer.build(variables)
        made.append(
            tf.function(lambda *grads: _eager(optimizer, variables, grads, style), autograph=False)
        )
    made[0](*(tf.constant(grad) for grad in grads))


def _by_jax(made, optimizer, variables, grads, style):
    import jax

    def step(values, own, grads):
        scaled = [grad * optimizer.scale_loss(1.0, own) for grad in grads]
        if style == "guide":
            scaled = optimizer.get_unscaled_gradients(scaled, own)
        return optimizer.stateless_apply(own, scaled, values)

    if not made:
        optimizer.build(variables)
        made.append(jax.jit(step))
    values, own = made[0](
        [variable.value for variable in variables],
        [variable.value for variable in optimizer.variables],
        [np.asarray(grad) for grad in grads],
    )
    for variable, value in zip([*variables, *optimizer.variables], [*values, *own], strict=True):
        variable.assign(value)


WAYS = {
    "torch": {"eager": None},
    "jax": {"eager": None, "jitted": _by_jax},
    "tensorflow": {"eager": None, "in a graph": _by_tensorflow},
}[BACKEND]


@pytest.fixture(params=WAYS)
def step(request):
    """Take a step with gradients of a loss that was scaled: ``step(optimizer, variables, grads)``.

    The gradients are given unscaled. It runs as written, and compiled where the backend compiles.
    """
    compiled = WAYS[request.param]
    functions = {}

    def run(optimizer, variables, grads, style="keras"):
        grads = [None if grad is None else np.asarray(grad, "float32") for grad in grads]
        if compiled is None:
            _eager(optimizer, variables, grads, style)
        else:
            made = functions.setdefault((id(optimizer), style), [])
            compiled(made, optimizer, variables, grads, style)

    return run


@pytest.fixture
def variable():
    """Make a trainable float32 variable: ``variable(1.0, 2.0)``."""
    return lambda *values: keras.Variable(np.asarray(values, "float32"), name="weight")


@pytest.fixture
def values():
    """What an optimizer and variables hold, as NumPy arrays."""

    def read(optimizer, variables):
        inner = optimizer.inner_optimizer
        return [variable.numpy() for variable in [*variables, *inner.variables]]

    return read


@pytest.fixture(autouse=True, scope="session")
def compiled_quickly():
    """What JAX compiles here runs a few times; optimizing it costs more than it gives."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def float32_policy():
    """Leave the global policy as it was found."""
    before = keras.config.dtype_policy()
    yield
    install(UNSET)
    keras.config.set_dtype_policy(before)


def pytest_configure(config):
    """What Keras and the backends warn of in their own code, and what many models here do."""
    # a marker of Keras' own tests, some of which run here
    config.addinivalue_line("markers", "requires_trainable_backend: Keras trains on it")
    for warning in (
        # Keras on JAX and TensorFlow, of its own epsilons in float16
        "ignore:overflow encountered in cast:RuntimeWarning",
        # most models here end in 16 bits; the tests about that look for the warning
        "ignore:The (softmax|last layer|output).* model:halfstep.PolicyWarning",
        # keras.Variable.numpy() under NumPy 2
        "ignore:.*__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", warning)
