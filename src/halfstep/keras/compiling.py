"""What ``compile`` says about a model's policies, before a step is run.

Two warnings, and one error: layers that were made before the global policy was set keep the old
one; an output in 16 bits; and a key of a policy map that names no layer.

Whether a layer was given its policy or took the global one is known by identity: the very object
that Keras handed out as the default. So ``compile`` counts the layers that missed the policy, and
no others. Looking for live models while the policy is being set would cost a sweep through all
objects (0.1 s), and name models that are long done, or garbage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import keras

from ..errors import PolicyError, PolicyWarning, nearest
from . import _internals
from .global_policy import global_policy, was_default
from .policy import PolicyMap
from .settling import after_call, before_call, map_of

_LOW = ("float16", "bfloat16")
_unseen: WeakSet[Any] = WeakSet()
_seen: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


@cache
def install() -> None:
    """Let ``compile`` look at the model's policies, and layers settle, from now on."""
    _internals.after_compile(look)
    _internals.around_calls(before_call, _after_call)


def _after_call(layer: Any, outputs: Any) -> None:
    after_call(layer)
    if _unseen and layer in _unseen:
        look_at_outputs(layer, outputs)


def look(model: Any) -> None:
    """Warn about a compiled model's policies.

    Raises:
        PolicyError: a key of a policy map that names no layer, where all layers are there.
    """
    for key, near in unmatched_keys(model):
        raise PolicyError(
            f"PolicyMap: the key {key!r} matches no layer of the model {model.name!r}.{near}"
        )
    late = late_layers(model)
    if late:
        evidence, suggestion = late_message(model, late)
        _warn(f"{evidence}. {_sentence(suggestion)}.")
    if _internals.outputs_of(model) is None:
        _unseen.add(model)
    for layer, dtype, softmax in low_outputs(model):
        what = "softmax that ends the model" if softmax else "last layer of the model"
        _warn(
            f"The {what} {model.name!r}, {_internals.path_of(layer)!r}, computes in {dtype}. "
            f"{_why(softmax)} {_sentence(output_cure(layer))}."
        )


def look_at_outputs(model: Any, outputs: Any) -> None:
    """Warn about 16-bit outputs of a model of which they could not be known before."""
    _unseen.discard(model)
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in keras.tree.flatten(outputs)}
    _seen[model] = sorted(dtypes.intersection(_LOW))
    for dtype in _seen[model]:
        _warn(
            f"The output of the model {model.name!r} is {dtype}. {_why(False)} Give its last layer "
            'dtype="float32".'
        )


def seen_outputs(model: Any) -> list[str]:
    """The 16-bit dtypes of the outputs of a model whose graph Keras does not know."""
    return _seen.get(model, [])


def _why(softmax: bool) -> str:
    if softmax:
        return "Small probabilities are rounded away there, and the loss takes their logarithm."
    return "What the loss and you are given is rounded to it."


def _warn(message: str) -> None:
    warnings.warn(message, PolicyWarning, stacklevel=4)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def late_layers(model: Any) -> list[Any]:
    """Return the layers that took an earlier global policy, and would compute in 16 bits now."""
    now = global_policy()
    if not is_low(now):
        return []
    found = []
    for layer, path in _internals.parts_of(model).items():
        taken = map_of(layer) or _internals.own_policy(layer)
        # two maps of Keras cannot be compared: it fails on their names
        if was_default(taken) and taken is not now and taken != now:
            policy = now[path] if isinstance(now, PolicyMap) else now
            floating = keras.backend.is_float_dtype(layer.compute_dtype)
            if floating and policy.compute_dtype in _LOW and layer.compute_dtype not in _LOW:
                found.append(layer)
    return found


def is_low(policy: Any) -> bool:
    """Whether a policy or a map, ours or Keras' own, computes anything in 16 bits."""
    overrides = policy.rule.overrides.values() if isinstance(policy, PolicyMap) else ()
    policies = [policy, *overrides]
    return any(one.compute_dtype in _LOW for one in policies)


def late_message(model: Any, late: list[Any]) -> tuple[str, str]:
    """What was seen, and what to do about it."""
    everyone = _internals.parts_of(model)
    dtypes = " and ".join(sorted({layer.compute_dtype for layer in late}))
    names = ", ".join(repr(everyone[layer]) for layer in late[:3])
    more = ", ..." if len(late) > 3 else ""
    # a map's name says its default's
    name = global_policy().name.removeprefix("map_")
    return (
        f"{len(late)} of {len(everyone)} layers of the model {model.name!r} keep {dtypes} ({names}"
        f"{more}): they were made before the global policy was set to {name!r}, and "
        "setting it changes no layer that exists",
        'set the policy first, then build the model; layers that are meant to stay so say dtype="'
        f'{late[0].compute_dtype}"',
    )


def low_outputs(model: Any) -> Iterator[tuple[Any, str, bool]]:
    """Yield each layer that makes an output in 16 bits, its dtype, and whether it is a softmax."""
    seen = set()
    for layer, dtype in _internals.outputs_of(model) or ():
        if dtype in _LOW and id(layer) not in seen:
            seen.add(id(layer))
            yield layer, dtype, _is_softmax(layer)


def _is_softmax(layer: Any) -> bool:
    softmax = getattr(layer, "activation", None) is keras.activations.softmax
    # the layer, and the operation
    return softmax or type(layer).__name__ == "Softmax"


def output_cure(layer: Any) -> str:
    """What to do about a layer whose output is the model's, in 16 bits."""
    return (
        'give the layer dtype="float32", or set '
        f'model.get_layer({layer.name!r}).dtype_policy = "float32" before training'
    )


def unmatched_keys(model: Any) -> Iterator[tuple[str, str]]:
    """Yield each key of the model's maps that names no layer, and the nearest paths in words.

    Silent about a model of which layers are still to be made, and about maps from a file, which
    may hold a part of the model that the map was written for.
    """
    layers = _internals.paths_of(model)
    if not all(layer.built for layer in layers):
        return
    for policies in _maps(layers):
        known = dict.fromkeys([*layers.values(), *policies.asked])
        for key in policies.rule.unmatched(known):
            yield key, nearest(key, known)


def _maps(layers: Iterable[Any]) -> list[PolicyMap]:
    found = (map_of(layer) for layer in layers)
    return list({id(m): m for m in found if m is not None and not m.from_file}.values())
