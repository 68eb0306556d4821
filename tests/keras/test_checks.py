"""Each defect is shown to be there, then to be found, then to be gone once the cure is taken."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from halfstep.core.advice.findings import Report
from halfstep.keras import PolicyMap, check_model, policy_scope, set_global_policy

ON_TORCH = keras.backend.backend() == "torch"
ONES = np.ones((1, 4), "float32")


def found(model):
    return {(finding.rule, finding.place) for finding in check_model(model)}


def severities(model):
    return {finding.rule: finding.severity for finding in check_model(model)}


def numbers(tensor):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def net(*inside, shape=(4,), name="net", **batch):
    """A model with layers and an end that nothing is wrong with."""
    return keras.Sequential(
        [keras.Input(shape, **batch), *inside, layers.Activation("linear", dtype="float32")],
        name=name,
    )


class Counter(layers.Layer):
    """Counts its calls, in the guide's way of writing a layer with state."""

    def __init__(self, cast=True, **options):
        super().__init__(**options)
        self.cast = cast

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="calls", autocast=self.cast
        )

    def call(self, x):
        self.count()
        return x

    def count(self):
        self.calls.assign_add(1.0)


class Average(Counter):
    def call(self, x):
        self.calls.assign(self.calls * 0.5 + 5.0)
        return x


class Replaced(Counter):
    def call(self, x):
        for variable in self.variables:
            variable.assign(keras.ops.cast(keras.ops.mean(x), "float32"))
        return x


class TestUpdatesInACall:
    RULE = "lost-update" if ON_TORCH else "rounded-update"

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    @pytest.mark.parametrize("kind", [Counter, Average])
    def test_what_a_call_adds_is_lost_or_rounded(self, kind, policy):
        layer = kind(name="count", dtype=policy)
        model = net(layer)
        start = 5000.0 if policy == "mixed_bfloat16" else 2049.0
        layer.calls.assign(start)
        layer(ONES)
        expected = start + 1 if kind is Counter else start / 2 + 5
        assert float(numbers(layer.calls)) != expected
        assert found(model) == {(self.RULE, "net/count")}
        assert severities(model)[self.RULE] == ("error" if ON_TORCH else "warning")

    @pytest.mark.parametrize(
        "cure", [{"cast": False, "dtype": "mixed_float16"}, {"dtype": "float32"}]
    )
    def test_the_cures_cure(self, cure):
        layer = Counter(name="count", **cure)
        with policy_scope("mixed_float16"):
            model = net(layer)
        layer.calls.assign(2049.0)
        model(ONES)
        assert float(numbers(layer.calls)) == 2050
        assert not found(model)

    def test_a_value_from_elsewhere_is_only_a_hint_where_it_arrives(self):
        layer = Replaced(name="last", dtype="mixed_float16")
        model = net(layer)
        layer(3 * ONES)
        assert float(numbers(layer.calls)) == (0 if ON_TORCH else 3)
        assert severities(model) == {self.RULE: "error" if ON_TORCH else "hint"}

    def test_layers_of_keras_that_do_it_are_found(self):
        spectral = layers.SpectralNormalization(layers.Dense(2), name="spectral")
        with policy_scope("mixed_float16"):
            spectral.dtype_policy = "mixed_float16"
            model = net(spectral)
            stateful = net(layers.LSTM(2, stateful=True, name="lstm"), shape=(3, 4), batch_size=1)
        before = numbers(spectral.vector_u)
        model(ONES, training=True)
        assert np.array_equal(before, numbers(spectral.vector_u)) == ON_TORCH
        assert found(model) == {(self.RULE, "net/spectral")}
        assert found(stateful) == {(self.RULE, "net/lstm")}

    def test_layers_of_keras_that_do_it_right_are_not(self):
        with policy_scope("mixed_float16"):
            model = net(
                layers.Dense(4),
                layers.BatchNormalization(),
                layers.LayerNormalization(),
                layers.Dropout(0.5),
                layers.Reshape((2, 2)),
                layers.LSTM(3, return_sequences=True),
                layers.GRU(3),
            )
        assert not found(model)

    def test_without_its_source_a_layer_is_judged_by_its_code(self):
        names = {"layers": layers}
        exec(
            "class Hidden(layers.Layer):\n"
            "    def build(self, shape):\n"
            "        self.n = self.add_weight(shape=(), trainable=False, name='n')\n"
            "    def call(self, x):\n"
            "        self.n.assign_add(1.0)\n"
            "        return x\n",
            names,
        )
        model = net(names["Hidden"](name="hidden", dtype="mixed_float16"))
        assert found(model) == {(self.RULE, "net/hidden")}


