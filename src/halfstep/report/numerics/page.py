"""From the record of a run to its page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...core.formats import format_of
from ..assembly import environment, in_script, plotly_js
from ..plots import COLOURS, Plot, powers_of_two
from .findings import findings, verdict
from .reading import Run, read_run
from .shares import LEVELS, SMALLEST, View, views
from .tree import tree
from .weights import slowest

MOST_MARKS = 4000
"""The most skipped steps that are marked; of more it is every n-th."""


def render_run(run: Run | str | os.PathLike[str]) -> str:
    """Return the page of a run that a numerics monitor watched: one HTML file, loading nothing.

    Args:
        run: the path of the record, or what :func:`read_run` returned.

    Raises:
        RecordError: no such file, or not such a record.
    """
    read = run if isinstance(run, Run) else read_run(run)
    found = views(read)
    said = findings(read, found)
    plots = [plot for plot in (_scales(read), _losses(read)) if plot["data"]]
    for place, plot in enumerate(plots):
        plot["id"] = f"plot-{place}"
    return environment().get_template("numerics/page.html.j2").render(
        run=read,
        verdict=verdict(read, said),
        findings=said,
        views=found,
        plots=plots,
        weights=slowest(read),
        tree=tree(read.header["layers"]),
        facts=_facts(read),
        data=in_script({"views": [_plain(view) for view in found], "plots": plots,
                        "limits": _limits(read.header["formats"]), "levels": LEVELS,
                        "smallest": SMALLEST}),
        plotly_js=Markup(plotly_js()),
    )  # fmt: skip


def _plain(view: View) -> dict[str, Any]:
    return {
        "title": view.title,
        "kind": view.kind,
        "formats": view.formats,
        "steps": view.steps,
        "fine": view.fine_steps,
        "layers": [
            {
                "label": each.label,
                "title": each.title,
                "lost": [each.lost[name] for name in view.formats],
                "low": each.low,
                "high": len(each.exponents[0]) if each.exponents else 0,
                "exponents": "".join(each.exponents),
            }
            for each in view.layers
        ],
    }


def _limits(names: Sequence[str]) -> list[dict[str, Any]]:
    """The exponents where each format ends: its largest, its smallest normal, zero below."""
    found = []
    for name in names:
        described = format_of(name)
        top = math.log2(described.max)
        subnormal = math.log2(described.smallest_subnormal)
        found.append(
            {"name": name, "max": top, "normal": math.log2(described.smallest_normal),
             "zero": subnormal - 1}
        )  # fmt: skip
    return found


def _scales(run: Run) -> Plot:
    changed = [*run.all("scale"), *run.all("skip")]
    points = sorted(
        {  # what a step itself says of its scale is right, and stands last
            **{e["step"] + 1: e.get("next_scale", e["scale"]) for e in changed},
            **{step["step"]: step["scale"] for step in run.steps},
            **{event["step"]: event["scale"] for event in run.all("skip")},
        }.items()
    )
    points = _changes(points)
    scaled = run.header["loss_scale"] is not None or any(scale != 1 for _, scale in points)
    data: list[dict[str, Any]] = []
    if scaled:
        data.append({
            "type": "scatter", "mode": "lines", "name": "loss scale",
            "x": [step for step, _ in points], "y": [scale for _, scale in points],
            "line": {"shape": "hv", "color": COLOURS[0], "width": 2},
        })  # fmt: skip
        data += [_marks(run, which, place) for place, which in enumerate(("probe", "fault"), 4)]
        data = [trace for trace in data if trace["x"]]
    return Plot(
        id="", title="Loss scale", wide=True, data=data,
        alt="Loss scale by step; crosses mark skipped steps.",
        layout={
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "loss scale"}, "type": "log", **powers_of_two(data)},
            "showlegend": True,
        },
    )  # fmt: skip


def _changes(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points at which a curve of steps turns, its two ends among them."""
    return [
        point
        for place, point in enumerate(points)
        if place in (0, len(points) - 1) or point[1] != points[place - 1][1]
    ]


def _marks(run: Run, which: str, place: int) -> dict[str, Any]:
    judged = {
        step: each["verdict"]
        for each in run.all("skips")
        for step in range(each["first"], each["last"] + 1)
    }
    skips = [e for e in run.all("skip") if judged.get(e["step"], e["verdict"]) == which]
    skips = skips[:: math.ceil(len(skips) / MOST_MARKS) or 1]
    return {
        "type": "scatter", "mode": "markers", "name": f"skipped: {which}",
        "x": [each["step"] for each in skips], "y": [each["scale"] for each in skips],
        "text": [_who(each) for each in skips],
        "hovertemplate": "step %{x}, scale %{y}<br>%{text}<extra></extra>",
        "marker": {"symbol": "x", "size": 9, "color": COLOURS[1 if which == "fault" else place]},
    }  # fmt: skip


def _who(event: dict[str, Any]) -> str:
    names = event["parameters"][:6]
    more = event["not_finite"] - len(names)
    shown = "<br>".join(names) + (f"<br>and {more} more" if more > 0 else "")
    return f"{event['text']}<br>not finite, of {event['of']} gradients:<br>{shown}"


def _losses(run: Run) -> Plot:
    seen = [(step["step"], step["loss"]) for step in run.steps if step["loss"] is not None]
    finite = [(step, loss) for step, loss in seen if math.isfinite(loss)]
    data = [{
        "type": "scatter", "mode": "lines+markers", "name": "loss",
        "x": [step for step, _ in finite], "y": [loss for _, loss in finite],
        "line": {"color": COLOURS[2], "width": 2}, "marker": {"size": 4},
    }] if finite else []  # fmt: skip
    return Plot(
        id="", title="Loss at the recorded steps", wide=True, data=data,
        alt="Training loss by recorded step.",
        layout={
            "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "loss"}},
        },
    )  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str]]:
    header, end = run.header, run.end
    shown = len(run.steps)
    recorded = f"{run.recorded:,}" + (f", {shown} of them shown" if shown < run.recorded else "")
    facts = [
        ("Model", f"{header['model']}, {len(header['layers']):,} modules"),
        ("Policy", header["policy"] or "none"),
        ("Loss scale", _rule(header["loss_scale"])),
        ("Steps", f"{run.last_step:,}"),
        ("Recorded steps", f"{recorded}, every {header['every']}"),
        ("Device", header["device"]),
        ("Versions", f"halfstep {header['halfstep']}, {header['library']}"),
    ]
    if end is not None:
        facts.insert(5, ("Seconds", f"{end['seconds']:.1f}"))
    return facts


def _rule(config: dict[str, Any] | None) -> str:
    if config is None:
        return "none"
    words = [f"{name} {value}" for name, value in config.items() if name != "kind"]
    return f"{config['kind']}: {', '.join(words)}" if words else str(config["kind"])
