"""JAX recipes: the same race, record and summary, with the policy through halfstep.jax."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")
jnp = jax.numpy
optax = pytest.importorskip("optax")

from halfstep import Policy, PolicyMap, RecipeError  # noqa: E402
from halfstep.compare import Settings, compare, load_recipe, summarise, write_template  # noqa: E402
from halfstep.compare import jax_trainee as trainees  # noqa: E402
from halfstep.compare.engine import Plan  # noqa: E402
from halfstep.core.record import read_record  # noqa: E402

QUICK = Settings(memory=False)

TINY = """
import jax
import jax.numpy as jnp
import numpy as np
import optax

FRAMEWORK = "jax"
STEPS = 4
METRIC = "error"
seen = []

def init(key):
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (3, 8)) / 2, "b": jax.random.normal(keys[1], (8, 1))}

def tx():
    return optax.sgd(0.1)

def batches(epoch, seed):
    draw = np.random.default_rng([seed, epoch])
    for _ in range(3):
        yield {"x": draw.normal(size=(4, 3)).astype("float32"), "by": np.float32(1)}

def apply(params, x):
    with jax.named_scope("up"):
        x = jnp.tanh(x @ params["a"])
    return x @ params["b"]

def loss(params, batch, key):
    seen.append("traced")
    keep = jax.random.bernoulli(key, 0.9, (4, 1))
    return jnp.square(apply(params, batch["x"]) * keep).mean() * batch["by"]

def evaluate(params):
    return {"error": jnp.abs(apply(params, jnp.ones((1, 3)))).mean(), "examples": 7}
"""

# batch norm: a running mean that is not trained
STATEFUL = """
def init_state(key):
    return {"mean": jnp.zeros(1), "key": jax.random.key(3)}

def loss(params, state, batch):
    y = apply(params, batch["x"])
    mean = 0.9 * state["mean"] + 0.1 * y.mean(0)
    return jnp.square(y - y.mean(0)).mean() * batch["by"], {**state, "mean": mean}

def evaluate(params, state):
    return {"error": jnp.abs(apply(params, jnp.ones((1, 3))) - state["mean"]).mean(),
            "mean": state["mean"][0]}
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny(recipe):
    return lambda added="": recipe(added, name="tiny_jax", source=TINY)


def start(recipe, policy="float32", seed=0):
    given = Policy(policy) if isinstance(policy, str) else policy
    return trainees.starter(recipe, "cpu", seed)(given)


def losses(trainee, recipe, steps=4, seed=0):
    plan = Plan(steps=steps, seed=seed)
    return [
        trainee.step(batch, plan.step_seed(step)).loss
        for step, (_, batch) in enumerate(plan.batches(recipe))
    ]


def one_batch(by=1.0):
    return {"x": np.ones((4, 3), "float32"), "by": np.float32(by)}


