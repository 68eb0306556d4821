import pytest

from halfstep.compare.summary import summarise
from halfstep.compare.verdict import judge_metric

MIB = 2**20
BASE = {"seconds": 0.01, "memory": [100 * MIB], "metric": 0.98}


def sentence(record):
    return summarise(record).get("recipes")[0]["verdict"]


def test_the_sentence_of_the_issue(made_up):
    bfloat = {"seconds": 0.014, "memory": [58 * MIB], "metric": 0.98}
    assert sentence(made_up({"float32": BASE, "mixed_bfloat16": bfloat}, examples=450)) == (
        "mixed_bfloat16 took 1.4× the time and 0.58× the memory of float32 on this CPU, which has "
        "no fast bfloat16 matrix units; same accuracy."
    )


def test_two_policies_share_a_sentence(made_up):
    half = {"seconds": 0.042, "memory": [80 * MIB], "metric": 0.979}
    bfloat = {"seconds": 0.14, "memory": [58 * MIB], "metric": 0.98}
    record = made_up({"float32": BASE, "mixed_float16": half, "mixed_bfloat16": bfloat})
    assert sentence(record) == (
        "Against float32, mixed_float16 took 4.2× the time and 0.80× the memory, mixed_bfloat16 "
        "14× the time and 0.58× the memory, on this CPU, which has no fast 16-bit matrix units; "
        "same accuracy."
    )


@pytest.mark.parametrize(
    ("fast", "said"),
    [
        ({"float16": True, "bfloat16": True}, "has fast matrix units for float16 and bfloat16;"),
        ({"float16": True, "bfloat16": False},
         "has fast matrix units for float16 but not for bfloat16;"),
        ({}, "on this Chip X; same"),
    ],
)  # fmt: skip
def test_the_hardware_is_the_one_measured_on(made_up, fast, said):
    fastest = {"seconds": 0.004, "memory": [50 * MIB], "metric": 0.98}
    record = made_up(
        {"float32": BASE, "mixed_float16": fastest, "mixed_bfloat16": fastest},
        fast=fast, device="cuda",
    )  # fmt: skip
    assert said in sentence(record)
    assert "0.40× the time" in sentence(record)
    assert "this CPU" not in sentence(record)


def test_a_time_within_three_percent_is_the_same_time(made_up):
    near = {**BASE, "seconds": 0.0102}
    assert "about the same time" in sentence(made_up({"float32": BASE, "mixed_float16": near}))


def test_a_difference_that_the_spread_can_hide_is_no_difference(made_up):
    swings = [0.008 if step % 2 else 0.0125 for step in range(400)]
    said = sentence(
        made_up({"float32": BASE, "mixed_float16": {**BASE, "seconds": swings}}, steps=400)
    )
    assert "about the same time" in said


def test_a_time_that_swings_too_much_is_said_to_tell_nothing(made_up):
    swings = [0.001 if step % 2 else 0.02 for step in range(20)]
    said = sentence(
        made_up({"float32": BASE, "mixed_float16": {**BASE, "seconds": swings}}, steps=20)
    )
    assert "too noisy to tell (0.10 to 2.0×)" in said


@pytest.mark.parametrize(
    ("base", "other", "said"),
    [
        ([100, 104], [103, 107], "about the same memory"),  # the ranges overlap
        ([100, 100], [102, 102], "about the same memory"),  # no noise, but nothing to speak of
        ([100, 104], [50, 52], "0.50× the memory"),
        ([100, 104], [204, 204], "2.0× the memory"),
    ],
)
def test_memory_is_judged_by_its_noise(made_up, base, other, said):
    slow = {"seconds": 0.02, "memory": [size * MIB for size in other], "metric": 0.98}
    policies = {"float32": {**BASE, "memory": [s * MIB for s in base]}, "mixed_float16": slow}
    assert said in sentence(made_up(policies))


