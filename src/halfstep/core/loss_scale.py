"""Loss scaling: the rule, written once for every array library.

A float16 gradient below 2**-24 is zero. Multiplying the loss by a scale moves every gradient up
by as many exponents; dividing the gradients by the same scale, in float32, undoes it. How large
the scale may be is found while training (Micikevicius et al. 2017, "Mixed Precision Training",
arXiv:1710.03740, section 3.2).

Configuration and state are apart: a :class:`DynamicLossScale` is a frozen value, its
:class:`LossScaleState` is a tuple of scalars (Python numbers, NumPy arrays, torch tensors, JAX
arrays or TensorFlow's), and :meth:`LossScale.update` is a pure function from one state to the
next. It uses arithmetic, comparison and ``where``, so torch tensors stay on their device and JAX
traces it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from ..errors import LossScaleError, nearest

_MOST_STEPS = 2**24  # where a float32 counter stops counting

Scalar: TypeAlias = Any
"""A number, or a 0-dim array of NumPy, torch, JAX or TensorFlow."""


class LossScaleState(NamedTuple):
    """What a loss scale remembers between steps; every field is a scalar of one array library.

    Attributes:
        scale: what the next loss is multiplied by, float32.
        finite_steps: steps with finite gradients since the scale last changed.
        bad_steps: steps in a row, up to now, whose gradients were not finite.
        skipped_steps: steps skipped in all.
    """

    scale: Scalar
    finite_steps: Scalar
    bad_steps: Scalar
    skipped_steps: Scalar


@dataclass(frozen=True)
class LossScale:
    """What every loss scale offers; use one of its three kinds.

    ``FixedLossScale(1024)``, ``DynamicLossScale()`` or ``NoLossScale()``. A kind is immutable
    and hashable; what changes while training lives in a :class:`LossScaleState`.
    """

    kind: ClassVar[str] = ""

    @property
    def first_scale(self) -> float:
        """The scale of the first step."""
        raise NotImplementedError

    def init(self, asarray: Callable[[float], Scalar] = np.float32) -> LossScaleState:
        """Return the state before the first step.

        Args:
            asarray: makes a scalar of the wanted array library from a float, for instance
                ``lambda x: torch.tensor(x, device="cuda")``. Every field is made by it.
        """
        return LossScaleState(asarray(self.first_scale), asarray(0.0), asarray(0.0), asarray(0.0))

    def update(self, state: LossScaleState, finite: Scalar) -> LossScaleState:
        """Return the state after a step whose unscaled gradients were ``finite`` (a boolean)."""
        raise NotImplementedError

    def exhausted(self, state: LossScaleState) -> Scalar:
        """Whether a smaller scale can no longer help (a boolean scalar): see the subclasses."""
        raise NotImplementedError

    @property
    def skips(self) -> bool:
        """Whether a step with gradients that are not finite is left out."""
        return True

    def get_config(self) -> dict[str, Any]:
        """Return a plain dict that :func:`loss_scale_from_config` turns back into an equal value.

        >>> FixedLossScale(1024).get_config()
        {'kind': 'fixed', 'value': 1024.0}
        """
        return {"kind": self.kind, **asdict(self)}


_WHERE = {
    "torch": "torch",
    "jax": "jax.numpy",
    "jaxlib": "jax.numpy",
    "tensorflow": "tensorflow",
}
"""The module with ``where``, by the package that an array's type comes from."""


def _select(finite: Scalar, if_finite: Scalar, otherwise: Scalar) -> Scalar:
    """Choose between two scalars by a third, in the array library that ``finite`` belongs to."""
    if isinstance(finite, (bool, np.bool_)):
        return if_finite if finite else otherwise
    library = type(finite).__module__.partition(".")[0]
    return sys.modules[_WHERE.get(library, "numpy")].where(finite, if_finite, otherwise)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float32(owner: str, name: str, value: Any) -> float:
    """The value as the state will hold it, so that a floor or a ceiling is met exactly."""
    if not _is_number(value):
        raise LossScaleError(f"{owner}({name}={value!r}): it must be a number.")
    try:
        number = float(value)
    except OverflowError:  # a Python int knows no limit
        return math.inf
    # what is past the limits of every field stays past them, without an overflow
    return float(np.float32(number)) if abs(number) <= 2.0**127 else math.inf


