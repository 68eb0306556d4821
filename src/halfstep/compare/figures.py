"""The numbers of a summary as words, the same on the terminal and on the page."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Memory, PolicyResult, RecipeResult, Spread

NOTHING = "–"


@dataclass(frozen=True)
class Row:
    """One policy's line of the table."""

    policy: str
    milliseconds: str
    time_ratio: str
    memory: str
    memory_ratio: str
    metric: str
    loss: str
    skipped: str
    result: str


def rows(recipe: RecipeResult) -> list[Row]:
    """Return the lines of a recipe's table, in the order of the policies."""
    return [
        Row(
            policy=label,
            milliseconds=_milliseconds(policy["step_seconds"]),
            time_ratio="1" if label == recipe["baseline"] else _ratio(policy["ratio"]),
            memory=_memory(policy["memory"]),
            memory_ratio="1"
            if label == recipe["baseline"] and policy["memory"]
            else _memory_ratio(policy["memory"]),
            metric=number(policy["final_metric"]),
            loss=number(policy["final_loss"]),
            skipped=f"{policy['skipped']}",
            result=_result(label, policy, recipe),
        )
        for label, policy in recipe["policies"].items()
    ]


def number(value: float | None) -> str:
    """Return a number with four figures, also where the last of them are 0.

    >>> number(0.98444), number(0.8), number(1234.0), number(None)
    ('0.9844', '0.8000', '1234', '–')
    """
    return NOTHING if value is None else f"{value:#.4g}".rstrip(".")


def _milliseconds(seconds: Spread | None) -> str:
    return NOTHING if seconds is None else f"{seconds['median'] * 1000:#.3g}".rstrip(".")


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return NOTHING
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _memory(memory: Memory | None) -> str:
    if memory is None:
        return NOTHING
    half = (memory["high"] - memory["low"]) / 2
    around = f" ±{bytes_in_words(half)}" if memory["count"] > 1 else ""
    return bytes_in_words(memory["median"]) + around


def bytes_in_words(count: float) -> str:
    """Return a number of bytes with its unit.

    >>> bytes_in_words(3 * 2**20), bytes_in_words(9.18 * 2**30)
    ('3.0 MiB', '9.18 GiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _memory_ratio(memory: Memory | None) -> str:
    if memory is None or memory["ratio"] is None:
        return NOTHING
    return f"{memory['ratio']:.2f}" + (" (noise)" if memory["within_noise"] else "")


def _result(label: str, policy: PolicyResult, recipe: RecipeResult) -> str:
    if policy["status"] in ("diverged", "failed"):
        return f"{policy['status']} at step {policy['stopped_at']}: {policy['reason']}"
    if policy["status"] == "unfinished":
        return f"stopped after {policy['steps']} steps"
    if label == recipe["baseline"]:
        return "baseline"
    if recipe["metric"] is None or policy["metric_is"] is None:
        return "finished"
    return policy["metric_is"]