def test_memory_that_was_not_measured_is_not_mentioned(made_up):
    slow = {"seconds": 0.02, "metric": 0.98}
    said = sentence(made_up({"float32": {"metric": 0.98}, "mixed_float16": slow}))
    assert said.startswith("mixed_float16 took 2.0× the time of float32 on this CPU")
    assert "memory" not in said


def test_a_worse_metric_is_said_with_both_values(made_up):
    worse = {**BASE, "seconds": 0.02, "metric": 0.91}
    record = made_up(
        {"float32": BASE, "mixed_float16": worse, "mixed_bfloat16": {**BASE, "seconds": 0.02}},
        examples=450,
    )
    assert sentence(record).endswith(
        "; accuracy worse with mixed_float16, 0.91 against 0.98; same accuracy with mixed_bfloat16."
    )


def test_a_lower_loss_is_better(made_up):
    policies = {"float32": {"metric": 2.0}, "mixed_float16": {"seconds": 0.02, "metric": 1.9}}
    said = sentence(made_up(policies, metric="validation loss (nats)", higher=False))
    assert said.endswith("; validation loss better with mixed_float16, 1.9 against 2.")


def test_a_policy_that_diverged_is_said_with_step_and_reason(made_up):
    lost = {"stopped": ("diverged", 12, "the loss was not finite for 5 steps in a row")}
    record = made_up(
        {"float32": BASE, "mixed_float16": lost, "mixed_bfloat16": {**BASE, "seconds": 0.02}}
    )
    said = sentence(record)
    assert "mixed_float16 diverged at step 12: the loss was not finite" in said
    assert "mixed_bfloat16 took 2.0× the time" in said


def test_all_others_lost(made_up):
    lost = {"stopped": ("failed", 0, "RuntimeError: not implemented for 'Half'.")}
    assert sentence(made_up({"float32": BASE, "float16": lost})) == (
        "float16 failed at step 0: RuntimeError: not implemented for 'Half'."
    )


def test_a_lost_baseline_leaves_nothing_to_compare_with(made_up):
    lost = {"stopped": ("diverged", 3, "nan")}
    said = sentence(made_up({"float32": lost, "mixed_float16": BASE}))
    assert said == "float32 diverged at step 3: nan; there is no baseline."


def test_a_stopped_run_says_how_far_it_came(made_up):
    slow = {**BASE, "seconds": 0.02}
    record = made_up(
        {"float32": BASE, "mixed_float16": slow}, status="interrupted", steps=40, planned=300
    )
    assert sentence(record).startswith("Stopped after 40 of 300 steps; ")


def test_nothing_measured(made_up):
    assert sentence(made_up({"float32": BASE})) == "Nothing was measured."


@pytest.mark.parametrize(
    ("base", "other", "word"),
    [
        # sqrt(0.9 * 0.1 / 100) = 0.03
        (0.9, 0.93, "same"),
        (0.9, 0.87, "same"),
        (0.9, 0.8699, "worse"),
        (0.9, 0.9301, "better"),
        # no error at all, still one example is one example
        (1.0, 0.99, "same"),
        (1.0, 0.98, "worse"),
        (0.9, None, None),
        (None, 0.9, None),
    ],
)
def test_a_share_is_judged_by_its_binomial_standard_error(base, other, word):
    assert judge_metric(base, other, higher_is_better=True, examples=100).word == word


@pytest.mark.parametrize(
    ("other", "word"), [(2.02, "same"), (1.98, "same"), (2.03, "worse"), (1.97, "better")]
)
def test_another_metric_is_judged_relatively(other, word):
    assert judge_metric(2.0, other, higher_is_better=False, same_within=0.01).word == word


def test_the_rule_is_stated_with_its_margin():
    rule = judge_metric(0.9, 0.9, higher_is_better=True, examples=100).rule
    assert "binomial standard error" in rule
    assert "±0.0300" in rule
    assert "±0.02" in judge_metric(2.0, 2.0, higher_is_better=False, same_within=0.01).rule
