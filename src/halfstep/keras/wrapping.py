"""What may be wrapped in a loss-scale optimizer, and with which loss scale."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from ..core import loss_scale as core
from ..errors import LossScaleError, LossScaleWarning
from .loss_scale import DynamicLossScale, FixedLossScale, LossScale, as_loss_scale


class LossScaleArgumentError(LossScaleError, ValueError):
    """Arguments that contradict each other. A ValueError too, as Keras raises."""


def inner_of(optimizer: Any) -> Any:
    """Return the optimizer to wrap: an optimizer of Keras, or the one of that name.

    Raises:
        LossScaleArgumentError: one that scales the loss already, or no optimizer.
    """
    inner = keras.optimizers.get(optimizer)
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise LossScaleArgumentError(
            f"LossScaleOptimizer({type(inner).__name__}(...)): it is wrapped already, and would "
            "scale the loss twice. Give its inner_optimizer."
        )
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise LossScaleArgumentError(
            f"LossScaleOptimizer({optimizer!r}): it takes a Keras optimizer, or the name of one."
        )
    if inner.loss_scale_factor is not None:
        warnings.warn(
            f"LossScaleOptimizer({type(inner).__name__}(loss_scale_factor="
            f"{inner.loss_scale_factor!r})): the factor is not used, or the loss would be scaled "
            f"twice. Leave it out; for a fixed scale, give loss_scale={inner.loss_scale_factor!r}.",
            LossScaleWarning,
            stacklevel=3,
        )
    return inner


def chosen_loss_scale(
    loss_scale: LossScale | core.LossScale | float | str | None,
    initial_scale: float | None,
    growth_steps: int | None,
    dynamic: bool,
) -> LossScale | None:
    """Return the loss scale that the arguments of a loss-scale optimizer stand for.

    Args:
        loss_scale: ours.
        initial_scale: Keras'.
        growth_steps: Keras', ``dynamic_growth_steps``.
        dynamic: that of TensorFlow 2.4.

    Raises:
        LossScaleArgumentError: arguments that say it twice, or not at all.
    """
    if not isinstance(dynamic, bool) or isinstance(loss_scale, bool):
        raise LossScaleArgumentError(
            f"LossScaleOptimizer(loss_scale={loss_scale!r}, dynamic={dynamic!r}): dynamic is a "
            "bool; loss_scale is 'dynamic', a number, a loss scale or None."
        )
    keras_words = initial_scale is not None or growth_steps is not None or not dynamic
    if keras_words and loss_scale != "dynamic":
        raise LossScaleArgumentError(
            f"LossScaleOptimizer: loss_scale={loss_scale!r} says what initial_scale, "
            "dynamic_growth_steps and dynamic say; give one."
        )
    if not dynamic:
        if initial_scale is None or growth_steps is not None:
            raise LossScaleArgumentError(
                "LossScaleOptimizer(dynamic=False): it takes initial_scale, the fixed scale, and "
                "no dynamic_growth_steps. (Keras' own has you set `loss_scale_factor` instead, "
                "which skips no step.)"
            )
        return FixedLossScale(initial_scale)
    if keras_words:
        return DynamicLossScale(initial_scale, growth_steps)
    return as_loss_scale(loss_scale)


def as_tensor(grad: Any) -> Any:
    """Return a gradient as the backend's array; None and ``IndexedSlices`` as they are."""
    if grad is None or ops.is_tensor(grad) or type(grad).__name__ == "IndexedSlices":
        return grad
    return ops.convert_to_tensor(grad)


def blame(pairs: Iterable[tuple[Any, Any]], most: int = 5) -> str:
    """Return the variables whose gradients are not finite, in words. It reads the device."""
    pairs = [(grad, variable) for grad, variable in pairs if grad is not None]
    if not pairs:
        return (
            "Compile the model with run_eagerly=True, or run one step outside of the compiled "
            "function, to be told which gradients."
        )
    bad = [
        f"{getattr(variable, 'path', variable.name)} {tuple(variable.shape)}"
        for grad, variable in pairs
        if not bool(ops.all(ops.isfinite(getattr(grad, "values", grad) if _sparse(grad) else grad)))
    ]
    more = len(bad) - most
    return (
        "Not finite last: " + "; ".join(bad[:most]) + (f"; and {more} more." if more > 0 else ".")
    )


def _sparse(grad: Any) -> bool:
    return type(grad).__name__ == "IndexedSlices"


def needed(variables: Sequence[Any] | None) -> Sequence[Any]:
    """Return the variables to build an optimizer with.

    Raises:
        ValueError: there are none.
    """
    if variables is None:
        raise ValueError(
            "When passing `grads` without `variables`, the optimizer must already be built on a "
            "list of variables. Call `optimizer.build(trainable_variables)` first."
        )
    return variables