class TestAttention:
    def model(self, policy="mixed_float16", kind=layers.Attention):
        with policy_scope(policy):
            inputs = keras.Input((3, 4))
            end = kind(name="attend")([inputs, inputs])
            outputs = layers.Activation("linear", dtype="float32")(end)
        return keras.Model(inputs, outputs, name="net")

    def test_a_row_that_is_masked_as_a_whole_is_nan_on_torch_and_found_there(self):
        layer = layers.Attention(dtype="mixed_float16")
        x = np.ones((1, 3, 4), "float32")
        out = numbers(layer([x, x], mask=[None, np.zeros((1, 3), bool)]))
        assert bool(np.isnan(out).any()) == ON_TORCH
        rules = {"masked-attention"} if ON_TORCH else set()
        assert set(severities(self.model())) == rules | {"attention-overflow"}

    def test_large_scores_are_nan_and_hinted_at(self):
        x = np.full((1, 3, 4), 200, "float32")
        out = numbers(layers.Attention(dtype="mixed_float16")([x, x]))
        assert np.isnan(out).any()
        assert severities(self.model())["attention-overflow"] == "hint"

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_it_is_fine_in_wider_formats(self, policy):
        assert not found(self.model(policy))

    def test_additive_attention_has_no_products_to_overflow(self):
        assert set(severities(self.model(kind=layers.AdditiveAttention))) == (
            {"masked-attention"} if ON_TORCH else set()
        )


class TestNormalizations:
    def test_unit_norms_vanish_and_overflow_in_float16(self):
        layer = layers.UnitNormalization(name="unit", dtype="mixed_float16")
        assert not numbers(layer(1000 * ONES)).any()
        assert not np.isfinite(numbers(layer(1e-4 * ONES))).any()
        assert found(net(layer)) == {("unit-normalization", "net/unit")}

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_unit_norms_are_right_in_wider_formats(self, policy):
        layer = layers.UnitNormalization(name="unit", dtype=policy)
        assert np.allclose(numbers(layer(1000 * ONES)), 0.5, rtol=0.01)
        assert not found(net(layer))

    @pytest.mark.parametrize(
        ("mean", "variance"), [(0.0, 1e-8), (1e5, 1.0), (1000.0, 0.01), (0.0, 1e10)]
    )
    def test_statistics_that_float16_cannot_hold_are_found(self, mean, variance):
        layer = layers.Normalization(
            mean=[0.0, mean], variance=[1.0, variance], name="norm", dtype="mixed_float16"
        )
        model = net(layer, shape=(2,))
        x = np.array([[0.0, mean + variance**0.5]], "float32")  # one deviation off the mean
        assert not np.allclose(numbers(layer(x)), [[0, 1]], atol=0.2)
        assert found(model) == {("normalization-range", "net/norm")}
        assert "1 of 2 features" in str(check_model(model))

    @pytest.mark.parametrize(
        ("mean", "variance", "policy"),
        [
            (0.0, 1.0, "mixed_float16"),
            (100.0, 50.0, "mixed_float16"),
            (0.0, 1e-8, "mixed_bfloat16"),
            (1e5, 1.0, "float32"),
        ],
    )
    def test_statistics_that_fit_are_not(self, mean, variance, policy):
        layer = layers.Normalization(mean=[mean], variance=[variance], dtype=policy)
        model = net(layer, shape=(1,))
        out = numbers(layer(np.array([[mean + variance**0.5]], "float32")))
        assert np.allclose(out, 1, atol=0.05)
        assert not found(model)

    def test_adapted_statistics_count_as_given_ones(self):
        layer = layers.Normalization(name="norm", dtype="mixed_float16")
        layer.adapt(np.random.default_rng(0).normal(2000, 0.1, (64, 1)).astype("float32"))
        # it was built by itself, outside of the model
        assert found(net(layer, shape=(1,))) == {("normalization-range", "norm")}


