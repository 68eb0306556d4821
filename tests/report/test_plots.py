import json
import math

import pytest

from halfstep.report.plots import COLOURS, DASHES, RAW_POINTS, plots, smoothed, styles


@pytest.fixture
def made(summary):
    return {plot["title"]: plot for plot in plots(summary()["recipes"][0], "p")}


def test_everything_there_is_has_a_plot(made):
    assert list(made) == [
        "Training loss", "Evaluation: accuracy", "Evaluation: loss", "Time of a step",
        "Peak memory of training", "Loss scale",
    ]  # fmt: skip
    assert [plot["id"] for plot in made.values()] == [f"p-{i}" for i in range(6)]
    assert all(plot["alt"] for plot in made.values())


def test_what_was_not_measured_has_no_plot(summary):
    recipe = summary()["recipes"][0]
    for policy in recipe["policies"].values():
        policy.update(memory=None, scale=[], evaluations=[], skipped_at=[])
    assert [p["title"] for p in plots(recipe, "p")] == ["Training loss", "Time of a step"]


def test_a_policy_has_one_colour_in_every_plot(made):
    colours = {}
    for plot in made.values():
        for trace in plot["data"]:
            name = trace["name"].partition(":")[0]
            marker = trace.get("marker", {})
            colour = marker.get("color") or trace["line"]["color"]
            colours.setdefault(name, set()).add(colour)
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(colours, 1)
    assert len(set.union(*colours.values())) == 3


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("paper", ["#ffffff", "#14171a"])
@pytest.mark.parametrize("colour", COLOURS[:3])
def test_the_usual_three_stand_out_on_both_papers(colour, paper):
    # WCAG 2.1, 1.4.11: 3 to 1 for graphics
    assert contrast(colour, paper) >= 3


def test_many_policies_still_differ_in_colour_or_dash():
    found = styles([str(i) for i in range(6)]).values()
    assert len({(s.colour, s.dash) for s in found}) == 6 == len(COLOURS) == len(DASHES)


def test_curves_are_raw_and_smoothed_over_each_other(made):
    traces = made["Training loss"]["data"]
    assert [t["showlegend"] for t in traces if "showlegend" in t] == [False] * 3
    assert [t["name"] for t in traces if "showlegend" not in t] == [
        "float32", "mixed_float16", "mixed_bfloat16",
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_is_a_gap(made):
    raw = made["Training loss"]["data"][1]
    assert raw["y"][20] is None
    assert raw["y"][19] is not None


def test_smoothing_keeps_a_straight_line_and_takes_out_noise():
    line = [100.0 - step for step in range(100)]
    assert smoothed(line) == line
    zigzag = [1.0 + (-1) ** step for step in range(200)]
    assert all(0.5 < value < 1.5 for value in smoothed(zigzag)[10:-10])
    assert smoothed([]) == []


def test_a_long_raw_curve_is_thinned_and_its_smoothed_one_is_not(summary):
    recipe = summary()["recipes"][0]
    recipe["policies"]["float32"]["losses"] = [1.0] * 10 * RAW_POINTS
    traces = plots(recipe, "p")[0]["data"]
    lengths = sorted(len(t["x"]) for t in traces if t["name"] == "float32")
    assert lengths == [RAW_POINTS, 10 * RAW_POINTS]


def test_bars_show_the_measurement_and_its_spread(made):
    bar = made["Time of a step"]["data"][1]
    assert bar["x"] == [20.0]
    assert bar["y"][0].startswith("mixed_float16")
    assert "20" in bar["y"][0]
    assert bar["error_x"]["array"] == [0.0]
    memory = made["Peak memory of training"]["data"]
    assert [trace["x"][0] for trace in memory] == [4.0, 3.0, 2.0]
    assert made["Peak memory of training"]["layout"]["xaxis"]["title"]["text"].startswith("MiB")


def test_skipped_steps_are_marked_on_the_loss_scale(made):
    line, marks = made["Loss scale"]["data"]
    assert (line["x"], line["y"]) == ([0, 20, 39], [2.0**15, 2.0**14, 2.0**14])
    assert line["line"]["shape"] == "hv"
    assert (marks["x"], marks["y"]) == ([20], [2.0**14])
    axis = made["Loss scale"]["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert all(math.log2(tick).is_integer() for tick in axis["tickvals"])
    assert 10 ** axis["range"][0] < 2.0**14 < 2.0**15 < 10 ** axis["range"][1]


def test_plots_are_plain_json(made):
    json.dumps(list(made.values()), allow_nan=False)
