"""Loss scales for Keras: the core's rules, in the words of the mixed precision guide.

A loss scale here is a configuration. Its arithmetic is :mod:`halfstep.core.loss_scale`; its state
lives in the variables of the optimizer that it was given to, and is shown when it is printed.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeAlias

import keras
import numpy as np

from ..core import loss_scale as core
from ..errors import LossScaleError

PACKAGE = "halfstep"
"""Under which name Keras knows the classes of this door in a saved file."""

LossScaleLike: TypeAlias = "LossScale | core.LossScale | float | str | None"
"""A loss scale, a number (fixed), ``"dynamic"``, or None for no loss scaling."""

_DEFAULTS = core.DynamicLossScale()


class StateOwner(Protocol):
    """What keeps the state of a loss scale: an optimizer."""

    def loss_scale_state(self) -> core.LossScaleState:
        """Return the state as Python numbers."""


@keras.saving.register_keras_serializable(PACKAGE)
class LossScale:
    """What every loss scale of this door offers; use one of its kinds.

    A value: equal where the configuration is, hashable, and saved in ``.keras`` files. An
    optimizer that takes it keeps the state; the loss scale remembers the last such optimizer,
    weakly, to show that state.

    Args:
        rule: a loss scale of the core.
    """

    rule: core.LossScale

    def __init__(self, rule: core.LossScale) -> None:
        self.rule = rule
        self._owner: weakref.ref[StateOwner] | None = None

    def attach(self, owner: StateOwner) -> None:
        """Show the state of ``owner`` from now on."""
        self._owner = weakref.ref(owner)

    def state(self) -> core.LossScaleState:
        """Return the state as Python numbers: the optimizer's, or the one before the first step.

        It reads the device.
        """
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            return owner.loss_scale_state()
        return self.rule.init(float)

    @property
    def current_loss_scale(self) -> float:
        """What the next loss is multiplied by."""
        return float(self.state().scale)

    @property
    def num_good_steps(self) -> int:
        """Steps with finite gradients since the scale last changed."""
        return int(self.state().finite_steps)

    def __float__(self) -> float:
        return self.current_loss_scale

    def __call__(self) -> float:
        """Return the current loss scale, as the guide's ``loss_scale()`` did."""
        return self.current_loss_scale

    def get_config(self) -> dict[str, Any]:
        """Return the rule as a dict of plain values."""
        return self.rule.get_config()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the loss scale that :meth:`get_config` described, here or in TensorFlow 2.1."""
        if "kind" not in config:
            return cls(**config)
        made = as_loss_scale(core.loss_scale_from_config(config))
        if not isinstance(made, cls):
            raise LossScaleError(f"{cls.__name__}.from_config({dict(config)!r}): another kind.")
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossScale) and self.rule == other.rule

    def __hash__(self) -> int:
        return hash(self.rule)

    def __reduce__(self) -> tuple[Any, ...]:
        return as_loss_scale, (self.rule,)

    def __repr__(self) -> str:
        return f"LossScale({self.rule!r})"


@keras.saving.register_keras_serializable(PACKAGE)
class FixedLossScale(LossScale):
    """Multiply every loss by one number; a step that is not finite is skipped all the same.

    Args:
        value: the scale, a positive finite number. The guide's name for it,
            ``loss_scale_value``, is taken too.
        patience: steps in a row that are not finite after which training ends with
            :class:`~halfstep.errors.LossScaleExhausted`.

    Raises:
        LossScaleError: another value.

    >>> FixedLossScale(1024)
    FixedLossScale(1024.0)
    """

    rule: core.FixedLossScale

    def __init__(
        self,
        value: float | None = None,
        patience: int = core.FixedLossScale.patience,
        *,
        loss_scale_value: float | None = None,
    ) -> None:
        given = _one_of("FixedLossScale", value=value, loss_scale_value=loss_scale_value)
        if given is None:
            raise LossScaleError("FixedLossScale(): it takes the scale, a positive number.")
        super().__init__(core.FixedLossScale(given, patience))

    def __repr__(self) -> str:
        extra = _changed(self.rule, core.FixedLossScale(self.rule.value), ("patience",))
        return f"FixedLossScale({', '.join([str(self.rule.value), *extra])})"


@keras.saving.register_keras_serializable(PACKAGE)
class DynamicLossScale(LossScale):
    """Look for the largest scale that keeps the gradients finite; see the core's rule.

    Its arguments have the core's names, and those of the guide: ``initial_loss_scale``,
    ``increment_period`` and ``multiplier``, in the same places.

    Args:
        initial_scale: the scale of the first step; also ``initial_loss_scale``.
        growth_interval: finite steps after which a larger scale is tried; also
            ``increment_period``.
        multiplier: short for ``growth_factor=multiplier, backoff_factor=1 / multiplier``.
        **options: the rest of :class:`halfstep.DynamicLossScale`: ``growth_factor``,
            ``backoff_factor``, ``hysteresis``, ``min_scale``, ``max_scale``, ``patience``.

    Raises:
        LossScaleError: a value outside of the rule's limits, one argument by two names, or an
            unknown argument.

    >>> DynamicLossScale(increment_period=1000)
    DynamicLossScale(current_loss_scale=32768.0, num_good_steps=0, initial_loss_scale=32768.0,
                     increment_period=1000, multiplier=2.0)
    """

    rule: core.DynamicLossScale

    def __init__(
        self,
        initial_scale: float | None = None,
        growth_interval: int | None = None,
        multiplier: float | None = None,
        *,
        initial_loss_scale: float | None = None,
        increment_period: int | None = None,
        **options: float,
    ) -> None:
        me = "DynamicLossScale"
        given = {
            "initial_scale": _one_of(
                me, initial_scale=initial_scale, initial_loss_scale=initial_loss_scale
            ),
            "growth_interval": _one_of(
                me, growth_interval=growth_interval, increment_period=increment_period
            ),
            **_factors(multiplier, options),
        }
        unknown = set(given) - {field.name for field in dataclasses.fields(core.DynamicLossScale)}
        if unknown:
            raise LossScaleError(f"{me}: unknown argument {', '.join(map(repr, sorted(unknown)))}.")
        rule: Any = core.DynamicLossScale
        super().__init__(rule(**{name: v for name, v in given.items() if v is not None}))

    def __repr__(self) -> str:
        rule, state = self.rule, self.state()
        parts = [
            f"current_loss_scale={float(state.scale)}",
            f"num_good_steps={int(state.finite_steps)}",
            f"initial_loss_scale={rule.initial_scale}",
            f"increment_period={rule.growth_interval}",
        ]
        if rule.backoff_factor == float(np.float32(1 / rule.growth_factor)):
            parts.append(f"multiplier={rule.growth_factor}")
        else:
            parts.append(f"growth_factor={rule.growth_factor}")
            parts.append(f"backoff_factor={rule.backoff_factor}")
        rest = ("hysteresis", "min_scale", "max_scale", "patience")
        return f"DynamicLossScale({', '.join([*parts, *_changed(rule, _DEFAULTS, rest)])})"


_KINDS: dict[type[core.LossScale], Any] = {
    core.FixedLossScale: FixedLossScale,
    core.DynamicLossScale: DynamicLossScale,
}


def as_loss_scale(value: LossScaleLike) -> LossScale | None:
    """Return the loss scale that a value stands for; None where there is to be none.

    Args:
        value: ``"dynamic"``, a positive number, None, or a loss scale of this door (returned as
            it is) or of the core.

    Raises:
        LossScaleError: another value.

    >>> as_loss_scale(1024)
    FixedLossScale(1024.0)
    >>> as_loss_scale(None) is None
    True
    """
    if isinstance(value, LossScale):
        return value
    rule = core.as_loss_scale(value)
    if isinstance(rule, core.NoLossScale):
        return None
    kind = _KINDS.get(type(rule), LossScale)
    scale: LossScale = kind.__new__(kind)
    LossScale.__init__(scale, rule)
    return scale


def _one_of(owner: str, **names: Any) -> Any:
    """The value of an argument that has two names."""
    given = {name: value for name, value in names.items() if value is not None}
    if len(given) > 1:
        raise LossScaleError(
            f"{owner}: {' and '.join(f'{k}={v!r}' for k, v in given.items())} are the same "
            "argument; give one of them."
        )
    return next(iter(given.values()), None)


def _factors(multiplier: float | None, options: Mapping[str, float]) -> dict[str, Any]:
    if multiplier is None:
        return dict(options)
    twice = {"growth_factor", "backoff_factor"} & set(options)
    if twice:
        raise LossScaleError(
            f"DynamicLossScale: multiplier={multiplier!r} says what {sorted(twice)} say; give one."
        )
    core.DynamicLossScale(growth_factor=multiplier)  # its own words about what is no factor
    return {**options, "growth_factor": multiplier, "backoff_factor": 1 / multiplier}


def _changed(rule: Any, usual: Any, names: tuple[str, ...]) -> list[str]:
    return [
        f"{name}={getattr(rule, name)}"
        for name in names
        if getattr(rule, name) != getattr(usual, name)
    ]
