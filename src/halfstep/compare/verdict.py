"""One sentence that says what a comparison found, put together from the measurements alone.

::

    mixed_bfloat16 took 1.4× the time and 0.58× the memory of float32 on this CPU, which has no
    fast 16-bit matrix units; same accuracy.

Two numbers count as the same by rules that are stated beside them: see :func:`judge_metric`,
:data:`SAME_TIME` and the ``within_noise`` of a memory measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import PolicyResult, RecipeResult, Spread

SAME_TIME = 0.03
"""Times whose ratio is this near to 1, or as near as the measurement can tell, are the same."""

TELLING = 0.2
"""A measurement of times that is less sure of its ratio than this tells nothing about sameness."""

SAME_MEMORY = 0.03
"""Peaks whose ratio is this near to 1 are the same, also where the noise is smaller still."""


@dataclass(frozen=True)
class Judgement:
    """How a metric compares with the baseline's.

    Attributes:
        word: ``"same"``, ``"better"``, ``"worse"``, or None where there is nothing to compare.
        rule: what counts as the same, in words.
        difference: theirs minus the baseline's.
    """

    word: str | None
    rule: str
    difference: float = 0.0


def judge_metric(
    base: float | None,
    other: float | None,
    higher_is_better: bool,
    examples: float | None = None,
    same_within: float = 0.01,
) -> Judgement:
    """Compare a final metric with the baseline's.

    A share of ``examples`` examples, such as an accuracy, is the same within one binomial standard
    error ``sqrt(p (1 - p) / n)`` of the baseline's, at least one example. Any other metric is the
    same within the share ``same_within`` of the baseline's.

    >>> judge_metric(0.98, 0.975, higher_is_better=True, examples=450).word
    'same'
    >>> judge_metric(2.0, 2.1, higher_is_better=False).word
    'worse'
    """
    share = examples is not None and examples > 0 and base is not None and 0 <= base <= 1
    if base is None:
        return Judgement(None, "not known, the baseline has no final value")
    if share and examples is not None:
        margin = max(math.sqrt(base * (1 - base) / examples), 1 / examples)
        rule = (
            f"within one binomial standard error of the baseline's on {examples:.0f} test "
            f"examples, ±{margin:.4f}"
        )
    else:
        margin = abs(base) * same_within
        rule = f"within {same_within:.3g} times the baseline's, ±{margin:.4g}"
    if other is None:
        return Judgement(None, rule)
    difference = other - base
    # a difference of exactly the margin is the same, also after rounding
    if abs(difference) <= margin * (1 + 1e-9):
        return Judgement("same", rule, difference)
    return Judgement(
        "better" if (difference > 0) == higher_is_better else "worse", rule, difference
    )


def verdict(result: RecipeResult, machine: Mapping[str, Any], configs: Mapping[str, Any]) -> str:
    """Return the sentence for one recipe.

    Args:
        result: the recipe's part of a summary.
        machine: the summary's ``machine``.
        configs: the summary's ``policies``: what each computes in.
    """
    baseline = result["baseline"]
    others = {label: r for label, r in result["policies"].items() if label != baseline}
    if result["policies"][baseline]["status"] in ("diverged", "failed"):
        lost = _losses({baseline: result["policies"][baseline]})
        return _sentence([_stopped(result), *lost, *_losses(others), "there is no baseline"])
    timed = [label for label, r in others.items() if _is_timed(r)]
    return _sentence(
        [
            _stopped(result),
            _costs({label: others[label] for label in timed}, baseline)
            + _on_hardware(timed, result["device"], machine, configs),
            _metrics({label: others[label] for label in timed}, result),
            *_losses(others),
        ]
    )


def _sentence(clauses: Iterable[str]) -> str:
    joined = "; ".join(filter(None, clauses)) or "nothing was measured"
    # a policy's name keeps its small letter
    starts_with_word = joined.startswith(("against ", "stopped ", "nothing "))
    return (joined[0].upper() + joined[1:] if starts_with_word else joined) + "."


def _is_timed(policy: PolicyResult) -> bool:
    return policy["status"] in ("finished", "unfinished") and policy["ratio"] is not None


def _stopped(result: RecipeResult) -> str:
    if result["status"] == "finished":
        return ""
    done = max((r["steps"] for r in result["policies"].values()), default=0)
    planned = result["planned"]["steps"]
    return f"stopped after {done}{f' of {planned}' if planned else ''} steps"


def _costs(timed: Mapping[str, PolicyResult], baseline: str) -> str:
    """``a took 1.4× the time and 0.58× the memory of b``, or ``Against b, a took ..., c ...``."""
    costs = {label: [_time(policy), *_memory(policy)] for label, policy in timed.items()}
    plain = all(part[0].isdigit() for parts in costs.values() for part in parts)
    if len(costs) == 1 and plain:
        [(label, parts)] = costs.items()
        return f"{label} took {' and '.join(parts)} of {baseline}"
    clauses = [
        f"{label} {'took ' if place == 0 else ''}{' and '.join(parts)}"
        for place, (label, parts) in enumerate(costs.items())
    ]
    return f"against {baseline}, {', '.join(clauses)}" if clauses else ""


def _time(policy: PolicyResult) -> str:
    ratio = policy["ratio"]
    if ratio is None:
        return "an unknown time"
    unsure = uncertainty(ratio)
    if abs(ratio["median"] - 1) > max(SAME_TIME, unsure):
        return f"{times(ratio['median'])} the time"
    if unsure <= TELLING:
        return "about the same time"
    return f"a time too noisy to tell ({ratio['low']:.2f} to {times(ratio['high'])})"


def uncertainty(ratio: Spread) -> float:
    """Return how far the median of all possible steps may lie from this one's.

    It is half the notch of a box plot, ``1.57 IQR / sqrt(n)``: about 95 % of the time within it
    (McGill, Tukey, Larsen 1978, "Variations of Box Plots").

    >>> uncertainty({"median": 1.4, "low": 1.3, "high": 1.5, "count": 100})
    0.0314...
    """
    return 1.57 * (ratio["high"] - ratio["low"]) / math.sqrt(ratio["count"])


def _memory(policy: PolicyResult) -> list[str]:
    memory = policy["memory"]
    if memory is None or memory["ratio"] is None:
        return []
    if memory["within_noise"] or abs(memory["ratio"] - 1) <= SAME_MEMORY:
        return ["about the same memory"]
    return [f"{times(memory['ratio'])} the memory"]


def times(ratio: float) -> str:
    """Return a ratio with two or three figures.

    >>> times(0.583), times(1.04), times(1.42), times(14.2)
    ('0.58×', '1.04×', '1.4×', '14×')
    """
    digits = 2 if ratio < 1.1 else 1 if ratio < 10 else 0
    return f"{ratio:.{digits}f}×"


def _on_hardware(
    timed: Sequence[str], device: str, machine: Mapping[str, Any], configs: Mapping[str, Any]
) -> str:
    if not timed:
        return ""
    word = "this CPU" if device == "cpu" else f"this {machine.get('device_name') or device}"
    fast = machine.get("fast") or {}
    wanted = dict.fromkeys(d for label in timed for d in configs[label]["computes_in"])
    known = {dtype: fast[dtype] for dtype in wanted if fast.get(dtype) is not None}
    which = _units(known)
    return f"{',' if len(timed) > 1 else ''} on {word}" + (f", which has {which}" if which else "")


def _units(known: Mapping[str, bool]) -> str:
    having = [dtype for dtype, is_fast in known.items() if is_fast]
    lacking = [dtype for dtype, is_fast in known.items() if not is_fast]
    if not known:
        return ""
    if not having:
        names = "16-bit" if len(lacking) > 1 else lacking[0]
        return f"no fast {names} matrix units"
    if not lacking:
        return f"fast matrix units for {' and '.join(having)}"
    return f"fast matrix units for {' and '.join(having)} but not for {' and '.join(lacking)}"


def _metrics(timed: Mapping[str, PolicyResult], result: RecipeResult) -> str:
    metric = result["metric"]
    base = result["policies"][result["baseline"]]["final_metric"]
    judged = {label: r for label, r in timed.items() if r["metric_is"] is not None}
    if metric is None or base is None or not judged:
        return ""
    if all(r["metric_is"] == "same" for r in judged.values()):
        return f"same {_short(metric)}"
    phrases = []
    for label, policy in judged.items():
        final = policy["final_metric"]
        if policy["metric_is"] == "same":
            phrases.append(f"same {_short(metric)} with {label}")
        elif final is not None:
            phrases.append(
                f"{_short(metric)} {policy['metric_is']} with {label}, "
                f"{final:.4g} against {base:.4g}"
            )
    return "; ".join(phrases)


def _short(metric: str) -> str:
    """A metric's name without its unit in brackets."""
    return metric.partition(" (")[0]


def _losses(policies: Mapping[str, PolicyResult]) -> list[str]:
    return [
        f"{label} {'diverged' if r['status'] == 'diverged' else 'failed'} at step "
        f"{r['stopped_at']}: {(r['reason'] or 'no reason given').rstrip('.')}"
        for label, r in policies.items()
        if r["status"] in ("diverged", "failed")
    ]
