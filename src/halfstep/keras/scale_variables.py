"""The state of a loss scale in the variables of a Keras optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops
from keras.src.utils import tracking

from ..core import loss_scale as core
from ..errors import LossScaleExhausted
from .loss_scale import LossScale
from .wrapping import blame


class ScaleVariables(keras.optimizers.LossScaleOptimizer):
    """The part of :class:`~halfstep.keras.LossScaleOptimizer` that keeps the scale and its counts.

    ``dynamic_scale`` and ``step_counter`` are Keras' own variables; the bad steps in a row and
    the skipped steps are added behind them.
    """

    rule: core.LossScale
    inner_optimizer: Any
    _loss_scale: LossScale | None

    @tracking.no_automatic_dependency_tracking
    def build(self, var_list: Sequence[Any]) -> None:
        """Make the variables: the scale, three counts, and those of the inner optimizer."""
        if self.built:
            return
        super().build(var_list)
        self.bad_steps = self.add_variable((), dtype="int", name="bad_steps")
        self.steps_skipped = self.add_variable((), dtype="int", name="skipped_steps")

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale; printed, it shows the state of this optimizer."""
        return self._loss_scale

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes while training."""
        return isinstance(self.rule, core.DynamicLossScale)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped in all. It reads the device."""
        return int(self.loss_scale_state().skipped_steps)

    def loss_scale_state(self) -> core.LossScaleState:
        """Return the state of the loss scale as Python numbers. It reads the device.

        On JAX, inside ``fit``, call ``model.jax_state_sync()`` before: until then the variables
        hold nothing.
        """
        if not self.built:
            return self.rule.init(float)
        return core.LossScaleState(*(_number(variable.value) for variable in self._state))

    @property
    def _state(self) -> core.LossScaleState:
        """The variables of the state."""
        return core.LossScaleState(
            self.dynamic_scale, self.step_counter, self.bad_steps, self.steps_skipped
        )

    def advance(self, finite: Any) -> core.LossScaleState:
        """Let the rule make the next state, and keep it: for the ways to step, not for users."""
        before = core.LossScaleState(*(variable.value for variable in self._state))
        if isinstance(finite, bool) and _is_near(before.scale):
            before = self.loss_scale_state()
        after = self.rule.update(before, finite)
        for variable, old, new in zip(self._state, before, after, strict=True):
            if new is not old:
                variable.assign(new)
        return after

    def check_loss_scale(self, optimizer_variables: Sequence[Any] | None = None) -> None:
        """Raise when the scale is at its end. It reads the device: call it now and then.

        ``fit``, ``train_on_batch`` and every step that is not compiled do it by themselves. A
        compiled step of one's own cannot.

        Args:
            optimizer_variables: on JAX, the arrays that stand for ``variables`` now.

        Raises:
            LossScaleExhausted: at the floor, gradients have not been finite for ``patience``
                steps.
        """
        if not self.built:
            return
        if optimizer_variables is None:
            self.raise_exhausted(self.loss_scale_state())
        else:
            self.raise_exhausted(self.state_among(optimizer_variables))

    def state_among(self, optimizer_variables: Sequence[Any]) -> core.LossScaleState:
        """Return the state of the loss scale among the arrays that stand for ``variables``."""
        places = {id(variable): place for place, variable in enumerate(self.variables)}
        return core.LossScaleState(
            *(optimizer_variables[places[id(variable)]] for variable in self._state)
        )

    def raise_exhausted(
        self, state: core.LossScaleState, pairs: Iterable[tuple[Any, Any]] = ()
    ) -> None:
        """Raise if a smaller scale can no longer help: for the ways to step, not for users."""
        if bool(self.rule.exhausted(state)):
            raise LossScaleExhausted(
                f"The gradients of {int(state.bad_steps)} steps in a row were not finite with the "
                f"loss scale at {float(state.scale):g}; a smaller one cannot help. "
                f"{int(state.skipped_steps)} steps were skipped in all. "
                f"{blame(pairs)} Look for the cause in the model, the data "
                "or the learning rate."
            )


def _number(value: Any) -> float:
    """A scalar as a Python number."""
    number: float = (value if hasattr(value, "item") else ops.convert_to_numpy(value)).item()
    return number


def _is_near(value: Any) -> bool:
    """Whether reading a torch tensor waits for nothing: a dozen launches cost more, then."""
    return bool(keras.backend.backend() == "torch" and value.device.type == "cpu")
