"""The page of one run, from records that are written by hand."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest

from halfstep import RecordError, report
from halfstep.core.numerics.histogram import ExponentHistogram
from halfstep.core.record import RecordWriter, dump_line
from halfstep.report.numerics.findings import findings, verdict
from halfstep.report.numerics.reading import read_run, spread
from halfstep.report.numerics.shares import LEVELS, SCALED, encode, lost_share, views
from halfstep.report.numerics.tree import tree
from halfstep.report.numerics.weights import slowest, typical

FORMATS = ["float16", "bfloat16"]
KINDS = ("activation", "activation_gradient", "weight", "weight_gradient", "update")


def header(layers=2, **more):
    paths = ["", *(f"blocks.{place}" for place in range(layers))]
    return {
        "numerics": 1, "library": "torch 2.13.0", "halfstep": "0.1.0", "device": "cpu",
        "model": "Net", "every": 10, "policy": "mixed_float16",
        "loss_scale": {"kind": "dynamic", "initial_scale": 1024.0}, "formats": FORMATS,
        "layers": [
            {"path": path, "class": "Net" if not path else "Linear", "policy": "mixed_float16",
             "compute_dtype": "float32" if path == "blocks.1" else "float16"} for path in paths
        ],
        **more,
    }  # fmt: skip


def row(number, kind, lost=0.0):
    count = 1000
    gone = round(lost * count)
    fields = {"id": number, "count": count, "low": -5, "counts": [count // 2, count // 2]}
    if kind == "update":
        return fields | ({"lost": {"bfloat16": gone}} if gone else {})
    counters = {"float16": [gone, 0, 0]} if gone else {}
    if kind.endswith("_gradient"):
        return fields | ({"scaled": counters} if counters else {})
    return fields | counters


def step_event(step, layers=2, lost=0.0, **more):
    """A recorded step in which the last layer's tensors lose a share."""
    rows = [
        row(place * layers + layer, kind, lost if layer == layers - 1 else 0.0)
        for place, kind in enumerate(KINDS)
        for layer in range(layers)
    ]
    gradients = ExponentHistogram.from_array([2.0**-e for e in range(2, 20)]).to_plain()
    return {
        "event": "numerics", "step": step, "seconds": 0.1 * step, "loss": 2 / step,
        "scale": 1024.0, "skipped": False, "rows": rows, "weight_gradients": gradients,
        "activation_gradients": gradients, **more,
    }  # fmt: skip


def tensors(layers=2):
    for place, kind in enumerate(KINDS):
        for layer in range(layers):
            yield {
                "event": "tensor", "id": place * layers + layer, "kind": kind,
                "path": f"blocks.{layer}", "class": "Linear", "dtype": "float32", "shape": [4, 4],
                "name": "" if kind.startswith("activation") else "weight",
            }  # fmt: skip


def skip(step, verdict="probe", reason="search", **more):
    yield {
        "event": "skip", "step": step, "scale": 1024.0, "next_scale": 512.0, "in_a_row": 1,
        "loss": 1.0, "parameters": ["blocks.1.weight"], "not_finite": 3, "of": 4,
        "verdict": verdict, "reason": reason, "text": f"because of {reason}", **more,
    }  # fmt: skip
    yield {
        "event": "skips", "first": step, "last": step, "count": 1, "verdict": verdict,
        "reason": reason, "text": f"because of {reason}",
    }  # fmt: skip


END = {
    "event": "end", "steps": 40, "recorded": 4, "skipped": 0, "seconds": 4.0, "scale": 1024.0,
    "error": None, "advice": None,
}  # fmt: skip


@pytest.fixture
def record(tmp_path):
    """Write a record and return its path."""

    def write(events, head=None, end=END):
        path = tmp_path / "run.jsonl"
        with RecordWriter(path, "numerics", **(head or header())) as writer:
            for event in [*events, *([end] if end else [])]:
                writer.write(event)
        return path

    return write


def steps(count=4, **more):
    return [step_event(1 + 10 * place, **more) for place in range(count)]


def titles(path):
    run = read_run(path)
    return {(each.severity, each.title) for each in findings(run, views(run))}


# ---------------------------------------------------------------------- reading


def test_a_healthy_run_says_so(record):
    run = read_run(record([*tensors(), *steps()]))
    said = findings(run, views(run))
    assert {each.severity for each in said} == {"note"}
    assert verdict(run, said) == "40 steps. No fault."
    assert "can hold the gradients" in said[0].title
    assert "A fixed loss scale of" in said[0].text


def test_a_killed_run_can_be_read(record):
    path = record([*tensors(), *steps()], end=None)
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 100])
    run = read_run(path)
    assert run.torn
    assert run.recorded == 3
    said = findings(run, views(run))
    assert "the run was killed, or goes on" in verdict(run, said)
    assert report.render_run(run)


