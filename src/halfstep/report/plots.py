"""The plots of the page, as the plain dicts that Plotly's JavaScript takes.

A policy has one colour and one dash in every plot. The colours are those of Okabe and Ito
("Color Universal Design", 2008) that stand out on white and on near-black; the dashes tell curves
apart that lie on each other, and in print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ..compare.results import PolicyResult, RecipeResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

RAW_POINTS = 2000
"""A raw curve shows at most so many points of a policy; its smoothed one is made of all."""


class Plot(TypedDict):
    """One plot.

    ``alt`` says in words what the plot shows, for those who cannot see it.
    """

    id: str
    title: str
    alt: str
    wide: bool
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Style:
    """How one policy is drawn."""

    colour: str
    dash: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Return the style of every policy, by its place in the list.

    >>> styles(["float32", "mixed_float16"])["float32"]
    Style(colour='#0072B2', dash='solid')
    """
    return {
        label: Style(COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)])
        for place, label in enumerate(labels)
    }


def plots(recipe: RecipeResult, prefix: str) -> list[Plot]:
    """Return the plots of one recipe; those without anything to show are left out."""
    style = styles(list(recipe["policies"]))
    made = [
        _losses(recipe, style),
        *_metrics(recipe, style),
        _times(recipe, style),
        _memory(recipe, style),
        _scales(recipe, style),
    ]
    shown = [plot for plot in made if plot["data"]]
    for place, plot in enumerate(shown):
        plot["id"] = f"{prefix}-{place}"
    return shown


def smoothed(values: Sequence[float | None], reach: int | None = None) -> list[float | None]:
    """Return the mean of the finite values from ``reach`` before each to ``reach`` after it.

    A step without a finite value has none, so that the curve shows a gap there. Left out, the
    reach is a fiftieth of the curve. At both ends it is what there is on the shorter side, so
    that a falling curve is not shown too high where it begins.

    >>> smoothed([1.0, 3.0, None, 5.0, 6.0], reach=1)
    [1.0, 2.0, None, 5.5, 6.0]
    """
    wanted = len(values) // 50 if reach is None else reach
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    found: list[float | None] = []
    for place, value in enumerate(values):
        half = min(wanted, place, len(values) - 1 - place)
        first, last = place - half, place + half + 1
        count = counts[last] - counts[first]
        found.append(None if value is None else (sums[last] - sums[first]) / count)
    return found


def _line(
    label: str,
    style: Style,
    steps: Sequence[int],
    values: Sequence[float | None],
    **more: Any,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label,
        "legendgroup": label,
        "x": list(steps),
        "y": list(values),
        "line": {"color": style.colour, "dash": style.dash, "width": 2},
        **more,
    }


def _axes(x: str, y: str, **y_more: Any) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": y}, **y_more},
    }


