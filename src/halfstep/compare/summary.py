"""From the record of a comparison to its summary: a pure function.

The summary is what ``--json`` writes and what the page shows. It is plain JSON (a number that is
not finite is null) and stands for itself: the curves are in it, so that the page can be made anew
from the file alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..core.record import Event, Record
from ..errors import RecordError
from .results import Evaluation, Memory, PolicyResult, RecipeResult, Spread, Summary
from .verdict import judge_metric, verdict

FORMAT = "halfstep-compare"
VERSION = 1


def spread(values: Iterable[float]) -> Spread | None:
    """Return the median and the quartiles (linear interpolation), None of no values.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0, 'count': 5}
    """
    ordered = sorted(values)
    if not ordered:
        return None
    low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return Spread(median=median, low=low, high=high, count=len(ordered))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def warmup_steps(steps: int) -> int:
    """Return how many first steps say nothing about the time: a fifth, at most 10.

    They compile kernels, fill caches and make the optimizer's state.

    >>> [warmup_steps(n) for n in (1, 2, 10, 300)]
    [0, 1, 2, 10]
    """
    return min(10, max(1, steps // 5), max(0, steps - 1))


def summarise(record: Record) -> Summary:
    """Return the summary of a comparison, also of one that was stopped half-way.

    Args:
        record: what :func:`halfstep.compare.compare` wrote, read back.

    Raises:
        RecordError: the record of something else.
    """
    header = record.header
    if header.get("kind") != "compare":
        raise RecordError(f"A record of {header.get('kind')!r}; a comparison's has kind 'compare'.")
    ended: Event = next((e for e in record.events if e["event"] == "end"), {})
    names = [e["recipe"] for e in record.events if e["event"] == "recipe"]
    return Summary(
        format=FORMAT,
        version=VERSION,
        halfstep=header["halfstep"],
        created=header["created"],
        command=header["command"],
        seed=header["seed"],
        status=ended.get("status", "unfinished"),
        error=ended.get("error"),
        machine=header["machine"],
        policies=header["policies"],
        recipes=[
            _recipe_result([e for e in record.events if e.get("recipe") == name], header)
            for name in names
        ],
    )


def _recipe_result(events: list[Event], header: Event) -> RecipeResult:
    start = next(e for e in events if e["event"] == "recipe")
    ended: Event = next((e for e in events if e["event"] == "recipe_end"), {})
    labels: list[str] = list(header["policies"])
    baseline = labels[0]
    steps_of = {label: _of(events, "step", label) for label in labels}
    warmup = warmup_steps(max((len(steps) for steps in steps_of.values()), default=0))
    metric = start.get("metric") or _first_metric(events)
    status = ended.get("status", "unfinished")
    policies = {label: _policy_result(events, label, baseline, warmup, status) for label in labels}
    _set_final_metrics(policies, metric)
    examples = next((e["examples"] for e in events if e.get("examples")), None)
    higher = bool(start["higher_is_better"])
    base = policies[baseline]["final_metric"]
    rule = judge_metric(base, base, higher, examples, start["same_within"]).rule
    for policy in policies.values():
        policy["metric_is"] = judge_metric(
            base, policy["final_metric"], higher, examples, start["same_within"]
        ).word
    result = RecipeResult(
        name=start["recipe"],
        title=start["title"],
        framework=start["framework"],
        device=start["device"],
        note=start["note"],
        metric=metric,
        higher_is_better=higher,
        same_rule=rule,
        baseline=baseline,
        warmup=warmup,
        planned={"steps": start["steps"], "epochs": start["epochs"]},
        status=status,
        error=ended.get("error"),
        verdict="",
        policies=policies,
    )
    result["verdict"] = verdict(result, header["machine"], header["policies"])
    return result


def _of(events: Iterable[Event], kind: str, label: str) -> list[Event]:
    return [e for e in events if e["event"] == kind and e.get("policy") == label]


def _first_metric(events: Iterable[Event]) -> str | None:
    for event in events:
        if event["event"] == "evaluation" and event["metrics"]:
            return str(next(iter(event["metrics"])))
    return None


def _set_final_metrics(policies: dict[str, PolicyResult], metric: str | None) -> None:
    """The metric at the last evaluation that every policy still in the race has taken part in.

    A run may be stopped in the middle of an evaluation; then some have one more than others.
    """
    running = [p for p in policies.values() if p["stopped_at"] is None]
    steps = [{e["step"] for e in policy["evaluations"]} for policy in running]
    shared = set.intersection(*steps) if steps else set()
    for policy in running:
        found = {e["step"]: e["metrics"] for e in policy["evaluations"]}
        if shared and metric is not None:
            policy["final_metric"] = found[max(shared)].get(metric)


def _policy_result(
    events: list[Event], label: str, baseline: str, warmup: int, ran: str
) -> PolicyResult:
    steps = _of(events, "step", label)
    stopped = next(iter(_of(events, "stopped", label)), None)
    evaluations = _of(events, "evaluation", label)
    finished = "finished" if ran == "finished" else "unfinished"
    measured = _memory(events, label, baseline)
    return PolicyResult(
        status=stopped["status"] if stopped else finished,
        reason=stopped["reason"] if stopped else None,
        stopped_at=stopped["step"] if stopped else None,
        steps=len(steps),
        step_seconds=spread(e["seconds"] for e in steps if e["step"] >= warmup),
        ratio=_ratio(steps, _of(events, "step", baseline), warmup),
        memory=measured,
        memory_error=_memory_error(events, label) if measured is None else None,
        final_metric=None,
        metric_is=None,
        final_loss=_final_loss(steps),
        skipped=sum(e["skipped"] for e in steps),
        notes=[e["text"] for e in _of(events, "note", label)],
        numerics=next((e["file"] for e in _of(events, "numerics_record", label)), None),
        losses=[_finite(e["loss"]) for e in steps],
        skipped_at=[e["step"] for e in steps if e["skipped"]],
        scale=_changes(steps),
        evaluations=[
            Evaluation(
                step=e["step"],
                metrics={name: _finite(value) for name, value in e["metrics"].items()},
            )
            for e in evaluations
        ],
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _ratio(steps: list[Event], base: list[Event], warmup: int) -> Spread | None:
    """The time of each step over the baseline's time of the same step."""
    seconds = {e["step"]: e["seconds"] for e in base}
    return spread(
        e["seconds"] / seconds[e["step"]]
        for e in steps
        if e["step"] >= warmup and seconds.get(e["step"], 0) > 0
    )


