"""autocast: what runs in which dtype, and that it stands wherever the function stood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import halfstep
from halfstep.jax import autocast

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) / 3


def mlp(w, x):
    return jnp.tanh(x @ w) @ w


# what is painted


def test_parameters_outputs_and_gradients_stay_float32_and_products_do_not(check_all_ways):
    check_all_ways(lambda w: (mlp(w, X) ** 2).mean(), W, count=5)


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
def test_a_fully_masked_softmax_is_not_nan(far, dtype):
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
def test_a_small_epsilon_still_guards_a_division(far, dtype):
    def normalize(w, x):
        y = x @ w
        return (y / (jnp.abs(y) + 1e-8)) @ w

    zero = jnp.zeros((4, 8))
    function = autocast(normalize, f"mixed_{dtype}")
    assert not function(W, zero).any()
    # at zero itself the derivative is 1e8, which no 16-bit product could hand on in float16
    assert far(function(W, X), normalize(W, X)) < 0.02
    assert np.isfinite(jax.grad(lambda w: function(w, X).sum())(W)).all()


def test_a_captured_array_that_does_not_fit_keeps_what_takes_it_in_float32(far):
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
def test_what_is_denied_runs_in_16_bits_when_it_is_allowed(far, equations, name, function):
    allowed = autocast(function, allow=[name])
    assert 0 < far(jax.jit(allowed)(X), function(X)) < 0.02
    dtypes = {e.outvars[0].aval.dtype for e in equations(allowed, X) if e.primitive.name == name}
    assert dtypes == {jnp.dtype("bfloat16")}


def test_matrix_products_only_leaves_everything_else(equations):
    found = equations(autocast(mlp, level="matrix_products"), W, X)
    low = {e.primitive.name for e in found if e.outvars[0].aval.dtype == jnp.bfloat16}
    assert low == {"dot_general", "convert_element_type"}


# where it stands


def test_vmap_inside_and_outside(far, products):
    expected = jax.vmap(mlp, (None, 0))(W, X)
    assert far(jax.vmap(autocast(mlp), (None, 0))(W, X), expected) < 0.02
    assert far(autocast(jax.vmap(mlp, (None, 0)))(W, X), expected) < 0.02
    per_example = jax.vmap(jax.grad(autocast(lambda w, x: mlp(w, x).sum())), (None, 0))(W, X)
    assert (
        far(per_example, jax.vmap(jax.grad(lambda w, x: mlp(w, x).sum()), (None, 0))(W, X)) < 0.03
    )


def test_jvp_vjp_and_linearize(far):
    expected = jax.jvp(lambda w: mlp(w, X), (W,), (W,))
    assert far(jax.jvp(autocast(lambda w: mlp(w, X)), (W,), (W,)), expected) < 0.02
    out, pull = jax.vjp(autocast(mlp), W, X)
    assert far(pull(out), jax.vjp(mlp, W, X)[1](out)) < 0.02
    out, push = jax.linearize(autocast(mlp), W, X)
    assert far(push(W, X), jax.linearize(mlp, W, X)[1](W, X)) < 0.02


def test_tracers_may_be_captured(far):
    @jax.jit
    def outer(w, x):
        return jax.grad(lambda x: autocast(lambda x: mlp(w, x))(x).sum())(x)

    assert far(outer(W, X), jax.grad(lambda x: mlp(W, x).sum())(X)) < 0.02
    captured = jax.grad(lambda w: autocast(lambda x: mlp(w, x))(X).sum())(W)
    assert far(captured, jax.grad(lambda w: mlp(w, X).sum())(W)) < 0.02


def test_jit_outside_keeps_donation_and_static_arguments(far):
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


def test_leaves_that_are_no_arrays_stay_what_they_are(far):
    def model(x, config):
        y = config["activation"](x @ W)
        if config["train"]:
            y = y * config["rate"]
        return {"y": y, "name": config["name"], "steps": config["steps"] + 1, "none": None}

    config = {"activation": jnp.tanh, "train": True, "rate": 0.5, "name": "net", "steps": 3}
    out = autocast(model)(X, config=config)
    assert (out["name"], out["steps"], out["none"]) == ("net", 4, None)
    assert far(out["y"], jnp.tanh(X @ W) / 2) < 0.02


def test_random_keys_and_dropout(far):
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


def test_references(far):
    def count(x):
        total = jax.new_ref(jnp.zeros((4, 8)))

        def body(i, x):
            total[...] += x
            return jnp.tanh(x @ W)

        jax.lax.fori_loop(0, 3, body, x)
        return total[...]

    assert far(autocast(count)(X), count(X)) < 0.02


def test_linear_algebra_stays_in_float32(far, equations):
    def solve(x):
        a = x.T @ x + 4 * jnp.eye(8)
        return jnp.linalg.solve(a, x.T) @ x

    assert far(jax.jit(autocast(solve))(X), solve(X)) < 0.05
    found = equations(autocast(solve), X)
    assert {e.outvars[0].aval.dtype.name for e in found if e.primitive.name == "lu"} == {"float32"}


def test_convolutions_and_pooling(check_all_ways):
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

    check_all_ways(loss, kernel, image)


def test_a_function_that_was_autocast_may_be_again(products):
    twice = autocast(autocast(mlp))
    np.testing.assert_array_equal(twice(W, X), autocast(mlp)(W, X))


def test_the_wrapper_looks_like_the_function():
    assert autocast(mlp).__name__ == "mlp"


def test_a_pallas_kernel_is_left_alone_and_what_stands_around_it_is_not(far, equations):
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
