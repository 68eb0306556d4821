"""The policy that holds wherever none is given: one for the process, or one inside a scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .policy import Policy, PolicyMap, as_policy


@dataclass(frozen=True, eq=False)
class Setting:
    """A policy that was set: told apart from any other time that the same one was set.

    Attributes:
        policy: what was set.
        scoped: whether a scope set it, rather than the whole process.
    """

    policy: Policy | PolicyMap
    scoped: bool = False


UNSET = Setting(Policy("float32"))
"""What holds until somebody sets a policy."""

# One value for the process, worker threads too; a scope shadows it in its own context only.
_process = UNSET
_scope: ContextVar[Setting | None] = ContextVar("halfstep_policy", default=None)


def _checked(policy: Policy | PolicyMap | str) -> Policy | PolicyMap:
    return policy if isinstance(policy, PolicyMap) else as_policy(policy)


def current_setting() -> Setting:
    """Return what holds here: the innermost scope's setting, else the process's."""
    return _scope.get() or _process


def global_policy() -> Policy | PolicyMap:
    """Return the policy that holds wherever none is given: ``float32`` until you set one."""
    return current_setting().policy


def install(setting: Setting) -> None:
    """Make a setting the process's."""
    global _process
    _process = setting


def set_global_policy(policy: Policy | PolicyMap | str) -> None:
    """Set the policy that holds wherever none is given, in every thread of this process.

    Args:
        policy: a policy, a policy map, or a policy's name.

    Raises:
        PolicyError: an unknown name.

    >>> set_global_policy("mixed_bfloat16")
    >>> global_policy()
    Policy('mixed_bfloat16')
    >>> set_global_policy("float32")
    """
    install(Setting(_checked(policy)))


@contextmanager
def setting_scope(setting: Setting) -> Iterator[Setting]:
    """Make a setting hold inside a ``with`` block, in this thread or task only."""
    token = _scope.set(setting)
    try:
        yield setting
    finally:
        _scope.reset(token)


@contextmanager
def policy_scope(policy: Policy | PolicyMap | str) -> Iterator[Policy | PolicyMap]:
    """Make ``policy`` the global one inside a ``with`` block, in this thread or task only.

    >>> with policy_scope("mixed_float16"):
    ...     print(global_policy())
    Policy('mixed_float16')
    >>> global_policy()
    Policy('float32')
    """
    with setting_scope(Setting(_checked(policy), scoped=True)) as setting:
        yield setting.policy
