"""What a recipe of each framework holds, and what trains it: one entry a framework.

Nothing here imports a framework. A trainer is a module, ``torch_trainee`` or ``jax_trainee``, that
is imported when its first recipe is to be run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..core.policy import Policy, PolicyMap
from ..errors import RecipeError, nearest
from . import keras_data

if TYPE_CHECKING:
    from .engine import Trainee
    from .recipe import Recipe

Policies = Mapping[str, Policy | PolicyMap]


@dataclass(frozen=True)
class Function:
    """A function of a recipe.

    Attributes:
        arguments: what it is called with.
        returns: what it must return, in words.
        more: arguments that it may take behind these.
    """

    arguments: tuple[str, ...]
    returns: str
    more: tuple[str, ...] = ()

    @property
    def counts(self) -> range:
        """How many positional arguments it may take."""
        return range(len(self.arguments), len(self.arguments) + len(self.more) + 1)


Functions = Mapping[str, Function]


class Starter(Protocol):
    """What makes the trainees of one recipe, and measures what they need."""

    def __call__(self, policy: Policy | PolicyMap) -> Trainee:
        """Return a new model under a policy, with the weights that all start from."""

    def measure_memory(self, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
        """Yield measurements: see :func:`halfstep.compare.memory.measure`."""


class Trainer(Protocol):
    """What trains the recipes of one framework: the functions of its module."""

    def pick_device(self, name: str | None = None) -> str:
        """Return the device to train on: the one given, else the fastest there is."""

    def describe(self, device: str) -> dict[str, Any]:
        """Return plain values: ``versions``, the ``device_name``, the CPU's ``threads``."""

    def threads(self, count: int | None) -> AbstractContextManager[None]:
        """Compute on the CPU with so many threads meanwhile; None leaves them as they are."""

    def starter(self, recipe: Recipe, device: str, seed: int) -> Starter:
        """Return what makes the trainees of a recipe; all start from the same weights."""

    def explain(self, recipe: Recipe, policy: Policy | PolicyMap, seed: int) -> object:
        """Return what prints as a table of what the policy does to the recipe's model, and why.

        Raises:
            PolicyError: the policy puts nothing in 16 bits.
        """


@dataclass(frozen=True)
class Framework:
    """One framework's entry.

    Attributes:
        functions: from a recipe's module to the functions that it must have.
        trainer: imports what trains such recipes.
        optional: the functions that it may have.
        defaults: what stands for a function that a recipe leaves out; called with the recipe first.
    """

    functions: Callable[[types.ModuleType], Functions]
    trainer: Callable[[], Trainer]
    optional: Functions = field(default_factory=dict)
    defaults: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


_BATCHES = Function(("epoch", "seed"), "an iterable of the training batches of one epoch")
_METRICS = "a dict of metrics, numbers by name"

_TORCH: Functions = {
    "make_model": Function((), "a new model, the same kind each time"),
    "make_optimizer": Function(("model",), "an optimizer over the model's parameters"),
    "batches": _BATCHES,
    "loss": Function(("model", "batch"), "the training loss, a scalar tensor"),
    "evaluate": Function(("model",), _METRICS),
}

_JAX: Functions = {
    "init": Function(("key",), "the parameters, a pytree of float32 arrays"),
    "tx": Function((), "an optax optimizer"),
    "batches": _BATCHES,
    "loss": Function(("params", "batch"), "the training loss, a scalar array", more=("key",)),
    "evaluate": Function(("params",), _METRICS),
}

_JAX_WITH_STATE: Functions = {
    **_JAX,
    "loss": Function(
        ("params", "state", "batch"),
        "a pair: the training loss, a scalar array, and the new state",
        more=("key",),
    ),
    "evaluate": Function(("params", "state"), _METRICS),
}

_KERAS_MODEL: Functions = {"make_model": Function((), "a new model, compiled, the same each time")}

_KERAS: Functions = {
    **_KERAS_MODEL,
    "data": Function((), "(x_train, y_train, x_test, y_test), arrays"),
}

_KERAS_BY_BATCH: Functions = {
    **_KERAS_MODEL,
    "batches": _BATCHES,
    "evaluate": Function(("model",), _METRICS),
}


def _keras_functions(module: types.ModuleType) -> Functions:
    """Batches and metrics follow from ``data``; without it the recipe says both itself."""
    own = {name: it for name, it in _KERAS_BY_BATCH.items() if hasattr(module, name)}
    by_batch = hasattr(module, "batches") and not hasattr(module, "data")
    return _KERAS_BY_BATCH if by_batch else {**_KERAS, **own}


STATE = "init_state"
"""The function of a JAX recipe whose model has state that is not trained."""


def _torch() -> Trainer:
    from . import torch_trainee

    return torch_trainee


def _jax() -> Trainer:
    from . import jax_trainee

    return jax_trainee


def _keras() -> Trainer:
    from . import keras_trainee

    return keras_trainee


FRAMEWORKS: dict[str, Framework] = {
    "torch": Framework(lambda _: _TORCH, _torch),
    "jax": Framework(
        lambda module: _JAX_WITH_STATE if hasattr(module, STATE) else _JAX,
        _jax,
        {STATE: Function(("key",), "the model's state that is not trained, a pytree of arrays")},
    ),
    "keras": Framework(
        _keras_functions,
        _keras,
        defaults={"batches": keras_data.batches, "evaluate": keras_data.evaluate},
    ),
}
"""What trains a recipe, by the recipe's FRAMEWORK."""


def framework_of(recipe: Recipe) -> Framework:
    """Return the entry for a recipe's framework.

    Raises:
        RecipeError: nothing trains such recipes.
    """
    name = recipe.framework
    if name not in FRAMEWORKS:
        raise RecipeError(
            f"{recipe.file}: FRAMEWORK = {name!r}: nothing trains such recipes. Allowed are "
            f"{', '.join(map(repr, FRAMEWORKS))}.{nearest(name, FRAMEWORKS)}"
        )
    return FRAMEWORKS[name]
