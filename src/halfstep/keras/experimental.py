"""The names of ``tf.keras.mixed_precision.experimental``, as the guide for TensorFlow 2.1 has them.

::

    from halfstep.keras import experimental as mixed_precision

    policy = mixed_precision.Policy("mixed_float16")
    mixed_precision.set_policy(policy)

The loss scales, which TensorFlow had in ``tf.mixed_precision.experimental``, are here too.
"""

from typing import Any as _Any

import keras

from .global_policy import global_policy as global_policy
from .global_policy import set_global_policy as _set_global_policy
from .loss_scale import DynamicLossScale as DynamicLossScale
from .loss_scale import FixedLossScale as FixedLossScale
from .loss_scale import LossScale as LossScale
from .optimizer import LossScaleOptimizer as LossScaleOptimizer
from .policy import Policy as Policy
from .policy import PolicyLike as _PolicyLike
from .policy import as_policy as _as_policy

__all__ = [
    "DynamicLossScale",
    "FixedLossScale",
    "LossScale",
    "LossScaleOptimizer",
    "Policy",
    "get_layer_policy",
    "global_policy",
    "set_policy",
]


def set_policy(policy: "_PolicyLike | None") -> None:
    """Set the global policy, as :func:`halfstep.keras.set_global_policy`.

    Args:
        policy: a policy, its name, or None for the policy of ``keras.config.floatx()``.

    Raises:
        PolicyError: an unknown name.

    >>> set_policy("mixed_bfloat16")
    >>> global_policy().compute_dtype
    'bfloat16'
    >>> set_policy(None)
    """
    _set_global_policy(keras.config.floatx() if policy is None else policy)


def get_layer_policy(layer: _Any) -> _Any:
    """Return the policy of a layer, as a policy of this door where it can be one.

    Args:
        layer: a Keras layer.

    Raises:
        TypeError: no layer.

    >>> get_layer_policy(keras.layers.Dense(1, dtype="float32"))
    <Policy "float32", loss_scale=None>
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"get_layer_policy({layer!r}): it takes a Keras layer.")
    try:
        return _as_policy(layer.dtype_policy)
    except ValueError:  # one that quantizes
        return layer.dtype_policy
