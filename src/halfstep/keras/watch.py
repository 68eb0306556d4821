"""Notice, in a compiled training loop, that the loss scale is at its end, without waiting.

Every few steps two numbers are copied behind the step that makes them, and looked at a few steps
later, when they have long been there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from ..core.loss_scale import LossScaleState
from .optimizer import LossScaleOptimizer

EVERY = 8
"""Steps between two looks: training ends at most twice as many steps late."""


class Watch:
    """The state of a model's loss scale, as it was a few steps ago.

    Args:
        optimizer: whose loss scale.
    """

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        self._optimizer = optimizer
        self._calls = 0
        self._copied: LossScaleState | None = None

    def look(self, values: Callable[[], Sequence[Any]]) -> LossScaleState | None:
        """Every few calls, take a copy of the state, and return the one before.

        Args:
            values: gives the arrays that stand for the optimizer's variables now.
        """
        self._calls += 1
        if self._calls % EVERY or not self._optimizer.built:
            return None
        before = self._copied
        state = self._optimizer.state_among(values())
        # the step after this one may reuse the memory of what it is given
        self._copied = LossScaleState(*(ops.add(value, 0) for value in state))
        return before


class WatchedFunction:
    """A train function of Keras that ends training when the loss scale is exhausted.

    Args:
        model: the model that it trains, with a loss-scale optimizer.
        function: what Keras made.
    """

    def __init__(self, model: Any, function: Callable[..., Any]) -> None:
        self._model = model
        self._function = function
        self._watch = Watch(model.optimizer)

    def __call__(self, *args: Any) -> Any:
        """Look, and train."""
        seen = self._watch.look(lambda: _optimizer_values(self._model, args))
        if seen is not None and bool(self._model.optimizer.rule.exhausted(seen)):
            if hasattr(self._model, "jax_state_sync"):
                self._model.jax_state_sync()  # leave the model as the last step made it
            self._model.optimizer.raise_exhausted(seen)
        return self._function(*args)


def _optimizer_values(model: Any, args: tuple[Any, ...]) -> Sequence[Any]:
    """The arrays that stand for the optimizer's variables as a train function is called."""
    if keras.backend.backend() == "jax":  # (trainable, non-trainable, optimizer's, metrics'), data
        values: Sequence[Any] = args[0][2]
        return values
    return [variable.value for variable in model.optimizer.variables]
