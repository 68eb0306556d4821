"""What a recipe of each framework holds: one entry a framework, and nothing here imports one."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RecipeError, nearest
from . import keras_data
from .recipe import Recipe


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


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


Functions = Mapping[str, Function]


@dataclass(frozen=True)
class Framework:
    """One framework's entry.

    Attributes:
        functions: from a recipe's module to the functions that it must have.
        optional: the functions that it may have.
        defaults: what stands for a function that a recipe leaves out; called with the recipe first.
    """

    functions: Callable[[types.ModuleType], Functions]
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

FRAMEWORKS: dict[str, Framework] = {
    "torch": Framework(lambda _: _TORCH),
    "jax": Framework(
        lambda module: _JAX_WITH_STATE if hasattr(module, STATE) else _JAX,
        {STATE: Function(("key",), "the model's state that is not trained, a pytree of arrays")},
    ),
    "keras": Framework(
        _keras_functions,
        defaults={"batches": keras_data.batches, "evaluate": keras_data.evaluate},
    ),
}
"""What a recipe holds, by its FRAMEWORK."""


def framework_of(recipe: Recipe) -> str:
    """Return the name of a recipe's framework.

    Raises:
        RecipeError: nothing trains such recipes.
    """
    name = recipe.framework
    if name not in FRAMEWORKS:
        raise RecipeError(
            f"{recipe.file}: FRAMEWORK = {name!r}: nothing trains such recipes. Allowed are "
            f"{', '.join(map(repr, FRAMEWORKS))}.{nearest(name, FRAMEWORKS)}"
        )
    return name