def test_float32_is_the_plain_training_loop_bit_for_bit(tiny):
    recipe, plan, expected = tiny(), Plan(steps=4), []
    params, tx = recipe.call("init", jax.random.key(0)), optax.sgd(0.1)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch, key):
        value, grads = jax.value_and_grad(recipe.module.loss)(params, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for number, (_, batch) in enumerate(plan.batches(recipe)):
        key = jax.random.key(plan.step_seed(number))
        params, state, value = step(params, state, batch, key)
        expected.append(float(value))
    assert losses(start(recipe), recipe) == expected


def test_policies_start_alike_and_draw_alike(tiny):
    recipe = tiny()
    make = trainees.starter(recipe, "cpu", 0)
    # the gradients of this problem overflow float16 under the first dynamic scale
    policies = Policy("float32"), Policy("mixed_float16", loss_scale=64), Policy("mixed_bfloat16")
    exact, half, bfloat = (losses(make(policy), recipe) for policy in policies)
    assert half == pytest.approx(exact, rel=0.03)
    assert bfloat == pytest.approx(exact, rel=0.1)
    assert exact != half != bfloat
    assert losses(start(recipe, seed=1), recipe) != exact


def test_float16_has_a_loss_scale_and_the_others_have_none(tiny):
    recipe = tiny()
    scales = [
        start(recipe, policy).step(one_batch(), 0).scale
        for policy in ("float32", "mixed_bfloat16", "mixed_float16",
                       Policy("mixed_float16", loss_scale=64))
    ]  # fmt: skip
    assert scales == [None, None, 2.0**15, 64.0]


@pytest.mark.parametrize("added", ["", STATEFUL], ids=["", "with state"])
def test_a_step_that_overflows_is_skipped_and_backs_the_scale_off(tiny, added):
    recipe = tiny(added)
    trainee = start(recipe, "mixed_float16")
    before = trainee.evaluate()
    result = trainee.step(one_batch(by=1e36), 0)
    assert (result.skipped, result.scale) == (True, 2.0**14)
    # neither parameters nor statistics have moved
    assert trainee.evaluate() == before
    assert not trainee.step(one_batch(), 0).skipped
    assert trainee.evaluate() != before


def test_state_is_trained_along_and_not_differentiated(tiny):
    recipe = tiny(STATEFUL)
    trainee = start(recipe, "mixed_bfloat16")
    trainee.step(one_batch(), 0)
    value = trainee.evaluate()["mean"]
    mean = np.asarray(recipe.call("apply", recipe.call("init", jax.random.key(0)), np.ones((1, 3))))
    assert value == pytest.approx(0.1 * mean.item(), rel=0.01)


def test_the_clock_sees_neither_tracing_nor_compiling_nor_the_batch(tiny, monkeypatch):
    recipe = tiny()
    trainee = start(recipe, "mixed_bfloat16")
    now = threading.local()
    now.running = False
    clock, wait = time.perf_counter, trainees.wait

    def tick():
        now.running = not now.running
        return clock()

    waits = []

    def waiting(tree):
        waits.append(now.running)
        return wait(tree)

    monkeypatch.setattr(trainees.time, "perf_counter", tick)
    monkeypatch.setattr(trainees, "wait", waiting)
    running_when_traced = []
    recipe.module.seen = type("", (), {"append": lambda self, _: running_when_traced.append(
        now.running)})()  # fmt: skip
    with jax.transfer_guard_device_to_host("disallow"):
        try:
            trainee.step(one_batch(), 0)
        except RuntimeError:  # a guard of devices: on a CPU reading needs no transfer
            pytest.fail("a step read from the device")
        finally:
            now.running = False
    assert running_when_traced == [False] * len(running_when_traced) != []
    # the batch is awaited before the clock starts, the results once, at its end
    assert waits == [False, True]


def test_one_compilation_serves_memory_and_training(tiny):
    recipe = tiny()
    make = trainees.starter(recipe, "cpu", 0)
    policies = {"float32": Policy("float32"), "low": Policy("mixed_bfloat16")}
    found = list(make.measure_memory(policies, 3))
    traced = len(recipe.module.seen)
    for policy in policies.values():
        losses(make(policy), recipe)
    assert len(recipe.module.seen) == traced
    assert [each["policy"] for each in found] == ["float32", "low"]
    # 32 parameters of 4 bytes and the batch are the least
    assert all(128 < each["bytes"] < 2**16 for each in found)
    assert all("XLA's plan" in each["method"] for each in found)


def test_the_plan_counts_what_is_kept_for_the_backward_pass(recipe):
    def needed(layers):
        big = recipe(
            f"""
            def init(key): return {{"a": jnp.ones((64, 64)) / 64, "b": jnp.ones((64, 1))}}
            def batches(epoch, seed): yield {{"x": np.ones((4096, 64), "float32")}}
            def loss(params, batch):
                x = batch["x"]
                for _ in range({layers}):
                    x = jnp.tanh(x @ params["a"])
                return jnp.square(x).mean()
            """, name="big_jax", source=TINY,
        )  # fmt: skip
        make = trainees.starter(big, "cpu", 0)
        [found] = make.measure_memory({"float32": Policy("float32")}, 3)
        return found["bytes"]

    # an activation is a mebibyte
    assert 4 * 2**20 <= needed(6) - needed(2) <= 6 * 2**20


def test_memory_of_a_policy_that_fails_says_why(tiny):
    lost = PolicyMap("mixed_float16", {"nowhere": "float32"})
    make = trainees.starter(tiny(), "cpu", 0)
    [each] = make.measure_memory({"lost": lost}, 3)
    assert "nowhere" in each["error"]
    assert "bytes" not in each


def test_the_race_the_record_and_the_summary_are_those_of_torch(tiny, tmp_path):
    recipe, path = tiny(), tmp_path / "run.jsonl"
    lost = PolicyMap("mixed_float16", {"nowhere": "float32"})
    policies = {
        "float32": Policy("float32"), "mixed_float16": Policy("mixed_float16"),
        "up": PolicyMap("mixed_bfloat16", {"up": "float32"}), "lost": lost,
    }  # fmt: skip
    summary = compare(recipe, policies, Settings(steps=6), record=path)
    assert summarise(read_record(path))["recipes"] == summary["recipes"]
    [found] = summary["recipes"]
    assert found["framework"] == "jax"
    assert summary["machine"]["versions"]["jax"] == jax.__version__
    by_name = found["policies"]
    assert [by_name[name]["steps"] for name in policies] == [6, 6, 6, 0]
    assert by_name["lost"]["status"] == "failed"
    assert "nowhere" in by_name["lost"]["reason"]
    # the first step overflows and is skipped
    assert by_name["mixed_float16"]["skipped_at"] == [0]
    assert by_name["mixed_float16"]["scale"] == [(0, 2.0**14), (5, 2.0**14)]
    assert by_name["mixed_float16"]["memory"]["count"] == 1
    assert by_name["up"]["losses"] != by_name["mixed_float16"]["losses"]
    assert found["same_rule"].startswith("within one binomial") or "7" in found["same_rule"]


def test_a_policy_that_diverges_leaves_the_race(tiny):
    hot = tiny(
        """
        def loss(params, batch):
            y = batch["x"] @ (params["a"] * 1e4)
            return jnp.square(y @ y.T).mean()
        """
    )
    summary = compare(hot, "float32,mixed_float16", Settings(steps=20, memory=False))
    assert summary["recipes"][0]["policies"]["mixed_float16"]["status"] == "diverged"


def test_evaluation_is_under_the_policy_where_it_can_be_traced(tiny):
    recipe = tiny()
    exact, low = (start(recipe, name) for name in ("float32", "mixed_bfloat16"))
    assert exact.evaluate()["error"] != low.evaluate()["error"]
    assert exact.notes == low.notes == []
    by_hand = tiny("def evaluate(params): return {'error': float(jnp.abs(params['a']).mean())}")
    exact, low = (start(by_hand, name) for name in ("float32", "mixed_bfloat16"))
    assert exact.evaluate() == low.evaluate()
    assert exact.notes == []
    assert "float32, as it is written" in low.notes[0]


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("def init(key): return undefined", r"line \d+: init\(key\): NameError"),
        ("def init(key): return {'a': jnp.arange(3)}", r"int32 at params\['a'\].*must be float32"),
        ("def init(key): return [1.0]", r"1.0 at params\[0\].*must be float32"),
        ("def loss(params, batch): return None", "returned None; it must return a scalar array"),
        ("def loss(params, batch): return batch['x']", r"shape \(4, 3\) and dtype float32"),
        ("def loss(params, batch): return jnp.int32(1)", "dtype int32"),
        (STATEFUL + "\ndef loss(params, state, batch): return jnp.ones(())", "must return a pair"),
        ("def evaluate(params): return {'error': 'high'}", "must return a dict of numbers"),
    ],
)
def test_what_is_the_recipes_fault_is_said_with_its_place(tiny, added, said):
    summary = None
    try:
        summary = compare(tiny(added), "float32", QUICK)
    except RecipeError as error:
        text = str(error)
    else:
        text = summary["error"]
    import re

    assert re.search(said, text), text


