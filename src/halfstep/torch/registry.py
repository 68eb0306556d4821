"""Which policy owns which parameter.

`apply_policy` writes it down here, and loss scaling reads it: an optimizer knows its parameters,
not the modules that they belong to. ``fully_shard`` puts new parameters in a module's place for the
old ones, past every method of it: those are found again by their modules.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..core.loss_scale import LossScale, NoLossScale
from ..core.policy import Policy
from ..errors import PolicyError
from .casting import PLAIN

# by identity, because tensors compare elementwise; weakly, because a model may go away
_policies: MutableMapping[Tensor, Policy] = WeakIdKeyDictionary()
_owners: MutableMapping[nn.Module, Policy] = WeakIdKeyDictionary()


class Follower(Protocol):
    """What goes by the policies of parameters, and must know when they change.

    It is told, and does not ask: inside ``torch.compile`` nobody can look into weak dictionaries.
    """

    def policy_changed(self, parameter: Tensor, policy: Policy | None) -> None:
        """Take note that a parameter, its own or another's, now has this policy, or none."""


_followers: WeakSet[Follower] = WeakSet()


def tell(follower: Follower) -> None:
    """Tell ``follower`` from now on, for as long as it lives, which policy a parameter gets."""
    _followers.add(follower)


def register(parameter: Tensor, policy: Policy) -> None:
    """Write down that ``parameter`` belongs to a layer with this policy; the last word holds."""
    _policies[parameter] = policy
    for follower in list(_followers):
        follower.policy_changed(parameter, policy)


def register_module(module: nn.Module, policy: Policy) -> None:
    """Write down the policy of a module's own parameters.

    Of layers that share one, the first to compute in 16 bits has it.
    """
    _owners[module] = policy
    for parameter in module._parameters.values():
        tied = None if parameter is None else _policies.get(parameter)
        if parameter is not None and not (tied is not None and tied.is_low):
            register(parameter, policy)


def forget(parameter: Tensor) -> None:
    """Remove what was written down about ``parameter``, if anything was."""
    if _policies.pop(parameter, None) is not None:
        for follower in list(_followers):
            follower.policy_changed(parameter, None)


def forget_module(module: nn.Module) -> None:
    """Remove what was written down about a module and its own parameters."""
    _owners.pop(module, None)
    for parameter in module._parameters.values():
        if parameter is not None:
            forget(parameter)


def policy_of_parameter(parameter: Tensor) -> Policy | None:
    """Return the policy of the layer that owns ``parameter``, or None if it has none.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> register(weight, Policy("mixed_float16"))
    >>> policy_of_parameter(weight)
    Policy('mixed_float16')
    >>> forget(weight)
    >>> policy_of_parameter(weight) is None
    True
    """
    policy = _policies.get(parameter)
    if policy is None and type(parameter) not in PLAIN and _owners:
        for module, its in list(_owners.items()):
            if any(
                type(own) not in PLAIN for own in module._parameters.values() if own is not None
            ):
                register_module(module, its)
        policy = _policies.get(parameter)
    return policy


def loss_scale_of(parameters: Iterable[Tensor]) -> LossScale | None:
    """Return the loss scale that the policies of these parameters want.

    Args:
        parameters: the parameters of one optimizer.

    Returns:
        None if no parameter has a policy, :class:`~halfstep.NoLossScale` if no policy wants a
        scale, otherwise the one scale that they want.

    Raises:
        PolicyError: policies that want different loss scales.
    """
    policies = {policy_of_parameter(parameter) for parameter in parameters} - {None}
    if not policies:
        return None
    wanted = {policy.loss_scale: policy for policy in policies if policy is not None}
    scales = [scale for scale in wanted if not isinstance(scale, NoLossScale)]
    if len(scales) > 1:
        listed = ", ".join(sorted(f"{wanted[scale]} wants {scale}" for scale in scales))
        raise PolicyError(
            f"The parameters of one optimizer want {len(scales)} different loss scales: {listed}. "
            "Give the optimizer one of them as loss_scale=, or use one optimizer for each."
        )
    return scales[0] if scales else NoLossScale()
