"""TensorFlow's own graph rewrite, with a loss scale: the oldest way to mixed precision in Keras.

TensorFlow rewrites the graph of every function so that its matrix products run in float16; layers
and variables know nothing of it. It does not scale the loss: that is for the optimizer.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any

import keras

from ..core.hardware import devices
from ..errors import PolicyError, PolicyWarning
from . import _internals
from .compiling import is_low
from .global_policy import global_policy, refuse_policies
from .loss_scale import LossScale
from .optimizer import LossScaleOptimizer

OPTION = "auto_mixed_precision"
"""What TensorFlow calls its rewrite to float16."""

CAPABILITY = (7, 0)
"""The compute capability below which TensorFlow leaves the graph of a GPU alone."""

CPU_SETS = frozenset({"AMX-FP16", "AVX512-FP16", "AVX-NE-CONVERT"})
"""The instruction sets with one of which oneDNN, and so TensorFlow, computes in float16."""

_ELSEWHERE = {
    "torch": "halfstep.torch.autocast(model, policy) rewrites the graph of a torch model.",
    "jax": "halfstep.jax.autocast(function, policy) rewrites the program of a JAX function.",
}


def enable_mixed_precision_graph_rewrite(
    optimizer: Any, loss_scale: LossScale | float | str = "dynamic"
) -> LossScaleOptimizer:
    """Turn TensorFlow's graph rewrite to float16 on; return the optimizer, scaling the loss.

    It holds for every ``tf.function`` of this process, until
    :func:`disable_mixed_precision_graph_rewrite`. Layers and variables stay float32. What XLA
    compiles is not rewritten, so such a model needs ``compile(..., jit_compile=False)``.

    Args:
        optimizer: a Keras optimizer, or the name of one.
        loss_scale: ``"dynamic"``, a number, or a loss scale.

    Raises:
        PolicyError: the backend is not TensorFlow, or the global policy computes in 16 bits by
            itself. From then on such a policy is refused, and so is a model with such layers.
        LossScaleError: an optimizer that scales already.

    It warns with a :class:`~halfstep.PolicyWarning` where TensorFlow has no device to rewrite for;
    TensorFlow itself says nothing.

    Source: https://www.tensorflow.org/api_docs/python/tf/compat/v1/mixed_precision.

    >>> enable_mixed_precision_graph_rewrite("sgd")  # where Keras runs on torch
    Traceback (most recent call last):
    halfstep.errors.PolicyError: enable_mixed_precision_graph_rewrite: ...
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise PolicyError(
            "enable_mixed_precision_graph_rewrite: the rewrite is TensorFlow's, and Keras runs on "
            f"{backend} here. {_ELSEWHERE.get(backend, '')}".rstrip()
        )
    if is_low(global_policy()):
        raise _both(f"the global policy is {global_policy()!r}")
    wrapped = LossScaleOptimizer(optimizer, loss_scale)
    _tf_options()({OPTION: True})
    refuse_policies(_refuse)
    _look_at_models()
    if not _has_device():
        warnings.warn(
            "enable_mixed_precision_graph_rewrite: TensorFlow rewrites for a GPU of compute "
            f"capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, or a CPU with one of "
            f"{', '.join(sorted(CPU_SETS))}. There is none here: everything will run in float32.",
            PolicyWarning,
            stacklevel=2,
        )
    return wrapped


def disable_mixed_precision_graph_rewrite() -> None:
    """Turn TensorFlow's graph rewrite off; policies are allowed again.

    Functions that were traced before keep what was made of them. Where the rewrite was never on,
    and on other backends, nothing happens.

    >>> disable_mixed_precision_graph_rewrite()
    """
    if is_enabled():
        _tf_options()({OPTION: False})
        refuse_policies(None)


def is_enabled() -> bool:
    """Whether TensorFlow's rewrite to float16 is on, whoever turned it on."""
    if keras.backend.backend() != "tensorflow":
        return False
    return bool(_tf().config.optimizer.get_experimental_options().get(OPTION, False))


def _tf() -> Any:
    return sys.modules["tensorflow"]


def _tf_options() -> Any:
    return _tf().config.optimizer.set_experimental_options


def _both(what: str) -> PolicyError:
    return PolicyError(
        f"The graph rewrite and a policy cannot be combined: {what}, whose layers compute in 16 "
        "bits by themselves. Take one of the two; disable_mixed_precision_graph_rewrite() turns "
        "the rewrite off, set_global_policy('float32') the policy."
    )


def _refuse(policy: Any) -> None:
    if is_low(policy):
        raise _both(f"the rewrite is on, and the policy would be {policy!r}")


@cache
def _look_at_models() -> None:
    """Let ``compile`` look at what the rewrite meets, from now on."""
    _internals.after_compile(_look)


def _look(model: Any) -> None:
    if not is_enabled():
        return
    low = [layer for layer in _internals.parts_of(model) if is_low(layer.dtype_policy)]
    if low:
        name = _internals.path_of(low[0])
        raise _both(f"the rewrite is on, and {name!r} has {low[0].dtype_policy!r}")
    if model.jit_compile and not model.run_eagerly:
        warnings.warn(
            f"compile: XLA compiles the model {model.name!r}, and TensorFlow's graph rewrite does "
            "not reach what XLA compiles. Give compile jit_compile=False.",
            PolicyWarning,
            stacklevel=4,
        )


def _has_device() -> bool:
    """Whether TensorFlow has a device here that it rewrites graphs for."""
    config = _tf().config
    details = map(config.experimental.get_device_details, config.list_physical_devices("GPU"))
    if any(tuple(each.get("compute_capability") or (0, 0)) >= CAPABILITY for each in details):
        return True
    return any(CPU_SETS.intersection(each.features) for each in devices() if each.kind == "cpu")