def _whole(owner: str, name: str, value: Any) -> int:
    if _is_number(value) and 1 <= value <= _MOST_STEPS and value == int(value):
        return int(value)
    raise LossScaleError(f"{owner}({name}={value!r}): it must be a whole number, from 1 to 2**24.")


@dataclass(frozen=True)
class DynamicLossScale(LossScale):
    """Look for the largest scale that keeps the gradients finite, step by step.

    ::

        if all unscaled gradients are finite:
            apply them
            after growth_interval such steps since the last change:
                scale = min(scale * growth_factor, max_scale)
        else:
            skip the step
            from the hysteresis-th bad step in a row on:
                scale = max(scale * backoff_factor, min_scale)

    The scale never leaves ``[min_scale, max_scale]``, so it can become neither 0 nor infinite,
    which is how a plain rule turns weights into NaN after 166 bad steps.

    Args:
        initial_scale: the scale of the first step.
        growth_interval: finite steps after which a larger scale is tried, from 1 to 2**24.
        growth_factor: above 1.
        backoff_factor: above 0 and below 1.
        hysteresis: the first ``hysteresis - 1`` bad steps in a row leave the scale alone; a lone
            bad batch then costs one step, not half the scale. At least 1.
        min_scale: the floor, above 0.
        max_scale: the ceiling, finite.
        patience: bad steps in a row at the floor after which the scale counts as exhausted,
            at least 1.

    Raises:
        LossScaleError: a value outside of these limits.

    >>> rule = DynamicLossScale(initial_scale=8, growth_interval=2)
    >>> state = rule.init()
    >>> for finite in (True, True, False, False):
    ...     state = rule.update(state, finite)
    ...     print(float(state.scale), int(state.skipped_steps))
    8.0 0
    16.0 0
    8.0 1
    4.0 2
    """

    initial_scale: float = 2.0**15
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    hysteresis: int = 1
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    patience: int = 8

    kind: ClassVar[str] = "dynamic"

    def __post_init__(self) -> None:
        given = asdict(self)
        for name, value in given.items():
            whole = name in ("growth_interval", "hysteresis", "patience")
            read = _whole if whole else _float32
            object.__setattr__(self, name, read("DynamicLossScale", name, value))
        limits = {
            # past it the product of a step could overflow before the ceiling cuts it
            "growth_factor": (
                1 < self.growth_factor <= 2.0**127 / self.max_scale,
                "above 1, and times max_scale at most 2**127",
            ),
            "backoff_factor": (0 < self.backoff_factor < 1, "above 0 and below 1"),
            "min_scale": (self.min_scale >= 2.0**-126, "at least 2**-126, a normal float32"),
            "max_scale": (
                self.min_scale <= self.max_scale <= 2.0**126,
                f"from min_scale={self.min_scale} to 2**126",
            ),
            "initial_scale": (
                self.min_scale <= self.initial_scale <= self.max_scale,
                f"from min_scale={self.min_scale} to max_scale={self.max_scale}",
            ),
        }
        for name in ("min_scale", "max_scale", "initial_scale", "growth_factor", "backoff_factor"):
            kept, allowed = limits[name]
            if not kept:
                raise LossScaleError(
                    f"DynamicLossScale({name}={given[name]!r}): it must be {allowed}."
                )

    @property
    def first_scale(self) -> float:
        """``initial_scale``."""
        return self.initial_scale

    def update(self, state: LossScaleState, finite: Scalar) -> LossScaleState:
        """Return the state after a step whose unscaled gradients were ``finite``."""
        steps = state.finite_steps + 1
        bad = state.bad_steps + 1
        full = steps >= self.growth_interval
        grown = _select(full, state.scale * self.growth_factor, state.scale)
        grown = _select(grown > self.max_scale, state.scale * 0 + self.max_scale, grown)
        backed = _select(bad >= self.hysteresis, state.scale * self.backoff_factor, state.scale)
        backed = _select(backed < self.min_scale, state.scale * 0 + self.min_scale, backed)
        none = steps * 0
        return LossScaleState(
            scale=_select(finite, grown, backed),
            finite_steps=_select(finite, _select(full, none, steps), none),
            bad_steps=_select(finite, none, bad),
            skipped_steps=_select(finite, state.skipped_steps, state.skipped_steps + 1),
        )

    def exhausted(self, state: LossScaleState) -> Scalar:
        """At the floor, and ``patience`` steps in a row, or more, were not finite."""
        return (state.scale <= self.min_scale) & (state.bad_steps >= self.patience)


