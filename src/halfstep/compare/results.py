"""What a comparison found, as plain JSON: a summary, its recipes and their policies."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Spread(TypedDict):
    """A median with its quartiles."""

    median: float
    low: float
    high: float
    count: int


class Memory(TypedDict):
    """Peak memory in bytes: median, smallest and largest of the measurements."""

    median: float
    low: float
    high: float
    count: int
    method: str
    ratio: float | None
    within_noise: bool


class Evaluation(TypedDict):
    """The metrics after so many steps."""

    step: int
    metrics: dict[str, float | None]


class PolicyResult(TypedDict):
    """What came of one policy.

    ``status`` is ``finished``, ``diverged``, ``failed`` or ``unfinished`` (the run was stopped).
    ``numerics`` is the file of the record of its numbers, beside that of the comparison.
    """

    status: str
    reason: str | None
    stopped_at: int | None
    steps: int
    step_seconds: Spread | None
    ratio: Spread | None
    memory: Memory | None
    memory_error: str | None
    final_metric: float | None
    metric_is: str | None
    final_loss: float | None
    skipped: int
    notes: list[str]
    numerics: str | None
    losses: list[float | None]
    skipped_at: list[int]
    scale: list[tuple[int, float]]
    evaluations: list[Evaluation]


class RecipeResult(TypedDict):
    """What came of one recipe."""

    name: str
    title: str
    framework: str
    device: str
    note: str | None
    metric: str | None
    higher_is_better: bool
    same_rule: str
    baseline: str
    warmup: int
    planned: dict[str, int | None]
    status: str
    error: str | None
    verdict: str
    policies: dict[str, PolicyResult]


class Summary(TypedDict):
    """A whole comparison."""

    format: str
    version: int
    halfstep: str
    created: str
    command: str
    seed: int
    status: str
    error: str | None
    machine: dict[str, Any]
    policies: dict[str, Any]
    recipes: list[RecipeResult]
    record: NotRequired[str]
