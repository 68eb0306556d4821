"""Dtype policies: in which dtype a layer computes, and in which it keeps its variables.

The idea is Keras': https://keras.io/api/mixed_precision/policy/. A policy here is a frozen value
that also carries the loss scale its compute dtype needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import PolicyError, nearest
from .loss_scale import (
    DynamicLossScale,
    FixedLossScale,
    LossScale,
    NoLossScale,
    as_loss_scale,
    loss_scale_from_config,
)
from .policy_names import DTYPES as DTYPES
from .policy_names import MEMORY as MEMORY
from .policy_names import MIXED as MIXED
from .policy_names import NAMES as NAMES
from .policy_names import SCALED, Update, suggestion


def _default_loss_scale(name: str) -> LossScale:
    """float16 gradients need scaling; no other format here does."""
    return DynamicLossScale() if name in SCALED else NoLossScale()


@dataclass(frozen=True, init=False, repr=False)
class Policy:
    """The dtype a layer computes in, the dtype of its variables, and the loss scale it wants.

    =============== ============= ============== ========= ==========
    name            compute dtype variable dtype update    loss scale
    =============== ============= ============== ========= ==========
    mixed_float16   float16       float32        plain     dynamic
    mixed_bfloat16  bfloat16      float32        plain     none
    master_float16  float16       float16        master    dynamic
    master_bfloat16 bfloat16      bfloat16       master    none
    kahan_bfloat16  bfloat16      bfloat16       kahan     none
    float16         float16       float16        plain     none
    bfloat16        bfloat16      bfloat16       plain     none
    float32         float32       float32        plain     none
    float64         float64       float64        plain     none
    =============== ============= ============== ========= ==========

    *update* is how an optimizer writes into variables. ``plain`` rounds the new value to the
    variable's dtype: fine in 32 bits, but in bfloat16 an update below 2**-9 of a weight vanishes.
    ``master``: the optimizer keeps a float32 value of every weight, updates that, and rounds it
    into the variable (Micikevicius et al. 2017, arXiv:1710.03740, section 3.1). ``kahan``: it
    keeps what rounding cut off in a second 16-bit number, and adds it to the next update
    (Zamirai et al. 2020, arXiv:2010.06192). The policies ``master_*`` and ``kahan_*`` are about
    memory and want an optimizer that knows them.

    Args:
        name: one of the names above.
        loss_scale: ``"dynamic"``, a positive number (fixed), ``None`` (no loss scaling), or a
            :class:`~halfstep.LossScale`. Left out, it is what the table says.

    Raises:
        PolicyError: an unknown name, with the nearest one.
        LossScaleError: a loss scale that is none.

    >>> policy = Policy("mixed_float16")
    >>> policy.compute_dtype, policy.variable_dtype
    ('float16', 'float32')
    >>> policy
    Policy('mixed_float16')
    >>> Policy("mixed_float16", loss_scale=1024).loss_scale
    FixedLossScale(value=1024.0, patience=8)
    """

    name: str
    loss_scale: LossScale

    def __init__(self, name: str, loss_scale: LossScale | float | str | None = "default") -> None:
        if not isinstance(name, str):
            raise PolicyError(
                f"Policy({name!r}): the name must be a string, one of {', '.join(NAMES)}."
                + suggestion(name)
            )
        if name not in NAMES:
            raise PolicyError(
                f"Policy({name!r}): unknown policy. Allowed are {', '.join(NAMES)}."
                + suggestion(name)
            )
        scale = _default_loss_scale(name) if loss_scale == "default" else as_loss_scale(loss_scale)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "loss_scale", scale)

    @property
    def compute_dtype(self) -> str:
        """The dtype the layer computes in, for instance ``'float16'``."""
        if self.name in MEMORY:
            return MEMORY[self.name][0]
        return MIXED.get(self.name, self.name)

    @property
    def variable_dtype(self) -> str:
        """The dtype of the layer's variables, for instance ``'float32'``."""
        return "float32" if self.name in MIXED else self.compute_dtype

    @property
    def update(self) -> Update:
        """How an optimizer writes into the variables: ``'plain'``, ``'master'`` or ``'kahan'``."""
        return MEMORY[self.name][1] if self.name in MEMORY else "plain"

    @property
    def is_low(self) -> bool:
        """Whether the compute dtype has 16 bits."""
        return self.compute_dtype in ("float16", "bfloat16")

    def _loss_scale_argument(self) -> object | None:
        """The shortest value of ``loss_scale=`` that gives this policy, or None for the default."""
        scale = self.loss_scale
        if scale == _default_loss_scale(self.name):
            return None
        if isinstance(scale, FixedLossScale) and scale == FixedLossScale(scale.value):
            return int(scale.value) if scale.value.is_integer() else scale.value
        if scale == DynamicLossScale():
            return "dynamic"
        return scale

    def __repr__(self) -> str:
        if isinstance(self.loss_scale, NoLossScale) and self.name in SCALED:
            return f"Policy({self.name!r}, loss_scale=None)"
        argument = self._loss_scale_argument()
        return f"Policy({self.name!r}{'' if argument is None else f', loss_scale={argument!r}'})"

    __str__ = __repr__

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON.

        >>> Policy("mixed_float16", loss_scale=1024).get_config()
        {'name': 'mixed_float16', 'loss_scale': {'kind': 'fixed', 'value': 1024.0}}
        """
        config: dict[str, Any] = {"name": self.name}
        if self.loss_scale != _default_loss_scale(self.name):
            config["loss_scale"] = self.loss_scale.get_config()
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Policy:
        """Return the policy that :meth:`get_config` described.

        >>> Policy.from_config({"name": "mixed_bfloat16"})
        Policy('mixed_bfloat16')
        """
        unknown = set(config) - {"name", "loss_scale"}
        if unknown or "name" not in config:
            raise PolicyError(
                f"Policy.from_config({dict(config)!r}): it takes 'name' and, if it is not the "
                "default, 'loss_scale'."
            )
        if "loss_scale" not in config:
            return cls(config["name"])
        scale = config["loss_scale"]
        return cls(
            config["name"],
            loss_scale_from_config(scale) if isinstance(scale, Mapping) else scale,
        )


PolicyLike: TypeAlias = "Policy | PolicyMap | str"
"""A policy, a policy map, or a policy's name."""


