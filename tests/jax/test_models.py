"""Models of Flax, Equinox and plain JAX, none of them edited."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
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
    """The benchmarks' models, which are no package of the tests; each is made once."""
    path = Path(__file__).parents[2] / "benchmarks" / "jax_zoo.py"
    spec = importlib.util.spec_from_file_location("halfstep_jax_zoo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.MODELS = {name: cache(make) for name, make in module.MODELS.items()}
    return module


@pytest.fixture(scope="module")
def traced(zoo):
    """Value and gradient of a model: as it is, by autocast, by hand; each is traced once."""
    ways = {
        "float32": lambda model: model.loss,
        "autocast": lambda model: autocast(model.loss),
        "by hand": lambda model: model.by_hand,
    }

    @cache
    def found(name, way):
        model = zoo.MODELS[name]()
        differentiated = jax.value_and_grad(ways[way](model), has_aux=model.has_aux)
        return jax.jit(differentiated).trace(model.params, model.batch)

    return found


@pytest.fixture(scope="module")
def gradient(zoo, traced):
    """The numbers that come out."""

    @cache
    def found(name, way):
        model = zoo.MODELS[name]()
        return traced(name, way).lower().compile()(model.params, model.batch)

    return found


NAMES = [
    "linen transformer, scanned", "the same, checkpointed", "nnx transformer, scanned",
    "equinox classifier", "plain JAX, scanned", "convnet with batch norm",
]  # fmt: skip
LINEN, PLAIN, CONVNET = NAMES[0], NAMES[4], NAMES[5]


def test_every_model_of_the_zoo_is_tested(zoo):
    assert [*zoo.MODELS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_all_products_are_in_16_bits(traced, products, name):
    low, every = products(traced(name, "autocast"))
    assert low == every > 0


@pytest.mark.parametrize("name", [name for name in NAMES if "same" not in name])
def test_gradients_are_float32_and_near(far, gradient, name):
    expected, found = gradient(name, "float32"), gradient(name, "autocast")
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    error = far(found[1], expected[1])
    assert 0 < error < 0.12
    if "linen" in name:
        assert error < 1.25 * far(gradient(name, "by hand")[1], expected[1])


def test_what_a_scan_keeps_for_the_backward_pass_is_smaller(traced, equations):
    def edge(way) -> int:
        found = equations(traced(LINEN, way))
        scan = next(e for e in found if e.primitive.name == "scan")
        return sum(var.aval.size * var.aval.dtype.itemsize for var in scan.outvars)

    low = edge("autocast")
    assert low <= 0.6 * edge("float32")
    assert low < edge("by hand")


def test_autocast_around_the_gradient_of_a_model_is_right_too(far, gradient, zoo, products):
    plain = zoo.MODELS[PLAIN]()
    outside = autocast(jax.value_and_grad(plain.loss))
    found = jax.jit(outside)(plain.params, plain.batch)
    assert far(found, gradient(PLAIN, "float32")) < 0.03
    for model in (plain, zoo.MODELS[LINEN]()):
        low, every = products(autocast(jax.grad(model.loss)), model.params, model.batch)
        assert low == every


def test_running_statistics_of_batch_norm_stay_float32(gradient):
    (_, expected), _ = gradient(CONVNET, "float32")
    (_, found), _ = gradient(CONVNET, "autocast")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=0.01, atol=1e-3)


def test_a_flax_module_is_named_by_its_path(zoo):
    model = zoo.MODELS[LINEN]()
    policy = PolicyMap(
        "mixed_bfloat16", {"Transformer/head": "float32", r".*/layers/up": "float32"}
    )
    rows = explain(model.loss, policy)(model.params, model.batch).rows
    high = {row.path for row in rows if row.flops and row.dtype == "float32"}
    assert high == {"Transformer/head", "Transformer/layers/up"}
    assert all(row.dtype == "bfloat16" for row in rows if row.flops and row.path not in high)


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("nnx transformer, scanned", "params/blocks/up", 1),
        ("equinox classifier", "params/attention", 4),
    ],
)
def test_a_module_that_opens_no_scope_is_named_by_its_parameters(zoo, name, key, count):
    model = zoo.MODELS[name]()
    policy = PolicyMap("mixed_bfloat16", {key: "float32"})
    rows = explain(model.loss, policy)(model.params, model.batch).rows
    high = [row for row in rows if row.flops and row.dtype == "float32"]
    assert len(high) == count
    assert all(f"override {key!r}" in row.why for row in high)


@pytest.fixture(scope="module")
def trained(zoo):
    """Eighty steps under a policy: the last loss, and the optimizer's state."""
    model = zoo.MODELS[PLAIN]()

    @cache
    def train(policy, scale):
        loss = autocast(model.loss, policy)
        start = None if scale is None else DynamicLossScale(initial_scale=scale)
        tx = loss_scaled(optax.adam(3e-3), start)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: scale_loss(loss(params, model.batch), state))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = model.params, tx.init(model.params)
        run = jax.jit(lambda start: jax.lax.scan(step, start, None, length=80)[0])
        params, state = run(start)
        return float(model.loss(params, model.batch)), state

    return train


@pytest.mark.parametrize(
    ("policy", "scale"), [("mixed_bfloat16", None), ("mixed_float16", 2.0**24)]
)
def test_training_reaches_the_loss_of_float32(zoo, trained, policy, scale):
    model = zoo.MODELS[PLAIN]()
    first = float(model.loss(model.params, model.batch))
    expected, _ = trained("float32", None)
    found, state = trained(policy, scale)
    assert expected < 0.3 * first
    assert abs(found - expected) < 0.1 * first
    if scale is not None:
        assert float(state.loss_scale.skipped_steps) > 0  # it started by overflowing
