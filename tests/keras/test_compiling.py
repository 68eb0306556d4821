from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from halfstep import PolicyWarning
from halfstep.keras import Policy, PolicyMap, policy_scope, set_global_policy

X, Y = np.ones((2, 4), "float32"), np.ones((2, 1), "float32")


@pytest.fixture(autouse=True)
def _every_warning_counts():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=PolicyWarning)
        yield


def classifier(name="net", **end):
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="body"),
            layers.Flatten(name="flat"),
            layers.Dense(2, activation="softmax", name="end", **end),
        ],
        name=name,
    )


class TestAPolicySetTooLate:
    def test_compile_names_how_many_layers_keep_float32(self):
        model = classifier()
        set_global_policy("mixed_float16")
        with pytest.warns(PolicyWarning, match=r"3 of 3 layers of the model 'net' keep float32 .*"):
            model.compile("sgd", "mse")

    @pytest.mark.parametrize(
        "late",
        [
            lambda: keras.config.set_dtype_policy("mixed_float16"),
            lambda: set_global_policy(PolicyMap("float32", {"net/.*": "mixed_bfloat16"})),
        ],
    )
    def test_however_the_policy_is_set(self, late):
        model = classifier()
        late()
        with pytest.warns(PolicyWarning, match="3 of 3 layers"):
            model.compile("sgd", "mse")

    def test_a_part_that_was_built_before_is_counted_alone(self):
        backbone = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="old")], name="back")
        set_global_policy("mixed_bfloat16")
        model = keras.Sequential(
            [backbone, layers.Dense(1, name="new"), layers.Dense(1, name="out", dtype="float32")]
        )
        with pytest.warns(PolicyWarning, match=r"1 of 3 layers .*'back/old'"):
            model.compile("sgd", "mse")

    def test_layers_that_were_told_their_policy_are_none_of_its_business(self):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1, dtype="float32")])
        with policy_scope("float32"):
            scoped = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        set_global_policy("mixed_float16")
        model.compile("sgd", "mse")
        scoped.compile("sgd", "mse")

    def test_a_loaded_model_is_none_of_its_business(self, tmp_path):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        model.compile("sgd", "mse")
        model.train_on_batch(X, Y)
        model.save(tmp_path / "old.keras")
        set_global_policy("mixed_float16")
        keras.models.load_model(tmp_path / "old.keras")

    def test_going_back_to_float32_is_not_worth_a_word(self):
        set_global_policy("mixed_bfloat16")
        model = classifier(dtype="float32")
        set_global_policy("float32")
        model.compile("sgd", "mse")

    def test_an_earlier_policy_of_ours_counts_as_one_too(self):
        set_global_policy("float32")
        model = classifier()
        set_global_policy("mixed_bfloat16")
        with pytest.warns(PolicyWarning, match="3 of 3 layers"):
            model.compile("sgd", "mse")


class TestOutputsIn16Bits:
    @pytest.mark.parametrize("name", ["mixed_float16", "bfloat16"])
    def test_a_softmax_at_the_end_is_named(self, name):
        with policy_scope(name):
            model = classifier()
        with pytest.warns(
            PolicyWarning, match=r"softmax that ends the model 'net', 'net/end', comp"
        ):
            model.compile("sgd", "mse")

    @pytest.mark.parametrize(
        "end", [layers.Softmax, lambda: layers.Activation("softmax"), lambda: keras.ops.softmax]
    )
    def test_as_a_layer_or_an_operation(self, end):
        with policy_scope("mixed_float16"):
            inputs = keras.Input((4,))
            outputs = end()(layers.Dense(2)(inputs))
        with pytest.warns(PolicyWarning, match="softmax that ends the model"):
            keras.Model(inputs, outputs).compile("sgd", "mse")

    def test_another_last_layer_is_named_too_each_once(self):
        with policy_scope("mixed_float16"):
            inputs = keras.Input((4,))
            body = layers.Dense(2)(inputs)
            outputs = [layers.Dense(1, name="a")(body), layers.Dense(1, name="b")(body)]
        with pytest.warns(PolicyWarning, match="last layer of the model") as caught:
            keras.Model(inputs, outputs).compile("sgd", "mse")
        assert len(caught) == 2

    def test_the_end_of_a_model_inside_of_a_model_is_found(self):
        with policy_scope("mixed_float16"):
            model = keras.Sequential([keras.Input((4,)), classifier("inner")], name="outer")
        with pytest.warns(PolicyWarning, match="softmax that ends the model 'outer', 'inner/end'"):
            model.compile("sgd", "mse")

    def test_an_output_in_float32_is_fine(self):
        with policy_scope("mixed_float16"):
            model = classifier(dtype="float32")
        model.compile("sgd", "mse")

    def test_the_cure_that_the_warning_names_cures(self):
        with policy_scope("mixed_float16"):
            model = classifier()
        with pytest.warns(PolicyWarning, match=r'get_layer\(.end.\).dtype_policy = "float32"'):
            model.compile("sgd", "mse")
        model.get_layer("end").dtype_policy = "float32"
        model.compile("sgd", "mse")
        out = model.predict(X, verbose=0)
        assert out.dtype == "float32"
        assert np.allclose(out.sum(-1), 1, atol=1e-6)

    def test_a_model_of_ones_own_is_looked_at_in_its_first_call_once(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__(name="own")
                self.dense = layers.Dense(1)

            def call(self, x):
                return self.dense(x)

        with policy_scope("mixed_bfloat16"):
            model = Own()
        model.compile("sgd", "mse")
        with pytest.warns(PolicyWarning, match="output of the model 'own' is bfloat16") as caught:
            model.fit(X, Y, epochs=2, verbose=0)
        assert sum(one.category is PolicyWarning for one in caught) == 1

    def test_losses_see_float32(self):
        seen = []

        def loss(y, prediction):
            seen.append(keras.backend.standardize_dtype(prediction.dtype))
            return keras.ops.mean(keras.ops.square(y - prediction))

        with policy_scope(Policy("mixed_float16", 8)):
            model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        with pytest.warns(PolicyWarning, match="last layer"):
            model.compile("sgd", loss)
        model.train_on_batch(X, Y)
        assert set(seen) == {"float32"}
