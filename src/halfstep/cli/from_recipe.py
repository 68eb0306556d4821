"""What commands that look at a torch recipe need of it: its model, a batch, a policy by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.policy import Policy, PolicyMap
from ..errors import PolicyError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from ..compare import Recipe


def torch_recipe(name: str) -> Recipe:
    """Load a recipe that torch trains.

    Raises:
        RecipeError: there is none of this name, or another framework trains it.
    """
    from ..compare import load_recipe

    recipe = load_recipe(name)
    if recipe.framework != "torch":
        raise RecipeError(
            f"{recipe.file}: FRAMEWORK = {recipe.framework!r}; this command knows recipes of torch "
            "only."
        )
    return recipe


def one_policy(argument: str) -> Policy | PolicyMap:
    """Return the policy of a name or a JSON file.

    Raises:
        PolicyError: an unknown name, a file that holds no policy, or several of them.
    """
    from ..compare import parse_policies

    policies = parse_policies(argument, option="--policy")
    if len(policies) > 1:
        raise PolicyError(f"--policy: {argument!r} names {len(policies)} policies; give one.")
    return next(iter(policies.values()))


def set_up(recipe: Recipe, seed: int, device: str | None) -> str:
    """Run the recipe's ``setup`` and return the device to work on.

    Raises:
        RecipeError: a device that is not there, or what ``setup`` raises.
    """
    from ..compare import run
    from ..compare.torch_device import pick_device

    chosen = pick_device(device)
    run.set_up(recipe, seed, chosen)
    return chosen


def first_batch(recipe: Recipe, seed: int, device: str | None) -> tuple[nn.Module, Any]:
    """Return a model of the recipe, in training mode, and its first batch, on the device.

    Raises:
        RecipeError: the recipe cannot make one of the two.
    """
    from ..compare import engine
    from ..compare.torch_trainee import make_model, move

    chosen = set_up(recipe, seed, device)
    model = make_model(recipe, seed).to(chosen).train()
    return model, move(engine.first_batch(recipe, seed), chosen)
