"""A model that is loaded has the policy it was saved with, whatever the global policy is then.

Keras saves the policy of each layer, but a model that is made again from its config takes the
global policy of the moment.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import keras

from . import _internals
from .policy import Policy


@cache
def install() -> None:
    """Let Keras keep policies when it loads layers and models, from now on."""
    _internals.keep_when_loading(Policy)
    for cls in (keras.Model, keras.Sequential):
        _internals.after_loading(cls, restore_policy)


def restore_policy(model: Any, config: dict[str, Any]) -> None:
    """Give a model made from a config its policy again.

    A ``Sequential`` has it in its config. A functional model does not: it gets the policy that
    most of its layers have, of several the first. Other models make themselves.
    """
    if isinstance(model, keras.Sequential):
        saved = config.get("dtype")
        if saved is not None:
            _internals.set_own_policy(model, keras.dtype_policies.get(saved))
    elif _internals.is_functional(model):
        policies = [_internals.own_policy(layer) for layer in _internals.parts_of(model)]
        if policies:
            # policies of Keras cannot be hashed
            most = max(policies, key=policies.count)
            _internals.set_own_policy(model, most)
