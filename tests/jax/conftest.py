"""JAX for these tests: on the CPU, and with eight devices where a test starts its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")

import halfstep.jax  # noqa: E402


@pytest.fixture(scope="session")
def far():
    """The relative distance of two pytrees of arrays."""

    def distance(one, other) -> float:
        one, other = (
            np.concatenate(
                [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
            )
            for tree in (one, other)
        )
        return float(np.linalg.norm(one - other) / np.linalg.norm(other))

    return distance


@pytest.fixture(scope="session")
def on_eight_devices():
    """Run a piece of Python in a process of its own, where JAX sees eight devices."""

    def run(code: str) -> str:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


def _bodies(params):
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "jaxpr"):
                yield one.jaxpr
            elif hasattr(one, "eqns"):
                yield one


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for body in _bodies(equation.params):
            yield from _equations(body)


@pytest.fixture
def equations():
    """All equations of a program, those in bodies too: ``equations(f, *args)`` or of a trace."""

    def found(function, *args) -> list:
        closed = function.jaxpr if hasattr(function, "jaxpr") else jax.make_jaxpr(function)(*args)
        return list(_equations(closed.jaxpr))

    return found


@pytest.fixture
def products(equations):
    """Matrix products and convolutions: how many are in 16 bits, and how many there are."""

    def count(function, *args) -> tuple[int, int]:
        dtypes = [
            equation.invars[0].aval.dtype.name
            for equation in equations(function, *args)
            if equation.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        return sum(name in ("bfloat16", "float16") for name in dtypes), len(dtypes)

    return count


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly():
    """What is compiled here runs once; optimizing it costs more than it gives."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def check_all_ways(far, products):
    """Value and gradient under autocast, both ways round: near, float32, all products low."""

    def check(loss, *args, count=None, rtol=0.03):
        expected = jax.jit(jax.value_and_grad(loss))(*args)
        inside = jax.value_and_grad(halfstep.jax.autocast(loss))
        outside = halfstep.jax.autocast(jax.value_and_grad(loss))
        for function in (inside, outside):
            found = jax.jit(function)(*args)
            assert all(leaf.dtype == jax.numpy.float32 for leaf in jax.tree.leaves(found))
            assert 0 < far(found, expected) < rtol
            low, every = products(function, *args)
            assert low == every
            assert count is None or every == count

    return check
