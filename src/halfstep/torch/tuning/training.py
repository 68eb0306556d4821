"""Short training runs of one recipe-like thing, in float32 and with layers kept out of 16 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core.formats import format_of
from ...core.loss_scale import DynamicLossScale
from ...core.policy import Policy, PolicyMap
from ...core.tuning import Losses
from ...errors import AdviceError, LossScaleExhausted, PolicyError, PolicyWarning
from ..apply import apply_policy
from ..casting import cast_nested
from ..loss_scaling import LossScaleOptimizer
from ..planning import Options
from .layers import Layers
from .ranking import Observations


class Training(Protocol):
    """What can be trained: a recipe's module, or anything with the same four functions."""

    def make_model(self) -> nn.Module:
        """Return a new model, float32, on the CPU."""

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return an optimizer over the model's parameters."""

    def batches(self, epoch: int, seed: int) -> Iterable[Any]:
        """Return the batches of one epoch, the same ones for the same arguments."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss, a scalar."""


class ShortRuns:
    """Trains the same model on the same batches again and again; a ``core.tuning.Trainer``.

    Args:
        training: what is trained.
        target: the 16-bit policy, with its loss scale.
        keep: the policy of the layers that are kept.
        steps: of each run.
        device: where.
        options: for :func:`apply_policy`.

    Attributes:
        target: the policy that the next run uses.
        layers: the candidates; made from the first model.
        observed: what the first float32 run showed.
    """

    def __init__(
        self,
        training: Training,
        target: Policy,
        keep: Policy,
        steps: int,
        device: str,
        options: Options,
    ) -> None:
        self.target, self.observed = target, Observations()
        self.layers: Layers | None = None
        self._training, self._keep, self._steps, self._device = training, keep, steps, device
        self._options = options

    # ------------------------------------------------------------------ the runs

    def baseline(self, seed: int) -> Losses:
        """Train in float32; the first time, count what is computed on the first and last batch."""
        model = self._model(seed)
        return self._train(model, self._training.make_optimizer(model), seed, first=self._prepare)

    def noise(self, seed: int) -> Losses:
        """Train in float32, with weights that keep only the digits of the 16-bit format."""
        model = self._model(seed)
        bits = format_of(self.target.compute_dtype).mantissa_bits
        return self._train(
            model, self._training.make_optimizer(model), seed, around=lambda: rounded(model, bits)
        )

    def low(self, kept: frozenset[str], seed: int) -> Losses:
        """Train in 16 bits, with these candidates kept out of them.

        A run that skips updates lags behind float32's though no layer is at fault, so it is run
        again from the loss scale that it ended with. If nothing is skipped then, that is the scale
        to start from, here and in later runs.
        """
        found, ended_with = self._low(kept, seed, self.target)
        lower = _starting_from(self.target, ended_with)
        if found.skipped and not found.reason and lower != self.target:
            again, _ = self._low(kept, seed, lower)
            if not again.skipped and not again.reason:
                self.target = lower
            return again
        return found

    def _low(self, kept: frozenset[str], seed: int, target: Policy) -> tuple[Losses, float]:
        model = self._model(seed)
        try:
            with warnings.catch_warnings():
                # with all layers kept, the policy changes nothing, and says so
                warnings.simplefilter("ignore", PolicyWarning)
                apply_policy(
                    model, self.policy_map(kept), functional=self._options.functional,
                    output_dtype=self._options.output_dtype,
                    cast_forward_inputs=self._options.cast_forward_inputs,
                )  # fmt: skip
        except PolicyError as error:
            return Losses((), reason=str(error)), 1.0
        optimizer = LossScaleOptimizer(
            self._training.make_optimizer(model), loss_scale=target.loss_scale
        )
        return self._train(model, optimizer, seed), float(optimizer.current_scale)

    def policy_map(self, kept: Iterable[str]) -> PolicyMap:
        """Return the policy with these candidates kept."""
        if self.layers is None:
            raise AdviceError("ShortRuns: there are no layers before the first float32 run.")
        return self.layers.policy_map(self.target, self._keep, kept)

    # ------------------------------------------------------------------ one run

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = self._training.make_model().to(self._device)
        return model.train()

    def _train(
        self,
        model: nn.Module,
        optimizer: Any,
        seed: int,
        *,
        first: Any = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Losses:
        losses: list[float] = []
        watched = first(model) if first is not None else frozenset()
        scaled, skipped, reason = isinstance(optimizer, LossScaleOptimizer), 0, ""
        for step, batch in enumerate(islice(self._batches(seed), self._steps)):
            torch.manual_seed((seed * 1_000_003 + step + 1) % 2**31)
            watch = self.observed.watching(model) if step in watched else nullcontext()
            try:
                with watch, around():
                    optimizer.zero_grad()
                    loss = self._training.loss(model, batch)
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        break
                    optimizer.backward(loss) if scaled else torch.autograd.backward(loss)
                optimizer.step()
            except LossScaleExhausted:
                reason = "the loss scale was exhausted: gradients stayed not finite"
                break
            except (RuntimeError, TypeError, ValueError) as error:
                if not scaled:
                    raise
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                break
            skipped += bool(scaled and optimizer.last_step_skipped)
        return Losses(tuple(losses), skipped, reason)

    def _prepare(self, model: nn.Module) -> frozenset[int]:
        """Find the candidates, and say which steps shall be watched: once, in the first run."""
        if self.layers is not None:
            return frozenset()
        from .layers import layers_of

        self.layers = layers_of(model, self.target, self._options.functional)
        return frozenset((0, self._steps - 1))

    def _batches(self, seed: int) -> Iterator[Any]:
        epoch = 0
        while True:
            empty = True
            for batch in self._training.batches(epoch, seed):
                empty = False
                yield cast_nested(batch, lambda tensor: tensor.to(self._device))
            if empty:
                raise AdviceError(
                    f"tune: batches({epoch}, {seed}) gave no batch; it must return an iterable of "
                    "the training batches of one epoch."
                )
            epoch += 1


def _starting_from(policy: Policy, scale: float) -> Policy:
    """Return the policy with a lower loss scale to start from, itself if that is fixed."""
    rule = policy.loss_scale
    if not isinstance(rule, DynamicLossScale) or scale >= rule.initial_scale:
        return policy
    return Policy(policy.name, replace(rule, initial_scale=max(scale, rule.min_scale)))


@contextmanager
def rounded(model: nn.Module, mantissa_bits: int) -> Iterator[None]:
    """Let the weights keep only so many digits inside a ``with`` block, in float32's range.

    ::

        c = (2**(23 - mantissa_bits) + 1) * w          # Veltkamp's splitting
        w = c - (c - w)

    Source: T. J. Dekker, "A floating-point technique for extending the available precision",
    Numerische Mathematik 18, 1971.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1 + 2**-9)
    >>> with rounded(model, 7):
    ...     print(model.weight.item())
    1.0
    >>> model.weight.item() == 1 + 2**-9
    True
    """
    weights = [p for p in model.parameters() if p.dtype is torch.float32]
    before = [weight.detach().clone() for weight in weights]
    factor = 2.0 ** (23 - mantissa_bits) + 1
    with torch.no_grad():
        for weight in weights:
            wide = weight * factor
            weight.copy_(wide - (wide - weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
