"""Which policy owns which parameter.

`apply_policy` writes it down here, and loss scaling reads it: an optimizer knows its parameters,
not the modules that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core.loss_scale import LossScale, NoLossScale
from ..core.policy import Policy
from ..errors import PolicyError

# by identity, because tensors compare elementwise; weakly, because a model may go away
_policies: MutableMapping[Tensor, Policy] = WeakIdKeyDictionary()


def register(parameter: Tensor, policy: Policy) -> None:
    """Write down that ``parameter`` belongs to a layer with this policy; the last word holds."""
    _policies[parameter] = policy


def forget(parameter: Tensor) -> None:
    """Remove what was written down about ``parameter``, if anything was."""
    _policies.pop(parameter, None)


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
    return _policies.get(parameter)


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
