"""Compare: every recipe under every policy, with a record written as it goes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.record import Event, Record, RecordWriter
from ..errors import HalfstepError, RecipeError, RecordError
from .engine import Plan, Race, plan_for
from .loading import load_recipe
from .machine import computes_in, describe_machine
from .policies import DEFAULT, parse_policies
from .recipe import Recipe
from .results import Summary
from .summary import summarise
from .trainee import Policies, Starter, Trainee, Trainer
from .trainers import trainer_of

MEMORY_STEPS = 3
"""Steps of one measurement: the second is the first one with the optimizer's state in place."""


@dataclass(frozen=True)
class Settings:
    """What a comparison was asked to do.

    Attributes:
        steps: training steps; None: what the recipe says.
        epochs: passes over the data; ``steps`` goes before it.
        seed: of the weights, the batches and the random numbers of every step.
        device: None: the fastest there is.
        memory: whether to measure peak memory.
        threads: of the CPU; None: the framework's default. Small models are steadier with 1.
        numerics: record the numbers of every so-manieth step, layer by layer; None: of none.
    """

    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    device: str | None = None
    memory: bool = True
    threads: int | None = None
    numerics: int | None = None


def compare(
    recipes: str | Recipe | Iterable[str | Recipe],
    policies: str | Policies | None = None,
    settings: Settings | None = None,
    *,
    record: str | os.PathLike[str] | None = None,
    on_event: Callable[[Event], None] | None = None,
    command: str = "",
) -> Summary:
    """Train recipes under several policies side by side and return what came of it.

    A run that Ctrl-C stops, or that an error in a later recipe ends, still returns the summary of
    what there was, with ``status`` ``"interrupted"`` or ``"failed"`` and the ``error``.

    Args:
        recipes: names of built-in recipes or files, one or several.
        policies: as :func:`~halfstep.compare.policies.parse_policies` takes them, or by label;
            the first one is the baseline. Left out: float32, mixed_float16, mixed_bfloat16.
        settings: how long, which seed, which device.
        record: where to write the record, line by line as the run goes.
        on_event: is called with every event, the record's header first.
        command: what the user typed, for the page.

    Raises:
        RecipeError: a recipe that cannot be loaded, or a device that is not there.
        PolicyError: a policy that is none.
        RecordError: a record that cannot be written, or numerics without a record to lie beside.

    >>> summary = compare("digits-mlp", "float32", Settings(steps=2, memory=False))
    >>> summary["status"], summary["recipes"][0]["policies"]["float32"]["steps"]
    ('finished', 2)
    """
    settings = settings or Settings()
    if settings.numerics is not None and record is None:
        raise RecordError(
            "compare(numerics=...): give record=, the numbers are recorded beside it."
        )
    chosen = policies if isinstance(policies, Mapping) else parse_policies(policies or DEFAULT)
    several = [recipes] if isinstance(recipes, (str, Recipe)) else list(recipes)
    loaded = [each if isinstance(each, Recipe) else load_recipe(each) for each in several]
    trainers = [trainer_of(recipe) for recipe in loaded]
    with ExitStack() as stack:
        for trainer in dict.fromkeys(trainers):
            # before the device is picked: JAX's threads are made when it first looks for one
            stack.enter_context(trainer.threads(settings.threads))
        devices = [trainer.pick_device(settings.device) for trainer in trainers]
        header = _header(chosen, settings, command, devices, trainers)
        sinks: list[Callable[[Event], None]] = []
        if record is not None:
            sinks.append(stack.enter_context(RecordWriter(record, "compare", **header)).write)
        beside = None if record is None else Path(record)
        run = _Run(chosen, settings, [*sinks, on_event or _ignore], beside)
        (on_event or _ignore)({"event": "header", "kind": "compare", **header})
        run.all(zip(loaded, trainers, devices, strict=True))
    return summarise(Record({"event": "header", "kind": "compare", **header}, run.events))


def _ignore(event: Event) -> None:
    """Nobody watches."""


def _header(
    policies: Policies,
    settings: Settings,
    command: str,
    devices: Sequence[str],
    trainers: Sequence[Trainer],
) -> dict[str, Any]:
    told = [trainer.describe(device) for trainer, device in zip(trainers, devices, strict=True)]
    versions = {name: each for one in told for name, each in one["versions"].items()}
    return {
        "halfstep": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "argv0": os.path.basename(sys.argv[0]),
        "seed": settings.seed,
        "machine": describe_machine(
            devices[0], policies.values(), {**told[0], "versions": versions}
        ),
        "policies": {
            label: {"config": policy.get_config(), "computes_in": computes_in(policy)}
            for label, policy in policies.items()
        },
    }