def test_of_a_long_run_steps_are_chosen_evenly(record):
    run = read_run(record([*tensors(), *steps(100)]), most_steps=12)
    chosen = [step["step"] for step in run.steps]
    assert run.recorded == 100
    assert len(chosen) == 12
    assert (chosen[0], chosen[-1]) == (1, 991)
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert max(gaps) - min(gaps) <= 10
    assert spread([1, 2], 5) == [1, 2]


def test_what_is_no_record_of_numerics_is_an_error(tmp_path, record):
    with pytest.raises(RecordError, match="cannot read this record"):
        read_run(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="version 9 of the numerics"):
        read_run(record([], header(numerics=9)))
    with RecordWriter(tmp_path / "other.jsonl", "compare"):
        pass
    with pytest.raises(RecordError, match="a record of kind 'compare'"):
        read_run(tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match="no record"):
        read_run(tmp_path / "empty.jsonl")
    with RecordWriter(tmp_path / "odd.jsonl", "odd"):
        pass
    with pytest.raises(RecordError, match="kind 'odd'; allowed are compare, numerics"):
        report.page(tmp_path / "odd.jsonl")


# ---------------------------------------------------------------------- what is said


def test_a_fault_comes_first_with_its_parameters(record):
    path = record([*tensors(), *steps(), *skip(41, "fault", "loss"), *skip(2)])
    run = read_run(path)
    said = findings(run, views(run))
    assert said[0].title == "Step 41 skipped: a fault"
    assert said[0].text == "Because of loss. Not finite: blocks.1.weight and 2 more."
    assert ("note", "1 skipped step was a probe of the loss scale") in titles(path)
    assert verdict(run, said) == "41 steps, 2 of them skipped. 1 fault to look at."


def test_probes_alone_are_no_fault(record):
    run = read_run(record([*tensors(), *steps(), *skip(2)]))
    said = findings(run, views(run))
    assert verdict(run, said).endswith("all as probes of the loss scale. No fault.")


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("activation", "Activations that float16 would not hold"),
        ("weight_gradient", "Gradients of weights lost in float16 at the loss scale of the run"),
        ("update", "Updates that weights stored in bfloat16 would lose"),
    ],
)
def test_what_is_lost_is_said_with_the_layer(kind, title, record):
    run = read_run(record([*tensors(), *steps(lost=0.25)]))
    (found,) = [each for each in findings(run, views(run)) if each.title == title]
    assert "blocks.1" in found.text
    assert "25%" in found.text
    assert "blocks.0" not in found.text


def test_a_skipped_step_is_no_loss_of_the_layer(record):
    lost = {"lost": 1.0, "skipped": True}
    run = read_run(record([*tensors(), step_event(1), step_event(11, **lost)]))
    assert not [each for each in findings(run, views(run)) if "Gradients of weights" in each.title]


def test_gradients_that_went_into_the_weights_are_a_fault(record):
    event = {
        "event": "not_finite", "step": 11, "loss": 1.0, "parameters": ["blocks.0.weight"],
        "not_finite": 1, "of": 2,
    }  # fmt: skip
    assert ("fault", "Gradients that were not finite in 1 recorded steps") in titles(
        record([*tensors(), *steps(), event])
    )


def test_an_error_that_ended_the_run_is_a_fault(record):
    end = {**END, "error": "LossScaleExhausted: at its floor"}
    run = read_run(record([*tensors(), *steps()], end=end))
    said = findings(run, views(run))
    assert (said[0].severity, said[0].text) == ("fault", "LossScaleExhausted: at its floor")


# ---------------------------------------------------------------------- the views


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01, 3e-4, 1e-6])
def test_a_share_survives_its_character(share):
    code = ord(encode(share)) - ord("0")
    assert 1 <= code <= LEVELS
    back = 10 ** (-6 * (1 - (code - 1) / (LEVELS - 1)))
    assert back == pytest.approx(share, rel=0.11)  # half of 6 decades in 69 steps


def test_shares_are_told_from_none_and_from_nothing():
    assert (encode(None), encode(0.0), encode(1e-12)) == (" ", "0", "1")
    assert encode(5.0) == encode(1.0)


def test_the_share_lost_is_of_what_is_not_zero():
    plain = {"count": 100, "zeros": 50, "counts": [30, 20], "low": 0, "float16": [5, 10, 3]}
    assert lost_share(plain, "float16") == pytest.approx(0.3)
    assert lost_share(plain, "bfloat16") == 0
    assert lost_share(plain | {"infinities": 50}, "bfloat16") == pytest.approx(0.5)
    assert lost_share({**plain, "scaled": {"float16": [0, 25, 0]}}, SCALED) == pytest.approx(0.5)
    assert lost_share({"count": 10, "counts": [10], "lost": {"bfloat16": 4}}, "bfloat16") == 0.4
    assert lost_share(None, "float16") is None


