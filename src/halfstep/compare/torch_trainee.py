"""What trains a torch recipe: one model, one optimizer and one policy each."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.loss_scale import NoLossScale
from ..core.policy import Policy, PolicyMap
from ..errors import PolicyError, PolicyWarning, RecipeError
from .noting import noting
from .policies import is_low, is_plain_float32
from .recipe import Recipe
from .resident_memory import measure_in_children
from .torch_device import describe as describe
from .torch_device import pick_device as pick_device
from .torch_device import threads as threads
from .torch_memory import measure_on_cuda
from .trainee import Policies, StepResult

if TYPE_CHECKING:
    from halfstep.torch import PolicySummary


def seed_everything(seed: int) -> None:
    """Seed the generators that a model or a recipe may draw from: torch, NumPy, Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def move(batch: Any, device: str) -> Any:
    """Return the batch with its tensors on the device and its containers made anew."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


class PlainOptimizer:
    """The bare optimizer with the words of a loss-scaling one: what float32 training is."""

    last_step_skipped = False
    current_scale = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner_optimizer = optimizer
        self.zero_grad: Callable[[], None] = optimizer.zero_grad
        self.step: Callable[[], Any] = optimizer.step

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``."""
        torch.autograd.backward(loss)


class TorchTrainee:
    """One model under one policy.

    Args:
        recipe: what makes, trains and judges the model.
        policy: applied to the model before its optimizer is made.
        weights: the state dict to start from.
        device: where it trains.
        seed: drawn from while the model is made.

    Attributes:
        notes: what there is to say about this policy on this model, one string each.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy | PolicyMap,
        weights: Mapping[str, Tensor],
        device: str,
        seed: int,
    ) -> None:
        self._recipe, self._device = recipe, device
        self._model = make_model(recipe, seed)
        self._model.load_state_dict(weights)
        self._model.to(device)
        self._scaled = not isinstance(policy.loss_scale, NoLossScale)
        self.notes: list[str] = []
        # Any: what a recipe returns as its optimizer is only checked by what it can do
        self._optimizer: Any = self._make_optimizer(policy)
        self._synchronise = (
            torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
        )

    def _make_optimizer(self, policy: Policy | PolicyMap) -> Any:
        if is_plain_float32(policy):
            return PlainOptimizer(self._recipe.call("make_optimizer", self._model))
        import halfstep.torch as door

        with noting(self.notes, PolicyWarning):
            door.apply_policy(self._model, policy)
        return door.LossScaleOptimizer(self._recipe.call("make_optimizer", self._model))

    def watched(self, record: str | os.PathLike[str], every: int) -> AbstractContextManager[object]:
        """Return what records the numbers of every so-manieth step meanwhile."""
        from ..torch.numerics import NumericsMonitor

        plain = isinstance(self._optimizer, PlainOptimizer)
        optimizer = self._optimizer.inner_optimizer if plain else self._optimizer
        return NumericsMonitor(self._model, optimizer, every, record)

    def step(self, batch: Any, seed: int) -> StepResult:
        """Train on one batch and time it: zero_grad, forward, backward, update."""
        batch = move(batch, self._device)
        self._model.train()
        seed_everything(seed)
        self._synchronise()
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self._recipe.call("loss", self._model, batch)
        self._check_loss(loss)
        self._optimizer.backward(loss)
        self._optimizer.step()
        self._synchronise()
        seconds = time.perf_counter() - start
        # read after the clock has stopped: these wait for the device
        return StepResult(
            seconds=seconds,
            loss=float(loss.detach()),
            skipped=bool(self._optimizer.last_step_skipped),
            scale=float(self._optimizer.current_scale) if self._scaled else None,
        )

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else loss
            raise RecipeError(
                f"{self._recipe.file}: loss(model, batch) returned {given!r}; it must return a "
                "scalar tensor."
            )

    def evaluate(self) -> dict[str, float]:
        """Return the recipe's metrics of the model in evaluation mode, as Python numbers."""
        self._model.eval()
        with torch.no_grad():
            metrics = self._recipe.call("evaluate", self._model)
        return self._recipe.numbers(metrics, "model")


def _nothing() -> None:
    """A CPU has nothing to wait for."""


def make_model(recipe: Recipe, seed: int) -> nn.Module:
    """Return a new model of the recipe.

    Raises:
        RecipeError: ``make_model`` raised or returned something else.
    """
    seed_everything(seed)
    try:
        model = recipe.call("make_model")
    except Exception as error:  # a user's function may raise anything
        raise RecipeError(
            f"{recipe.where(error)}: make_model(): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"{recipe.file}: make_model() returned {model!r}; it must return a torch.nn.Module."
        )
    return model


def initial_weights(recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """Return the weights that every policy starts from, on the CPU."""
    state = make_model(recipe, seed).state_dict()
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


class Starter:
    """What makes the trainees of a torch recipe."""

    def __init__(self, recipe: Recipe, device: str, seed: int) -> None:
        self.recipe, self.device, self.seed = recipe, device, seed

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return initial_weights(self.recipe, self.seed)

    def __call__(self, policy: Policy | PolicyMap) -> TorchTrainee:
        """Return a new model under a policy, with the weights that all start from."""
        return TorchTrainee(self.recipe, policy, self._weights, self.device, self.seed)

    def anew(self) -> Starter:
        """Return another one that makes all again, the weights that all start from too."""
        return Starter(self.recipe, self.device, self.seed)

    def measure_memory(self, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
        """Yield the allocator's peak on CUDA, else the peaks of children's resident sets."""
        on_cuda = self.device.startswith("cuda")
        run = measure_on_cuda if on_cuda else measure_in_children
        yield from run(self, policies, steps)


def starter(recipe: Recipe, device: str, seed: int) -> Starter:
    """Return what makes the trainees of a recipe; all start from the same weights."""
    return Starter(recipe, device, seed)


def explain(recipe: Recipe, policy: Policy | PolicyMap, seed: int) -> PolicySummary:
    """Return what every module of the recipe's model computes in, and why.

    Raises:
        PolicyError: no module computes in 16 bits.
    """
    from halfstep.torch import apply_policy, policy_summary

    if not is_low(policy):
        raise PolicyError(
            f"{recipe.name}: {policy!r} puts nothing in 16 bits; there is nothing to explain. "
            "Allowed are policies that do, for instance mixed_float16 or mixed_bfloat16."
        )
    model = make_model(recipe, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)  # it is an error here, in better words
        summary = policy_summary(apply_policy(model, policy))
    if not any(row.compute_dtype in ("float16", "bfloat16") for row in summary):
        raise PolicyError(
            f"{recipe.name}: under {policy!r} no module of the model computes in 16 bits."
        )
    return summary