def _losses(recipe: RecipeResult, style: dict[str, Style]) -> Plot:
    data: list[dict[str, Any]] = []
    for label, policy in recipe["policies"].items():
        losses = policy["losses"]
        if not losses:
            continue
        every = max(1, len(losses) // RAW_POINTS)
        raw = {"showlegend": False, "opacity": 0.25, "hoverinfo": "skip"}
        thin = _line(label, style[label], range(0, len(losses), every), losses[::every], **raw)
        thin["line"] = {"color": style[label].colour, "width": 1}
        data.append(thin)
    data += [
        _line(label, style[label], range(len(policy["losses"])), smoothed(policy["losses"]))
        for label, policy in recipe["policies"].items()
        if policy["losses"]
    ]
    return Plot(
        id="",
        title="Training loss",
        alt="Training loss by step, one curve for each policy: raw and smoothed.",
        wide=True,
        data=data,
        layout=_axes("step", "loss, thin: each batch"),
    )


def _metrics(recipe: RecipeResult, style: dict[str, Style]) -> list[Plot]:
    names = dict.fromkeys(
        name
        for policy in recipe["policies"].values()
        for evaluation in policy["evaluations"]
        for name in evaluation["metrics"]
    )
    first = [recipe["metric"]] if recipe["metric"] in names else []
    order = dict.fromkeys([*first, *names])
    return [_metric(recipe, style, str(name)) for name in order]


def _metric(recipe: RecipeResult, style: dict[str, Style], name: str) -> Plot:
    data = []
    for label, policy in recipe["policies"].items():
        seen = [e for e in policy["evaluations"] if name in e["metrics"]]
        if seen:
            steps, values = [e["step"] for e in seen], [e["metrics"][name] for e in seen]
            marked = {"mode": "lines+markers", "marker": {"size": 6}}
            data.append(_line(label, style[label], steps, values, **marked))
    return Plot(
        id="",
        title=f"Evaluation: {name}",
        alt=f"{name} by step, one curve for each policy.",
        wide=False,
        data=data,
        layout=_axes("step", name),
    )


def _bars(
    title: str, unit: str, found: dict[str, tuple[float, float, float]], style: dict[str, Style]
) -> Plot:
    """Horizontal bars with whiskers, the first policy on top."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "x": [middle],
            "y": [f"{label}<br><b>{middle:.3g}</b>"],
            "marker": {"color": style[label].colour},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [high - middle],
                "arrayminus": [middle - low],
                "thickness": 1.5,
            },
            "hovertemplate": f"{label}: {middle:.3g} ({low:.3g} to {high:.3g}) {unit}"
            "<extra></extra>",
        }
        for label, (low, middle, high) in found.items()
    ]
    words = ", ".join(f"{label} {middle:.3g}" for label, (_, middle, _) in found.items())
    layout = {
        "xaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "showlegend": False,
    }
    return Plot(
        id="", title=title, alt=f"{title}, {unit}: {words}.", wide=False, data=data, layout=layout
    )


def _times(recipe: RecipeResult, style: dict[str, Style]) -> Plot:
    found = {
        label: (each["low"] * 1e3, each["median"] * 1e3, each["high"] * 1e3)
        for label, policy in recipe["policies"].items()
        if (each := policy["step_seconds"]) is not None
    }
    return _bars("Time of a step", "ms, median and quartiles", found, style)


def _memory(recipe: RecipeResult, style: dict[str, Style]) -> Plot:
    found = {
        label: (each["low"] / 2**20, each["median"] / 2**20, each["high"] / 2**20)
        for label, policy in recipe["policies"].items()
        if (each := policy["memory"]) is not None
    }
    return _bars("Peak memory of training", "MiB, median and range", found, style)


def _scales(recipe: RecipeResult, style: dict[str, Style]) -> Plot:
    data: list[dict[str, Any]] = []
    for label, policy in recipe["policies"].items():
        if not policy["scale"]:
            continue
        steps = [step for step, _ in policy["scale"]]
        values = [scale for _, scale in policy["scale"]]
        line = _line(label, style[label], steps, values)
        line["line"] = {**line["line"], "shape": "hv"}
        data.append(line)
        if policy["skipped_at"]:
            data.append(_skipped(label, style[label], policy))
    return Plot(
        id="",
        title="Loss scale",
        alt="Loss scale by step; crosses mark skipped steps.",
        wide=False,
        data=data,
        layout={
            **_axes("step", "loss scale", type="log", **powers_of_two(data)),
            "showlegend": True,
        },
    )


def powers_of_two(data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ticks at powers of two, at most 8 of them, one beyond the values on either side."""
    exponents = [math.log2(value) for trace in data for value in trace["y"]]
    if not exponents:
        return {}
    low, high = math.floor(min(exponents)) - 1, math.ceil(max(exponents)) + 1
    ticks = range(low, high + 1, max(1, math.ceil((high - low) / 8)))
    return {
        "tickvals": [2.0**exponent for exponent in ticks],
        "ticktext": [f"2<sup>{exponent}</sup>" for exponent in ticks],
        # Plotly wants the logarithm to base 10 of a logarithmic axis' ends
        "range": [(low - 0.2) * math.log10(2), (high + 0.2) * math.log10(2)],
    }


def _skipped(label: str, style: Style, policy: PolicyResult) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{label}: skipped step",
        "x": policy["skipped_at"],
        "y": [_scale_at(policy["scale"], step) for step in policy["skipped_at"]],
        "marker": {"symbol": "x", "size": 10, "color": style.colour},
    }


def _scale_at(changes: Sequence[tuple[int, float]], step: int) -> float:
    """The scale after a step, from the list of its changes."""
    return [scale for at, scale in changes if at <= step][-1]
