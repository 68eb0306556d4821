"""Policies, policy maps, and the policy that holds where none is given."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import halfstep
from halfstep import (
    DynamicLossScale,
    FixedLossScale,
    NoLossScale,
    Policy,
    PolicyError,
    PolicyMap,
    global_policy,
    policy_scope,
    set_global_policy,
)
from halfstep.core.policy import NAMES, as_policy_map


@pytest.fixture(autouse=True)
def _float32_again():
    yield
    set_global_policy("float32")


@pytest.mark.parametrize(
    ("name", "compute", "variable", "loss_scale", "low"),
    [
        ("mixed_float16", "float16", "float32", DynamicLossScale(), True),
        ("mixed_bfloat16", "bfloat16", "float32", NoLossScale(), True),
        ("master_float16", "float16", "float16", DynamicLossScale(), True),
        ("master_bfloat16", "bfloat16", "bfloat16", NoLossScale(), True),
        ("kahan_bfloat16", "bfloat16", "bfloat16", NoLossScale(), True),
        ("float16", "float16", "float16", NoLossScale(), True),
        ("bfloat16", "bfloat16", "bfloat16", NoLossScale(), True),
        ("float32", "float32", "float32", NoLossScale(), False),
        ("float64", "float64", "float64", NoLossScale(), False),
    ],
)
def test_the_names(name, compute, variable, loss_scale, low):
    policy = Policy(name)
    assert (policy.name, policy.compute_dtype, policy.variable_dtype) == (name, compute, variable)
    assert policy.loss_scale == loss_scale
    assert policy.is_low is low
    assert repr(policy) == str(policy) == f"Policy({name!r})"


def test_the_names_are_all():
    assert set(NAMES) == {
        "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float32", "float64",
        "master_float16", "master_bfloat16", "kahan_bfloat16",
    }  # fmt: skip


def test_how_an_optimizer_writes_into_the_variables():
    assert {name: Policy(name).update for name in NAMES if Policy(name).update != "plain"} == {
        "master_float16": "master",
        "master_bfloat16": "master",
        "kahan_bfloat16": "kahan",
    }


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        (1024, FixedLossScale(1024)),
        (0.5, FixedLossScale(0.5)),
        ("dynamic", DynamicLossScale()),
        (None, NoLossScale()),
        (DynamicLossScale(growth_interval=7), DynamicLossScale(growth_interval=7)),
    ],
)
@pytest.mark.parametrize("name", ["mixed_float16", "master_float16", "mixed_bfloat16", "float32"])
def test_a_loss_scale_of_choice_survives_repr_config_and_pickle(name, given, scale):
    policy = Policy(name, loss_scale=given)
    assert policy.loss_scale == scale
    assert eval(repr(policy), vars(halfstep).copy()) == policy
    assert Policy.from_config(json.loads(json.dumps(policy.get_config()))) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
    assert hash(pickle.loads(pickle.dumps(policy))) == hash(policy)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_policy_is_its_name_in_a_config(name):
    assert Policy(name).get_config() == {"name": name}
    assert Policy.from_config({"name": name}) == Policy(name)


def test_a_short_loss_scale_in_a_config_is_taken():
    assert Policy.from_config({"name": "mixed_float16", "loss_scale": 8}).loss_scale.value == 8
    none = Policy.from_config({"name": "mixed_float16", "loss_scale": None})
    assert none == Policy("mixed_float16", loss_scale=None)


def test_equal_policies_are_equal_and_others_are_not():
    assert Policy("mixed_float16") == Policy("mixed_float16", loss_scale="dynamic")
    assert Policy("mixed_float16") != Policy("mixed_float16", loss_scale=1024)
    assert Policy("mixed_float16") != "mixed_float16"
    assert len({Policy(name) for name in NAMES} | {Policy(name) for name in NAMES}) == len(NAMES)


def test_a_policy_is_frozen():
    with pytest.raises(AttributeError):
        Policy("float32").name = "float16"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixed_flaot16", ["'mixed_flaot16'", "Did you mean 'mixed_float16'", "mixed_bfloat16"]),
        ("fp16", ["'fp16'", "float64"]),
        ("int32", ["'int32'"]),
        ("", ["''"]),
        (None, ["None", "must be a string"]),
        (16, ["16", "must be a string"]),
    ],
)
def test_an_unknown_name_lists_what_is_allowed(name, words):
    with pytest.raises(PolicyError) as caught:
        Policy(name)
    for word in [*words, *NAMES]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("fp16", "FP16", "half", "16-mixed", "float16_mixed", "torch.float16"), "mixed_float16"),
        ((16, np.float16, np.dtype("float16")), "mixed_float16"),
        (("bf16", "bf16-mixed", "bfloat16_mixed", "torch.bfloat16"), "mixed_bfloat16"),
        ((ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)), "mixed_bfloat16"),
        (("fp32", np.float32), "float32"),
    ],
)
def test_a_dtype_and_other_libraries_words_get_the_policy_that_trains(words, name):
    for word in words:
        with pytest.raises(PolicyError, match=rf" Did you mean '{name}'\?$"):
            Policy(word)


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan"), "large", True, [8]])
def test_a_loss_scale_that_is_none_is_refused(scale):
    with pytest.raises(halfstep.LossScaleError):
        Policy("mixed_float16", loss_scale=scale)


@pytest.mark.parametrize(
    "config", [{}, {"loss_scale": None}, {"name": "float32", "dtype": "x"}, {"name": "float23"}]
)
def test_a_config_that_is_none_is_refused(config):
    with pytest.raises(PolicyError):
        Policy.from_config(config)


# ---------------------------------------------------------------- policy maps

BLOCK = ("", ".norm", ".attn", ".attn.q")
PATHS = ["", "embed", "blocks", *(f"blocks.{i}{part}" for i in (0, 1) for part in BLOCK),
         "head", "head.out"]  # fmt: skip


def named(policies, paths=PATHS):
    """The policy's name of every path, and the key and the path that gave it."""
    return {path: (r.policy.name, r.key, r.at) for path, r in policies.resolve(paths).items()}