@dataclass(frozen=True)
class FixedLossScale(LossScale):
    """Multiply every loss by one number; a step that is not finite is skipped all the same.

    Args:
        value: the scale, a positive finite number.
        patience: steps in a row that are not finite after which the scale counts as exhausted.

    Raises:
        LossScaleError: another value.

    >>> FixedLossScale(1024).init().scale
    np.float32(1024.0)
    """

    value: float
    patience: int = 8

    kind: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        if not _is_number(self.value) or not 2.0**-126 <= self.value <= 2.0**126:
            raise LossScaleError(
                f"FixedLossScale({self.value!r}): it must be a positive number, "
                "from 2**-126 to 2**126."
            )
        object.__setattr__(self, "value", _float32("FixedLossScale", "value", self.value))
        object.__setattr__(self, "patience", _whole("FixedLossScale", "patience", self.patience))

    @property
    def first_scale(self) -> float:
        """``value``."""
        return self.value

    def update(self, state: LossScaleState, finite: Scalar) -> LossScaleState:
        """Count; the scale stays."""
        none = state.finite_steps * 0
        return LossScaleState(
            scale=state.scale,
            finite_steps=_select(finite, state.finite_steps + 1, none),
            bad_steps=_select(finite, none, state.bad_steps + 1),
            skipped_steps=_select(finite, state.skipped_steps, state.skipped_steps + 1),
        )

    def exhausted(self, state: LossScaleState) -> Scalar:
        """``patience`` steps in a row, or more, were not finite: this scale does not fit."""
        return state.bad_steps >= self.patience

    def get_config(self) -> dict[str, Any]:
        """Return a plain dict; ``patience`` only where it is not the default."""
        config = super().get_config()
        if self.patience == FixedLossScale.patience:
            del config["patience"]
        return config


@dataclass(frozen=True)
class NoLossScale(LossScale):
    """The loss scale of a run that needs none: the scale is 1 and no step is ever skipped.

    >>> rule = NoLossScale()
    >>> rule.update(rule.init(), finite=False).scale
    np.float32(1.0)
    """

    kind: ClassVar[str] = "none"

    @property
    def first_scale(self) -> float:
        """1."""
        return 1.0

    @property
    def skips(self) -> bool:
        """Never: what the bare optimizer would do with such gradients is what happens."""
        return False

    def update(self, state: LossScaleState, finite: Scalar) -> LossScaleState:
        """Return the state as it is."""
        return state

    def exhausted(self, state: LossScaleState) -> Scalar:
        """Never."""
        return state.scale != state.scale  # False, in the state's own library


_KINDS = {kind.kind: kind for kind in (DynamicLossScale, FixedLossScale, NoLossScale)}


def loss_scale_from_config(config: Mapping[str, Any]) -> LossScale:
    """Return the loss scale that ``get_config`` described.

    >>> loss_scale_from_config({"kind": "fixed", "value": 1024.0})
    FixedLossScale(value=1024.0, patience=8)
    """
    fields = dict(config)
    name = str(fields.pop("kind", None))
    if name not in _KINDS:
        raise LossScaleError(
            f"loss_scale_from_config({config!r}): 'kind' must be one of {sorted(_KINDS)}."
            + nearest(name, _KINDS)
        )
    try:
        return _KINDS[name](**fields)
    except TypeError as error:
        raise LossScaleError(f"loss_scale_from_config({config!r}): {error}.") from None


def as_loss_scale(value: LossScale | float | str | None) -> LossScale:
    """Return the loss scale that ``"dynamic"``, a number, ``None`` or a loss scale stands for.

    >>> as_loss_scale(1024)
    FixedLossScale(value=1024.0, patience=8)
    >>> as_loss_scale(None)
    NoLossScale()
    """
    if isinstance(value, LossScale):
        return value
    if value is None:
        return NoLossScale()
    if isinstance(value, str) and value == "dynamic":
        return DynamicLossScale()
    if _is_number(value):
        return FixedLossScale(float(value))
    raise LossScaleError(
        f"loss_scale={value!r}: it must be 'dynamic', a positive number, None, "
        "or a DynamicLossScale, FixedLossScale or NoLossScale."
    )
