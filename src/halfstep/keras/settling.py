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
from .policy import Policy, PolicyMap

_maps: WeakKeyDictionary[Any, PolicyMap] = WeakKeyDictionary()
_kept: WeakSet[Any] = WeakSet()


def map_of(layer: Any) -> PolicyMap | None:
    """The map that a layer has, or had before it settled."""
    policy = _internals.own_policy(layer)
    return policy if isinstance(policy, PolicyMap) else _maps.get(layer)


def before_call(layer: Any) -> None:
    """Give a layer that has a map its policy; with the map, while it is still to be built."""
    policies = _internals.own_policy(layer)
    if type(policies) is not PolicyMap or layer in _kept:
        return
    _maps.setdefault(layer, policies)
    if layer.built:
        _settle(layer, policies)
    else:
        # the layers inside are made while it is built, and may be given the map from here
        policy = _ask(policies, layer)
        _internals.set_own_policy(layer, policies.beginning_with(policy))


def after_call(layer: Any) -> None:
    """Let a layer that was built in the call settle."""
    policies = _internals.own_policy(layer)
    if type(policies) is PolicyMap and layer.built and layer not in _kept:
        _settle(layer, policies)


def _ask(policies: PolicyMap, layer: Any) -> Policy:
    path = _internals.path_in_call(layer)
    policies.asked[path] = None
    return policies[path]


def _settle(layer: Any, policies: PolicyMap) -> None:
    policy = _ask(policies, layer)
    if _internals.saves_its_layers(layer) or all(
        policies[path] == policy for path in _internals.paths_of(layer).values()
    ):
        _internals.set_own_policy(layer, policy)
    else:
        # it alone is saved, and must bring the policies of the layers inside of it
        _internals.set_own_policy(layer, policies.beginning_with(policy))
        _kept.add(layer)