def as_policy(value: Policy | str) -> Policy:
    """Return the policy that a name or a policy stands for.

    >>> as_policy("mixed_float16")
    Policy('mixed_float16')
    """
    return value if isinstance(value, Policy) else Policy(value)


@dataclass(frozen=True)
class Resolved:
    """The policy of one layer, and the rule that gave it.

    Attributes:
        policy: the policy.
        key: the key of the map that named the layer or one above it, ``None`` for the default.
        at: the path that the key named; ``""`` where there is no key.
        because: why there is no key, in a few words.
    """

    policy: Policy
    key: str | None
    at: str
    because: str = "default"

    @property
    def why(self) -> str:
        """The rule in a few words, for a summary."""
        if self.key is None:
            return self.because
        return f"override {self.key!r}" + ("" if self.key == self.at else f" at {self.at!r}")


class PolicyMap:
    r"""A default policy and overrides by layer path.

    A key is a layer's path or, where no layer has that path, a regular expression that must match
    a whole path (``re.fullmatch``). What a key names covers the layer and everything below it.
    The deepest match wins; at the same depth a path wins over an expression.

    Args:
        default: the policy of every layer that no key covers.
        overrides: policies by key.

    Raises:
        PolicyError: an unknown policy, or a key that is no valid regular expression.

    >>> policies = PolicyMap("mixed_float16", {"head": "float32", r".*\.norm": "float32"})
    >>> found = policies.resolve(["", "blocks", "blocks.0", "blocks.0.norm", "head", "head.out"])
    >>> [(path, rule.policy.name) for path, rule in found.items() if rule.key]
    [('blocks.0.norm', 'float32'), ('head', 'float32'), ('head.out', 'float32')]
    """

    __slots__ = ("_default", "_overrides")

    def __init__(
        self, default: Policy | str, overrides: Mapping[str, Policy | str] | None = None
    ) -> None:
        self._default = as_policy(default)
        self._overrides = {}
        for key, policy in (overrides or {}).items():
            if not isinstance(key, str):
                raise PolicyError(
                    f"PolicyMap: the key {key!r} must be a string, a layer's path or a regular "
                    "expression."
                )
            try:
                re.compile(key)
            except re.error as error:
                raise PolicyError(
                    f"PolicyMap: the key {key!r} is no regular expression: {error}."
                ) from None
            self._overrides[key] = as_policy(policy)

    @property
    def default(self) -> Policy:
        """The policy of every layer that no key covers."""
        return self._default

    @property
    def overrides(self) -> dict[str, Policy]:
        """Policies by key (a copy)."""
        return dict(self._overrides)

    @property
    def loss_scale(self) -> LossScale:
        """The loss scale of the first policy that wants one: the default's, then the overrides'."""
        for policy in (self._default, *self._overrides.values()):
            if not isinstance(policy.loss_scale, NoLossScale):
                return policy.loss_scale
        return self._default.loss_scale

    def resolve(self, paths: Iterable[str], separator: str = ".") -> dict[str, Resolved]:
        """Return the policy of every path, with the rule that gave it.

        Args:
            paths: the paths of all layers of a model; ``""`` is the model itself.
            separator: what stands between the parts of a path.

        Raises:
            PolicyError: a key that matches no path (with the nearest ones), or two expressions
                that match the same path and disagree.
        """
        known = dict.fromkeys(paths)
        for key in self.unmatched(known):
            raise PolicyError(
                f"PolicyMap: the key {key!r} matches no layer of this model."
                + (nearest(key, known) or f" Its layers are {_some(known)}.")
            )
        named = {path: self._named(path, known) for path in known}
        return {path: self._deepest(path, named, separator) for path in known}

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """Return the keys that name none of the paths.

        >>> PolicyMap("mixed_float16", {"head": "float32"}).unmatched(["", "body"])
        ['head']
        """
        known = dict.fromkeys(paths)
        return [
            key
            for key in self._overrides
            if key not in known
            and not any(re.fullmatch(key, path) for path in known if path not in self._overrides)
        ]

    def policy_at(self, path: str, separator: str = ".") -> Policy:
        """Return the policy of one path, where the other paths of the model are not known.

        It is what :meth:`resolve` gives, if no other layer's path happens to be a key that is
        also an expression matching this one; and it cannot see that a key matches no layer.

        Raises:
            PolicyError: two expressions that match the same path and disagree.

        >>> PolicyMap("mixed_float16", {"head": "float32"}).policy_at("head/out", "/")
        Policy('float32')
        """
        parts = path.split(separator)
        above = dict.fromkeys(separator.join(parts[:depth]) for depth in range(len(parts), 0, -1))
        named = {at: self._named(at, above) for at in above}
        return self._deepest(path, named, separator).policy

    def _named(self, path: str, known: Mapping[str, None]) -> list[str]:
        """The keys that name this very path: the path itself, else every expression that does."""
        if path in self._overrides:
            return [path]
        keys = [key for key in self._overrides if key not in known and re.fullmatch(key, path)]
        if len({self._overrides[key] for key in keys}) > 1:
            rules = ", ".join(f"{key!r}: {self._overrides[key]}" for key in keys)
            raise PolicyError(
                f"PolicyMap: {rules} all match the layer {path!r} and disagree. "
                f"Name it by its path, or make all but one of them not match."
            )
        return keys

    def _deepest(self, path: str, named: Mapping[str, list[str]], separator: str) -> Resolved:
        at = path
        while True:
            for key in named.get(at, ()):
                return Resolved(self._overrides[key], key, at)
            if not at:
                return Resolved(self._default, None, "")
            at = at.rpartition(separator)[0]

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON."""
        return {
            "default": self._default.get_config(),
            "overrides": {key: policy.get_config() for key, policy in self._overrides.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PolicyMap:
        """Return the map that :meth:`get_config` described.

        >>> policies = PolicyMap("mixed_float16", {"head": "float32"})
        >>> PolicyMap.from_config(policies.get_config()) == policies
        True
        """
        if set(config) - {"overrides"} != {"default"}:
            raise PolicyError(
                f"PolicyMap.from_config({dict(config)!r}): it takes 'default' and 'overrides'."
            )
        return cls(
            Policy.from_config(config["default"]),
            {key: Policy.from_config(value) for key, value in config.get("overrides", {}).items()},
        )

    def _items(self) -> tuple[object, ...]:
        # order matters nowhere, so it is not part of the value
        return (self._default, frozenset(self._overrides.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicyMap) and self._items() == other._items()

    def __hash__(self) -> int:
        return hash(self._items())

    def __reduce__(self) -> tuple[type[PolicyMap], tuple[Policy, dict[str, Policy]]]:
        return PolicyMap, (self._default, self._overrides)

    def __repr__(self) -> str:
        def short(policy: Policy) -> str:
            return repr(policy.name if policy == Policy(policy.name) else policy)

        overrides = ", ".join(f"{key!r}: {short(p)}" for key, p in self._overrides.items())
        return f"PolicyMap({short(self._default)}, {{{overrides}}})"


def as_policy_map(
    value: Policy | PolicyMap | str, overrides: Mapping[str, Policy | str] | None = None
) -> PolicyMap:
    """Return a policy map; ``overrides`` are added to those that ``value`` brings.

    >>> as_policy_map("mixed_float16", {"head": "float32"})
    PolicyMap('mixed_float16', {'head': 'float32'})
    """
    if isinstance(value, PolicyMap):
        return PolicyMap(value.default, {**value.overrides, **(overrides or {})})
    return PolicyMap(as_policy(value), overrides)


def _some(paths: Iterable[str], most: int = 8) -> str:
    shown = [repr(path) for path in paths if path]
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")
