"""autocast: what runs in which dtype, and that it stands wherever the function stood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import halfstep
from halfstep import PolicyMap
from halfstep.jax import NotTraceableError, autocast, explain, policy_scope

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) / 3
WS = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 3


def far(one, other) -> float:
    """The relative distance of two pytrees of arrays."""
    one, other = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def mlp(w, x):
    return jnp.tanh(x @ w) @ w


def check_all_ways(loss, products, *args, count=None, rtol=0.03):
    """Value and gradient under autocast, both ways round: near, float32, all products low."""
    expected = jax.jit(jax.value_and_grad(loss))(*args)
    inside = jax.value_and_grad(autocast(loss))
    outside = autocast(jax.value_and_grad(loss))
    for function in (inside, outside):
        found = jax.jit(function)(*args)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
        assert 0 < far(found, expected) < rtol
        low, every = products(function, *args)
        assert low == every
        assert count is None or every == count


# what is painted


def test_parameters_outputs_and_gradients_stay_float32_and_products_do_not(products):
    check_all_ways(lambda w: (mlp(w, X) ** 2).mean(), products, W, count=5)


def test_float16_is_a_policy_too(equations):
    found = equations(autocast(mlp, "mixed_float16"), W, X)
    assert [e.outvars[0].aval.dtype for e in found if e.primitive.name == "dot_general"] == [
        jnp.float16,
        jnp.float16,
    ]


def test_integers_and_other_dtypes_pass_through():
    def embed(table, tokens, mask):
        return (table[tokens] @ W) * mask[:, None], tokens + 1, mask

    tokens, mask = jnp.array([1, 2, 2]), jnp.array([True, False, True])
    out, shifted, same = autocast(embed)(W, tokens, mask)
    assert (out.dtype, shifted.dtype, same.dtype) == (jnp.float32, tokens.dtype, jnp.bool_)
    np.testing.assert_array_equal(shifted, tokens + 1)


def test_the_output_dtype_is_what_was_asked_for():
    def two(x):
        return x @ W, x.sum()

    for asked, expected in (
        ("float32", ["float32", "float32"]),
        ("bfloat16", ["bfloat16", "bfloat16"]),
        ("float16", ["float16", "float16"]),
        (None, ["bfloat16", "float32"]),
    ):
        assert [out.dtype.name for out in autocast(two, output_dtype=asked)(X)] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_fully_masked_softmax_is_not_nan(dtype):
    # finfo(float32).min is -inf in both formats, and a row of -inf is a softmax of NaN
    def attention(q, k, v, mask):
        scores = jnp.where(mask, q @ k.T, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(scores) @ v

    mask = jnp.zeros((4, 4), bool).at[0, :2].set(True)
    expected = attention(X, X, X, mask)
    function = autocast(attention, f"mixed_{dtype}")
    assert far(function(X, X, X, mask), expected) < 0.02
    grads = jax.grad(lambda q: function(q, X, X, mask).sum())(X)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_small_epsilon_still_guards_a_division(dtype):
    def normalize(w, x):
        y = x @ w
        return (y / (jnp.abs(y) + 1e-8)) @ w

    zero = jnp.zeros((4, 8))
    function = autocast(normalize, f"mixed_{dtype}")
    assert not function(W, zero).any()
    # at zero itself the derivative is 1e8, which no 16-bit product could hand on in float16
    assert far(function(W, X), normalize(W, X)) < 0.02
    assert np.isfinite(jax.grad(lambda w: function(w, X).sum())(W)).all()


def test_a_captured_array_that_does_not_fit_keeps_what_takes_it_in_float32():
    bias = np.where(np.tri(4, dtype=bool), 0, np.finfo(np.float32).min).astype(np.float32)

    def attention(q):
        return jax.nn.softmax(q @ q.T + bias) @ q

    assert far(autocast(attention)(X), attention(X)) < 0.02


def test_sums_stay_in_float32():
    # 4096 ones add up to 256 in bfloat16
    def total(x):
        return (x @ jnp.ones((1, 1))).sum()

    assert autocast(total)(jnp.ones((4096, 1))) == 4096


def test_the_dtype_trap_of_a_numpy_scalar_is_none(products):
    def scaled(q):
        return jnp.tanh((q @ q.T) / np.sqrt(np.float32(8))) @ q

    assert products(autocast(scaled), X) == (2, 2)


def test_a_precision_that_was_asked_for_is_kept(products):
    def careful(x):
        return jnp.dot(x @ W, W, precision="highest")

    assert products(autocast(careful), X) == (1, 2)


def test_lists_can_be_changed(equations):
    def model(x):
        return jnp.exp(x @ W) @ W

    def dtype_of(name, **changes):
        found = equations(autocast(model, **changes), X)
        return next(e.outvars[0].aval.dtype.name for e in found if e.primitive.name == name)

    assert dtype_of("exp") == "float32"
    assert dtype_of("exp", allow=["exp"]) == "bfloat16"
    with pytest.raises(halfstep.PolicyError, match="deny= asked for it"):
        autocast(model, deny=["dot_general"])(X)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("scatter-add", lambda x: (x @ W).at[jnp.array([0, 0])].add(x[:2] @ W) @ W),
        ("cumsum", lambda x: jnp.cumsum(x @ W, 0) @ W),
        ("erf_inv", lambda x: jax.lax.erf_inv(jnp.tanh(x @ W)) @ W),
    ],
)
def test_what_is_denied_runs_in_16_bits_when_it_is_allowed(equations, name, function):
    allowed = autocast(function, allow=[name])
    assert 0 < far(jax.jit(allowed)(X), function(X)) < 0.02
    dtypes = {e.outvars[0].aval.dtype for e in equations(allowed, X) if e.primitive.name == name}
    assert dtypes == {jnp.dtype("bfloat16")}


def test_matrix_products_only_leaves_everything_else(equations):
    found = equations(autocast(mlp, level="matrix_products"), W, X)
    low = {e.primitive.name for e in found if e.outvars[0].aval.dtype == jnp.bfloat16}
    assert low == {"dot_general", "convert_element_type"}


# control flow and custom rules


def test_scan(products):
    def loss(ws, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w) @ w, (x**2).sum()

        x, sizes = jax.lax.scan(layer, x, ws)
        return (x**2).mean() + sizes.mean() / 100

    check_all_ways(loss, products, WS, X)


def test_scans_may_run_backwards_unrolled_and_without_inputs(products):
    def loss(w, x):
        def layer(carry, _):
            x, count = carry
            return (jnp.tanh(x @ w), count + 1), None

        (x, count), _ = jax.lax.scan(layer, (x, 0), None, length=4, reverse=True, unroll=2)
        return (x**2).sum() * count

    check_all_ways(loss, products, W, X)


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


def test_while_and_fori_loop(products):
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


def test_cond_and_switch(products):
    def loss(w, x, which):
        x = jax.lax.switch(
            which,
            [lambda x: x @ w, lambda x: jnp.exp(-jnp.abs(x)), lambda x: x],
            x,
        )
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x).mean()

    for which in (0, 2):
        args = (W, X, which)
        found = jax.grad(autocast(loss))(*args)
        assert far(found, jax.grad(loss)(*args)) < 0.05 or not np.any(found)
        assert (
            far(autocast(jax.value_and_grad(loss))(*args), jax.value_and_grad(loss)(*args)) < 0.05
        )
    assert products(jax.grad(autocast(loss)), W, X, jnp.int32(0))[0] > 3


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(products, policy):
    def loss(ws, x):
        @jax.checkpoint if policy is None else lambda f: jax.checkpoint(f, policy=policy)
        def layer(x, w):
            return jnp.tanh(x @ w) @ w + x, None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).mean()

    check_all_ways(loss, products, WS, X)


def test_checkpointed_code_runs_again_in_the_backward_pass(products):
    def loss(w, x):
        return (jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x) ** 2).mean()

    plain = products(jax.grad(loss), W, X)[1]
    assert products(jax.grad(autocast(loss)), W, X) == (plain, plain)
    assert products(autocast(jax.grad(loss)), W, X) == (plain, plain)


def test_custom_jvp(products):
    @jax.custom_jvp
    def half_square(x):
        return (x @ W) * x / 2

    @half_square.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        return half_square(x), 7 * (t @ W) * x  # not the derivative: the rule must be the one used

    def loss(x):
        return half_square(jnp.tanh(x @ W)).mean()

    check_all_ways(loss, products, X)
    value, tangent = jax.jvp(autocast(loss), (X,), (X,))
    assert far((value, tangent), jax.jvp(loss, (X,), (X,))) < 0.03


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
def test_custom_vjp_with_static_and_integer_arguments(products, symbolic_zeros):
    function = make_custom_vjp(symbolic_zeros)

    def loss(w, x):
        y, count = function(jnp.tanh(x @ w), w, 2, jnp.int32(5))
        return (y**2).mean() * count

    check_all_ways(loss, products, W, X)


def test_custom_vjp_inside_of_a_scan_keeps_16_bit_residuals(equations, products):
    function = make_custom_vjp()

    def loss(ws, x):
        def layer(x, w):
            return function(jnp.tanh(x @ w), w, 1, jnp.int32(1))[0], None

        return (jax.lax.scan(layer, x, ws)[0] ** 2).mean()

    check_all_ways(loss, products, WS, X)


def test_second_derivatives():
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


def test_second_derivatives_of_a_rule_that_captures_an_array():
    def curvature(w, x, around):
        loss = around(lambda x: capturing(w)(x).sum() + (x @ W).sum())
        return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)

    expected = curvature(W, X, lambda f: f)
    assert far(curvature(W, X, autocast), expected) < 0.03
    # w is being traced, by jit, outside of autocast
    assert far(jax.jit(lambda w, x: curvature(w, x, autocast))(W, X), expected) < 0.03


def test_a_rule_that_captures_what_autocast_traces_is_named():
    def loss(w, x):
        return capturing(w)(x).sum()

    # jax.jit has the same limit
    with pytest.raises((jax.errors.UnexpectedTracerError, TypeError)):
        jax.grad(jax.jit(loss), 1)(W, X)
    with pytest.raises(NotTraceableError, match=r"captures an array.*autocast\(jax.grad\(f\)\)"):
        jax.grad(autocast(loss), 1)(W, X)
    assert far(autocast(jax.grad(loss, 1))(W, X), jax.grad(loss, 1)(W, X)) < 0.03


def test_a_rule_is_told_which_arguments_are_differentiated():
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
def test_bodies_within_bodies(loss, products):
    check_all_ways(loss, products, WS, X, rtol=0.05)


# where it stands


def test_vmap_inside_and_outside(products):
    expected = jax.vmap(mlp, (None, 0))(W, X)
    assert far(jax.vmap(autocast(mlp), (None, 0))(W, X), expected) < 0.02
    assert far(autocast(jax.vmap(mlp, (None, 0)))(W, X), expected) < 0.02
    per_example = jax.vmap(jax.grad(autocast(lambda w, x: mlp(w, x).sum())), (None, 0))(W, X)
    assert (
        far(per_example, jax.vmap(jax.grad(lambda w, x: mlp(w, x).sum()), (None, 0))(W, X)) < 0.03
    )


def test_jvp_vjp_and_linearize():
    expected = jax.jvp(lambda w: mlp(w, X), (W,), (W,))
    assert far(jax.jvp(autocast(lambda w: mlp(w, X)), (W,), (W,)), expected) < 0.02
    out, pull = jax.vjp(autocast(mlp), W, X)
    assert far(pull(out), jax.vjp(mlp, W, X)[1](out)) < 0.02
    out, push = jax.linearize(autocast(mlp), W, X)
    assert far(push(W, X), jax.linearize(mlp, W, X)[1](W, X)) < 0.02


def test_tracers_may_be_captured():
    @jax.jit
    def outer(w, x):
        return jax.grad(lambda x: autocast(lambda x: mlp(w, x))(x).sum())(x)

    assert far(outer(W, X), jax.grad(lambda x: mlp(W, x).sum())(X)) < 0.02
    captured = jax.grad(lambda w: autocast(lambda x: mlp(w, x))(X).sum())(W)
    assert far(captured, jax.grad(lambda w: mlp(w, X).sum())(W)) < 0.02


def test_jit_outside_keeps_donation_and_static_arguments():
    @jax.jit
    def step(w, x):
        return autocast(mlp)(w, x)

    donated = jax.jit(autocast(lambda w, x: w - 0.1 * mlp(w, x).mean()), donate_argnums=0)
    w = jnp.array(W)
    donated(w, X)
    assert w.is_deleted()
    named = jax.jit(
        autocast(lambda x, activation: getattr(jnp, activation)(x @ W)), static_argnums=1
    )
    assert far(named(X, "tanh"), jnp.tanh(X @ W)) < 0.02
    assert far(step(W, X), mlp(W, X)) < 0.02


def test_leaves_that_are_no_arrays_stay_what_they_are():
    def model(x, config):
        y = config["activation"](x @ W)
        if config["train"]:
            y = y * config["rate"]
        return {"y": y, "name": config["name"], "steps": config["steps"] + 1, "none": None}

    config = {"activation": jnp.tanh, "train": True, "rate": 0.5, "name": "net", "steps": 3}
    out = autocast(model)(X, config=config)
    assert (out["name"], out["steps"], out["none"]) == ("net", 4, None)
    assert far(out["y"], jnp.tanh(X @ W) / 2) < 0.02


def test_random_keys_and_dropout():
    def dropout(key, x):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, jnp.tanh(x @ W) / 0.5, 0.0) @ W + jax.random.normal(key, x.shape)

    assert far(autocast(dropout)(KEY, X), dropout(KEY, X)) < 0.02
    typed, _raw = autocast(lambda k, x: (jax.random.split(k), x @ W))(KEY, X)
    assert jnp.issubdtype(typed.dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(
        jax.random.key_data(typed), jax.random.key_data(jax.random.split(KEY))
    )


def test_printing_and_callbacks_happen_once(capfd):
    calls = []

    def model(x):
        y = x @ W
        jax.debug.print("sum {}", y.sum() > 0)
        jax.debug.callback(lambda value: calls.append(value.dtype), y)
        return y @ W

    jax.block_until_ready(autocast(model)(X))
    jax.effects_barrier()
    assert calls == [np.float32]
    assert capfd.readouterr().out.count("sum") == 1


def test_references():
    def count(x):
        total = jax.new_ref(jnp.zeros((4, 8)))

        def body(i, x):
            total[...] += x
            return jnp.tanh(x @ W)

        jax.lax.fori_loop(0, 3, body, x)
        return total[...]

    assert far(autocast(count)(X), count(X)) < 0.02


def test_linear_algebra_stays_in_float32(equations):
    def solve(x):
        a = x.T @ x + 4 * jnp.eye(8)
        return jnp.linalg.solve(a, x.T) @ x

    assert far(jax.jit(autocast(solve))(X), solve(X)) < 0.05
    found = equations(autocast(solve), X)
    assert {e.outvars[0].aval.dtype.name for e in found if e.primitive.name == "lu"} == {"float32"}


def test_convolutions_and_pooling(products):
    kernel = jax.random.normal(KEY, (3, 3, 2, 4)) / 4
    image = jax.random.normal(KEY, (2, 8, 8, 2))

    def loss(kernel, image):
        y = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.reduce_window(
            jax.nn.relu(y), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        return (y**2).mean()

    check_all_ways(loss, products, kernel, image)


def test_a_function_that_was_autocast_may_be_again(products):
    twice = autocast(autocast(mlp))
    np.testing.assert_array_equal(twice(W, X), autocast(mlp)(W, X))


def test_the_wrapper_looks_like_the_function():
    assert autocast(mlp).__name__ == "mlp"


# policies by scope


def model_with_scopes(w, x):
    with jax.named_scope("net"):
        with jax.named_scope("body"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("head"):
            return x @ w


def dtypes_of_products(function, *args):
    return [row.dtype for row in explain(function)(*args).rows if row.flops]


def test_a_policy_map_over_paths(products):
    for policy, expected in (
        (PolicyMap("mixed_bfloat16", {"net/head": "float32"}), ["bfloat16", "float32"]),
        (PolicyMap("float32", {".*/body": "mixed_bfloat16"}), ["bfloat16", "float32"]),
        (PolicyMap("mixed_bfloat16", {"net": "float32", "net/head": "mixed_bfloat16"}),
         ["float32", "bfloat16"]),
    ):  # fmt: skip
        function = autocast(model_with_scopes, policy)
        assert dtypes_of_products(function, W, X) == expected
        low, every = products(jax.grad(lambda w, f=function: f(w, X).sum()), W)
        assert (0 < low < every) or low == every - 2
        assert products(autocast(jax.grad(lambda w: model_with_scopes(w, X).sum()), policy), W)[0]


def test_a_path_that_matches_nothing_is_refused():
    policy = PolicyMap("mixed_bfloat16", {"net/haed": "float32"})
    with pytest.raises(halfstep.PolicyError, match=r"'net/haed'.*Did you mean 'net/head'"):
        autocast(model_with_scopes, policy)(W, X)


def test_policy_scope_keeps_exactly_that_piece(products, equations):
    def model(w, x):
        x = jnp.tanh(x @ w)
        with policy_scope("float32"):
            x = jnp.tanh(x @ w)
        return (x @ w).mean()

    assert dtypes_of_products(autocast(model), W, X) == ["bfloat16", "float32", "bfloat16"]
    assert products(jax.grad(autocast(model)), W, X) == (5, 8)
    assert products(autocast(jax.grad(model)), W, X) == (5, 8)


def test_policy_scopes_nest_and_hold_inside_of_bodies():
    def model(ws, x):
        def layer(x, w):
            with policy_scope("float32"):
                x = jnp.tanh(x @ w)
                with policy_scope("mixed_bfloat16"):
                    x = jnp.tanh(x @ w)
            return x, None

        with policy_scope("float32"):
            return jax.lax.scan(jax.jit(layer), x, ws)[0] @ W

    assert dtypes_of_products(autocast(model), WS, X) == ["float32", "bfloat16", "float32"]
    assert dtypes_of_products(autocast(model, "float32"), WS, X) == [
        "float32",
        "bfloat16",
        "float32",
    ]


def test_a_scope_reaches_custom_rules():
    @jax.custom_vjp
    def product(x):
        return x @ W

    product.defvjp(lambda x: (product(x), None), lambda _, g: (g @ W.T,))

    def model(x):
        with policy_scope("float32"):
            return product(x).sum() + 0 * (x @ W).sum()

    assert not np.array_equal(jax.grad(autocast(lambda x: product(x).sum()))(X), jax.grad(model)(X))
    exact = autocast(lambda x: model(x) + 0 * (x @ W).sum())
    np.testing.assert_array_equal(jax.grad(exact)(X), jax.grad(model)(X))


def test_without_a_policy_around_it_a_scope_does_nothing():
    def model(x):
        with policy_scope("mixed_bfloat16"):
            return x @ W

    np.testing.assert_array_equal(model(X), X @ W)


def test_the_policy_float32_changes_nothing():
    np.testing.assert_array_equal(autocast(mlp, "float32")(W, X), mlp(W, X))
    assert autocast(mlp, "float32", output_dtype="bfloat16")(W, X).dtype == jnp.bfloat16


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: autocast(3), "must be a function"),
        (lambda: autocast(mlp, "mixed_flaot16"), "Did you mean 'mixed_float16'"),
        (lambda: autocast(mlp, "bfloat16")(W, X), "Did you mean 'mixed_bfloat16'"),
        (lambda: autocast(mlp, "float64")(W, X), "wants float64 variables"),
        (lambda: autocast(mlp, output_dtype="int8"), "output_dtype='int8'"),
        (lambda: autocast(mlp, level="some"), "full, matrix_products"),
        (lambda: autocast(mlp, allow="exp"), r"\['exp'\]"),
        (lambda: autocast(mlp, allow=["exp"], deny=["exp"]), "both allow= and deny="),
        (lambda: autocast(mlp, allow=["scan"]), "inside of it is painted"),
        (lambda: autocast(mlp, allow=["lu"]), "it must stay: the decomposition"),
        (lambda: autocast(mlp, deny=["tahn"])(W, X), "Did you mean 'tan"),
        (lambda: autocast(lambda x: x + 1)(X), "no conv_general_dilated or dot_general"),
        (lambda: autocast(lambda x: x + 1)(jnp.arange(3)), "no operation on float32 arrays"),
        (lambda: policy_scope("int8").__enter__(), "unknown policy"),
        (lambda: policy_scope("float16").__enter__(), "Did you mean 'mixed_float16'"),
        (
            lambda: autocast(mlp, PolicyMap("mixed_float16", {".*": "mixed_bfloat16"}))(W, X),
            "one 16-bit format at a time",
        ),
        (lambda: explain(mlp, "float32")(W, X), "float32 everywhere"),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, message):
    with pytest.raises(halfstep.PolicyError, match=message):
        make()


def test_a_function_that_cannot_be_traced_is_named():
    def branches(x):
        return x @ W if x.sum() > 0 else x

    with pytest.raises(NotTraceableError, match=r"autocast\(branches\).*jax.lax.cond"):
        autocast(branches)(X)
    with pytest.raises(NotTraceableError):
        autocast(lambda x: np.asarray(x @ W))(X)


def test_an_error_of_the_function_is_its_own():
    with pytest.raises(TypeError, match="contracting dimensions"):
        autocast(lambda x: x @ x)(X)


# explain


def test_explain_names_lines_reasons_and_totals():
    def model(w, x):
        with jax.named_scope("head"):
            return jnp.exp(x @ w).sum()

    explanation = explain(model)(W, X)
    by_name = {row.operation: row for row in explanation.rows}
    product = by_name["dot_general"]
    assert (product.dtype, product.path, product.shape) == ("bfloat16", "head", "4x8")
    assert product.flops == 2 * 4 * 8 * 8
    assert product.source.startswith("test_autocast.py:")
    assert "deny list" in by_name["exp"].why
    assert explanation.low_flops_share == 1
    assert explanation.casts == 3
    assert explanation.cast_bytes == 2 * (64 + 32) + 4 * 32
    assert "exp at test_autocast.py" not in str(explanation)


def test_explain_counts_what_runs_in_a_loop_each_time():
    def model(ws, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    assert sum(row.flops for row in explain(model)(WS, X).rows) == 3 * 2 * 4 * 8 * 8


def test_explain_takes_shapes_and_an_autocast_function():
    shapes = jax.ShapeDtypeStruct(W.shape, W.dtype), jax.ShapeDtypeStruct(X.shape, X.dtype)
    explanation = explain(autocast(mlp, "mixed_float16"))(*shapes)
    assert explanation.dtype == "float16"
    assert explanation.low_products == (2, 2)


def test_a_pallas_kernel_is_left_alone_and_what_stands_around_it_is_not(equations):
    from jax.experimental import pallas

    def kernel(x, out):
        out[...] = x[...] * 2.0

    def model(x):
        doubled = pallas.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
        )(x @ W)
        return doubled @ W

    assert far(autocast(model)(X), model(X)) < 0.02
    call = next(e for e in equations(autocast(model), X) if e.primitive.name == "pallas_call")
    assert call.outvars[0].aval.dtype == jnp.float32
