"""The faults of jmp, MPX, Flax's DynamicScale and optax, none of which happens here.

jmp 0.0.4
    a 16-bit initial scale does not adjust     test_a_16_bit_initial_scale_adjusts
    min_loss_scale is lost under jit           test_the_floor_survives_jit
    a strongly typed scalar promotes the rest  test_one_float32_constant_promotes_nothing
    setup.py says python_requires wrongly      test_the_distribution_says_which_python_it_needs
    (its policies are for a whole function or, in Haiku, a class; ours for a scope: test_scopes)
MPX 0.1.8
    set_half_precision_datatype("bfloat16") does nothing
                                               test_a_policy_by_its_name_takes_effect
    gradients unscaled with the new scale      test_gradients_are_unscaled_with_the_scale_...
    a bfloat16 loss times a float16 scale      test_the_scale_of_a_bfloat16_loss_is_not_16_bit
    force_full_precision returns float16       test_what_is_kept_in_float32_comes_out_in_float32
    (it needs Equinox layers marked by hand; there is no wrapper of layers here)
Flax 0.12 DynamicScale
    a float16 loss overflows in the first step test_a_float16_loss_does_not_overflow_...
    growth one step late                       test_growth_comes_after_exactly_the_interval
    the caller must select, or takes a bad step
                                               test_a_bad_step_is_never_taken
optax apply_if_finite
    takes the bad update after so many in a row
                                               test_a_bad_step_is_never_taken
"""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import halfstep
from halfstep.jax import (
    DynamicLossScale,
    FixedLossScale,
    autocast,
    explain,
    loss_scaled,
    policy_scope,
    scale_loss,
    value_and_grad,
)

X = jax.random.normal(jax.random.key(0), (4, 8))
advance = jax.jit(lambda scale, finite: scale.update(finite))


def run(scale, steps):
    history = []
    for finite in steps:
        scale = advance(scale, finite)
        history.append(float(scale.scale))
    return scale, history


def test_a_16_bit_initial_scale_adjusts():
    # jmp: DynamicLossScale(jmp.half_dtype()(2**15)).adjust(...) raises TypeError
    scale, history = run(DynamicLossScale(initial_scale=jnp.float16(2**15)), [False])
    assert history == [2.0**14]
    assert scale.scale.dtype == jnp.float32


def test_the_floor_survives_jit():
    # jmp: min_scale is not in tree_flatten, any jit resets it to 1
    _, history = run(DynamicLossScale(initial_scale=1, min_scale=0.25), [False] * 4)
    assert history == [0.5, 0.25, 0.25, 0.25]


def test_gradients_are_unscaled_with_the_scale_they_were_scaled_by():
    # MPX: on a growth step loss and gradients come out halved
    @jax.jit
    def step(x, scale):
        value, grads, finite = value_and_grad(lambda x: (x**2).sum() / 2, scale)(x)
        return value, grads, scale.update(finite)

    x, scale = jnp.arange(4.0), DynamicLossScale(growth_interval=1)
    for grown in (2**16, 2**17, 2**18):
        value, grads, scale = step(x, scale)
        assert scale.scale == grown
        assert value == 7
        np.testing.assert_array_equal(grads, x)


def test_the_scale_of_a_bfloat16_loss_is_not_16_bit():
    # MPX: scale() multiplies by a float16 scale even for bfloat16, so 2**17 is infinite
    scaled = FixedLossScale(2**17).scale_loss(jnp.bfloat16(3))
    assert (scaled.dtype, float(scaled)) == (jnp.float32, 3 * 2**17)


def test_a_float16_loss_does_not_overflow_in_the_first_step():
    # Flax's DynamicScale: 65536 * a float16 loss overflows, the first step is always skipped
    @jax.jit
    def step(x):
        return value_and_grad(lambda x: (x.astype(jnp.float16) ** 2).mean(), DynamicLossScale())(x)

    value, grads, finite = step(jnp.ones(4))
    assert value.dtype == jnp.float16
    assert finite
    np.testing.assert_array_equal(grads, np.full(4, 0.5))


def test_growth_comes_after_exactly_the_interval():
    # Flax's DynamicScale: after growth_interval + 1 steps
    _, history = run(DynamicLossScale(initial_scale=4, growth_interval=3), [True] * 6)
    assert history == [4, 4, 8, 8, 8, 16]


def test_many_bad_steps_leave_a_scale_that_works():
    scale, _ = run(DynamicLossScale(), [False] * 200)
    assert scale.scale == 1
    assert np.isfinite(float(scale.unscale(jnp.ones(()))))


def test_one_float32_constant_promotes_nothing(products):
    # jmp, MPX: x / np.float32(3) is float32, and so is every product after it
    def model(x):
        y = jnp.tanh((x @ x.T) / np.sqrt(np.float32(8)))
        return (y + np.ones((4, 4), np.float32)) @ x

    assert products(autocast(model), X) == (2, 2)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), X)
    assert products(model, cast) == (1, 2)


def test_the_distribution_says_which_python_it_needs():
    assert importlib.metadata.metadata("halfstep")["Requires-Python"] == ">=3.11"


def test_a_policy_by_its_name_takes_effect():
    for name in ("bfloat16", "float16"):
        rows = explain(lambda x: x @ x.T, f"mixed_{name}")(X).rows
        assert [row.dtype for row in rows if row.flops] == [name]
    with pytest.raises(halfstep.PolicyError, match="'bf16'.*unknown policy"):
        autocast(jnp.dot, "bf16")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_what_is_kept_in_float32_comes_out_in_float32(policy):
    def model(x):
        y = x @ x.T
        with policy_scope("float32"):
            return x @ x.T, y

    kept, low = autocast(model, policy, output_dtype=None)(X)
    assert (kept.dtype, low.dtype) == (jnp.float32, jnp.dtype(policy.removeprefix("mixed_")))
    np.testing.assert_array_equal(kept, X @ X.T)


def test_a_bad_step_is_never_taken():
    tx = loss_scaled(optax.adam(1.0), DynamicLossScale(initial_scale=4))
    params = jnp.ones(3)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(20):
        grads = jax.grad(lambda p, s=state: scale_loss((p * jnp.inf).sum(), s))(params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, np.ones(3))
    assert float(state.loss_scale.skipped_steps) == 20
