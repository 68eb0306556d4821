import json
import math
from dataclasses import replace

import pytest

from halfstep import RecordError
from halfstep.compare.summary import spread, summarise


def policy(record, label):
    return summarise(record)["recipes"][0]["policies"][label]


def test_ratios_are_taken_step_by_step(made_up):
    # the machine slows down tenfold in the second half; the ratio of each step stays 2
    base = [0.01 if step < 20 else 0.1 for step in range(40)]
    slow = [2 * seconds for seconds in base]
    ratio = policy(made_up({"a": {"seconds": base}, "b": {"seconds": slow}}), "b")["ratio"]
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0, "count": 32}


def test_warm_up_steps_are_left_out(made_up):
    seconds = [9.0] * 8 + [0.01] * 32
    found = policy(made_up({"a": {"seconds": seconds}}), "a")["step_seconds"]
    assert found["high"] == 0.01
    assert found["count"] == 32


def test_pairs_end_where_the_baseline_left(made_up):
    record = made_up({"a": {"stopped": ("diverged", 20, "nan")}, "b": {"seconds": 0.02}})
    assert policy(record, "b")["ratio"]["count"] == 12
    assert policy(record, "b")["steps"] == 40
    assert policy(record, "a")["stopped_at"] == 20


def test_the_final_loss_is_a_mean_of_the_last_steps(made_up):
    losses = [5.0] * 398 + [1.0, 2.0]
    found = policy(made_up({"a": {"losses": [*losses[:-20], *range(20)]}}, steps=400), "a")
    assert found["final_loss"] == sum(range(20)) / 20


def test_a_loss_that_is_not_finite_is_null_and_the_summary_is_strict_json(made_up):
    losses = [1.0] * 38 + [math.nan, math.inf]
    summary = summarise(made_up({"a": {"losses": losses, "metric": math.nan}}))
    json.dumps(summary, allow_nan=False)
    found = summary["recipes"][0]["policies"]["a"]
    assert found["losses"][-2:] == [None, None]
    assert found["final_loss"] is None
    assert found["final_metric"] is None


def test_the_scale_history_keeps_changes_and_both_ends(made_up):
    scales = [8.0] * 10 + [4.0] * 20 + [8.0] * 10
    found = policy(made_up({"a": {"scales": scales, "skipped_at": [10]}}), "a")
    assert found["scale"] == [(0, 8.0), (10, 4.0), (30, 8.0), (39, 8.0)]
    assert found["skipped"] == 1
    assert found["skipped_at"] == [10]


def test_memory_has_median_range_and_ratio(made_up):
    record = made_up({"a": {"memory": [90, 100, 120]}, "b": {"memory": [40, 50, 60]}})
    found = policy(record, "b")["memory"]
    assert (found["median"], found["low"], found["high"]) == (50, 40, 60)
    assert found["ratio"] == 0.5
    assert not found["within_noise"]


def test_memory_that_could_not_be_measured_leaves_its_reason(made_up):
    record = made_up({"a": {}})
    failed = {"event": "memory", "recipe": "r", "policy": "a", "error": "no /proc", "method": "m"}
    record.events.insert(1, failed)
    assert policy(record, "a")["memory"] is None
    assert policy(record, "a")["memory_error"] == "no /proc"


def test_an_interrupted_evaluation_compares_at_the_last_one_that_all_have(made_up):
    record = made_up({"a": {"metric": 0.5}, "b": {"metric": 0.6}}, status="interrupted")
    late = {"event": "evaluation", "recipe": "r", "policy": "a", "step": 45, "examples": None}
    record.events.insert(-2, {**late, "metrics": {"accuracy": 0.9}})
    assert policy(record, "a")["final_metric"] == 0.5
    assert policy(record, "a")["status"] == "unfinished"


def test_a_record_that_ends_anywhere_has_a_summary(made_up):
    scales = [8.0] * 5
    record = made_up({"a": {"memory": [1], "scales": scales, "metric": 1.0}, "b": {}}, steps=5)
    for end in range(len(record.events) + 1):
        summary = summarise(replace(record, events=record.events[:end]))
        json.dumps(summary, allow_nan=False)
        finished = end == len(record.events)
        assert summary["status"] == ("finished" if finished else "unfinished")
        assert len(summary["recipes"]) == (end > 0)


def test_a_metric_that_is_not_named_is_the_first_one(made_up):
    record = made_up({"a": {"metric": 0.5}})
    record.events[0]["metric"] = None
    assert summarise(record)["recipes"][0]["metric"] == "accuracy"


def test_the_record_of_something_else_is_refused(made_up):
    record = made_up({"a": {}})
    with pytest.raises(RecordError, match="'audit'"):
        summarise(replace(record, header={**record.header, "kind": "audit"}))


def test_spread_of_nothing():
    assert spread([]) is None
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "count": 1}
