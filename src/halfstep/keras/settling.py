"""A layer that was given a map keeps the one policy that the map has for its path.

Keras looks a layer up in its map by a path that it gives late: to layers with weights when they
are built, after their first input was cast; to layers without (activations, dropout) never; and a
model loaded from a file gives other ones. So a layer here settles for its policy as soon as it
has been built.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from . import _internals
from .policy import PolicyMap

_maps: WeakKeyDictionary[Any, PolicyMap] = WeakKeyDictionary()
_kept: WeakSet[Any] = WeakSet()


def install() -> None:
    """Let layers settle around their calls, from now on."""
    _internals.before_and_after_calls(_before, _after)


def map_of(layer: Any) -> PolicyMap | None:
    """The map that a layer has, or had before it settled."""
    policy = _internals.own_policy(layer)
    return policy if isinstance(policy, PolicyMap) else _maps.get(layer)


def _before(layer: Any) -> None:
    policies = _internals.own_policy(layer)
    if type(policies) is not PolicyMap or layer in _kept:
        return
    _maps.setdefault(layer, policies)
    if layer.built:
        _settle(layer, policies)
    else:
        # the layers inside are made while it is built, and may be given the map from here
        policy = policies[_internals.path_in_call(layer)]
        _internals.set_own_policy(layer, policies.beginning_with(policy))


def _after(layer: Any) -> None:
    policies = _internals.own_policy(layer)
    if type(policies) is PolicyMap and layer.built and layer not in _kept:
        _settle(layer, policies)


def _settle(layer: Any, policies: PolicyMap) -> None:
    policy = policies[_internals.path_in_call(layer)]
    if _internals.saves_its_layers(layer) or all(
        policies[_internals.path_of(inner)] == policy for inner in _internals.layers_of(layer)[1:]
    ):
        _internals.set_own_policy(layer, policy)
    else:
        # it alone is saved, and must bring the policies of the layers inside of it
        _internals.set_own_policy(layer, policies.beginning_with(policy))
        _kept.add(layer)
