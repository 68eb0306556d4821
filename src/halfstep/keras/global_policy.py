"""The global policy: halfstep's, and Keras' own, in step.

Keras keeps one policy for each thread; halfstep one for the process, which a scope shadows. The
last word wins: what :func:`set_global_policy` says, here or in the core, holds for every thread
until somebody says something else; what ``keras.config.set_dtype_policy`` says holds, as ever,
for Keras and for the thread that said it. What Keras was told inside a scope ends with the scope.
``keras.config.dtype_policy()`` always gives what :func:`global_policy` gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

import keras

from ..core.global_policy import UNSET, Setting, current_setting, install, setting_scope
from . import _internals
from .policy import NAMES, PLAIN, Policy, PolicyLike, PolicyMap, as_policy

KerasPolicy: TypeAlias = Any
"""A policy of any kind, ours or of Keras itself."""

Refusal: TypeAlias = Callable[[KerasPolicy], None]
"""Raises at a policy that must not become the global one now."""

_WORDS = "halfstep_dtype_policies"

_lock = threading.RLock()
# the object of this door for each setting of the core that is still in force or may be again
_made: WeakKeyDictionary[Setting, Policy | PolicyMap] = WeakKeyDictionary()
# policies that layers were given because nobody named one, by identity: many cannot be hashed
_defaults: WeakValueDictionary[int, KerasPolicy] = WeakValueDictionary()

_refusals: list[Refusal] = []


def refuse_policies(refusal: Refusal | None) -> None:
    """Ask ``refusal`` before a policy becomes the global one, from now on; None for no longer."""
    _refusals[:] = [] if refusal is None else [refusal]


def _allowed(policy: KerasPolicy) -> KerasPolicy:
    for refuse in _refusals:
        refuse(policy)
    return policy


def _policy_of(setting: Setting) -> Policy | PolicyMap:
    """The one object of this door that stands for a setting."""
    with _lock:
        if setting not in _made:
            _made[setting] = as_policy(setting.policy)
        return _made[setting]


def _note_default(policy: KerasPolicy) -> KerasPolicy:
    with _lock:
        _defaults[id(policy)] = policy
    return policy


def was_default(policy: KerasPolicy) -> bool:
    """Whether this very object was, at any time, the policy of layers that were given none.

    What a scope gave does not count: it was meant.
    """
    return _defaults.get(id(policy)) is policy


class _Store:
    """Stands where Keras' policy functions look for their thread's policy."""

    def _words(self) -> WeakKeyDictionary[Setting, KerasPolicy]:
        """What Keras itself was told in this thread, by the setting it was told under."""
        tracker = _internals.tracker()
        words: WeakKeyDictionary[Setting, KerasPolicy] | None
        words = tracker.get_global_attribute(_WORDS)
        if words is None:
            words = WeakKeyDictionary()
            before_us = tracker.get_global_attribute(_internals.ATTRIBUTE)
            if before_us is not None:
                words[UNSET] = _note_default(before_us)
            tracker.set_global_attribute(_WORDS, words)
        return words

    def get_global_attribute(self, name: str, default: Any = None) -> Any:
        if name != _internals.ATTRIBUTE:
            return _internals.tracker().get_global_attribute(name, default)
        setting = current_setting()
        said: KerasPolicy = self._words().get(setting)
        if said is None and setting is UNSET:
            return default  # Keras makes one from its floatx, and tells us
        policy = _policy_of(setting) if said is None else said
        return policy if setting.scoped else _note_default(policy)

    def set_global_attribute(self, name: str, value: Any) -> None:
        if name != _internals.ATTRIBUTE:
            _internals.tracker().set_global_attribute(name, value)
            return
        _allowed(value)
        setting = current_setting()
        self._words()[setting] = value if setting.scoped else _note_default(value)


@cache
def follow() -> None:
    """Let Keras ask here for its global policy, from now on."""
    store = _Store()
    store._words()  # what this thread was told before
    _internals.seat(store)


def global_policy() -> KerasPolicy:
    """Return the policy of layers that are given none: ``float32`` until you set one.

    It is a :class:`Policy` or a :class:`PolicyMap`, but for a policy that only Keras knows (an
    integer one, a quantized one), which comes back as it was set.
    """
    policy = keras.config.dtype_policy()
    plain = type(policy) in PLAIN and policy.name in NAMES
    return _by_name(policy.name) if plain else policy


@cache
def _by_name(name: str) -> Policy:
    """The one object of this door for what Keras was told by name."""
    return Policy(name)


def set_global_policy(policy: PolicyLike) -> None:
    """Set the policy of layers that are given none, in every thread of this process.

    It is also :func:`halfstep.set_global_policy`, and the other way round. Layers that exist
    already keep the policy they have: ``compile`` warns where that was probably not meant. The
    compatibility check logs, once, whether the policy will run fast here.

    Args:
        policy: a policy or a map, of this door, the core or Keras, or a policy's name.

    Raises:
        PolicyError: an unknown name, or a policy that quantizes.

    >>> set_global_policy("mixed_bfloat16")
    >>> keras.config.dtype_policy()
    <Policy "mixed_bfloat16", loss_scale=None>
    >>> set_global_policy("float32")
    """
    made = _allowed(as_policy(policy))
    setting = Setting(made.rule)
    with _lock:
        _made[setting] = made
    install(setting)


@contextmanager
def policy_scope(policy: PolicyLike) -> Iterator[Policy | PolicyMap]:
    """Make ``policy`` the global one inside a ``with`` block, in this thread or task only.

    >>> with policy_scope("mixed_bfloat16"):
    ...     keras.layers.Dense(1).compute_dtype
    'bfloat16'
    """
    made = _allowed(as_policy(policy))
    setting = Setting(made.rule, scoped=True)
    with _lock:
        _made[setting] = made
    with setting_scope(setting):
        yield made
