"""Loss scaling under jit: the state, the gradients, the optimizer."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import halfstep
from halfstep.jax import (
    DynamicLossScale,
    FixedLossScale,
    NoLossScale,
    all_finite,
    check_loss_scale,
    loss_scaled,
    scale_loss,
    value_and_grad,
)

advance = jax.jit(lambda scale, finite: scale.update(finite))


def run(scale, steps, step=advance):
    history = []
    for finite in steps:
        scale = step(scale, finite)
        history.append(float(scale.scale))
    return scale, history


# the state is a pytree, whole


SCALES = [
    DynamicLossScale(
        initial_scale=8, growth_interval=3, growth_factor=4, backoff_factor=0.25, hysteresis=2,
        min_scale=0.25, max_scale=2**20, patience=3,
    ),
    FixedLossScale(1024, patience=2),
    NoLossScale(),
]  # fmt: skip


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: type(scale).__name__)
@pytest.mark.parametrize(
    "trip",
    [
        lambda tree: jax.tree.map(lambda leaf: leaf, tree),
        jax.jit(lambda tree: tree),
        jax.jit(lambda tree: tree, donate_argnums=0),
        lambda tree: pickle.loads(pickle.dumps(tree)),
        lambda tree: jax.tree.unflatten(
            jax.tree.structure(tree), [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        ),
        lambda tree: jax.lax.scan(lambda c, _: (c, None), tree, None, length=2)[0],
        lambda tree: jax.lax.cond(True, lambda t: t, lambda t: t, tree),
        lambda tree: jax.device_put(tree),
    ],
    ids=["tree.map", "jit", "donated", "pickle", "checkpoint", "scan", "cond", "device_put"],
)
def test_every_field_survives(scale, trip):
    given = jax.tree.map(jnp.array, scale)
    expected = [float(leaf) for leaf in jax.tree.leaves(given)]
    back = trip(given)
    assert type(back) is type(scale)
    assert back.rule == scale.rule
    assert [float(leaf) for leaf in jax.tree.leaves(back)] == expected


@pytest.mark.parametrize("scale", SCALES[:2], ids=lambda scale: type(scale).__name__)
def test_jit_gives_what_the_core_gives(scale):
    steps = np.random.default_rng(0).random(60) < 0.6
    rule = scale.rule
    state = rule.init()
    for finite in steps:
        scale, state = advance(scale, bool(finite)), rule.update(state, bool(finite))
        assert [float(leaf) for leaf in scale.state] == [float(field) for field in state]


def test_a_scan_over_steps_keeps_the_types():
    finite = jnp.array([True, False, True, True])
    scale, scales = jax.lax.scan(
        lambda s, f: ((n := s.update(f)), n.scale), DynamicLossScale(growth_interval=2), finite
    )
    np.testing.assert_array_equal(scales, [2**15, 2**14, 2**14, 2**15])
    assert scale.skipped_steps == 1


def test_bad_values_are_refused_by_the_core():
    with pytest.raises(halfstep.LossScaleError, match="growth_factor"):
        DynamicLossScale(growth_factor=1)
    with pytest.raises(halfstep.LossScaleError, match="loss_scale='dynamik'"):
        loss_scaled(optax.sgd(1.0), "dynamik")
    with pytest.raises(halfstep.LossScaleError, match="int32"):
        scale_loss(jnp.arange(3), FixedLossScale(2))


# value_and_grad


def test_what_is_lost_without_a_scale_is_kept_with_one():
    def loss(x):
        return (x.astype(jnp.float16) * np.float16(1e-3) * np.float16(1e-5)).sum()

    x = jnp.ones(2)
    assert not jax.grad(loss)(x).any()
    _, grads, finite = value_and_grad(loss, 2.0**12)(x)
    np.testing.assert_allclose(grads, 1e-8, rtol=0.02)
    assert finite


def test_aux_argnums_and_integers():
    def loss(w, step, bias):
        return (w["a"] * bias).sum(), {"step": step}

    (value, aux), grads, finite = value_and_grad(
        loss, DynamicLossScale(), argnums=(0, 2), has_aux=True
    )({"a": jnp.ones(2, jnp.bfloat16)}, 3, jnp.float32(2))
    assert (float(value), aux) == (4.0, {"step": 3})
    assert grads[0]["a"].dtype == jnp.float32
    assert float(grads[1]) == 2
    assert finite


def test_a_gradient_that_is_not_finite_is_reported():
    _, _, finite = value_and_grad(lambda x: jnp.sqrt(x).sum(), 1024)(jnp.zeros(1))
    assert not finite
    assert not all_finite({"a": jnp.ones(2), "b": [jnp.array([1.0, jnp.nan])]})
    assert all_finite({"a": jnp.arange(3), "none": None})


# the optimizer


PARAMS = {"w": jnp.arange(1.0, 5.0), "b": jnp.array(0.5)}
GRADS = {"w": jnp.linspace(-1, 1, 4), "b": jnp.array(2.0)}


def scaled(grads, state):
    return jax.tree.map(lambda grad: grad * state.loss_scale.scale, grads)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "noisy": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}


def numbers(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                   else leaf)
        for leaf in jax.tree.leaves(tree)
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_bare_optimizer(name):
    bare, tx = OPTIMIZERS[name], loss_scaled(OPTIMIZERS[name])
    plain_state, state = bare.init(PARAMS), tx.init(PARAMS)
    step = jax.jit(tx.update)
    for _ in range(2):
        expected, plain_state = jax.jit(bare.update)(GRADS, plain_state, PARAMS)
        updates, state = step(scaled(GRADS, state), state, PARAMS)
        for one, other in zip(numbers(updates), numbers(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    for one, other in zip(numbers(state.inner_state), numbers(plain_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_the_inner_state_bit_for_bit(name):
    tx = loss_scaled(OPTIMIZERS[name])
    step = jax.jit(tx.update)
    _, state = step(scaled(GRADS, tx.init(PARAMS)), tx.init(PARAMS), PARAMS)
    before = [leaf.tobytes() for leaf in numbers(state.inner_state)]
    for bad in (jnp.nan, jnp.inf):
        updates, after = step({**scaled(GRADS, state), "b": jnp.array(bad)}, state, PARAMS)
        assert [leaf.tobytes() for leaf in numbers(after.inner_state)] == before
        assert all(not leaf.any() for leaf in numbers(updates))
        assert bool(after.last_step_skipped)
        assert float(after.loss_scale.skipped_steps) == 1
        assert after.loss_scale.scale == state.loss_scale.scale / 2
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_training_goes_on_after_a_first_scale_that_overflows():
    tx = loss_scaled(optax.adam(0.05), DynamicLossScale(initial_scale=2**24))
    x = jnp.linspace(-1, 1, 32)[:, None]

    def loss(w):
        hidden = jnp.tanh(x.astype(jnp.float16) @ w["a"].astype(jnp.float16))
        return ((hidden @ w["b"].astype(jnp.float16) - jnp.sin(3 * x)) ** 2).mean() * 10

    @jax.jit
    def step(w, state):
        grads = jax.grad(lambda w: scale_loss(loss(w), state))(w)
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    keys = jax.random.split(jax.random.key(0))
    w = {"a": jax.random.normal(keys[0], (1, 16)), "b": jax.random.normal(keys[1], (16, 1)) / 4}
    first, state = loss(w), tx.init(w)
    for _ in range(150):
        w, state = step(w, state)
    assert loss(w) < 0.1 * first
    assert 1 <= float(state.loss_scale.skipped_steps) < 20
    assert state.loss_scale.scale < 2**24


def test_without_a_scale_nothing_is_skipped():
    tx = loss_scaled(optax.sgd(1.0), None)
    updates, state = tx.update({"b": jnp.array(jnp.nan)}, tx.init({"b": jnp.array(1.0)}))
    assert jnp.isnan(updates["b"])
    assert not state.last_step_skipped


def test_extra_arguments_reach_the_inner_optimizer():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(float(value))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = loss_scaled(inner, 1.0)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0)
    assert seen == [3.0]


def test_it_stands_inside_of_other_transformations():
    tx = optax.chain(loss_scaled(optax.sgd(1.0), 4.0), optax.scale(0.5))
    state = tx.init(PARAMS)
    grads = jax.grad(lambda p: scale_loss(p["b"] ** 2, state))(PARAMS)
    updates, _ = tx.update(grads, state, PARAMS)
    assert float(updates["b"]) == -0.5


def test_a_state_without_a_loss_scale_or_with_two_is_refused():
    with pytest.raises(halfstep.LossScaleError, match="no loss scale"):
        scale_loss(1.0, optax.sgd(1.0).init(PARAMS))
    twice = optax.chain(loss_scaled(optax.sgd(1.0)), loss_scaled(optax.sgd(1.0)))
    with pytest.raises(halfstep.LossScaleError, match="2 loss scales"):
        scale_loss(1.0, twice.init(PARAMS))


def test_a_donated_state_can_be_made_again():
    tx = loss_scaled(optax.sgd(1.0))
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    for _ in range(2):
        state = tx.init(PARAMS)
        step(jax.tree.map(jnp.array, GRADS), state, PARAMS)


def test_debug_nans_does_not_fire_inside_the_optimizer():
    tx = loss_scaled(optax.adam(1e-3))
    state = tx.init(PARAMS)
    bad = {**GRADS, "b": jnp.array(jnp.inf)}
    with jax.debug_nans(True):
        _, state = tx.update(bad, state, PARAMS)
    assert state.last_step_skipped


def test_a_scale_at_its_end_is_said():
    scale, _ = run(DynamicLossScale(initial_scale=2, patience=3), [False] * 3)
    with pytest.raises(halfstep.LossScaleExhausted, match="3 steps in a row"):
        check_loss_scale(scale)
    check_loss_scale(DynamicLossScale())
    rule = DynamicLossScale(initial_scale=1, patience=1)
    tx = loss_scaled(optax.sgd(1.0), rule)
    _, state = tx.update({"b": jnp.array(jnp.inf)}, tx.init({"b": jnp.array(1.0)}))
    with pytest.raises(halfstep.LossScaleExhausted):
        check_loss_scale(state, rule)
    with pytest.raises(halfstep.LossScaleError, match="rule="):
        check_loss_scale(state)


def test_all_along_a_mapped_axis_agree():
    shards = jnp.array([[1.0, 2.0], [jnp.inf, 1.0], [3.0, 4.0]])
    tx = loss_scaled(optax.sgd(1.0), axis_name="batch")
    state = tx.init(shards[0])
    updates, after = jax.vmap(
        lambda grads: tx.update(grads, state), axis_name="batch"
    )(shards)  # fmt: skip
    assert not updates.any()
    assert after.last_step_skipped.all()
    _, alone = jax.vmap(lambda grads: loss_scaled(optax.sgd(1.0)).update(grads, state))(shards)
    assert alone.last_step_skipped.tolist() == [False, True, False]
    _, _, finite = jax.vmap(
        lambda x: value_and_grad(lambda x: (x * x).sum(), 2.0, axis_name="batch")(x),
        axis_name="batch",
    )(shards)
    assert finite.tolist() == [False] * 3


SHARDED = """
import jax, jax.numpy as jnp, optax
from jax.sharding import PartitionSpec as P
from halfstep.jax import loss_scaled, scale_loss
mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
tx = loss_scaled(optax.adam(1e-2), axis_name="d")
for check_vma in (True, False):
    w = jnp.ones(4)
    state = tx.init(w)
    def step(w, x, state):
        # each device's own gradient, unscaled and judged before anything is averaged
        local = jax.lax.pcast(w, ("d",), to="varying") if check_vma else w
        grads = jax.grad(lambda w: scale_loss((w * x).sum(), state))(local)
        updates, state = tx.update(grads, state, w)
        return updates[None], jax.tree.map(lambda leaf: leaf[None], state)
    x = jnp.ones((8, 4)).at[5, 2].set(jnp.inf)
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d"), P()),
                                   out_specs=P("d"), check_vma=check_vma))
    updates, after = mapped(w, x, state)
    assert after.last_step_skipped.tolist() == [True] * 8, after.last_step_skipped
    assert not updates.any()
    updates, after = mapped(w, jnp.ones((8, 4)), state)
    assert after.last_step_skipped.tolist() == [False] * 8
    assert updates.all()
"""


def test_all_devices_of_a_shard_map_agree(on_eight_devices):
    on_eight_devices(SHARDED)
