from __future__ import annotations

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import layers

import halfstep
from halfstep import PolicyError
from halfstep.keras import Policy, PolicyMap, policy_scope


def dtypes(model):
    return {layer.name: layer.compute_dtype for layer in model._flatten_layers()}


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


@pytest.fixture
def policies():
    return PolicyMap("mixed_float16", {"net/head": "float32", r".*/norm\d": "bfloat16"})


def test_a_key_covers_a_layer_and_all_below_it_and_the_deepest_wins():
    policies = PolicyMap("mixed_float16", {"net": "float32", "net/body/out": "bfloat16"})
    found = [policies[path].name for path in ("net", "net/body", "net/body/out/kernel", "other")]
    assert found == ["float32", "float32", "bfloat16", "mixed_float16"]


def test_it_is_a_map_of_keras_with_the_default_on_its_face(policies):
    assert isinstance(policies, keras.dtype_policies.DTypePolicyMap)
    assert policies.name == "map_mixed_float16"
    assert (policies.compute_dtype, policies.variable_dtype) == ("float16", "float32")
    assert policies.default_policy == Policy("mixed_float16")
    assert len(policies) == 2
    assert "net/head" in policies
    assert {key: policy.name for key, policy in policies.items()} == {
        "net/head": "float32",
        r".*/norm\d": "bfloat16",
    }


def test_it_prints_as_it_is_written(policies):
    assert repr(policies) == (
        "PolicyMap('mixed_float16', {'net/head': 'float32', '.*/norm\\\\d': 'bfloat16'})"
    )


def test_it_takes_the_words_of_keras_and_maps_of_the_core(policies):
    keys = {"net/head": Policy("float32"), r".*/norm\d": keras.DTypePolicy("bfloat16")}
    assert PolicyMap(default_policy="mixed_float16", policy_map=keys) == policies
    assert PolicyMap(halfstep.PolicyMap("mixed_float16", {"a": "float32"})) == PolicyMap(
        "mixed_float16", {"a": "float32"}
    )
    with policy_scope("mixed_bfloat16"):
        assert PolicyMap().default_policy.name == "mixed_bfloat16"


def test_its_loss_scale_is_that_of_the_first_policy_that_wants_one():
    wanting = Policy("mixed_float16", 64)
    assert PolicyMap("float32", {"a": wanting}).loss_scale is wanting.loss_scale
    assert PolicyMap("float32").loss_scale is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PolicyMap("float32", {"(": "float16"}), PolicyError, "no regular expression"),
        (lambda: PolicyMap("float32", {"a": "flaot16"}), PolicyError, "Did you mean"),
        (lambda: PolicyMap(PolicyMap("float32")), PolicyError, "must be one policy, not a map"),
        (lambda: PolicyMap("float32", 123), TypeError, "`policy_map` must be a dict"),
        (lambda: PolicyMap("float32", default_policy="float16"), PolicyError, "given twice"),
        (
            lambda: PolicyMap("float32", {"a.*": "float16", ".*b": "bfloat16"})["ab"],
            PolicyError,
            "disagree",
        ),
    ],
)
def test_what_it_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_it_is_a_value(policies):
    same = PolicyMap("mixed_float16", dict(policies.items()))
    assert policies == same
    assert len({policies, same, PolicyMap("mixed_float16")}) == 2
    for change in (
        lambda: policies.__setitem__("a", "float32"),
        lambda: policies.pop("net/head"),
        lambda: policies.update(a="float32"),
        lambda: policies.clear(),
        lambda: setattr(policies, "_policy_map", {}),
    ):
        with pytest.raises(PolicyError, match="is frozen"):
            change()
    assert policies == same


