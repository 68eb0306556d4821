"""Compare: every recipe under every policy, with a record written as it goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from .. import __version__
from ..core.policy import Policy, PolicyMap
from ..core.record import Event, Record, RecordWriter
from ..errors import HalfstepError, RecipeError
from . import memory
from .engine import Plan, Race, Trainee, plan_for
from .machine import computes_in, describe_machine
from .policies import DEFAULT, parse_policies
from .recipe import Recipe, load_recipe
from .summary import Summary, summarise

Policies = Mapping[str, Policy | PolicyMap]


class Framework(Protocol):
    """What trains the recipes of one framework."""

    def pick_device(self, name: str | None) -> str:
        """Return the device to train on."""

    def describe(self, device: str) -> dict[str, Any]:
        """Return versions and the device's name, as plain values."""

    def threads(self, count: int | None) -> AbstractContextManager[None]:
        """Compute on the CPU with so many threads meanwhile; None leaves them as they are."""

    def starter(self, recipe: Recipe, device: str, seed: int) -> Callable[[Any], Trainee]:
        """Return what makes a trainee of a policy; all start from the same weights."""


class TorchFramework:
    """torch; it is imported when it is needed."""

    def pick_device(self, name: str | None) -> str:
        """Return the device given, else CUDA where there is one, else the CPU."""
        from .torch_trainee import pick_device

        return pick_device(name)

    def describe(self, device: str) -> dict[str, Any]:
        """Return torch's version, the number of threads, the GPU's name."""
        from .torch_trainee import describe

        return describe(device)

    def threads(self, count: int | None) -> AbstractContextManager[None]:
        """Set torch's threads and put them back."""
        from .torch_trainee import threads

        return threads(count)

    def starter(self, recipe: Recipe, device: str, seed: int) -> Callable[[Any], Trainee]:
        """Return what makes a trainee of a policy."""
        from .torch_trainee import TorchTrainee, initial_weights

        weights = initial_weights(recipe, seed)
        return lambda policy: TorchTrainee(recipe, policy, weights, device, seed)


FRAMEWORKS: dict[str, Framework] = {"torch": TorchFramework()}
"""What trains a recipe, by the recipe's FRAMEWORK."""


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
    """

    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    device: str | None = None
    memory: bool = True
    threads: int | None = None


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
        RecordError: a record that cannot be written.

    >>> summary = compare("digits-mlp", "float32", Settings(steps=2, memory=False))
    >>> summary["status"], summary["recipes"][0]["policies"]["float32"]["steps"]
    ('finished', 2)
    """
    settings = settings or Settings()
    chosen = policies if isinstance(policies, Mapping) else parse_policies(policies or DEFAULT)
    several = [recipes] if isinstance(recipes, (str, Recipe)) else list(recipes)
    loaded = [each if isinstance(each, Recipe) else load_recipe(each) for each in several]
    frameworks = [_framework_of(recipe) for recipe in loaded]
    device = frameworks[0].pick_device(settings.device)
    with ExitStack() as stack:
        stack.enter_context(frameworks[0].threads(settings.threads))
        header = _header(chosen, settings, command, device, frameworks[0])
        sinks: list[Callable[[Event], None]] = []
        if record is not None:
            sinks.append(stack.enter_context(RecordWriter(record, "compare", **header)).write)
        run = _Run(chosen, settings, device, [*sinks, on_event or _ignore])
        (on_event or _ignore)({"event": "header", "kind": "compare", **header})
        run.all(loaded, frameworks)
    return summarise(Record({"event": "header", "kind": "compare", **header}, run.events))


def _ignore(event: Event) -> None:
    """Nobody watches."""


def _framework_of(recipe: Recipe) -> Framework:
    if recipe.framework not in FRAMEWORKS:
        raise RecipeError(
            f"{recipe.file}: FRAMEWORK = {recipe.framework!r}: nothing trains such recipes yet. "
            f"Allowed is {', '.join(map(repr, FRAMEWORKS))}."
        )
    return FRAMEWORKS[recipe.framework]


def _header(
    policies: Policies, settings: Settings, command: str, device: str, framework: Framework
) -> dict[str, Any]:
    return {
        "halfstep": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "argv0": os.path.basename(sys.argv[0]),
        "seed": settings.seed,
        "machine": describe_machine(device, policies.values(), framework.describe(device)),
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
        device: str,
        sinks: Iterable[Callable[[Event], None]],
    ) -> None:
        self._policies, self._settings, self._device = policies, settings, device
        self._sinks = list(sinks)
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)
        for sink in self._sinks:
            sink(event)

    def all(self, recipes: Iterable[Recipe], frameworks: Iterable[Framework]) -> None:
        status, error = "finished", None
        for recipe, framework in zip(recipes, frameworks, strict=True):
            status, error = self._guarded(recipe, framework)
            if status != "finished":
                break
        self.emit({"event": "end", "status": status, "error": error})

    def _guarded(self, recipe: Recipe, framework: Framework) -> tuple[str, str | None]:
        status, reason = "finished", None
        try:
            self._one(recipe, framework)
        except KeyboardInterrupt:
            status = "interrupted"
        except HalfstepError as error:
            status, reason = "failed", str(error)
        self.emit({"event": "recipe_end", "recipe": recipe.name, "status": status, "error": reason})
        return status, reason

    def _one(self, recipe: Recipe, framework: Framework) -> None:
        note = _setup(recipe, self._settings.seed, self._device)
        plan = plan_for(recipe, self._settings.steps, self._settings.epochs, self._settings.seed)
        self.emit(_recipe_event(recipe, plan, self._device, note))
        if self._settings.memory:
            for found in memory.measure(recipe, self._policies, self._device, plan.seed):
                self.emit({"event": "memory", "recipe": recipe.name, **found})
        trainees = self._start(recipe, framework)
        Race(recipe, trainees, plan, self.emit).run()

    def _start(self, recipe: Recipe, framework: Framework) -> dict[str, Trainee]:
        """Make every policy's model; one that cannot be made leaves the others alone."""
        start = framework.starter(recipe, self._device, self._settings.seed)
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
            for note in getattr(trainees[label], "notes", ()):
                self.emit({"event": "note", **at, "text": note})
        if not trainees:
            raise RecipeError(f"{recipe.file}: no policy could be applied: {reason}")
        return trainees


def _setup(recipe: Recipe, seed: int, device: str) -> str | None:
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
