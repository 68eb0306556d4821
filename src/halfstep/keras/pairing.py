"""Whether gradients carry the loss scale: each step scales once, and unscales once.

There are two ways to write a step, and both are right::

    the guide's                                Keras 3's
    scaled = opt.get_scaled_loss(loss)         scaled = opt.scale_loss(loss)
    grads  = gradients of scaled               grads  = gradients of scaled
    grads  = opt.get_unscaled_gradients(grads)
    opt.apply_gradients(zip(grads, vars))      opt.apply(grads, vars)

`apply` must know which it is in. Two things tell it: the very arrays that went through this
optimizer since the last step, known by identity, and, for arrays made from those (clipped ones),
which method was called last. Inside a compiled function Python runs once, while tracing; there
the same record holds for the trace. A step that is cut by a compiled function's edge (scaled
inside, applied outside) leaves no record from its second run on; that it is so is noticed on the
first, and held to from then on.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from ..errors import LossScaleError, LossScaleWarning


class Stage(Enum):
    """Where a step stands."""

    IDLE = "nothing was scaled since the last step"
    SCALED = "a loss was scaled; the gradients are"
    UNSCALED = "the gradients are unscaled"


class _Known:
    """Arrays, known by identity and not kept alive."""

    def __init__(self) -> None:
        self._refs: dict[int, weakref.ref[Any]] = {}

    def add(self, values: Iterable[Any]) -> None:
        for value in values:
            try:
                self._refs[id(value)] = weakref.ref(value)
            except TypeError:  # a Python number as a loss
                continue

    def __contains__(self, value: object) -> bool:
        ref = self._refs.get(id(value))
        return ref is not None and ref() is value

    def clear(self) -> None:
        self._refs.clear()


class Pairing(threading.local):
    """The record of one optimizer's step. One for each thread: replicas may run in threads."""

    def __init__(self) -> None:
        self.stage = Stage.IDLE
        self._traced = False
        self._across: Stage | None = None  # what a compiled function did, out of our sight
        self._losses = _Known()
        self._scaled = _Known()
        self._unscaled = _Known()

    def __reduce__(self) -> tuple[type[Pairing], tuple[()]]:
        return Pairing, ()  # a copy of an optimizer stands before a step

    def scale(self, loss: Any, result: Any, traced: bool) -> None:
        """A loss is multiplied by the scale.

        Raises:
            LossScaleError: it is the result of such a product.
        """
        if loss in self._losses:
            raise LossScaleError(
                "This loss was scaled already: scale_loss and get_scaled_loss do the same, and "
                "Model.fit calls scale_loss by itself. Scale it once."
            )
        self._losses.add([result])
        self._enter(Stage.SCALED, traced)

    def unscale(self, grads: Sequence[Any], traced: bool) -> None:
        """Gradients are about to be divided by the scale.

        Raises:
            LossScaleError: one of them was divided already.
        """
        if any(grad is not None and grad in self._unscaled for grad in grads):
            raise LossScaleError(
                "get_unscaled_gradients: these gradients are its own result, divided by the loss "
                "scale already. Unscale them once."
            )
        self._cross(traced)
        if self.stage is Stage.IDLE and self._across is None:
            _warn_never_scaled("get_unscaled_gradients")

    def unscaled(self, grads: Sequence[Any], results: Sequence[Any], traced: bool) -> None:
        """Gradients were divided by the scale."""
        for grad, result in zip(grads, results, strict=True):
            if grad is not None and grad is not result:
                self._scaled.add([grad])
                self._unscaled.add([result])
        self._enter(Stage.UNSCALED, traced)

    def apply(self, grads: Sequence[Any], traced: bool) -> bool:
        """Say whether these gradients are still scaled; the step ends here.

        Raises:
            LossScaleError: some are scaled, and some are not.
        """
        self._cross(traced)
        stage = self._across or Stage.IDLE if self.stage is Stage.IDLE else self.stage
        present = [grad for grad in grads if grad is not None]
        with_scale = sum(grad in self._scaled for grad in present)
        without = sum(grad in self._unscaled for grad in present)
        if with_scale and without:
            raise LossScaleError(
                f"apply: {with_scale} of these gradients went into get_unscaled_gradients and "
                f"{without} came out of it. Apply what it returned, all of it."
            )
        if stage is Stage.IDLE:
            _warn_never_scaled("apply")
        self.reset()
        return bool(with_scale) or (stage is not Stage.UNSCALED and not without)

    def reset(self) -> None:
        """The step is over."""
        self.stage = Stage.IDLE
        self._traced = False
        for known in (self._losses, self._scaled, self._unscaled):
            known.clear()

    def _enter(self, stage: Stage, traced: bool) -> None:
        self.stage = stage
        self._traced = traced

    def _cross(self, traced: bool) -> None:
        """Notice a step that began inside a compiled function and goes on outside of it."""
        if self.stage is not Stage.IDLE and self._traced and not traced:
            self._across = self.stage


def _warn_never_scaled(method: str) -> None:
    warnings.warn(
        f"{method}: no loss was scaled since the last step, and the gradients are divided by the "
        "loss scale: the update is too small by that factor. Differentiate scale_loss(loss), or "
        "get_scaled_loss(loss), instead of the loss.",
        LossScaleWarning,
        stacklevel=4,
    )
