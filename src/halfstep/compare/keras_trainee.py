"""What trains a Keras recipe: a compiled model each, made while its policy is the global one."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import keras
import numpy as np

from ..core.policy import Policy, PolicyMap
from ..errors import LossScaleWarning, PolicyError, PolicyWarning, RecipeError
from .engine import first_batch
from .keras_device import describe as describe
from .keras_device import device_scope
from .keras_device import pick_device as pick_device
from .keras_device import threads as threads
from .keras_explanation import Explanation
from .keras_memory import measure
from .noting import noting
from .policies import is_low
from .recipe import Recipe
from .trainee import Policies, StepResult


class KerasTrainee:
    """One model under one policy.

    Args:
        recipe: what makes, trains and judges the model.
        policy: the global policy while ``make_model`` runs, and in every step.
        weights: those to start from; None for the model's own.
        device: where it trains.
        seed: of what the model draws as it is made.

    Attributes:
        model: what ``make_model`` returned, built.
        notes: what there is to say about this policy on this model, one string each.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy | PolicyMap,
        weights: list[Any] | None,
        device: str,
        seed: int,
    ) -> None:
        import halfstep.keras as door

        self._recipe, self._policy, self._device = recipe, policy, device
        self.notes: list[str] = []
        with self._here(), noting(self.notes, PolicyWarning, LossScaleWarning):
            self.model = make_model(recipe, seed)
            build(self.model, recipe, seed)
            if weights is not None:
                self.model.set_weights(weights)
        layers = door._internals.parts_of(self.model)
        if is_low(policy) and not any(_computes_low(layer) for layer in layers):
            self.notes.append("no layer of the model computes in 16 bits under this policy")
        self._scaling = isinstance(self.model.optimizer, door.LossScaleOptimizer)
        self._scaling = self._scaling and self.model.optimizer.rule.skips
        self._skipped = 0

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Under the policy, for layers that are made late, and on the device."""
        import halfstep.keras as door

        with ExitStack() as stack:
            stack.enter_context(device_scope(self._device))
            stack.enter_context(door.policy_scope(self._policy))
            yield

    def step(self, batch: Any, seed: int) -> StepResult:
        """Train on one batch and time it: the step that ``fit`` takes, until its loss is here."""
        inputs, targets, weights = unpacked(self._recipe, batch)
        _seed(seed)
        with self._here():
            start = time.perf_counter()
            logs = self.model.train_on_batch(inputs, targets, weights, return_dict=True)
            seconds = time.perf_counter() - start
        if not self._scaling:
            return StepResult(seconds, float(logs["loss"]))
        state = self.model.optimizer.loss_scale_state()
        before, self._skipped = self._skipped, int(state.skipped_steps)
        return StepResult(
            seconds, float(logs["loss"]), self._skipped > before, scale=float(state.scale)
        )

    def evaluate(self) -> dict[str, float]:
        """Return the recipe's metrics, as Python numbers."""
        with self._here(), _without_gradients():
            metrics = self._recipe.call("evaluate", self.model)
        return self._recipe.numbers(metrics, "model")


def _computes_low(layer: Any) -> bool:
    return layer.compute_dtype in ("float16", "bfloat16")


def _seed(seed: int) -> None:
    """Seed what a recipe may draw from. (Keras' own layers have generators of their own.)

    ``keras.utils.set_random_seed`` would import TensorFlow, for all backends.
    """
    random.seed(seed)
    np.random.seed(seed)
    if keras.backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)


def _without_gradients() -> AbstractContextManager[Any]:
    """What a recipe calls the model for itself in: torch alone records what it does."""
    if keras.backend.backend() != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


def make_model(recipe: Recipe, seed: int) -> Any:
    """Return a new model of the recipe.

    Raises:
        PolicyError, LossScaleError: what compiling under the policy raises.
        RecipeError: ``make_model`` raised something else, or returned no compiled model.
    """
    _seed(seed)
    if keras.backend.backend() == "tensorflow":
        # not in each step: it empties TensorFlow's cache of kernels
        keras.utils.set_random_seed(seed)
    model = recipe.call("make_model")
    if not isinstance(model, keras.Model):
        raise RecipeError(
            f"{recipe.file}: make_model() returned {model!r}; it must return a compiled "
            "keras.Model."
        )
    if not model.compiled or model.optimizer is None:
        raise RecipeError(
            f"{recipe.file}: make_model() returned a model without an optimizer; call "
            "model.compile(optimizer, loss) in it, so that the policy can scale the loss."
        )
    return model


def build(model: Any, recipe: Recipe, seed: int) -> None:
    """Make the variables of a model and its optimizer, which may need to see a batch for that."""
    if not model.built:
        inputs, _, _ = unpacked(recipe, first_batch(recipe, seed))
        model(keras.tree.map_structure(lambda array: array[:1], inputs), training=False)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def unpacked(recipe: Recipe, batch: Any) -> tuple[Any, Any, Any]:
    """Return the inputs, the targets and the weights of a batch, as ``fit`` takes them.

    Raises:
        RecipeError: not two or three things in a tuple.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise RecipeError(
            f"{recipe.file}: batches() gave {type(batch).__name__}; a batch must be a tuple "
            "(x, y) or (x, y, sample_weight)."
        )
    inputs, targets, *weights = batch
    return inputs, targets, weights[0] if weights else None


class Starter:
    """What makes the trainees of a Keras recipe."""

    def __init__(self, recipe: Recipe, device: str, seed: int) -> None:
        self.recipe, self.device, self.seed = recipe, device, seed

    @cached_property
    def _weights(self) -> list[Any]:
        try:
            first = KerasTrainee(self.recipe, Policy("float32"), None, self.device, self.seed)
        except RecipeError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise RecipeError(
                f"{self.recipe.where(error)}: make_model(): {type(error).__name__}: {error}"
            ) from error
        weights: list[Any] = first.model.get_weights()
        return weights

    def __call__(self, policy: Policy | PolicyMap) -> KerasTrainee:
        """Return a new model under a policy, with the weights that all start from."""
        return KerasTrainee(self.recipe, policy, self._weights, self.device, self.seed)

    def anew(self) -> Starter:
        """Return another one that makes all again, the weights that all start from too."""
        return Starter(self.recipe, self.device, self.seed)

    def measure_memory(self, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
        """Yield what training needs; how that is known depends on the backend and the device."""
        yield from measure(self, policies, steps)


def starter(recipe: Recipe, device: str, seed: int) -> Starter:
    """Return what makes the trainees of a recipe; all start from the same weights."""
    return Starter(recipe, device, seed)


def explain(recipe: Recipe, policy: Policy | PolicyMap, seed: int) -> Explanation:
    """Return what every layer of the recipe's model computes in, and what is wrong with it.

    Raises:
        PolicyError: no layer computes in 16 bits.
    """
    from halfstep.keras import check_model

    trainee = KerasTrainee(recipe, policy, None, pick_device(), seed)
    found = Explanation.of(trainee.model, check_model(trainee.model))
    if not found.low:
        raise PolicyError(
            f"{recipe.name}: under {policy!r} no layer of the model computes in 16 bits; there is "
            "nothing to explain. Allowed are policies that compute there, for instance "
            "mixed_float16 or mixed_bfloat16."
        )
    return found
