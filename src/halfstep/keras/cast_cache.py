"""On torch, cast a weight once for each call of the outermost layer, however often it is read.

Keras casts at each read: a ``Dense`` called eight times in a model makes 24 casts. JAX and
TensorFlow merge equal casts when they compile; eager torch does not. As in ``torch.autocast``,
only weights that are trained are kept, and only while gradients are recorded: their casts live
until the backward pass anyway, so that the cache keeps no memory of its own. As there, too, the
gradients of all uses of a weight add up in 16 bits before they are cast back.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import keras
from keras.src.backend.common import global_state, variables

_KEY = "halfstep_casts"


def install() -> None:
    """Let Keras' autocast scope look for a cast before it makes one, from now on."""
    scope = variables.AutocastScope
    if keras.backend.backend() != "torch" or hasattr(scope.maybe_cast, "__wrapped__"):
        return
    scope.maybe_cast = _cached(scope.maybe_cast)


def _cached(original: Any) -> Any:
    torch = sys.modules["torch"]

    @functools.wraps(original)
    def maybe_cast(self: Any, value: Any) -> Any:
        call = global_state.get_global_attribute("current_call_ctx")
        if (
            call is None
            or type(value) is not torch.nn.Parameter
            or not value.requires_grad
            or not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return original(self, value)
        casts = call.__dict__.setdefault(_KEY, {})
        key = (id(value), self.dtype)
        # the weight itself is kept with its cast, so that no other one gets its id
        _, versions, cast = casts.get(key, (None, None, None))
        if cast is None or versions != (value._version, cast._version):
            cast = original(self, value)
            casts[key] = value, (value._version, cast._version), cast
        return cast

    return maybe_cast
