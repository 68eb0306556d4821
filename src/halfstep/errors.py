"""The errors that halfstep raises.

::

    HalfstepError
    ├── PolicyError             (a ValueError) a policy, a name or a path that does not fit
    ├── LossScaleError          (a RuntimeError) loss scaling in an order that would be wrong
    │   └── LossScaleExhausted  at the floor, and gradients are still not finite
    ├── RecipeError             (a ValueError) a recipe that cannot be run
    ├── RecordError             (a ValueError) a record that cannot be read
    └── AdviceError             (a ValueError) an audit or a search asked for what there is not

    PolicyWarning               (a UserWarning) a policy that changed nothing, or is undone
    LossScaleWarning            (a UserWarning) loss scaling does not do what was asked of it

Every message says what was passed, what is allowed, and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .core.fault import Fault


class HalfstepError(Exception):
    """The root of every error that halfstep raises on purpose."""


class PolicyError(HalfstepError, ValueError):
    """A policy, a policy's name or a layer's path that does not fit."""


class LossScaleError(HalfstepError, RuntimeError):
    """Loss scaling used in an order that would give wrong updates."""


class LossScaleExhausted(LossScaleError):
    """The loss scale sits at its floor and the gradients are still not finite.

    A smaller scale cannot help: the model, the data or the learning rate makes them so.

    Attributes:
        fault: what a replay of the step found, if one was asked for
            (:func:`halfstep.torch.blame_on_exhausted`), else None.
    """

    fault: Fault | None = None


class RecipeError(HalfstepError, ValueError):
    """A recipe that cannot be run; the message names the function and what it must return."""


class RecordError(HalfstepError, ValueError):
    """A record that cannot be read, with the file and the line."""


class AdviceError(HalfstepError, ValueError):
    """An audit or a search that was asked for something that there is not."""


class PolicyWarning(UserWarning):
    """A policy was applied and changed nothing, or the model works against it."""


class LossScaleWarning(UserWarning):
    """Loss scaling does not do what was asked of it.

    Gradients are divided by a scale that, it seems, they were never multiplied by; or steps that
    were to be skipped on the device (``skip="device"``) have to wait for the host.
    """


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """Return `` Did you mean 'a' or 'b'?`` for what comes near ``name``, else an empty string.

    >>> nearest("mixed_flaot16", ["float32", "mixed_float16"])
    " Did you mean 'mixed_float16'?"
    """
    close = difflib.get_close_matches(name, list(allowed), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
