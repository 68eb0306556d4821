"""Keras recipes: the same race, record and summary, with the policy through halfstep.keras."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

from halfstep import LossScaleExhausted, Policy, PolicyError, PolicyMap, RecipeError  # noqa: E402
from halfstep.compare import Settings, compare, load_recipe, write_template  # noqa: E402
from halfstep.compare import keras_trainee as trainees  # noqa: E402
from halfstep.compare.engine import Plan, first_batch  # noqa: E402
from halfstep.core.record import read_record  # noqa: E402

# keras.Variable.numpy() under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")

QUICK = Settings(memory=False)

TINY = """
import keras
import numpy as np

FRAMEWORK = "keras"
STEPS = 4
BATCH_SIZE = 4
METRIC = "loss"
policies = []
bad = False

def make_model():
    policies.append(keras.config.dtype_policy().name)
    model = keras.Sequential([
        keras.Input((3,)),
        keras.layers.Dense(8, activation="tanh", name="body"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(1, dtype="float32", name="head"),
    ], name="net")
    model.get_layer("head").kernel.assign(0.01 * model.get_layer("head").kernel)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    return model

def data():
    x = np.random.default_rng(0).normal(size=(18, 3)).astype("float32")
    if bad:
        x[:] = np.inf
    y = x.sum(1) / 100  # gradients that a scale of 2**15 does not overflow
    return x[:14], y[:14], x[14:], y[14:]
"""


@pytest.fixture
def tiny(recipe):
    return lambda added="": recipe(added, name="tiny_keras", source=TINY)


def start(recipe, policy="float32", seed=0):
    given = Policy(policy) if isinstance(policy, str) else policy
    return trainees.starter(recipe, "cpu", seed)(given)


def steps(trainee, recipe, count=4):
    plan = Plan(steps=count)
    return [
        trainee.step(batch, plan.step_seed(i)) for i, (_, batch) in enumerate(plan.batches(recipe))
    ]


class TestTraining:
    def test_float32_is_train_on_batch_bit_for_bit(self, tiny):
        recipe = tiny()
        trainee = start(recipe)
        model = trainees.make_model(recipe, 0)
        expected = []
        for step, (_, batch) in enumerate(Plan(steps=4).batches(recipe)):
            keras.utils.set_random_seed(Plan(steps=4).step_seed(step))
            expected.append(model.train_on_batch(*batch, return_dict=True)["loss"])
        assert [result.loss for result in steps(trainee, recipe)] == expected
        assert trainee.notes == []

    def test_the_policy_is_the_global_one_while_the_model_is_made(self, tiny):
        recipe = tiny()
        low = start(recipe, "mixed_bfloat16")
        assert recipe.module.policies == ["float32", "mixed_bfloat16"]
        assert low.model.get_layer("body").compute_dtype == "bfloat16"
        assert keras.config.dtype_policy().name == "float32"

    def test_all_start_from_the_same_weights_and_draw_the_same(self, tiny):
        recipe = tiny()
        starter = trainees.starter(recipe, "cpu", 0)
        one, two = starter(Policy("float32")), starter(Policy("mixed_float16"))
        for mine, other in zip(one.model.get_weights(), two.model.get_weights(), strict=True):
            assert np.array_equal(mine, other)
        losses = [[result.loss for result in steps(each, recipe)] for each in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert losses[0] != losses[1]

    def test_float16_scales_the_loss_by_what_the_policy_says(self, tiny):
        recipe = tiny()
        assert steps(start(recipe, "mixed_float16"), recipe)[-1].scale == 2.0**15
        fixed = Policy("mixed_float16", loss_scale=64)
        assert steps(start(recipe, fixed), recipe)[-1].scale == 64.0
        assert steps(start(recipe, "mixed_bfloat16"), recipe)[-1].scale is None

    def test_a_skipped_step_is_told_and_changes_nothing(self, tiny):
        recipe = tiny()
        trainee = start(recipe, "mixed_float16")
        x, y = first_batch(recipe, 0)
        before = trainee.model.get_weights()
        result = trainee.step((x * np.inf, y), 1)
        assert (result.skipped, result.scale) == (True, 2.0**14)
        assert all(map(np.array_equal, before, trainee.model.get_weights()))
        assert not trainee.step((x, y, np.ones(4)), 2).skipped

    def test_an_exhausted_loss_scale_ends_it(self, tiny):
        from halfstep import DynamicLossScale

        recipe = tiny("bad = True")
        scale = DynamicLossScale(initial_scale=1.0, patience=2)
        trainee = start(recipe, Policy("mixed_float16", loss_scale=scale))
        with pytest.raises(LossScaleExhausted):
            steps(trainee, recipe, 8)

    def test_a_policy_map_goes_by_layer(self, tiny):
        trainee = start(tiny(), PolicyMap("mixed_bfloat16", {"net/body": "float32"}))
        assert trainee.model.get_layer("body").compute_dtype == "float32"
        assert len(trainee.notes) == 0

    def test_a_model_that_is_built_by_its_first_batch(self, tiny):
        recipe = tiny("""
        class Net(keras.Model):
            def __init__(self):
                super().__init__()
                self.one = keras.layers.Dense(1, dtype="float32")

            def call(self, x):
                return self.one(x)

        def make_model():
            model = Net()
            model.compile("adam", "mse")
            return model
        """)
        one, two = start(recipe), start(recipe, "mixed_bfloat16")
        assert np.array_equal(one.model.get_weights()[0], two.model.get_weights()[0])
        assert two.notes == ["no layer of the model computes in 16 bits under this policy"]

    def test_what_compile_warns_of_is_a_note(self, tiny):
        recipe = tiny("""
        def make_model():
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="end")])
            model.compile("sgd", "mse")
            return model
        """)
        assert any("computes in bfloat16" in note for note in start(recipe, "mixed_bfloat16").notes)


class TestData:
    def test_batches_and_metrics_follow_from_it(self, tiny):
        recipe = tiny()
        batches = list(recipe.call("batches", 0, 0))
        assert [len(x) for x, _ in batches] == [4, 4, 4]
        again = list(recipe.call("batches", 0, 0))
        assert np.array_equal(batches[0][0], again[0][0])
        assert not np.array_equal(batches[0][0], next(iter(recipe.call("batches", 1, 0)))[0])
        assert all(np.allclose(x.sum(1) / 100, y) for x, y in batches)
        trainee = start(recipe)
        assert trainee.evaluate() == {"loss": pytest.approx(
            trainee.model.evaluate(*recipe.module.data()[2:], verbose=0))}  # fmt: skip

    def test_of_an_accuracy_the_number_of_examples_is_known(self, tiny):
        recipe = tiny("""
        METRIC = "binary_accuracy"
        make_plain = make_model
        def make_model():
            model = make_plain()
            model.compile("sgd", "mse", metrics=["binary_accuracy"])
            return model
        """)
        assert start(recipe).evaluate()["examples"] == 4

    def test_dicts_and_tuples_of_arrays(self, tiny):
        recipe = tiny("""
        make_arrays = data
        def data():
            x, y, u, v = make_arrays()
            return {"a": x, "b": (x, y)}, y, {"a": u, "b": (u, v)}, v
        """)
        (x, y), *_ = recipe.call("batches", 0, 0)
        assert np.array_equal(x["a"], x["b"][0])
        assert np.array_equal(x["b"][1], y)

    def test_batches_and_evaluate_of_ones_own(self, tiny):
        recipe = tiny("""
        del data
        def batches(epoch, seed):
            yield np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
        def evaluate(model):
            return {"loss": model(np.ones((1, 3), "float32"))[0, 0]}
        """)
        summary = compare(recipe, "float32", QUICK)
        assert summary["recipes"][0]["policies"]["float32"]["status"] == "finished"


class TestFaults:
    @pytest.mark.parametrize(
        ("added", "message"),
        [
            ("del data", r"has no function data\(\), which must return \(x_train, y_train, x_tes"),
            ("del make_model", r"no function make_model\(\), which must return a new model, compi"),
            ("def evaluate(): pass", r"evaluate\(\) must be callable as evaluate\(model\)"),
            ("BATCH_SIZE = 0", "BATCH_SIZE = 0 must be a whole number above 0"),
        ],
    )
    def test_of_the_file(self, tiny, added, message):
        with pytest.raises(RecipeError, match=message):
            tiny(added)

    @pytest.mark.parametrize(
        ("added", "message"),
        [
            ("def make_model(): return 3", r"make_model\(\) returned 3; it must return a compiled"),
            ("def make_model(): return keras.Sequential()", "call model.compile"),
            ("def make_model(): raise KeyError('x')", r"make_model\(\): KeyError: 'x'"),
            ("def data(): return 1, 2", r"data\(\) returned tuple; it must return \(x_train, y_t"),
            ("def data(): return [1], [1, 2], [1], [1]", r"x_train and y_train of \[1, 2\] exampl"),
            ("def batches(epoch, seed): yield 3", "gave int; a batch must be a tuple"),
        ],
    )
    def test_in_the_run(self, tiny, added, message):
        summary = compare(tiny(added), "float32,mixed_bfloat16", QUICK)
        assert summary["status"] == "failed"
        with pytest.raises(RecipeError, match=message):
            raise RecipeError(summary["error"])


def test_a_comparison_is_recorded_as_any_other(tiny, tmp_path):
    record = tmp_path / "run.jsonl"
    summary = compare(tiny(), None, QUICK, record=record)
    (only,) = summary["recipes"]
    assert list(only["policies"]) == ["float32", "mixed_float16", "mixed_bfloat16"]
    assert {each["status"] for each in only["policies"].values()} == {"finished"}
    assert only["framework"] == "keras"
    assert summary["machine"]["versions"]["keras"] == keras.__version__
    assert only["policies"]["mixed_float16"]["scale"][-1][1] == 2.0**15
    assert read_record(record).events[-1]["status"] == "finished"


def test_memory_is_measured(tiny):
    recipe = tiny()
    found = list(
        trainees.starter(recipe, "cpu", 0).measure_memory({"float32": Policy("float32")}, 2)
    )
    assert found
    assert all(each["bytes"] >= 0 for each in found), found


def test_explain_says_what_each_layer_computes_in(tiny):
    text = str(trainees.explain(tiny(), Policy("mixed_bfloat16"), 0))
    assert ["net/body", "Dense", "bfloat16", "float32"] in [
        row.split() for row in text.splitlines()
    ]
    assert "3 layers: 2 in bfloat16, 1 in float32" in text
    assert "nothing found" in text
    with pytest.raises(PolicyError, match="no layer of the model computes in 16 bits"):
        trainees.explain(tiny(), Policy("float32"), 0)


def test_the_template_runs_as_it_is(tmp_path):
    recipe = load_recipe(write_template(tmp_path / "mine.py", "keras"))
    summary = compare(recipe, "float32,mixed_bfloat16", Settings(epochs=2, memory=False))
    assert summary["status"] == "finished"
    (only,) = summary["recipes"]
    assert "on 400 test examples" in only["same_rule"]
    assert only["policies"]["float32"]["final_metric"] > 0.5