def test_without_overrides_the_default_holds_everywhere():
    assert named(PolicyMap("mixed_float16")) == dict.fromkeys(PATHS, ("mixed_float16", None, ""))


def test_a_path_covers_everything_below_it_and_nothing_else():
    found = named(PolicyMap("mixed_float16", {"blocks.0": "float32"}))
    below = {p for p, (name, *_) in found.items() if name == "float32"}
    assert below == {"blocks.0", "blocks.0.norm", "blocks.0.attn", "blocks.0.attn.q"}
    assert found["blocks.0.attn.q"] == ("float32", "blocks.0", "blocks.0")


def test_a_path_does_not_cover_names_that_begin_alike():
    found = named(PolicyMap("mixed_float16", {"head": "float32"}), ["", "head", "header", "head.a"])
    assert [found[path][0] for path in ("head", "header", "head.a")] == [
        "float32", "mixed_float16", "float32"
    ]  # fmt: skip


def test_the_deepest_match_wins_whatever_the_order():
    overrides = {
        "blocks": "float32",
        "blocks.0.attn": "mixed_bfloat16",
        "blocks.0.attn.q": "float64",
    }
    for order in (list(overrides), list(reversed(overrides))):
        found = named(PolicyMap("mixed_float16", {key: overrides[key] for key in order}))
        assert found["blocks.0"][0] == "float32"
        assert found["blocks.0.norm"][0] == "float32"
        assert found["blocks.0.attn"][0] == "mixed_bfloat16"
        assert found["blocks.0.attn.q"][0] == "float64"
        assert found["head"][0] == "mixed_float16"


def test_an_expression_matches_whole_paths_only():
    found = named(PolicyMap("mixed_float16", {r"blocks\.\d+\.norm": "float32"}))
    assert {p for p, (name, *_) in found.items() if name == "float32"} == {
        "blocks.0.norm", "blocks.1.norm"
    }  # fmt: skip
    with pytest.raises(PolicyError, match="matches no layer"):
        PolicyMap("mixed_float16", {r"\d+\.norm": "float32"}).resolve(PATHS)


def test_what_an_expression_names_covers_everything_below_it():
    found = named(PolicyMap("mixed_float16", {r".*\.attn": "float32"}))
    assert found["blocks.1.attn.q"] == ("float32", r".*\.attn", "blocks.1.attn")


def test_a_path_wins_over_an_expression_at_the_same_depth():
    overrides = {r"blocks\..*": "float32", "blocks.0": "mixed_bfloat16", "blocks.1": "float64"}
    found = named(PolicyMap("mixed_float16", overrides))
    assert found["blocks.0"][0] == "mixed_bfloat16"
    # the expression matches the deeper path too, and deeper wins
    assert found["blocks.0.norm"][0] == "float32"


