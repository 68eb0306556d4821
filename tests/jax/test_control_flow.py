"""Loops, branches, checkpoints and functions with their own derivatives, under autocast."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halfstep import PolicyMap
from halfstep.jax import NotTraceableError, autocast

X = jax.random.normal(jax.random.key(0), (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) / 3
WS = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 3


def test_scan(check_all_ways):
    def loss(ws, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w) @ w, (x**2).sum()

        x, sizes = jax.lax.scan(layer, x, ws)
        return (x**2).mean() + sizes.mean() / 100

    check_all_ways(loss, WS, X)


def test_scans_may_run_backwards_unrolled_and_without_inputs(check_all_ways):
    def loss(w, x):
        def layer(carry, _):
            x, count = carry
            return (jnp.tanh(x @ w), count + 1), None

        (x, count), _ = jax.lax.scan(layer, (x, 0), None, length=4, reverse=True, unroll=2)
        return (x**2).sum() * count

    check_all_ways(loss, W, X)


def test_weights_are_cast_outside_of_the_loop(equations):
    def loss(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ W, None), x, ws)[0].sum()

    scan = next(e for e in equations(autocast(loss), WS, X) if e.primitive.name == "scan")
    assert WS.shape in [v.aval.shape for v in scan.invars if v.aval.dtype == jnp.bfloat16]
    inside = [
        e for e in scan.params["jaxpr"].jaxpr.eqns if e.primitive.name == "convert_element_type"
    ]
    assert not [e for e in inside if e.outvars[0].aval.shape == (8, 8)]


def test_what_a_scan_stacks_is_low_where_it_was_made_low(equations):
    def hidden(ws, x):
        _, stacked = jax.lax.scan(lambda x, w: (x, jnp.tanh(x @ w) @ W), x, ws)
        return stacked

    scan = next(e for e in equations(autocast(hidden), WS, X) if e.primitive.name == "scan")
    assert scan.outvars[-1].aval.dtype == jnp.bfloat16


def test_a_sum_over_a_loop_is_exact():
    def total(x):
        one = x @ jnp.ones((1, 1))
        return jax.lax.fori_loop(0, 1000, lambda _, s: s + one, jnp.zeros((1, 1)))

    assert autocast(total)(jnp.ones((1, 1))) == 1000


def test_while_and_fori_loop(far, products):
    def steps(w, x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)
        return jax.lax.while_loop(
            lambda c: (c[0] < 3) & jnp.isfinite(c[1] @ w).all(),
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)),
            (0, x),
        )

    count, out = autocast(steps)(W, X)
    assert count == 3
    assert far(out, steps(W, X)[1]) < 0.03
    assert products(autocast(steps), W, X) == (3, 3)
    looped = autocast(lambda w: (jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), X)).sum())
    assert jax.grad(looped)(W).dtype == jnp.float32


def test_cond_and_switch(far, products):
    def loss(w, x, which):
        x = jax.lax.switch(
            which,
            [lambda x: x @ w, lambda x: jnp.exp(-jnp.abs(x)), lambda x: x],
            x,
        )
        return (jax.lax.cond(which < 2, lambda: x @ w, lambda: x @ w @ w) ** 2).mean()

    expected = jax.jit(jax.value_and_grad(loss))
    for way in (jax.value_and_grad(autocast(loss)), autocast(jax.value_and_grad(loss))):
        found = jax.jit(way)
        for which in range(3):
            assert 0 < far(found(W, X, which), expected(W, X, which)) < 0.05
        low, every = products(way, W, X, 0)
        assert low == every > 3


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(check_all_ways, policy):
    def loss(ws, x):
        @jax.checkpoint if policy is None else lambda f: jax.checkpoint(f, policy=policy)
        def layer(x, w):
            return jnp.tanh(x @ w) @ w + x, None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).mean()

    check_all_ways(loss, WS, X)


def test_checkpointed_code_runs_again_in_the_backward_pass(products):
    def loss(w, x):
        return (jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x) ** 2).mean()

    plain = products(jax.grad(loss), W, X)[1]
    assert products(jax.grad(autocast(loss)), W, X) == (plain, plain)
    assert products(autocast(jax.grad(loss)), W, X) == (plain, plain)


def test_custom_jvp(far, check_all_ways):
    @jax.custom_jvp
    def half_square(x):
        return (x @ W) * x / 2

    @half_square.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        return half_square(x), 7 * (t @ W) * x  # not the derivative: the rule must be the one used

    def loss(x):
        return half_square(jnp.tanh(x @ W)).mean()

    check_all_ways(loss, X)
    value, tangent = jax.jvp(autocast(loss), (X,), (X,))
    assert far((value, tangent), jax.jvp(loss, (X,), (X,))) < 0.03


def test_vmap_of_a_while_loop_that_ends_at_another_time_for_each_example(far, products):
    def halve(x):
        return jax.lax.while_loop(
            lambda c: jnp.abs(c[1]).max() > 0.2,
            lambda c: (c[0] + 1, jnp.tanh(c[1] @ W) / 2),
            (0, x),
        )

    starts = X * jnp.array([[0.01], [1.0], [4.0], [20.0]])[: len(X)]
    counts, expected = jax.vmap(halve)(starts)
    assert len(set(counts.tolist())) > 1
    for way in (autocast(jax.vmap(halve)), jax.vmap(autocast(halve))):
        found_counts, found = way(starts)
        assert found_counts.tolist() == counts.tolist()
        assert 0 < far(found, expected) < 0.03
        assert products(way, starts) == (1, 1)


def make_custom_vjp(symbolic_zeros=False):
    def product(x, w, times, scale):
        return jnp.sin(x @ w) * times, scale

    function = jax.custom_vjp(product, nondiff_argnums=(2,))

    def forward(x, w, times, scale):
        if symbolic_zeros:
            x, w, scale = x.value, w.value, scale.value
        return product(x, w, times, scale), (x, w, scale)

    def backward(times, saved, cotangents):
        x, w, _scale = saved
        g = cotangents[0]
        if symbolic_zeros and isinstance(g, jax.custom_derivatives.SymbolicZero):
            g = jnp.zeros(g.shape, g.dtype)
        inner = g * jnp.cos(x @ w) * times * 3  # not the derivative
        return inner @ w.T, x.T @ inner, None

    function.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
    return function


@pytest.mark.parametrize("symbolic_zeros", [False, True])
def test_custom_vjp_with_static_and_integer_arguments(check_all_ways, symbolic_zeros):
    function = make_custom_vjp(symbolic_zeros)

    def loss(w, x):
        y, count = function(jnp.tanh(x @ w), w, 2, jnp.int32(5))
        return (y**2).mean() * count

    check_all_ways(loss, W, X)


def test_custom_vjp_takes_an_integer_argument_of_the_function(far):
    rows = jax.custom_vjp(lambda x, w, ids: (x @ w)[ids])
    rows.defvjp(
        lambda x, w, ids: (rows(x, w, ids), (x, w, ids)),
        lambda saved, g: (
            jnp.zeros_like(saved[0]).at[saved[2]].add(g @ saved[1].T),
            saved[0][saved[2]].T @ g,
            np.zeros(saved[2].shape, jax.dtypes.float0),
        ),
    )

    def loss(w, x, ids):
        with jax.named_scope("rows"):
            return (rows(jnp.tanh(x @ w), w, ids) ** 2).mean()

    ids = jnp.array([1, 0, 1])
    expected = jax.grad(loss)(W, X, ids)
    assert 0 < far(jax.grad(autocast(loss))(W, X, ids), expected) < 0.03
    assert 0 < far(autocast(jax.grad(loss))(W, X, ids), expected) < 0.03
    # the integer argument has a path like any other
    kept = PolicyMap("mixed_bfloat16", {"ids": "float32"})
    assert far(jax.grad(autocast(loss, kept))(W, X, ids), expected) > 0


def test_custom_vjp_inside_of_a_scan_keeps_16_bit_residuals(check_all_ways, equations):
    function = make_custom_vjp()

    def loss(ws, x):
        def layer(x, w):
            return function(jnp.tanh(x @ w), w, 1, jnp.int32(1))[0], None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).mean()

    check_all_ways(loss, WS, X)
    found = equations(jax.grad(autocast(loss)), WS, X)
    scan = next(e for e in found if e.primitive.name == "scan")
    kept = [var.aval for var in scan.outvars if var.aval.ndim > 2]
    assert "bfloat16" in {aval.dtype.name for aval in kept}


def test_second_derivatives(far):
    def loss(x):
        return jnp.tanh(x @ W).sum() + jax.nn.softplus(x @ W).sum() + (jax.nn.relu(x) @ W).sum()

    def curvature(f):
        return jax.jit(jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()))(X)

    assert far(curvature(autocast(loss)), curvature(loss)) < 0.05
    hessian = jax.jit(jax.jacfwd(jax.jacrev(autocast(loss))))(X[:1, :])
    assert far(hessian, jax.jit(jax.jacfwd(jax.jacrev(loss)))(X[:1, :])) < 0.05


def capturing(w):
    """sin(x @ w), with a rule that captures w and calls the function itself."""
    function = jax.custom_vjp(lambda x: jnp.sin(x @ w))
    function.defvjp(
        lambda x: (function(x), x), lambda x, g: ((g * jnp.cos(x @ w)) @ w.T,)
    )  # fmt: skip
    return function


def test_second_derivatives_of_a_rule_that_captures_an_array(far):
    def curvature(w, x, around):
        loss = around(lambda x: capturing(w)(x).sum() + (x @ W).sum())
        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    expected = curvature(W, X, lambda f: f)
    assert far(curvature(W, X, autocast), expected) < 0.03
    # w is being traced, by jit, outside of autocast
    assert far(jax.jit(lambda w, x: curvature(w, x, autocast))(W, X), expected) < 0.03


def test_a_rule_that_captures_what_autocast_traces_is_named(far):
    def loss(w, x):
        return capturing(w)(x).sum()

    # jax.jit has the same limit
    with pytest.raises((jax.errors.UnexpectedTracerError, TypeError)):
        jax.grad(jax.jit(loss), 1)(W, X)
    with pytest.raises(NotTraceableError, match=r"captures an array.*autocast\(jax.grad\(f\)\)"):
        jax.grad(autocast(loss), 1)(W, X)
    assert far(autocast(jax.grad(loss, 1))(W, X), jax.grad(loss, 1)(W, X)) < 0.03


def test_a_rule_is_told_which_arguments_are_differentiated(far):
    told = []
    product = jax.custom_vjp(lambda x, w: x @ w)

    def forward(x, w):
        told.append((x.perturbed, w.perturbed))
        return x.value @ w.value, (x.value, w.value)

    product.defvjp(forward, lambda saved, g: (g @ saved[1].T, saved[0].T @ g), symbolic_zeros=True)
    grad = jax.grad(autocast(lambda x, w: product(x, w).sum()))
    assert far(grad(X, W), jax.grad(lambda x: (x @ W).sum())(X)) < 0.02
    assert set(told) == {(True, False)}


def nested_scans(ws, x):
    def outer(x, w):
        def inner(y, _):
            return jax.checkpoint(lambda y: jnp.tanh(y @ w) + y / 2)(y), (y**2).sum()

        return jax.lax.scan(inner, x, None, length=2)

    x, sizes = jax.lax.scan(outer, x, ws)
    return (x**2).mean() + sizes.mean() / 10


def cond_in_a_scan(ws, x):
    def layer(carry, w):
        i, x = carry
        return (i + 1, jax.lax.cond(i % 2 == 0, lambda: jnp.tanh(x @ w), lambda: x)), None

    return (jax.lax.scan(layer, (0, x), ws)[0][1] ** 2).mean()


def lstm(ws, x):
    def cell(carry, w):
        c, h = carry
        c = jax.nn.sigmoid(h @ w) * c + jnp.tanh(h @ w)
        return (c, jnp.tanh(c) * jax.nn.sigmoid(h @ w)), h

    return (jax.lax.scan(cell, (jnp.zeros_like(x), x), ws)[1] ** 2).mean()


def vmap_of_a_scan(ws, x):
    def one(row):
        return jax.lax.scan(lambda c, w: (jnp.tanh(w @ c), None), row, ws)[0]

    return (jax.vmap(one)(x) ** 2).mean()


def attention(ws, x):
    q = (x @ ws[0]).reshape(1, 4, 2, 4)
    return (jax.nn.dot_product_attention(q, q, q, is_causal=True) ** 2).mean()


@pytest.mark.parametrize("loss", [nested_scans, cond_in_a_scan, lstm, vmap_of_a_scan, attention])
def test_bodies_within_bodies(check_all_ways, loss):
    check_all_ways(loss, WS, X, rtol=0.05)


@pytest.mark.parametrize("steps", [8, 70])
def test_a_loop_that_python_writes_out_is_added_up_in_float32(far, equations, steps):
    def refined(x):
        for _ in range(steps):
            x = x + 0.01 * jnp.tanh(x @ W) @ W
        return x @ W

    def summed(x):
        state = x @ W
        for _ in range(steps):
            state = state + jnp.tanh(x @ W) @ W
        return state @ W

    assert far(autocast(refined)(X), refined(X)) < 0.004
    # up to 64 additions in a row of what is in 16 bits anyway are in 16 bits too
    added = [e for e in equations(autocast(summed), X) if e.primitive.name == "add"]
    expected = jnp.float32 if steps > 64 else jnp.bfloat16
    assert [e.outvars[0].aval.dtype for e in added] == [expected] * steps


def test_a_bias_is_added_in_16_bits(equations):
    def layers(bias, x):
        return jnp.tanh(x @ W + bias) @ W

    added = [e for e in equations(autocast(layers), W[0], X) if e.primitive.name == "add"]
    assert [e.outvars[0].aval.dtype for e in added] == [jnp.bfloat16]