def test_dot_products_can_overflow_float16():
    layer = layers.Dot(1, name="dot", dtype="mixed_float16")
    assert np.isinf(numbers(layer([200 * ONES, 200 * ONES]))).all()
    with policy_scope("mixed_float16"):
        inputs = keras.Input((4,))
        model = keras.Model(
            inputs, layers.Activation("linear", dtype="float32")(layer([inputs] * 2))
        )
    assert found(model) == {("dot-overflow", "dot")}


@pytest.mark.skipif(not ON_TORCH, reason="torch modules run on the torch backend")
class TestTorchModules:
    def layer(self, **wrapping):
        import torch

        class Foreign(layers.Layer):
            def __init__(self, **options):
                super().__init__(**options)
                module = torch.nn.Linear(4, 2)
                self.linear = layers.TorchModuleWrapper(module, **wrapping) if wrapping else module

            def call(self, x):
                return self.linear(x)

        return Foreign(name="foreign")

    def test_a_module_with_other_weights_fails_and_is_found(self):
        with policy_scope("mixed_float16"):
            layer = self.layer()
            model = keras.Sequential([layer], name="net")
        [finding] = check_model(model)
        assert (finding.rule, finding.severity) == ("foreign-module", "error")
        assert finding.place.startswith("net/foreign/")
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            layer(ONES)

    def test_the_cure_cures(self):
        with policy_scope("mixed_float16"):
            layer = self.layer(dtype="float32", name="linear")
            layer(ONES)
            model = net(layer)
        assert not found(model)


class TestTheModelItself:
    def test_an_output_in_16_bits(self):
        with policy_scope("mixed_float16"):
            model = keras.Sequential([keras.Input((4,)), layers.Softmax(name="end")], name="net")
        assert found(model) == {("low-output", "net/end")}

    def test_the_output_of_a_model_of_ones_own_once_it_was_seen(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__(name="own")
                self.dense = layers.Dense(1)

            def call(self, x):
                return self.dense(x)

        with policy_scope("mixed_float16"):
            model = Own()
        model.compile("sgd", "mse")
        model.train_on_batch(ONES, ONES[:, :1])
        assert found(model) == {("low-output", "own")}

    def test_a_policy_set_too_late(self):
        model = net(layers.Dense(1))
        set_global_policy("mixed_float16")
        assert found(model) == {("policy-set-late", "net")}

    def test_a_key_of_a_map_that_names_no_layer(self):
        with policy_scope(PolicyMap("mixed_float16", {"net/haed": "float32"})):
            model = net(layers.Dense(1, name="head"))
        assert found(model) == {("unmatched-key", "net")}
        assert "Did you mean 'net/head'" in str(check_model(model))


def test_a_model_in_float32_has_nothing_to_find():
    model = net(layers.Dense(2), layers.UnitNormalization(), Counter())
    report = check_model(model)
    assert isinstance(report, Report)
    assert str(report) == "Under float32: nothing found"


def test_it_finds_layers_inside_of_layers_and_the_worst_first():
    class Block(layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.counter = Counter(name="counter")
            self.unit = layers.UnitNormalization(name="unit")

        def call(self, x):
            return self.unit(self.counter(x))

    with policy_scope("mixed_float16"):
        model = net(Block(name="block"))
    report = check_model(model)
    assert next(iter(report)).place in ("net/block/counter", "net/block/unit")
    assert found(model) == {
        (TestUpdatesInACall.RULE, "net/block/counter"),
        ("unit-normalization", "net/block/unit"),
    }
    assert report.worst == ("error" if ON_TORCH else "warning")


def test_it_leaves_the_model_and_the_names_of_later_layers_alone():
    with policy_scope("mixed_float16"):
        model = net(layers.UnitNormalization(), Counter())
    before = [numbers(weight) for weight in model.weights]
    check_model(model)
    assert all(map(np.array_equal, before, map(numbers, model.weights)))
    keras.utils.clear_session(free_memory=False)
    check_model(model)
    assert layers.UnitNormalization().name == "unit_normalization"
