"""A made-up comparison of two recipes, with everything that a page can show."""

import pytest

from halfstep.compare.summary import summarise
from halfstep.core.record import Record

MACHINE = {
    "device": "cpu", "device_name": "Chip <X>", "labels": ["Chip <X>"],
    "fast": {"float16": False, "bfloat16": True}, "system": "Linux", "threads": 2,
    "checks": {"mixed_float16": "The dtype policy mixed_float16 may run slowly."},
    "devices": [
        {"kind": "cpu", "name": "Chip <X>", "features": ["AVX2", "AMX-BF16"], "memory": 2**34}
    ],
    "versions": {"halfstep": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip
COMPUTES = {"float32": [], "mixed_float16": ["float16"], "mixed_bfloat16": ["bfloat16"]}


def events_of(recipe, evil):
    yield {
        "event": "recipe", "recipe": recipe, "title": f"Title of {recipe}{evil}", "file": "r.py",
        "framework": "torch", "device": "cpu", "note": "Scaled down.", "metric": "accuracy",
        "higher_is_better": True, "same_within": 0.01, "steps": 40, "epochs": None,
    }  # fmt: skip
    for place, policy in enumerate(COMPUTES):
        at = {"recipe": recipe, "policy": policy}
        yield {"event": "memory", **at, "bytes": (4 - place) * 2**20, "method": "resident set"}
        for step in range(40):
            skipped = policy == "mixed_float16" and step == 20
            scale = 2.0**15 if step < 20 else 2.0**14
            yield {
                "event": "step", **at, "step": step, "seconds": 0.01 * (1 + place),
                "loss": float("nan") if skipped else 2 / (1 + step) + 0.01 * place,
                "skipped": skipped, "scale": scale if policy == "mixed_float16" else None,
            }  # fmt: skip
        for step in (0, 20, 40):
            metrics = {"accuracy": 0.5 + step / 100, "loss": 1.0}
            yield {"event": "evaluation", **at, "step": step, "metrics": metrics, "examples": 450}
    yield {"event": "note", "recipe": recipe, "policy": "mixed_float16", "text": f"noted{evil}"}
    yield {"event": "recipe_end", "recipe": recipe, "status": "finished", "error": None}


@pytest.fixture
def record():
    """Return a function that makes the record; what it is given lands in every string."""

    def make(evil=""):
        header = {
            "event": "header", "kind": "compare", "halfstep": "0.1.0", "seed": 0,
            "created": "2026-11-22T12:00:00+00:00", "command": f"halfstep compare{evil}",
            "machine": MACHINE,
            "policies": {
                label: {"config": {"name": label}, "computes_in": dtypes}
                for label, dtypes in COMPUTES.items()
            },
        }  # fmt: skip
        events = [*events_of("first", evil), *events_of("second", evil)]
        return Record(header, [*events, {"event": "end", "status": "finished", "error": None}])

    return make


@pytest.fixture
def summary(record):
    """Return a function that makes the summary of that record."""
    return lambda evil="": summarise(record(evil))
