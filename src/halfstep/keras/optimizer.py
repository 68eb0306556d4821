"""A Keras optimizer that scales the loss for another one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from .. import __version__
from ..core import loss_scale as core
from ..errors import LossScaleError
from .gradients import judge, unscaled, widened
from .loss_scale import PACKAGE, LossScale
from .pairing import Pairing
from .policy import NOTE
from .scale_variables import ScaleVariables
from .stepping import take_step
from .tracing import current_scope, is_traced
from .wrapping import as_tensor, chosen_loss_scale, inner_of, needed

_KERAS_VARIABLES = 4
"""What Keras' own LossScaleOptimizer has before its inner variables; ours has two more."""


@keras.saving.register_keras_serializable(PACKAGE)
class LossScaleOptimizer(ScaleVariables):
    """Scale the loss for an optimizer, and skip the steps whose gradients are not finite.

    ::

        scaled = float32(loss) * scale
        grads  = float32(gradients of scaled) * (1 / scale)
        if all of grads are finite, on every replica:
            inner_optimizer.apply(grads)       # clipping, weight decay, averages, accumulation
        else:
            nothing changes, inner_optimizer.iterations included
        scale, counts = the rule's next ones   # halfstep.DynamicLossScale says how

    A step may be written in the guide's way (``get_scaled_loss``, ``get_unscaled_gradients``,
    ``apply_gradients``) or in Keras 3's (``scale_loss``, ``apply``). It is an instance of Keras'
    own ``LossScaleOptimizer``, so that ``compile``, callbacks and saving know it.

    Args:
        inner_optimizer: any Keras optimizer, or the name of one.
        loss_scale: ``"dynamic"``, a number (a fixed scale), a loss scale, or None, with which
            nothing is scaled and nothing is skipped.
        initial_scale: Keras' name for the first scale.
        dynamic_growth_steps: Keras' name for the growth interval.
        dynamic: TensorFlow 2.4's: False makes ``initial_scale`` a fixed scale.
        name: of the optimizer.
        **kwargs: what Keras' own takes, and refuses unless it is the default.

    Raises:
        LossScaleError: an optimizer that scales already, or a loss scale given twice.

    Source: Keras' mixed precision guide, https://www.tensorflow.org/guide/mixed_precision.

    >>> import keras
    >>> from halfstep.keras.optimizer import LossScaleOptimizer
    >>> optimizer = LossScaleOptimizer("sgd", loss_scale=1024)
    >>> optimizer.loss_scale
    FixedLossScale(1024.0)
    >>> float(optimizer.get_scaled_loss(2.0))
    2048.0
    """

    def __init__(
        self,
        inner_optimizer: Any,
        loss_scale: LossScale | core.LossScale | float | str | None = "dynamic",
        *,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
        dynamic: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        inner = inner_of(inner_optimizer)
        scale = chosen_loss_scale(loss_scale, initial_scale, dynamic_growth_steps, dynamic)
        rule = scale.rule if scale is not None else core.NoLossScale()
        super().__init__(
            inner,
            initial_scale=rule.first_scale,
            dynamic_growth_steps=getattr(rule, "growth_interval", None),
            name=name,
            **kwargs,
        )
        self.rule: core.LossScale = rule
        self._loss_scale = scale
        self._pairing = Pairing()
        if scale is not None:
            scale.attach(self)

    # ------------------------------------------------------------------ scaling

    def scale_loss(self, loss: Any, optimizer_variables: Sequence[Any] | None = None) -> Any:
        """Return the loss times the scale, at least in float32.

        Args:
            loss: a tensor of any shape, or a number.
            optimizer_variables: inside of ``jax.jit``, the arrays that stand for ``variables``;
                or be inside of a ``keras.StatelessScope`` that holds them.

        Raises:
            LossScaleError: a loss that was scaled already, or a scale that ``jax.jit`` would
                freeze.
        """
        if not self.rule.skips:
            return loss
        with self._over(optimizer_variables):
            traced = self._traced([loss], "scale_loss")
            wide = widened(ops.convert_to_tensor(loss))
            result = ops.multiply(wide, ops.cast(self._scale(), wide.dtype))
        self._pairing.scale(loss, result, traced)
        return result

    def get_scaled_loss(self, loss: Any, optimizer_variables: Sequence[Any] | None = None) -> Any:
        """Return the loss times the scale, as :meth:`scale_loss`; of a callable, a callable."""
        if callable(loss) and not ops.is_tensor(loss):
            function: Callable[[], Any] = loss
            return lambda: self.scale_loss(function(), optimizer_variables)
        return self.scale_loss(loss, optimizer_variables)

    def get_unscaled_gradients(
        self, grads: Iterable[Any], optimizer_variables: Sequence[Any] | None = None
    ) -> list[Any]:
        """Return the gradients divided by the scale, at least in float32.

        What follows may look at them and change them; ``apply`` knows that they are unscaled.

        Args:
            grads: gradients of a scaled loss; None is passed on.
            optimizer_variables: as for :meth:`scale_loss`.

        Raises:
            LossScaleError: gradients that were divided already.
        """
        given = [as_tensor(grad) for grad in grads]
        if not self.rule.skips:
            return given
        with self._over(optimizer_variables):
            traced = self._traced(given, "get_unscaled_gradients")
            self._pairing.unscale(given, traced)
            results = unscaled(given, self._inverse(), [False] * len(given))
        self._pairing.unscaled(given, results, traced)
        return results

    # ------------------------------------------------------------------ stepping

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables if all gradients are finite; else skip the step.

        Args:
            grads: gradients of a scaled loss, or what :meth:`get_unscaled_gradients` returned.
            trainable_variables: in the order of the gradients; None for all.

        Raises:
            LossScaleError: gradients of which some are scaled and some are not.
            LossScaleExhausted: a smaller scale can no longer help; where the step is not compiled.
        """
        given = [as_tensor(grad) for grad in grads]
        if not given:
            return
        variables = None if trainable_variables is None else list(trainable_variables)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(needed(variables))
        if not self.rule.skips or all(grad is None for grad in given):
            self.inner_optimizer.apply(given, variables)
            return
        scaled = self._pairing.apply(given, self._traced(given, "apply"))
        targets = self._trainable_variables if variables is None else variables
        if len(targets) != len(given):
            raise ValueError(f"apply: {len(given)} gradients for {len(targets)} variables.")
        judged = judge(
            given,
            targets,
            self._inverse() if scaled else None,
            [bool(self._overwrite_variable_with_gradient(variable)) for variable in targets],
            checked=self._smallest() >= 1,
        )
        take_step(self, judged, variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """Apply pairs of a gradient and its variable; return ``iterations``."""
        pairs = list(grads_and_vars)
        if not pairs:
            raise ValueError("No gradients provided for any variable.")
        self.apply([grad for grad, _ in pairs], [variable for _, variable in pairs])
        return self.iterations

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Any],
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """Return the variables and the optimizer's variables after :meth:`apply`, changing none.

        Inside of ``jax.jit`` there is no host callback, and no branch: the new values are chosen
        with ``where``.
        """
        base: Any = super(keras.optimizers.LossScaleOptimizer, self)
        result: tuple[list[Any], list[Any]] = base.stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        return result

    def minimize(
        self, loss: Callable[[], Any] | Any, var_list: Sequence[Any] | None = None, tape: Any = None
    ) -> Any:
        """Scale, differentiate and apply; where the backend is TensorFlow, as in TensorFlow 2.

        Args:
            loss: a function without arguments, or a tensor together with the ``tape`` that
                recorded it.
            var_list: the variables; None for those that the optimizer was built with.
            tape: a ``tf.GradientTape``.

        Raises:
            LossScaleError: another backend, which has no tape.
        """
        if keras.backend.backend() != "tensorflow":
            raise LossScaleError(
                f"minimize: the {keras.backend.backend()} backend records no gradients. Use "
                "scale_loss, the backend's own gradients, and apply."
            )
        tf = sys.modules["tensorflow"]
        if not callable(loss) and tape is None:
            raise ValueError("`tape` is required when a `Tensor` loss is passed.")
        tape = tf.GradientTape() if tape is None else tape
        with tape:
            value = loss() if callable(loss) else loss
            scaled = self.scale_loss(value)
        variables = self._trainable_variables if var_list is None else list(var_list)
        targets = [getattr(variable, "value", variable) for variable in variables]
        return self.apply_gradients(zip(tape.gradient(scaled, targets), variables, strict=True))

    # ------------------------------------------------------------------ saving

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values: Keras' own, the loss scale, and what to import."""
        return {
            **super().get_config(),
            "loss_scale": None if self._loss_scale is None else self._loss_scale.get_config(),
            NOTE: __version__,
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """Return the optimizer that :meth:`get_config` described, ours or Keras' own."""
        fields = {key: value for key, value in config.items() if key != NOTE}
        inner = keras.saving.deserialize_keras_object(
            fields.pop("inner_optimizer"), custom_objects=custom_objects
        )
        if "loss_scale" in fields:
            scale = fields["loss_scale"]
            fields["loss_scale"] = None if scale is None else LossScale.from_config(scale)
            for says_the_same in ("initial_scale", "dynamic_growth_steps"):
                fields.pop(says_the_same, None)
        return cls(inner, **fields)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Read what this optimizer saved, or Keras' own one, or the inner one without scaling."""
        inner = len(self.inner_optimizer.variables)
        own = len(self.variables) - inner
        count = len(store.keys())
        places = {
            _KERAS_VARIABLES + inner: [*range(_KERAS_VARIABLES), *range(own, own + inner)],
            inner: list(range(own, own + inner)),
        }.get(count if self.built else -1)
        if places is None:
            super().load_own_variables(store)
            return
        for key, place in enumerate(places):
            self.variables[place].assign(store[str(key)])

    # ------------------------------------------------------------------ small parts

    def _over(self, optimizer_variables: Sequence[Any] | None) -> Any:
        """Read the variables from ``optimizer_variables``, inside a ``with`` block."""
        if optimizer_variables is None:
            return contextlib.nullcontext()
        return keras.StatelessScope(list(zip(self.variables, optimizer_variables, strict=True)))

    def _traced(self, values: Sequence[Any], method: str) -> bool:
        """Say whether this is traced; refuse to let JAX freeze the scale in a compiled step."""
        traced = is_traced(value for value in values if value is not None)
        if traced and keras.backend.backend() == "jax":
            scope = current_scope()
            held = scope is not None and self.built and scope.get_current_value(self.dynamic_scale)
            if held is None or held is False:
                raise LossScaleError(
                    f"{method} inside jax.jit reads variables that jit would freeze as they are "
                    "now, the loss scale among them. Build the optimizer before, give scale_loss "
                    "the optimizer_variables of this step (or be in a keras.StatelessScope that "
                    "holds them), and use stateless_apply."
                )
        return traced

    def _scale(self) -> Any:
        if self.built:
            return self.dynamic_scale.value
        return ops.convert_to_tensor(self.rule.first_scale, dtype="float32")

    def _inverse(self) -> Any:
        return ops.divide(1.0, self._scale())

    def _smallest(self) -> float:
        """The smallest scale that there can be."""
        return float(getattr(self.rule, "min_scale", self.rule.first_scale))
