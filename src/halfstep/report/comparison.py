"""From a summary to the page: Jinja2 fills the template, Plotly's JavaScript is put in once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from markupsafe import Markup

from ..compare.figures import bytes_in_words, rows
from ..compare.results import RecipeResult, Summary
from ..compare.summary import FORMAT, VERSION, summarise
from ..core.record import read_record
from ..errors import RecordError
from .assembly import environment, in_script, plotly_js
from .plots import plots, styles


def load(path: str | os.PathLike[str]) -> Summary:
    """Read a summary, or the record of a comparison, which may have been killed half-way.

    Args:
        path: what ``halfstep compare`` wrote with ``--json``, or its record (``.jsonl``).

    Raises:
        RecordError: neither of the two.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return summarise(read_record(path))
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot read this summary: {error}.") from None
    _check(summary, str(path))
    return cast(Summary, summary)


def _check(summary: Any, where: str) -> None:
    if not isinstance(summary, Mapping) or summary.get("format") != FORMAT:
        raise RecordError(f"{where}: not a {FORMAT} summary.")
    version = summary.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise RecordError(
            f"{where}: version {version!r} of the summary; this halfstep reads 1 to {VERSION}."
        )


def render(summary: Summary, links: Mapping[str, str] | None = None) -> str:
    """Return the page of a summary: one HTML file that loads nothing from anywhere.

    Args:
        summary: what :func:`halfstep.compare.compare` or :func:`load` returned.
        links: where the pages of the runs' numbers are, by the file of their record.

    Raises:
        RecordError: a dict that is no summary, or of a newer version.
    """
    _check(summary, "report.render")
    sections = [
        _section(recipe, place, links or {}) for place, recipe in enumerate(summary["recipes"])
    ]
    every = [plot for section in sections for plot in section["plots"]]
    return environment().get_template("compare.html.j2").render(
        summary=summary,
        sections=sections,
        styles=styles(list(summary["policies"])),
        machine=_machine(summary["machine"]),
        plots_json=in_script(every),
        plotly_js=Markup(plotly_js()),
    )  # fmt: skip


def _section(recipe: RecipeResult, place: int, links: Mapping[str, str]) -> dict[str, Any]:
    methods = dict.fromkeys(
        policy["memory"]["method"] for policy in recipe["policies"].values() if policy["memory"]
    )
    notes = [
        f"{label}: {note}"
        for label, policy in recipe["policies"].items()
        for note in (
            *policy["notes"],
            *([f"memory not measured: {policy['memory_error']}"] if policy["memory_error"] else []),
        )
    ]
    return {
        "recipe": recipe,
        "rows": rows(recipe),
        "plots": plots(recipe, f"plot-{place}"),
        "memory_method": ", ".join(methods),
        "notes": notes,
        "links": {
            label: links[file]
            for label, policy in recipe["policies"].items()
            if (file := policy.get("numerics")) is not None and file in links
        },
        "noise": any(
            policy["memory"] is not None and policy["memory"]["within_noise"]
            for label, policy in recipe["policies"].items()
            if label != recipe["baseline"]
        ),
    }


def _machine(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    fast = {True: "yes", False: "no"}
    facts = [
        ("Device", f"{machine['device_name']} ({machine['device']})"),
        *(
            (f"Fast {dtype} matrix units", fast[is_fast])
            for dtype, is_fast in machine["fast"].items()
        ),
    ]
    for each in machine["devices"]:
        parts = [each["name"], *each["features"]]
        if each["memory"]:
            parts.append(bytes_in_words(each["memory"]))
        facts.append((each["kind"].upper(), ", ".join(parts)))
    if machine["threads"]:
        facts.append(("Threads", str(machine["threads"])))
    facts.append(("System", machine["system"]))
    facts += [(name, version) for name, version in machine["versions"].items()]
    return facts
