"""Policies that every Keras layer takes as ``dtype=``, over the core's.

What a policy's name means, what is allowed, and what wins in a map are the rules of
:mod:`halfstep.core.policy`; this module only speaks Keras.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn, Self, TypeAlias

import keras

from .. import __version__
from ..core import policy as core
from ..core.compatibility import compatibility_check
from ..core.loss_scale import NoLossScale
from ..errors import PolicyError
from .loss_scale import PACKAGE, LossScale, LossScaleLike, as_loss_scale

NOTE: Final = "import halfstep.keras"
"""The first key of each config here: where nobody has imported this door, Keras' error names it."""

PolicyLike: TypeAlias = "Policy | PolicyMap | core.Policy | core.PolicyMap | str | Any"
"""A policy or a map of this door, of the core or of Keras itself, or a policy's name."""

PLAIN = (keras.DTypePolicy, keras.dtype_policies.FloatDTypePolicy)
"""The kinds of policies of Keras that say a compute and a variable dtype, and nothing else."""


NAMES = (*core.DTYPES, *core.MIXED)
"""Every policy name of this door: those of the core that Keras' optimizers can follow."""


def _rule_of(name: Any) -> core.Policy:
    """The core's policy that a name or any kind of policy stands for."""
    if isinstance(name, Policy):
        return name.rule
    if isinstance(name, core.Policy):
        return _followed(name)
    if type(name) in PLAIN:
        name = name.name
    if not isinstance(name, str):
        raise TypeError(
            f"'name' must be a string, such as 'mixed_float16', or a policy. Received: {name!r}"
        )
    try:
        return _followed(core.Policy(name))
    except PolicyError as error:
        raise PolicyError(f"Cannot convert {name!r} to a policy. {error}") from None


def _followed(rule: core.Policy) -> core.Policy:
    if rule.name not in NAMES:
        raise PolicyError(
            f"{rule!r} wants an optimizer that updates 16-bit variables without loss, and Keras "
            f"has none. Allowed here are {', '.join(NAMES)}."
        )
    return rule


class _Frozen(keras.dtype_policies.FloatDTypePolicy):
    """What holds for both kinds: a value, that neither a user nor Keras changes by accident.

    It derives from Keras' alias of ``DTypePolicy``, so that Python asks us first when one of
    either is compared with ours.
    """

    rule: core.Policy | core.PolicyMap

    def __setattr__(self, name: str, value: object) -> None:
        # Keras' DTypePolicyMap.get_config() blanks the names of the very policies it holds
        if name == "_name" and value is None:
            return
        self._refuse(f"its {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        self._refuse(f"its {name!r} cannot be deleted")

    def _refuse(self, what: str) -> NoReturn:
        raise PolicyError(f"{self!r} is frozen: {what}. Make a new one.")

    def __eq__(self, other: object) -> bool:
        return self.rule == other.rule if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.rule)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rule,)