def _final_loss(steps: list[Event]) -> float | None:
    """The mean of the last twentieth of the losses, at most 20: one batch's loss is noise."""
    last = [e["loss"] for e in steps[-max(1, min(20, len(steps) // 20)) :]]
    return _finite(sum(last) / len(last)) if last else None


def _changes(steps: list[Event]) -> list[tuple[int, float]]:
    """The loss scale after each step at which it changed, and after the first and the last."""
    scales = [(e["step"], e["scale"]) for e in steps if e["scale"] is not None]
    return [
        (step, scale)
        for place, (step, scale) in enumerate(scales)
        if place in (0, len(scales) - 1) or scale != scales[place - 1][1]
    ]


def _memory(events: Iterable[Event], label: str, baseline: str) -> Memory | None:
    measured = [e for e in events if e["event"] == "memory" and "bytes" in e]
    own = sorted(e["bytes"] for e in measured if e["policy"] == label)
    base = sorted(e["bytes"] for e in measured if e["policy"] == baseline)
    if not own:
        return None
    median = _quantile(own, 0.5)
    middle = _quantile(base, 0.5) if base else 0
    return Memory(
        median=median,
        low=own[0],
        high=own[-1],
        count=len(own),
        method=next(e["method"] for e in measured if e["policy"] == label),
        ratio=median / middle if middle else None,
        within_noise=bool(base) and own[0] <= base[-1] and base[0] <= own[-1],
    )


def _memory_error(events: Iterable[Event], label: str) -> str | None:
    return next((e["error"] for e in _of(events, "memory", label) if "error" in e), None)