def test_views_are_in_the_order_of_the_model_with_every_step(record):
    found = views(read_run(record([*tensors(), *steps(lost=0.5)])))
    assert [view.kind for view in found] == [
        "activation", "activation_gradient", "weight_gradient", "weight", "update",
    ]  # fmt: skip
    first = found[0]
    assert [layer.label for layer in first.layers] == ["blocks.0", "blocks.1"]
    assert first.steps == (1, 11, 21, 31)
    assert first.layers[0].lost["float16"] == "0000"
    assert first.layers[1].lost["float16"] == 4 * encode(0.5)
    assert first.layers[1].low == -5
    assert first.layers[1].exponents == [2 * encode(0.5)] * 4
    assert found[1].formats == (SCALED, *FORMATS)


def test_weights_are_ordered_by_how_little_they_move():
    assert typical({"count": 10, "zeros": 6, "counts": [4], "low": -3}) == 0
    assert typical({"count": 10, "zeros": 4, "counts": [0, 6], "low": -3}) == 0.25
    assert typical({"count": 10, "infinities": 10}) == math.inf


def test_the_slowest_weights_are_named(record):
    still = step_event(1)
    still["rows"][-1] = {"id": 9, "count": 100, "zeros": 100}
    found = slowest(read_run(record([*tensors(), still])))
    assert [each.label for each in found] == ["blocks.1.weight", "blocks.0.weight"]
    assert [each.exponent for each in found] == [None, -5]


def test_the_tree_shows_where_a_policy_differs():
    root = tree(header()["layers"])
    assert (root.name, root.title, root.size) == ("Net", "Net", 3)
    # "blocks" holds modules and is none itself
    assert [(child.name, child.dtype) for child in root.children] == [
        ("0", "float16"), ("1", "float32"),
    ]  # fmt: skip
    assert root.mixed
    assert not root.children[0].mixed


# ---------------------------------------------------------------------- the page


def data_of(page):
    (found,) = re.findall(r"drawRun\((\{.*\})\);\n</script>", page, flags=re.DOTALL)
    return json.loads(found)


def test_the_page_holds_everything_and_nothing_that_could_run(record):
    evil = "</script><script>alert(1)</script>"
    events = [*tensors(), *steps(lost=0.1), *skip(2, parameters=[evil])]
    page = report.page(record(events, header(model=f"Net{evil}", policy=evil)))
    assert evil not in page
    data = data_of(page)
    assert data["views"][0]["title"] == "Activations"
    assert {limit["name"] for limit in data["limits"]} == set(FORMATS)
    half = data["limits"][0]
    assert (half["normal"], half["zero"]) == (-14, -25)
    assert half["max"] == pytest.approx(16, abs=1e-3)
    scale, probes = data["plots"][0]["data"]
    curve = list(zip(scale["x"], scale["y"], strict=True))
    assert curve == [(1, 1024.0), (3, 512.0), (11, 1024.0), (31, 1024.0)]
    assert probes["x"] == [2]
    assert "The slowest-changing weights" in page
    assert 'class="other">float32' in page


def test_a_run_without_a_loss_scale_has_no_curve_of_it(record):
    plain = [step_event(1, scale=1.0), step_event(11, scale=1.0)]
    page = report.page(record([*tensors(), *plain], header(loss_scale=None, policy=None)))
    assert [plot["title"] for plot in data_of(page)["plots"]] == ["Loss at the recorded steps"]
    assert SCALED not in page


def test_the_loss_scale_falls_and_grows_in_the_step_after_the_one_that_changed_it(record):
    grown = {"event": "scale", "step": 11, "scale": 2048.0}
    events = [step_event(1), *skip(4), step_event(11, scale=512.0), grown, step_event(21)]
    scale, probes = data_of(report.page(record([*tensors(), *events])))["plots"][0]["data"]
    assert list(zip(scale["x"], scale["y"], strict=True)) == [
        (1, 1024.0), (5, 512.0), (12, 2048.0), (21, 1024.0)
    ]  # fmt: skip
    assert (probes["x"], probes["y"]) == ([4], [1024.0])


def test_a_large_model_and_a_long_run_stay_small(record):
    head = header(300)
    events = (step_event(1 + place, 300, lost=0.1) for place in range(30))
    skips = (event for place in range(5000) for event in skip(10_000 + place))
    path = record([*tensors(300), *events, *skips], head)
    page = report.page(path)
    data = data_of(page)
    assert len(data["views"][0]["layers"]) == 300
    (curve, marks) = data["plots"][0]["data"]
    assert len(curve["x"]) == 2
    assert 2000 < len(marks["x"]) <= 4000
    # as many steps as are ever read would be below 3 MB
    assert len(json.dumps(data["views"], separators=(",", ":"))) * 200 / 30 < 3_000_000


def test_a_line_of_the_record_is_what_the_reader_looks_for():
    assert dump_line(step_event(7)).startswith('{"event": "numerics", "step": 7,')