def test_a_key_that_is_a_path_is_no_expression():
    paths = ["", "a.b", "axb"]
    assert named(PolicyMap("mixed_float16", {"a.b": "float32"}), paths)["axb"][0] == "mixed_float16"
    assert named(PolicyMap("mixed_float16", {"a.b": "float32"}), ["", "axb"])["axb"][0] == "float32"


def test_the_root_can_be_named():
    found = named(PolicyMap("mixed_float16", {"": "float32", "head": "mixed_bfloat16"}))
    assert found["embed"] == ("float32", "", "")
    assert found["head.out"][0] == "mixed_bfloat16"


def test_another_separator():
    found = PolicyMap("mixed_float16", {"a/b": "float32"}).resolve(
        ["", "a/b/c", "a/b", "a/b.c"], "/"
    )
    assert found["a/b/c"].policy.name == "float32"
    assert found["a/b.c"].policy.name == "mixed_float16"


def test_why():
    policies = PolicyMap("mixed_float16", {"head": "float32", r".*norm": "float32"})
    found = policies.resolve(PATHS)
    assert found["embed"].why == "default"
    assert found["head"].why == "override 'head'"
    assert "'.*norm'" in found["blocks.0.norm"].why
    assert "'blocks.0.norm'" in found["blocks.0.norm"].why


def test_a_key_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(PolicyError, match=r"'blocks\.0\.nrom' matches no layer.*'blocks\.0\.norm'"):
        PolicyMap("mixed_float16", {"blocks.0.nrom": "float32"}).resolve(PATHS)
    with pytest.raises(PolicyError, match=r"Its layers are 'embed', 'blocks'.* and 4 more"):
        PolicyMap("mixed_float16", {"zzzzzzzzzz": "float32"}).resolve(PATHS)


def test_expressions_that_disagree_are_an_error_that_names_both_and_the_path():
    policies = PolicyMap("mixed_float16", {r".*norm": "float32", r"blocks\..*": "mixed_bfloat16"})
    with pytest.raises(PolicyError) as caught:
        policies.resolve(PATHS)
    for word in (".*norm", r"blocks\\..*", "blocks.0.norm", "disagree"):
        assert word in str(caught.value)


def test_expressions_that_agree_may_overlap():
    overrides = {r".*norm": "float32", r"blocks\.0\..*": Policy("float32")}
    found = named(PolicyMap("mixed_float16", overrides))
    assert found["blocks.0.norm"][0] == "float32"


@pytest.mark.parametrize("key", ["(", "*", "[a"])
def test_a_key_that_is_no_expression_is_refused_at_once(key):
    with pytest.raises(PolicyError, match="no regular expression"):
        PolicyMap("mixed_float16", {key: "float32"})


def test_wrong_keys_and_policies_are_refused_at_once():
    with pytest.raises(PolicyError, match="must be a string"):
        PolicyMap("mixed_float16", {0: "float32"})
    with pytest.raises(PolicyError, match="float23"):
        PolicyMap("mixed_float16", {"head": "float23"})
    with pytest.raises(PolicyError, match="float23"):
        PolicyMap("float23")


def test_a_map_is_a_value():
    one = PolicyMap("mixed_float16", {"a": "float32", "b": Policy("mixed_float16", loss_scale=8)})
    two = PolicyMap("mixed_float16", {"b": Policy("mixed_float16", loss_scale=8), "a": "float32"})
    assert one == two
    assert hash(one) == hash(two)
    assert one != PolicyMap("mixed_float16", {"a": "float32"})
    assert one != PolicyMap("float32", one.overrides)
    assert one != "mixed_float16"
    assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert PolicyMap.from_config(json.loads(json.dumps(one.get_config()))) == one
    assert eval(repr(one), vars(halfstep).copy()) == one


def test_a_map_cannot_be_changed_through_what_it_gives_out():
    policies = PolicyMap("mixed_float16", {"head": "float32"})
    policies.overrides["head"] = Policy("float64")
    assert policies.overrides == {"head": Policy("float32")}
    with pytest.raises(AttributeError):
        policies.default = Policy("float64")


@pytest.mark.parametrize("config", [{}, {"default": {"name": "float32"}, "over": {}}])
def test_a_map_config_that_is_none_is_refused(config):
    with pytest.raises(PolicyError):
        PolicyMap.from_config(config)


