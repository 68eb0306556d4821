"""Made-up records and tiny recipes for the tests of this folder."""

import textwrap

import pytest

from halfstep.compare.loading import load_recipe
from halfstep.core.record import Record

TINY = """
import torch
from torch import nn

STEPS = 4
METRIC = "error"
seen = []

def make_model():
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)

def batches(epoch, seed):
    draw = torch.Generator().manual_seed(100 * seed + epoch)
    for _ in range(3):
        yield {"x": torch.randn(4, 3, generator=draw)}

def loss(model, batch):
    return model(batch["x"]).square().mean()

def evaluate(model):
    return {"error": model(torch.ones(1, 3)).abs().item()}
"""


@pytest.fixture
def recipe(tmp_path):
    """Return a function that makes a recipe: TINY with lines added that override it."""

    def make(added="", name="tiny", source=TINY):
        file = tmp_path / f"{name}.py"
        file.write_text(source + textwrap.dedent(added))
        return load_recipe(file)

    return make


@pytest.fixture
def made_up():
    """Return a function that makes the record of a comparison that never was.

    It takes keyword arguments for the run and one dict for each policy: ``seconds`` (one number or
    one a step), ``losses``, ``metric``, ``memory`` (a list), ``stopped`` (status, step, reason),
    ``skipped_at``, ``scales``.
    """

    def make(
        policies, *, steps=40, device="cpu", fast=None, examples=None, metric="accuracy",
        higher=True, status="finished", planned=None, error=None,
    ):  # fmt: skip
        header = {
            "event": "header", "kind": "compare", "halfstep": "0.1.0", "command": "halfstep …",
            "created": "2026-11-22T12:00:00+00:00", "seed": 0,
            "machine": {
                "device": device, "device_name": "Chip X", "devices": [], "labels": [],
                "fast": {"float16": False, "bfloat16": False} if fast is None else fast,
                "checks": {}, "system": "Linux", "versions": {"torch": "2.13"}, "threads": 2,
            },
            "policies": {
                label: {"config": {"name": label}, "computes_in": computes(label)}
                for label in policies
            },
        }  # fmt: skip
        start = {
            "event": "recipe", "recipe": "r", "title": "R", "framework": "torch", "file": "r.py",
            "device": device, "note": None, "metric": metric, "higher_is_better": higher,
            "same_within": 0.01, "steps": planned or steps, "epochs": None,
        }  # fmt: skip
        events = [start]
        for label, made in policies.items():
            events += policy_events(label, made, steps, metric, examples)
        events.append({"event": "recipe_end", "recipe": "r", "status": status, "error": error})
        events.append({"event": "end", "status": status, "error": error})
        return Record(header, events)

    return make


def computes(label):
    return [dtype for dtype in ("bfloat16", "float16") if label.endswith("_" + dtype)]


def policy_events(label, made, steps, metric, examples):
    at = {"recipe": "r", "policy": label}
    stopped = made.get("stopped")
    for size in made.get("memory", []):
        yield {"event": "memory", **at, "bytes": size, "method": "m"}
    last = stopped[1] if stopped else steps
    for step in range(last):
        seconds = made.get("seconds", 0.01)
        yield {
            "event": "step", **at, "step": step,
            "seconds": seconds[step] if isinstance(seconds, list) else seconds,
            "loss": made["losses"][step] if "losses" in made else 1 / (1 + step),
            "skipped": step in made.get("skipped_at", ()),
            "scale": made["scales"][step] if "scales" in made else None,
        }  # fmt: skip
    if stopped:
        status, step, reason = stopped
        yield {"event": "stopped", **at, "step": step, "status": status, "reason": reason}
    elif "metric" in made:
        metrics = {metric: made["metric"]}
        yield {"event": "evaluation", **at, "step": last, "metrics": metrics, "examples": examples}