@keras.saving.register_keras_serializable(PACKAGE, name="Policy")
class Policy(_Frozen):
    """A ``keras.DTypePolicy`` that also says how to scale the loss; see :class:`halfstep.Policy`.

    A frozen value: hashable, equal to a policy of the same name and loss scale, and to a plain
    ``keras.DTypePolicy`` of that name if the loss scale is the default one. Only its loss scale
    is alive: it shows the state of the optimizer that uses it.

    Args:
        name: ``mixed_float16``, ``mixed_bfloat16``, ``float16``, ``bfloat16``, ``float32`` or
            ``float64``; or a policy of the core or of Keras; left out, the global policy's.
        loss_scale: ``"dynamic"``, a positive number (fixed), None (no loss scaling), or a loss
            scale of this door or of the core. Left out, it is dynamic for ``mixed_float16`` and
            None for the others.

    Raises:
        PolicyError: an unknown name, with the nearest one.
        TypeError: a name that is no string.
        LossScaleError: a loss scale that is none.

    >>> policy = Policy("mixed_float16")
    >>> policy.compute_dtype, policy.variable_dtype
    ('float16', 'float32')
    >>> policy
    <Policy "mixed_float16", loss_scale=DynamicLossScale(current_loss_scale=32768.0,
     num_good_steps=0, initial_loss_scale=32768.0, increment_period=2000, multiplier=2.0)>
    >>> Policy("mixed_float16", loss_scale=1024).loss_scale
    FixedLossScale(1024.0)
    """

    rule: core.Policy

    def __init__(
        self, name: core.Policy | str | None = None, loss_scale: LossScaleLike = "default"
    ) -> None:
        rule = _rule_of(keras.config.dtype_policy().name if name is None else name)
        if loss_scale == "default":
            kept = name.loss_scale if isinstance(name, Policy) else as_loss_scale(rule.loss_scale)
        else:
            kept = as_loss_scale(loss_scale)
            rule = core.Policy(rule.name, NoLossScale() if kept is None else kept.rule)
        compatibility_check(rule)
        # the fields that Keras reads off its policies, then ours; both past the freeze
        self.__dict__.update(vars(keras.DTypePolicy(rule.name)))
        self.__dict__.update(rule=rule, _loss_scale=kept)

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale, with its live state; the same object each time. None for none."""
        scale: LossScale | None = self.__dict__["_loss_scale"]
        return scale

    def __eq__(self, other: object) -> bool:
        if type(other) in PLAIN:
            name = other.name  # type: ignore[attr-defined]
            return name in NAMES and self.rule == core.Policy(name)
        return super().__eq__(other)

    __hash__ = _Frozen.__hash__

    def __repr__(self) -> str:
        return f'<Policy "{self.name}", loss_scale={self.loss_scale!r}>'

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values, for :meth:`from_config` and ``.keras`` files.

        >>> config = Policy("mixed_float16", loss_scale=1024).get_config()
        >>> config["name"], config["loss_scale"]
        ('mixed_float16', {'kind': 'fixed', 'value': 1024.0})
        """
        return {NOTE: __version__, **self.rule.get_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the policy that :meth:`get_config`, here or in Keras, described.

        >>> Policy.from_config({"name": "mixed_bfloat16"})
        <Policy "mixed_bfloat16", loss_scale=None>
        """
        return cls(core.Policy.from_config(_without_note(config)))


def _without_note(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != NOTE}


@keras.saving.register_keras_serializable(PACKAGE, name="PolicyMap")
class PolicyMap(keras.dtype_policies.DTypePolicyMap, _Frozen):
    r"""A default policy and overrides by layer path, wherever Keras takes a ``DTypePolicyMap``.

    The keys are :class:`halfstep.PolicyMap`'s: a layer's path (``"model/head"``) or a regular
    expression that matches a whole path; a key covers the layer and all below it, and the
    deepest match wins. (In Keras' own map a key covers its layer alone, and two expressions that
    match one path are an error even where they agree.) ``compile`` and
    :func:`~halfstep.keras.check_model` refuse a key that names no layer.

    Frozen and hashable; Keras' quantized policies have no place in it. Once a layer is built, its
    ``dtype_policy`` is the one policy that the map gave it, which is what is saved, and may be
    set anew or quantized.

    Args:
        default: the policy of every layer that no key covers; or a map of the core; left out,
            the global policy, as it is now.
        overrides: policies by key.
        default_policy: Keras' name for ``default``.
        policy_map: Keras' name for ``overrides``.

    Raises:
        PolicyError: an unknown policy, or a key that is no regular expression.
        TypeError: overrides that are no mapping.

    >>> policies = PolicyMap("mixed_float16", {"model/head": "float32"})
    >>> policies["model/head/out"].compute_dtype, policies["model/body"].compute_dtype
    ('float32', 'float16')
    >>> policies
    PolicyMap('mixed_float16', {'model/head': 'float32'})
    """

    rule: core.PolicyMap

    def __init__(
        self,
        default: Any = None,
        overrides: Any = None,
        *,
        default_policy: Any = None,
        policy_map: Any = None,
    ) -> None:
        default = _one("default", default, default_policy)
        overrides = _one("overrides", overrides, policy_map)
        if isinstance(default, core.PolicyMap):  # a core's map brings its own
            default, overrides = default.default, {**default.overrides, **(overrides or {})}
        if isinstance(default, keras.dtype_policies.DTypePolicyMap):
            raise PolicyError(f"PolicyMap({default!r}): the default must be one policy, not a map.")
        if not isinstance(overrides or {}, Mapping):
            raise TypeError(
                f"If specified, `policy_map` must be a dict. Received: {overrides!r}, "
                "not policies by key."
            )
        first = _as_single(default)
        by_key = {key: _as_single(policy) for key, policy in (overrides or {}).items()}
        rule = core.PolicyMap(first.rule, {key: policy.rule for key, policy in by_key.items()})
        self.__dict__.update(rule=rule, _default_policy_arg=first, _default_policy=first)
        self.__dict__.update(_policy_map=by_key, _found={}, _asked={}, _from_file=False)

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of the first policy that wants one: the default's, then the overrides'."""
        wanting = (p.loss_scale for p in (self._default_policy, *self._policy_map.values()))
        return next((scale for scale in wanting if scale is not None), None)

    @property
    def asked(self) -> dict[str, None]:
        """The paths of all layers that were given this very map, in any model, and called."""
        paths: dict[str, None] = self._asked
        return paths

    @property
    def from_file(self) -> bool:
        """Whether a file said this map; it may be about more than the model of the file."""
        return bool(self._from_file)

    def __getitem__(self, path: str) -> Policy:
        """Return the policy of the layer of this path."""
        found: Policy | None = self._found.get(path)
        if found is None:
            rule = self.rule.policy_at(path, "/")
            candidates = (self._default_policy, *self._policy_map.values())
            found = next(policy for policy in candidates if policy.rule == rule)
            self._found[path] = found
        return found

    def beginning_with(self, policy: Policy) -> Self:
        """Return this map with another default."""
        made = type(self)(policy, self._policy_map)
        made.__dict__.update(_asked=self._asked, _from_file=self._from_file)
        return made

    def __setitem__(self, path: str, policy: object) -> None:
        self._refuse(f"the policy of {path!r} cannot be set")

    def __delitem__(self, path: str) -> None:
        self._refuse(f"{path!r} cannot be deleted")

    def __repr__(self) -> str:
        return repr(self.rule)

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values; the policies stay as they are."""
        config = self.rule.get_config()
        return {
            NOTE: __version__,
            "default_policy": config["default"],
            "policy_map": config["overrides"],
        }

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """Return the map that :meth:`get_config` described."""
        rule = core.PolicyMap.from_config(
            {"default": config["default_policy"], "overrides": config["policy_map"]}
        )
        made = cls(rule)
        # a file may hold a part of the model that the map was written for
        made.__dict__.update(_from_file=True)
        return made

    __eq__ = _Frozen.__eq__
    __hash__ = _Frozen.__hash__


# Without this door Keras looks a class up by this name among its own, finds its own class, and
# refuses the key NOTE by name; any other name would end in an AttributeError about a str.
Policy.__name__ = "DTypePolicy"
PolicyMap.__name__ = "DTypePolicyMap"


def _one(name: str, ours: Any, keras_name: Any) -> Any:
    if ours is not None and keras_name is not None:
        raise PolicyError(f"PolicyMap: {name} was given twice: {ours!r} and {keras_name!r}.")
    return keras_name if ours is None else ours


def _as_single(policy: Any) -> Policy:
    return policy if isinstance(policy, Policy) else Policy(policy)


def as_policy(value: PolicyLike) -> Policy | PolicyMap:
    """Return the policy or the map of this door that a value stands for.

    Raises:
        PolicyError: an unknown name, or a policy that quantizes.
        TypeError: something else than a name or a policy.

    >>> as_policy("mixed_bfloat16")
    <Policy "mixed_bfloat16", loss_scale=None>
    """
    if isinstance(value, (Policy, PolicyMap)):
        return value
    if isinstance(value, core.PolicyMap):
        return PolicyMap(value)
    if isinstance(value, keras.DTypePolicy) and type(value) not in PLAIN:
        raise PolicyError(
            f"{value!r} is not about mixed precision: it quantizes, or maps. "
            "Set it with keras.config.set_dtype_policy, or give it to layers as dtype=."
        )
    return Policy(value)
