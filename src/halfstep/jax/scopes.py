"""Which policy holds where in a function: scopes in the model's code, and a map from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax

from ..core.policy import Policy, PolicyMap, as_policy
from ..errors import PolicyError
from .program import Place

_MARK = "halfstep:"


@contextmanager
def policy_scope(policy: Policy | str) -> Iterator[None]:
    """Give the operations inside a ``with`` block, in the model's own code, this policy.

    It does nothing by itself: :func:`~halfstep.jax.autocast` around the model reads it. The
    innermost scope wins, over a :class:`~halfstep.PolicyMap` too. The scope travels as a name
    scope, so it holds inside ``scan`` and ``jit`` bodies and in the backward pass.

    Args:
        policy: ``"float32"``, ``"mixed_float16"`` or ``"mixed_bfloat16"``.

    Raises:
        PolicyError: another policy.

    >>> import jax.numpy as jnp
    >>> from halfstep.jax import autocast, policy_scope
    >>> def model(w, x):
    ...     hidden = x @ w
    ...     with policy_scope("float32"):
    ...         return hidden @ w
    >>> x = jnp.ones((2, 2)) / 3
    >>> float(jnp.abs(autocast(model)(x, x) - model(x, x)).max()) > 0
    True
    """
    checked = check_policy(as_policy(policy), "policy_scope")
    with jax.named_scope(_MARK + checked.name):
        yield


def check_policy(policy: Policy, where: str) -> Policy:
    """Return a policy that leaves variables in float32, which is all that a rewrite can give.

    Raises:
        PolicyError: for a policy with other variables.
    """
    if policy.variable_dtype != "float32":
        mixed = f" Did you mean 'mixed_{policy.compute_dtype}'?" if policy.is_low else ""
        raise PolicyError(
            f"{where}: the policy {policy.name!r} wants {policy.variable_dtype} variables, which "
            "are yours, not the function's. Allowed are float32, mixed_float16 and "
            f"mixed_bfloat16.{mixed}"
        )
    return policy


def split_scope(names: Iterable[str]) -> tuple[str, str | None]:
    """Return a layer's path and the policy of the innermost :func:`policy_scope` around it.

    >>> split_scope(["net", "halfstep:float32", "head"])
    ('net/head', 'float32')
    """
    path: list[str] = []
    policy = None
    for name in names:
        if name.startswith(_MARK):
            policy = name.removeprefix(_MARK)
        else:
            path.append(name)
    return "/".join(path), policy


class ScopePolicies:
    """The policy of every operation by the scopes around it and by the arguments that it takes.

    Args:
        policies: the map; its paths are those of :func:`jax.named_scope`, joined by ``/``, which
            for Flax modules are their own (``"Net/layers/Dense_0"``), and those of the arguments
            (``"params/layers/Dense_0/kernel"``). An operation that takes an argument follows
            that argument's path before its scope's.
        places: the place of every operation.

    Raises:
        PolicyError: a key that matches no path, a policy with other variables than float32, or
            two 16-bit formats at once.
    """

    def __init__(self, policies: PolicyMap, places: Iterable[Place]) -> None:
        distinct = dict.fromkeys(places)
        self._by_scope = {place.names: split_scope(place.names) for place in distinct}
        paths = [path for path, _ in self._by_scope.values()]
        paths += [path for place in distinct for path in place.takes]
        self._resolved = policies.resolve(_with_parents(paths), separator="/")
        marked = {policy for _, policy in self._by_scope.values() if policy is not None}
        named = {policies.default.name, *(p.name for p in policies.overrides.values()), *marked}
        for name in named:
            check_policy(Policy(name), "autocast")
        formats = sorted(Policy(name).compute_dtype for name in named if Policy(name).is_low)
        if len(formats) > 1:
            raise PolicyError(
                f"autocast: policies that compute in {' and '.join(formats)} meet in one function; "
                "one 16-bit format at a time."
            )
        self.low_dtype = formats[0] if formats else None

    def float32_reason(self, place: Place) -> str | None:
        """Why an operation at this place stays in float32, or ``None`` when it need not."""
        path, marked = self._by_scope[place.names]
        if marked is not None:
            return None if Policy(marked).is_low else f"policy_scope({marked!r})"
        named = [self._resolved[taken] for taken in place.takes]
        rules = [rule for rule in named if rule.key is not None] or [self._resolved[path]]
        high = next((rule for rule in rules if not rule.policy.is_low), None)
        return None if high is None else f"policy float32, {high.why}"


def _with_parents(paths: Iterable[str]) -> list[str]:
    found = {"": None}
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            found["/".join(parts[:depth])] = None
    return list(found)
