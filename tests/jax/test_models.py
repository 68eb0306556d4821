"""Models of Flax, Equinox and plain JAX, none of them edited."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halfstep import PolicyMap
from halfstep.jax import DynamicLossScale, autocast, explain, loss_scaled, scale_loss

pytest.importorskip("flax")
pytest.importorskip("equinox")


@pytest.fixture(scope="module")
def zoo():
    """The models are the benchmarks' ones, which are no package of the tests."""
    path = Path(__file__).parents[2] / "benchmarks" / "jax_zoo.py"
    spec = importlib.util.spec_from_file_location("halfstep_jax_zoo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NAMES = [
    "linen transformer, scanned", "the same, checkpointed", "nnx transformer, scanned",
    "equinox classifier", "plain JAX, scanned", "convnet with batch norm",
]  # fmt: skip


def far(one, other) -> float:
    one, other = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def gradient(model, loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=model.has_aux))(model.params, model.batch)


def test_every_model_of_the_zoo_is_tested(zoo):
    assert [*zoo.MODELS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_all_products_are_in_16_bits(zoo, products, name):
    model = zoo.MODELS[name]()
    grad = jax.grad(autocast(model.loss), has_aux=model.has_aux)
    low, every = products(grad, model.params, model.batch)
    assert low == every > 0


@pytest.mark.parametrize("name", [name for name in NAMES if "same" not in name])
def test_gradients_are_float32_and_near(zoo, name):
    model = zoo.MODELS[name]()
    expected, found = gradient(model, model.loss), gradient(model, autocast(model.loss))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    error = far(found[1], expected[1])
    assert 0 < error < 0.12
    if "linen" in name:
        assert error < 1.25 * far(gradient(model, model.by_hand)[1], expected[1])


def test_what_a_scan_keeps_for_the_backward_pass_is_smaller(zoo, equations):
    model = zoo.linen_model()

    def edge(loss) -> int:
        found = equations(jax.grad(loss), model.params, model.batch)
        scan = next(e for e in found if e.primitive.name == "scan")
        return sum(var.aval.size * var.aval.dtype.itemsize for var in scan.outvars)

    assert edge(autocast(model.loss)) <= 0.6 * edge(model.loss)
    assert edge(autocast(model.loss)) < edge(model.by_hand)


def test_autocast_around_the_gradient_of_a_model_is_right_too(zoo, products):
    model = zoo.plain_model()
    outside = autocast(jax.value_and_grad(model.loss))
    assert far(jax.jit(outside)(model.params, model.batch), gradient(model, model.loss)) < 0.03
    for each in (model, zoo.linen_model()):
        low, every = products(autocast(jax.grad(each.loss)), each.params, each.batch)
        assert low == every


def test_running_statistics_of_batch_norm_stay_float32(zoo):
    model = zoo.convnet_model()
    (_, expected), _ = gradient(model, model.loss)
    (_, found), _ = gradient(model, autocast(model.loss))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=0.01, atol=1e-3)


def test_a_flax_module_is_named_by_its_path(zoo):
    model = zoo.linen_model()
    policy = PolicyMap(
        "mixed_bfloat16", {"Transformer/head": "float32", r".*/layers/up": "float32"}
    )
    rows = explain(model.loss, policy)(model.params, model.batch).rows
    high = {row.path for row in rows if row.flops and row.dtype == "float32"}
    assert high == {"Transformer/head", "Transformer/layers/up"}
    assert all(row.dtype == "bfloat16" for row in rows if row.flops and row.path not in high)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_training_reaches_the_loss_of_float32(zoo, policy):
    model = zoo.plain_model()

    def train(loss, tx):
        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(
                lambda params: scale_loss(loss(params, model.batch), state)
            )(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value / state.loss_scale.scale

        params, state = model.params, tx.init(model.params)
        for _ in range(80):
            params, state, _ = step(params, state)
        return model.loss(params, model.batch), state

    expected, _ = train(model.loss, loss_scaled(optax.adam(3e-3), None))
    scale = DynamicLossScale(initial_scale=2.0**24) if policy == "mixed_float16" else None
    found, state = train(autocast(model.loss, policy), loss_scaled(optax.adam(3e-3), scale))
    first = model.loss(model.params, model.batch)
    assert expected < 0.3 * first
    assert abs(found - expected) < 0.1 * first
    if scale is not None:
        assert float(state.loss_scale.skipped_steps) > 0  # it started by overflowing