@pytest.mark.parametrize(
    ("signature", "given"),
    [
        ("params, batch", []),
        ("params, batch, scale=2.0", []),
        ("params, batch, rng", ["key"]),
        ("params, batch, key=None", ["key"]),
    ],
)
def test_a_key_is_given_to_a_loss_that_asks_for_one(tiny, signature, given):
    last = signature.split(",")[-1].split("=")[0]
    recipe = tiny(
        f"""
        def loss({signature}):
            if jax.dtypes.issubdtype(getattr({last}, "dtype", np.float32), jax.dtypes.prng_key):
                seen.append("key")
            return jnp.square(params["a"]).mean()
        """
    )
    start(recipe).step(one_batch(), 0)
    assert recipe.module.seen == given


def test_functions_that_do_not_fit_are_refused_when_the_recipe_is_loaded(tiny):
    with pytest.raises(RecipeError, match=r"must be callable as loss\(params, batch\)"):
        tiny("def loss(params): return None")
    with pytest.raises(RecipeError, match=r"must be callable as evaluate\(params, state\)"):
        tiny(STATEFUL + "\ndef evaluate(params): return {}")


def test_a_device_that_is_not_there_is_said():
    assert trainees.pick_device() == trainees.pick_device("cpu") == "cpu"
    for name in ("cuda", "cpu:7", "nonsense"):
        with pytest.raises(RecipeError, match=f"--device {name}"):
            trainees.pick_device(name)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux holds threads to cores")
def test_threads_are_held_to_cores_and_let_go():
    before = os.sched_getaffinity(0)
    with trainees.threads(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert trainees.describe("cpu")["threads"] == 1
    assert os.sched_getaffinity(0) == before
    with trainees.threads(None):
        assert os.sched_getaffinity(0) == before


def test_a_torch_recipe_may_follow_a_jax_one(tiny, recipe):
    summary = compare([tiny(), recipe()], "float32", Settings(steps=2, memory=False))
    assert [each["framework"] for each in summary["recipes"]] == ["jax", "torch"]
    assert {"jax", "torch"} <= set(summary["machine"]["versions"])


def test_the_template_runs_as_it_is_and_learns(tmp_path):
    path = write_template(tmp_path / "mine_jax.py", "jax")
    [recipe] = compare(str(path), "float32,mixed_float16", QUICK)["recipes"]
    for policy in recipe["policies"].values():
        assert policy["status"] == "finished"
        assert policy["final_metric"] > 0.9
    assert "binomial" in recipe["same_rule"]


def test_the_digits_are_learnt_by_a_transformer():
    recipe = load_recipe("digits-jax")
    recipe.module.WIDTH = 32  # for the sake of the test's time
    jax.config.update("jax_disable_most_optimizations", False)  # these steps are worth it
    try:
        summary = compare(recipe, "float32", Settings(steps=60, memory=False))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    evaluations = summary["recipes"][0]["policies"]["float32"]["evaluations"]
    assert evaluations[0]["metrics"]["accuracy"] < 0.3
    assert evaluations[-1]["metrics"]["accuracy"] > 0.6