@pytest.mark.parametrize(
    "travel",
    [
        lambda policies: PolicyMap.from_config(policies.get_config()),
        lambda policies: keras.dtype_policies.get(keras.dtype_policies.serialize(policies)),
        lambda policies: pickle.loads(pickle.dumps(policies)),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_it_survives_every_way_of_saving_it(policies, travel):
    back = travel(policies)
    assert back == policies
    assert type(back) is PolicyMap


def test_saving_it_leaves_its_policies_as_they_are(policies):
    before = repr(policies), [repr(policy) for policy in policies.values()]
    policies.get_config()
    assert (repr(policies), [repr(policy) for policy in policies.values()]) == before


def test_layers_without_weights_follow_it_too():
    """In Keras' own map they never do: they have no path."""
    policies = PolicyMap("mixed_float16", {"predictions": "float32"})
    inputs = keras.Input((3,))
    logits = layers.Dense(2, name="logits", dtype=policies)(inputs)
    outputs = layers.Activation("softmax", name="predictions", dtype=policies)(logits)
    assert (dtype_of(logits), dtype_of(outputs)) == ("float16", "float32")
    model = keras.Model(inputs, outputs)
    assert dtype_of(model(np.ones((1, 3), "float32"))) == "float32"


def test_the_first_input_is_cast_as_the_map_says_not_as_its_default():
    layer = layers.Dense(1, name="wide", dtype=PolicyMap("mixed_float16", {"wide": "float32"}))
    large = np.full((1, 2), 1e5, "float32")  # infinite in float16
    assert np.isfinite(keras.ops.convert_to_numpy(layer(large))).all()


def test_as_the_global_policy_it_reaches_every_layer_and_the_layers_inside_of_layers():
    keys = {"net/attention/query": "float32", "net/end": "float32"}
    with policy_scope(PolicyMap("mixed_float16", keys)):

        class Net(keras.Model):
            def __init__(self):
                super().__init__(name="net")
                self.attention = layers.MultiHeadAttention(1, 2, name="attention")
                self.end = layers.Dense(1, name="end")

            def call(self, x):
                return self.end(self.attention(x, x))

        model = Net()
        out = model(np.ones((1, 2, 4), "float32"))
    found = dtypes(model)
    assert dtype_of(out) == "float32"
    assert {name: found[name] for name in ("query", "key", "end", "attention")} == {
        "query": "float32",
        "key": "float16",
        "end": "float32",
        "attention": "float16",
    }


def test_a_built_layer_has_the_one_policy_and_may_be_given_another():
    default = Policy("mixed_float16", 64)
    layer = layers.Dense(2, name="a", dtype=PolicyMap(default, {"b": "float32"}))
    layer(np.ones((1, 2), "float32"))
    assert layer.dtype_policy is default
    layer.dtype_policy = "mixed_bfloat16"
    assert layer.compute_dtype == "bfloat16"
    layer.quantize("int8")
    assert layer.quantization_mode == "int8"


def test_a_saved_sequential_has_the_same_policies_when_it_is_loaded(tmp_path):
    """With Keras' own map they move: a loaded layer has another path."""
    with policy_scope(PolicyMap("mixed_float16", {"net/b": "float32", "net/end": "float32"})):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, name="a"),
                layers.Dense(2, name="b"),
                layers.Softmax(name="end"),
            ],
            name="net",
        )
    model.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    named = [layer.name for layer in model.layers]
    assert {name: dtypes(loaded)[name] for name in named} == {
        "a": "float16",
        "b": "float32",
        "end": "float32",
    }
    x = np.ones((2, 4), "float32")
    assert np.array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


class TestAKeyThatNamesNoLayer:
    def model(self, policies):
        with policy_scope(policies):
            return keras.Sequential(
                [keras.Input((4,)), layers.Dense(2, name="head", dtype=None)], name="net"
            )

    def test_compile_refuses_it_and_names_the_nearest(self):
        model = self.model(PolicyMap("mixed_float16", {"net/haed": "float32"}))
        with pytest.raises(PolicyError, match=r"'net/haed' matches no layer.*mean 'net/head'"):
            model.compile("sgd", "mse")

    def test_compile_takes_a_map_that_fits(self):
        model = self.model(PolicyMap("mixed_float16", {"net/head": "float32", "n.*": "float32"}))
        model.compile("sgd", "mse")

    def test_a_map_may_be_about_two_models(self):
        keys = {"one/a": "float32", "two/b": "float32"}
        with policy_scope(PolicyMap("mixed_bfloat16", keys)):
            one = keras.Sequential([keras.Input((2,)), layers.Dense(1, name="a")], name="one")
            two = keras.Sequential([keras.Input((2,)), layers.Dense(1, name="b")], name="two")
        one.compile("sgd", "mse")
        two.compile("sgd", "mse")

    def test_a_model_that_is_still_to_be_built_is_let_through(self):
        with policy_scope(PolicyMap("mixed_bfloat16", {"net/later": "float32"})):
            model = keras.Sequential([layers.Dense(1, name="later")], name="net")
            model.compile("sgd", "mse")
            model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
        assert model.layers[0].compute_dtype == "float32"
