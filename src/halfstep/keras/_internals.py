"""Everything of Keras that is not documented for users and that the policies lean on, in one place.

Checked on Keras 3.15.1. ``tests/keras/test_internals.py`` checks each of these on the installed
version and says which one moved.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import keras

CHECKED_VERSIONS = ("3.15.1",)
"""The versions of Keras on which the tests of this door passed."""

Layer: TypeAlias = Any
Model: TypeAlias = Any
Policy: TypeAlias = Any

ATTRIBUTE = "dtype_policy"
"""Under which name Keras keeps the policy that a thread was given."""


def tracker() -> Any:
    """Keras' store of what is global; each thread has its own, ``clear_session`` empties all."""
    return importlib.import_module("keras.src.backend.common.global_state")


def seat(store: Any) -> None:
    """Let ``store`` answer for Keras' global policy, through all of Keras' names for it.

    Those functions look their store up in their own module, and it keeps nothing else there.
    """
    module: Any = importlib.import_module("keras.src.dtype_policies.dtype_policy")
    module.global_state = store


def seated() -> Any:
    """What answers for Keras' global policy now."""
    return importlib.import_module("keras.src.dtype_policies.dtype_policy").global_state


def keep_when_loading(kind: type) -> None:
    """Let a layer that is loaded keep its policy if it is of this kind, not the bare name of it.

    ``Operation.from_config`` makes a name of every policy but the maps.
    """
    module: Any = importlib.import_module("keras.src.ops.operation")
    policies = keras.dtype_policies
    module.dtype_policies = SimpleNamespace(
        deserialize=policies.deserialize, DTypePolicyMap=(policies.DTypePolicyMap, kind)
    )


def after_loading(cls: type, then: Callable[[Model, dict[str, Any]], None]) -> None:
    """Call ``then(model, config)`` after each ``cls.from_config(config)``."""
    function = cls.__dict__["from_config"].__func__

    @functools.wraps(function)
    def from_config(asked: type, config: dict[str, Any], custom_objects: Any = None) -> Model:
        model = function(asked, config, custom_objects=custom_objects)
        then(model, config)
        return model

    cls.from_config = classmethod(from_config)  # type: ignore[attr-defined]


def around_calls(before: Callable[[Layer], None], after: Callable[[Layer, Any], None]) -> None:
    """Call ``before(layer)`` and ``after(layer, outputs)`` around each call of each layer."""
    call = keras.layers.Layer.__call__

    @functools.wraps(call)
    def around(self: Layer, *args: Any, **kwargs: Any) -> Any:
        before(self)
        outputs = call(self, *args, **kwargs)
        after(self, outputs)
        return outputs

    keras.layers.Layer.__call__ = around


def after_compile(then: Callable[[Model], None]) -> None:
    """Call ``then(model)`` after each ``model.compile(...)``."""
    owner = next(cls for cls in keras.Model.__mro__ if "compile" in vars(cls))
    original = owner.compile

    @functools.wraps(original)
    def compile(self: Model, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        then(self)

    owner.compile = compile


def outputs_of(model: Model) -> list[tuple[Layer, str]] | None:
    """The layer or operation that makes each output, and its dtype; None where it is not known."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not is_functional(model):
        return None
    found = []
    for tensor in model.outputs:
        maker = tensor._keras_history.operation
        inside = outputs_of(maker) if isinstance(maker, keras.Model) else None
        if inside is not None:
            found += inside
        else:
            # a layer's policy may have been set anew since the graph was made
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            layer = isinstance(maker, keras.layers.Layer) and keras.backend.is_float_dtype(dtype)
            found.append((maker, maker.compute_dtype if layer and _is_low(dtype) else dtype))
    return found


def _is_low(dtype: str) -> bool:
    return dtype in ("float16", "bfloat16")


def path_in_call(layer: Layer) -> str:
    """The path that a layer has, or will have when it is called here."""
    if layer.path:
        return str(layer.path)
    scopes = importlib.import_module("keras.src.backend.common.name_scope")
    with layer._open_name_scope():
        return str(scopes.current_path())


def path_of(layer: Layer) -> str:
    """The path of a layer; Keras itself gives none to layers without a build of their own."""
    # an operation that is no layer has a name alone
    above = getattr(layer, "_parent_path", None)
    known = getattr(layer, "path", None)
    return str(known or (f"{above}/{layer.name}" if above else layer.name))


def layers_of(model: Model) -> list[Layer]:
    """All layers of a model, the model itself first, each once."""
    return list(paths_of(model))


def is_functional(model: Model) -> bool:
    """Whether Keras knows the graph of a model's layers."""
    from keras.src.models.functional import Functional

    return isinstance(model, Functional)


def saves_its_layers(layer: Layer) -> bool:
    """Whether the layers inside of this one are in its config, each with its policy."""
    return isinstance(layer, keras.Sequential) or is_functional(layer)


def parts_of(model: Model) -> dict[Layer, str]:
    """The layers of a model that compute (no models, no inputs), and their paths."""
    return {
        layer: path
        for layer, path in paths_of(model).items()
        if not isinstance(layer, (keras.Model, keras.layers.InputLayer))
    }


def paths_of(layer: Layer) -> dict[Layer, str]:
    """A layer and all inside of it, with their paths.

    One that Keras has given no path gets its name below that of the layer around it.
    """
    found = {layer: path_of(layer)}
    waiting = [layer]
    while waiting:
        outer = waiting.pop()
        for inner in outer._layers:
            if inner not in found:
                known = inner.path or inner._parent_path
                below = f"{found[outer]}/{inner.name}"
                in_graph = isinstance(outer, keras.Model) and is_functional(outer)
                found[inner] = path_of(inner) if known or in_graph else below
                waiting.append(inner)
    return found


def own_policy(layer: Layer) -> Policy:
    """The policy object that a layer was given, a map where it was given one."""
    return layer._dtype_policy


def set_own_policy(layer: Layer, policy: Policy) -> None:
    """Give a layer another policy, past the setter, which writes into a map."""
    layer._dtype_policy = policy


def own_variables(layer: Layer) -> list[Any]:
    """The variables that this very layer holds, not those of the layers inside of it.

    Also those that Keras does not track, as the states of a stateful RNN.
    """
    held = keras.tree.flatten([value for value in vars(layer).values() if _may_hold(value)])
    tracked = [*layer._trainable_variables, *layer._non_trainable_variables]
    variables = [value for value in (*tracked, *held) if isinstance(value, keras.Variable)]
    return list({id(variable): variable for variable in variables}.values())


def _may_hold(value: Any) -> bool:
    return isinstance(value, (keras.Variable, list, tuple))


def is_cast(variable: Any) -> bool:
    """Whether a variable reads in the compute dtype inside its layer's call."""
    return bool(variable._autocast) and keras.backend.is_float_dtype(variable._dtype)
