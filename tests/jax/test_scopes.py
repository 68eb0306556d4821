"""Which policy holds where, what explain says about it, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import halfstep
from halfstep import PolicyMap
from halfstep.jax import NotTraceableError, autocast, explain, policy_scope

X = jax.random.normal(jax.random.key(0), (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) / 3
WS = jax.random.normal(jax.random.key(2), (3, 8, 8)) / 3


def mlp(w, x):
    return jnp.tanh(x @ w) @ w


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


def layers(params, x):
    def layer(x, weights):
        return jnp.tanh(x @ weights["up"].T) @ weights["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return jax.jit(jnp.dot)(x, params["head"].astype(jnp.float32).reshape(8, 8))


PARAMS = {"layers": {"up": WS, "down": WS}, "head": W.reshape(-1)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"params/head": "float32"}, ["bfloat16", "bfloat16", "float32"]),
        ({"params/layers/up": "float32"}, ["float32", "bfloat16", "bfloat16"]),
        ({"params/layers": "float32", ".*/down": "mixed_bfloat16"},
         ["float32", "bfloat16", "bfloat16"]),
    ],
)  # fmt: skip
def test_a_policy_map_over_the_paths_of_arguments(overrides, expected):
    # no scope is opened in this model: what takes a parameter follows it, in bodies too
    policy = PolicyMap("mixed_bfloat16", overrides)
    rows = explain(layers, policy)(PARAMS, X).rows
    assert [row.dtype for row in rows if row.flops] == expected
    assert [row.path for row in rows if row.flops] == [
        "params/layers/up", "params/layers/down", "params/head"
    ]  # fmt: skip
    # by name it is the same argument
    by_name = explain(lambda **kw: layers(**kw), policy)(params=PARAMS, x=X).rows
    assert [row.dtype for row in by_name if row.flops] == expected


def test_an_argument_decides_before_its_scope():
    def model(params, x):
        with jax.named_scope("net"):
            return (x @ params["a"]) @ params["b"]

    policy = PolicyMap("mixed_bfloat16", {"net": "float32", "params/b": "mixed_bfloat16"})
    rows = explain(model, policy)({"a": W, "b": W}, X).rows
    assert [row.dtype for row in rows if row.flops] == ["float32", "bfloat16"]


def test_the_rule_of_a_function_follows_what_it_takes(products):
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    policy = PolicyMap("mixed_bfloat16", {"params/a": "float32"})

    def loss(params):
        return (product(jnp.tanh(product(X, params["a"])), params["b"]) ** 2).sum()

    low, every = products(jax.grad(autocast(loss, policy)), {"a": W, "b": W})
    assert (low, every) == (3, 6)


def test_a_path_of_arguments_that_matches_nothing_is_refused():
    policy = PolicyMap("mixed_bfloat16", {"params/haed": "float32"})
    with pytest.raises(halfstep.PolicyError, match=r"'params/haed'.*Did you mean 'params/head'"):
        autocast(layers, policy)(PARAMS, X)


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

    with pytest.raises(NotTraceableError, match=r"\(branches\).*[^.]\. Arguments.*lax.cond"):
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
    assert product.source.startswith("test_scopes.py:")
    assert "deny list" in by_name["exp"].why
    assert explanation.low_flops_share == 1
    assert explanation.casts == 3
    assert explanation.cast_bytes == 2 * (64 + 32) + 4 * 32
    assert "exp at test_scopes.py" not in str(explanation)


def test_explain_counts_what_runs_in_a_loop_each_time():
    def model(ws, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    assert sum(row.flops for row in explain(model)(WS, X).rows) == 3 * 2 * 4 * 8 * 8


def test_explain_takes_shapes_and_an_autocast_function():
    shapes = jax.ShapeDtypeStruct(W.shape, W.dtype), jax.ShapeDtypeStruct(X.shape, X.dtype)
    explanation = explain(autocast(mlp, "mixed_float16"))(*shapes)
    assert explanation.dtype == "float16"
    assert explanation.low_products == (2, 2)
