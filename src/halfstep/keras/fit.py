"""Let ``compile`` and ``fit`` scale the loss of every model that computes in float16.

Keras wraps the optimizer only if the model's own policy is called "mixed_float16", and knows no
loss scale but the dynamic one. Two methods of its trainer are extended, once: ``compile``, which
chooses the optimizer, and ``make_train_function``, which makes what ``fit`` and
``train_on_batch`` call.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras

from ..errors import LossScaleError, LossScaleWarning
from . import _internals
from .history import release
from .loss_scale import DynamicLossScale, FixedLossScale, LossScale
from .optimizer import LossScaleOptimizer
from .watch import WatchedFunction

NAME = "loss_scale_optimizer"
"""What Keras calls an optimizer that ``compile`` wrapped."""


def install() -> None:
    """Extend the trainer of Keras, if that was not done before."""
    _extend("compile", _compiling)
    _extend("make_train_function", _watching)


def _extend(method: str, extension: Callable[[Any], Any]) -> None:
    owner = next(cls for cls in keras.Model.__mro__ if method in vars(cls))
    original = vars(owner)[method]
    if not hasattr(original, "halfstep"):
        extended = extension(original)
        extended.halfstep = True
        setattr(owner, method, extended)


def _compiling(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        wanted = given["auto_scale_loss"]
        given["optimizer"] = keras.optimizers.get(given["optimizer"])
        if wanted:
            given["optimizer"] = scaling_optimizer(self, given["optimizer"])
            # the choice is made; Keras' own would be another one
            given["auto_scale_loss"] = False
        original(*bound.args, **bound.kwargs)
        if not wanted:
            # Keras forgets it in a saved file
            self._compile_config.config["auto_scale_loss"] = False

    return compile


def _watching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_train_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        release(self)
        result = original(self, *args, **kwargs)
        if isinstance(self.train_function, (WatchedFunction, _FirstStep)):
            return result
        if not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            self.train_function = _FirstStep(self, self.train_function)
        # the steps of torch are all seen on the host
        elif isinstance(self.optimizer, LossScaleOptimizer) and keras.backend.backend() != "torch":
            self.train_function = WatchedFunction(self, self.train_function)
        return result

    return make_train_function


def float16_layers(model: Any) -> list[Any]:
    """Return the layers of a model that compute in float16, the model itself among them."""
    return [
        layer
        for layer in _internals.layers_of(model)
        # an input computes nothing, and has the global policy of the moment it was made or loaded
        if layer.compute_dtype == "float16" and not isinstance(layer, keras.layers.InputLayer)
    ]


def scaling_optimizer(model: Any, optimizer: Any) -> Any:
    """Return the optimizer to train a model with: wrapped, if it is to scale the loss.

    Args:
        model: any; it need not be built.
        optimizer: what ``compile`` was given; None stays None, and one that is a
            ``LossScaleOptimizer`` already stays itself.

    Raises:
        LossScaleError: policies that ask for different loss scales, or a fixed one that the
            optimizer's own ``loss_scale_factor`` contradicts.
    """
    if optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    layers = float16_layers(model)
    if not layers:
        return optimizer
    scale = wanted_loss_scale(model, layers)
    factor = optimizer.loss_scale_factor
    if factor is not None:
        if isinstance(scale, FixedLossScale) and scale != FixedLossScale(factor):
            raise LossScaleError(
                f"compile: the optimizer has loss_scale_factor={factor!r}, and the policy "
                f"loss_scale={scale!r}. Leave one of them out."
            )
        # the user's own number, from now on with a check of every step
        scale = FixedLossScale(factor)
        optimizer.loss_scale_factor = None
    return optimizer if scale is None else LossScaleOptimizer(optimizer, scale, name=NAME)


def wanted_loss_scale(model: Any, layers: list[Any]) -> LossScale | None:
    """Return the loss scale that the policies of a model ask for; None if they ask for none.

    The model's own policy decides if it is one for float16; else those of its float16 layers. A
    policy that says nothing (Keras' own, or pure float16) gets a dynamic one.

    Args:
        model: the model.
        layers: those of its layers that compute in float16, itself among them.

    Raises:
        LossScaleError: layers that ask for different ones.
    """
    asking = [model] if model in layers else layers
    scales: dict[LossScale | None, Any] = {}
    for layer in asking:
        scales.setdefault(_loss_scale_of(layer), layer)
    if len(scales) > 1:
        each = "; ".join(f"{layer.path or layer.name}: {scale}" for scale, layer in scales.items())
        raise LossScaleError(
            f"compile: the policies of this model's layers ask for different loss scales ({each}), "
            "and an optimizer has one. Give compile a LossScaleOptimizer with the one that is "
            "meant."
        )
    return next(iter(scales))


def _loss_scale_of(layer: Any) -> LossScale | None:
    policy = _internals.own_policy(layer)
    scale: LossScale | None = getattr(policy, "loss_scale", None)
    if scale is None and not _says_none(policy):
        return DynamicLossScale()
    return scale


def _says_none(policy: Any) -> bool:
    """Whether a policy that would have a loss scale was made without one, on purpose."""
    return hasattr(policy, "loss_scale") and policy.name == "mixed_float16"


class _FirstStep:
    """A train function of a model that does not scale; looks at its layers after the first step.

    Only then are those layers there that are made as the model is built.
    """

    def __init__(self, model: Any, function: Callable[..., Any]) -> None:
        self._model = model
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Train, look, and step aside."""
        result = self._function(*args)
        self._model.train_function = self._function
        _warn_late_float16(self._model)
        return result


def _warn_late_float16(model: Any) -> None:
    if model.optimizer is None or not model._compile_config.config.get("auto_scale_loss", True):
        return
    late = [layer for layer in float16_layers(model) if _loss_scale_of(layer) is not None]
    if late:
        names = ", ".join(repr(layer.path or layer.name) for layer in late[:3])
        warnings.warn(
            f"{len(late)} layers compute in float16 ({names}, ...) and were made after compile(), "
            "so the loss is not scaled and small gradients become zero. Build the model, then "
            "call compile() again.",
            LossScaleWarning,
            stacklevel=3,
        )
