"""What trains the recipes of each framework: a module, imported when a recipe is to be run."""

from __future__ import annotations

from collections.abc import Callable

from .frameworks import framework_of
from .recipe import Recipe
from .trainee import Trainer


def _torch() -> Trainer:
    from . import torch_trainee

    return torch_trainee


def _jax() -> Trainer:
    from . import jax_trainee

    return jax_trainee


def _keras() -> Trainer:
    from . import keras_trainee

    return keras_trainee


TRAINERS: dict[str, Callable[[], Trainer]] = {"torch": _torch, "jax": _jax, "keras": _keras}
"""What imports the trainer, by a recipe's FRAMEWORK."""


def trainer_of(recipe: Recipe) -> Trainer:
    """Import what trains a recipe, and return it.

    Raises:
        RecipeError: nothing trains such recipes.
    """
    return TRAINERS[framework_of(recipe)]()