def test_the_loss_scale_of_a_map_is_the_first_that_is_one():
    assert PolicyMap("float32", {"a": "mixed_float16"}).loss_scale == DynamicLossScale()
    fixed = Policy("mixed_float16", loss_scale=8)
    assert PolicyMap(fixed, {"a": "mixed_float16"}).loss_scale == FixedLossScale(8)
    assert PolicyMap("mixed_bfloat16", {"a": "float32"}).loss_scale == NoLossScale()


def test_overrides_are_added_to_a_map():
    base = PolicyMap("mixed_float16", {"a": "float32", "b": "float32"})
    assert as_policy_map(base, {"b": "float64", "c": "float64"}) == PolicyMap(
        "mixed_float16", {"a": "float32", "b": "float64", "c": "float64"}
    )
    assert as_policy_map("float32") == PolicyMap(Policy("float32"))


# ---------------------------------------------------------------- the global policy


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_it_is_float32_until_set():
    assert global_policy() == Policy("float32")


def test_worker_threads_see_it_old_ones_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(global_policy).result() == Policy("float32")
        set_global_policy("mixed_float16")
        assert pool.submit(global_policy).result() == Policy("mixed_float16")
    assert in_a_thread(global_policy) == Policy("mixed_float16")


def test_a_worker_thread_can_set_it():
    in_a_thread(lambda: set_global_policy("mixed_bfloat16"))
    assert global_policy() == Policy("mixed_bfloat16")


def test_a_map_can_be_global():
    policies = PolicyMap("mixed_float16", {"head": "float32"})
    set_global_policy(policies)
    assert global_policy() == policies


def test_scopes_nest_and_end_also_after_an_error():
    set_global_policy("mixed_float16")
    with policy_scope("float32") as outer:
        assert outer == global_policy() == Policy("float32")
        with pytest.raises(ZeroDivisionError), policy_scope("float64"):
            _ = global_policy() == Policy("float64") and 1 / 0
        assert global_policy() == Policy("float32")
    assert global_policy() == Policy("mixed_float16")


def test_a_scope_shadows_what_is_set_inside_it():
    with policy_scope("mixed_float16"):
        set_global_policy("mixed_bfloat16")
        assert global_policy() == Policy("mixed_float16")
    assert global_policy() == Policy("mixed_bfloat16")


def test_a_scope_holds_in_its_own_thread_only():
    inside, done = threading.Event(), threading.Event()
    seen = []

    def scoped():
        with policy_scope("mixed_float16"):
            inside.set()
            done.wait(10)
            seen.append(global_policy())

    thread = threading.Thread(target=scoped)
    thread.start()
    assert inside.wait(10)
    assert global_policy() == Policy("float32")
    done.set()
    thread.join()
    assert seen == [Policy("mixed_float16")]
    with policy_scope("mixed_bfloat16"):
        assert in_a_thread(global_policy) == Policy("float32")


def test_tasks_keep_their_own_scopes():
    async def task(name, barrier):
        with policy_scope(name):
            await barrier.wait()  # every task is inside its scope now
            first = global_policy().name
            await asyncio.sleep(0)
            return first, global_policy().name

    async def both():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(task("mixed_float16", barrier), task("float64", barrier))

    assert asyncio.run(both()) == [("mixed_float16",) * 2, ("float64",) * 2]
    assert global_policy() == Policy("float32")


def test_an_unknown_name_changes_nothing():
    set_global_policy("mixed_float16")
    with pytest.raises(PolicyError, match="float23"):
        set_global_policy("float23")
    with pytest.raises(PolicyError, match="float23"), policy_scope("float23"):
        pytest.fail("must not get here")
    assert global_policy() == Policy("mixed_float16")


@pytest.mark.parametrize("separator", [".", "/"])
def test_the_policy_at_one_path_is_the_one_that_all_paths_give(separator):
    policies = PolicyMap(
        "mixed_float16",
        {"a": "float32", separator.join("ab"): "bfloat16", r".*norm\d": "float64", "d": "float16"},
    )
    paths = [separator.join(parts) for parts in ("a", "ab", "abc", "ac", "d", "e", ["e", "norm1"])]
    found = policies.resolve(["", *paths], separator)
    assert {path: policies.policy_at(path, separator) for path in ["", *paths]} == {
        path: rule.policy for path, rule in found.items()
    }


def test_the_policy_at_one_path_refuses_expressions_that_disagree():
    policies = PolicyMap("float32", {"a.*": "float16", ".*b": "bfloat16"})
    with pytest.raises(PolicyError, match="disagree"):
        policies.policy_at("ab")