class _Run:
    """One comparison while it runs: it hands every event to those who listen and keeps it."""

    def __init__(
        self,
        policies: Policies,
        settings: Settings,
        sinks: Iterable[Callable[[Event], None]],
        beside: Path | None = None,
    ) -> None:
        self._policies, self._settings = policies, settings
        self._sinks, self._beside = list(sinks), beside
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)
        for sink in self._sinks:
            sink(event)

    def all(self, jobs: Iterable[tuple[Recipe, Trainer, str]]) -> None:
        status, error = "finished", None
        for recipe, trainer, device in jobs:
            status, error = self._guarded(recipe, trainer, device)
            if status != "finished":
                break
        self.emit({"event": "end", "status": status, "error": error})

    def _guarded(self, recipe: Recipe, trainer: Trainer, device: str) -> tuple[str, str | None]:
        status, reason = "finished", None
        try:
            self._one(recipe, trainer, device)
        except KeyboardInterrupt:
            status = "interrupted"
        except HalfstepError as error:
            status, reason = "failed", str(error)
        self.emit({"event": "recipe_end", "recipe": recipe.name, "status": status, "error": reason})
        return status, reason

    def _one(self, recipe: Recipe, trainer: Trainer, device: str) -> None:
        note = set_up(recipe, self._settings.seed, device)
        plan = plan_for(recipe, self._settings.steps, self._settings.epochs, self._settings.seed)
        self.emit(_recipe_event(recipe, plan, device, note))
        start = trainer.starter(recipe, device, self._settings.seed)
        if self._settings.memory:
            for found in start.measure_memory(self._policies, MEMORY_STEPS):
                self.emit({"event": "memory", "recipe": recipe.name, **found})
        trainees = self._start(recipe, start)
        with ExitStack() as watching:
            for label, trainee in trainees.items():
                self._watch(watching, recipe, label, trainee)
            Race(recipe, trainees, plan, self.emit).run()

    def _watch(self, until: ExitStack, recipe: Recipe, label: str, trainee: Trainee) -> None:
        every = self._settings.numerics
        if every is None or self._beside is None:
            return
        at = {"recipe": recipe.name, "policy": label}
        watched = getattr(trainee, "watched", None)
        if watched is None:
            text = f"the numbers of {recipe.framework} recipes cannot be recorded yet"
            self.emit({"event": "note", **at, "text": text})
            return
        name = re.sub(r"[^\w.-]+", "-", f"{self._beside.stem}.{recipe.name}.{label}")
        path = self._beside.with_name(f"{name}.numerics.jsonl")
        until.enter_context(watched(path, every))
        self.emit({"event": "numerics_record", **at, "file": path.name})

    def _start(self, recipe: Recipe, start: Starter) -> dict[str, Trainee]:
        """Make every policy's model; one that cannot be made leaves the others alone."""
        trainees: dict[str, Trainee] = {}
        for label, policy in self._policies.items():
            at = {"recipe": recipe.name, "policy": label}
            try:
                trainees[label] = start(policy)
            except RecipeError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a policy makes a model or an optimizer raise
                reason = f"{type(error).__name__}: {error}"
                self.emit(
                    {"event": "stopped", **at, "step": 0, "status": "failed", "reason": reason}
                )
                continue
            for note in trainees[label].notes:
                self.emit({"event": "note", **at, "text": note})
        if not trainees:
            raise RecipeError(f"{recipe.file}: no policy could be applied: {reason}")
        return trainees


def set_up(recipe: Recipe, seed: int, device: str) -> str | None:
    """Run a recipe's ``setup`` and return its note.

    Raises:
        RecipeError: it raised.
    """
    try:
        note = recipe.call("setup", seed, device)
    except Exception as error:
        raise RecipeError(
            f"{recipe.where(error)}: setup({seed}, {device!r}): {type(error).__name__}: {error}"
        ) from error
    return None if note is None else str(note)


def _recipe_event(recipe: Recipe, plan: Plan, device: str, note: str | None) -> Event:
    return {
        "event": "recipe",
        "recipe": recipe.name,
        "file": recipe.file.name,
        "title": recipe.title,
        "framework": recipe.framework,
        "device": device,
        "note": note,
        "metric": recipe.constant("METRIC"),
        "higher_is_better": recipe.constant("HIGHER_IS_BETTER", False),
        "same_within": float(recipe.constant("SAME_WITHIN", 0.01)),
        "steps": plan.steps,
        "epochs": plan.epochs,
    }
