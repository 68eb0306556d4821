"""A callback that keeps what ``fit`` does not: the loss scale, the skipped steps, the step times.

Keras waits for the device after every batch if a callback has a method for batches. So this one has
none: it stands around the train function meanwhile, copies two numbers behind each step, on the
device, and reads them many at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from .optimizer import LossScaleOptimizer

TOGETHER = 64
"""Steps whose numbers are read from the device in one piece."""


class _Recorder:
    """A train function that says, after each call, what the optimizer's variables are now."""

    def __init__(
        self, model: Any, function: Callable[..., Any], then: Callable[[Sequence[Any]], None]
    ) -> None:
        self._model, self.function, self._then = model, function, then

    def __call__(self, *args: Any) -> Any:
        """Train, and tell."""
        self._model.train_function = self.function
        try:
            result = self.function(*args)
        finally:
            # the function may have put another one in its place
            self.function = self._model.train_function
            self._model.train_function = self
        self._then(_optimizer_values(self._model, result))
        return result


def release(model: Any) -> None:
    """Let nobody record the steps of a model any longer, as where an error ended a training."""
    while isinstance(model.train_function, _Recorder):
        model.train_function = model.train_function.function


def _optimizer_values(model: Any, result: Any) -> Sequence[Any]:
    """The arrays that stand for the optimizer's variables after a step."""
    if keras.backend.backend() == "jax":  # logs, (trainable, non-trainable, optimizer's, metrics')
        values: Sequence[Any] = result[1][2]
        return values
    return [variable.value for variable in model.optimizer.variables]


class LossScaleHistory(keras.callbacks.Callback):
    """Record the loss scale, the skipped steps and the time of each step of ``fit``.

    At the end of an epoch ``loss_scale`` (after its last step), ``skipped_steps`` (in it) and
    ``step_seconds`` (the mean of its steps, but for the first one of all, which compiles) are added
    to Keras' logs. So they stand in ``History`` and the progress bar, and for callbacks that come
    behind this one, such as ``CSVLogger`` and ``TensorBoard``.

    Of a model that does not scale the loss there are the times alone. A call of the train function
    counts as one step; with ``steps_per_execution`` it is several batches.

    Attributes:
        scales: the loss scale after each step.
        skipped: how many steps were skipped in each: 0 or 1, more with ``steps_per_execution``.
        seconds: wall time from one step's end to the next one's. Where the device works behind
            Python's back (JAX, a GPU) single ones say when steps were handed over; their mean is
            right.

    >>> import numpy as np
    >>> from halfstep.keras import LossScaleHistory, policy_scope
    >>> with policy_scope("mixed_float16"):
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.add(keras.layers.Activation("linear", dtype="float32"))
    >>> model.compile("sgd", "mse")
    >>> x, y = np.array([[0, 0], [np.inf, 0]], "float32"), np.zeros((2, 1), "float32")
    >>> recorded = LossScaleHistory()
    >>> logs = model.fit(x, y, batch_size=1, shuffle=False, verbose=0, callbacks=[recorded])
    >>> recorded.scales, recorded.skipped, logs.history["skipped_steps"]
    ([32768.0, 16384.0], [0, 1], [1])
    """

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.skipped: list[int] = []
        self.seconds: list[float] = []
        self._optimizer: Any = None
        self._waiting: list[Any] = []  # arrays of a scale and the steps skipped so far
        self._last = 0.0
        self._skipped_before = 0
        self._epoch_began = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Stand around the train function, and forget what was before."""
        self.scales, self.skipped, self.seconds, self._waiting = [], [], [], []
        # kept: in mid-epoch `self.model` would write JAX's arrays back into the model, each time
        self._optimizer = self.model.optimizer
        self._skipped_before = self._optimizer.skipped_steps if self._is_scaled else 0
        self.model.train_function = _Recorder(self.model, self.model.train_function, self._note)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the clock: validation is over, and no step's time."""
        self._epoch_began = len(self.seconds)
        self._last = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Read what is still on the device, and add it to the logs."""
        self._read()
        seconds = self.seconds[max(self._epoch_began, 1) :] or self.seconds[self._epoch_began :]
        if logs is None or not seconds:
            return
        if self.scales:
            logs["loss_scale"] = self.scales[-1]
            logs["skipped_steps"] = sum(self.skipped[self._epoch_began :])
        logs["step_seconds"] = sum(seconds) / len(seconds)

    def on_train_end(self, logs: Any = None) -> None:
        """Leave the train function as it was."""
        self._read()
        release(self.model)

    @property
    def _is_scaled(self) -> bool:
        return isinstance(self._optimizer, LossScaleOptimizer) and self._optimizer.rule.skips

    def _note(self, values: Sequence[Any]) -> None:
        if self._is_scaled and self._optimizer.built:
            state = self._optimizer.state_among(values)
            # a copy: the next step may reuse the memory of what it is given
            pair = [ops.cast(each, "float32") for each in (state.scale, state.skipped_steps)]
            self._waiting.append(ops.stack(pair))
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if len(self._waiting) == TOGETHER:
            # of one length only, as JAX compiles this for each
            self._keep(_on_host(ops.stack(self._waiting)))

    def _read(self) -> None:
        self._keep([_on_host(each) for each in self._waiting])

    def _keep(self, rows: Any) -> None:
        for scale, skipped in rows:
            self.scales.append(float(scale))
            self.skipped.append(int(skipped) - self._skipped_before)
            self._skipped_before = int(skipped)
        self._waiting = []


def _on_host(array: Any) -> Any:
    """An array as lists of Python numbers; for torch past Keras, of which NumPy 2 warns."""
    return array.tolist() if hasattr(array, "tolist") else ops.convert_to_numpy(array).tolist()
