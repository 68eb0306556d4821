"""What DistributedDataParallel takes for granted of the model in it, seen to in its first forward.

When it is made, it copies rank 0's weights to the other ranks, and notes on each weight that its
gradient is to be reduced. It does not know of the digits that are kept beside 16-bit weights, and
its note is gone when a weight changes its dtype: torch then reduces nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import PolicyError
from .casting import LOW
from .masters import kept_of, update_of
from .registry import policy_of_parameter

_settled: WeakSet[DistributedDataParallel] = WeakSet()


def active() -> DistributedDataParallel | None:
    """Return the wrapper whose forward this process is in, if it is in one."""
    found: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return found if isinstance(found, DistributedDataParallel) else None


def settle(ddp: DistributedDataParallel) -> None:
    """See, once for each wrapper, that its ranks agree on all that is known of 16-bit weights.

    Collective among the ranks of ``ddp`` where 16-bit weights have masters or compensations: rank
    0's are sent to the others, as its weights were.

    Raises:
        PolicyError: the dtype of a weight was changed after ``ddp`` was made.
    """
    if ddp in _settled:
        return
    parameters = list(ddp.module.parameters())
    if any(p.dtype in LOW and policy_of_parameter(p) is not None for p in parameters):
        _refuse_stale_buckets(ddp)
        _share_digits(ddp)
    _settled.add(ddp)


def _refuse_stale_buckets(ddp: DistributedDataParallel) -> None:
    for bucket in ddp.reducer._get_zeros_like_grad_buckets():
        for parameter in bucket.parameters():
            if parameter.dtype is not bucket.buffer().dtype:
                raise PolicyError(
                    f"{_name_in(ddp, parameter)} got its policy, and the dtype {parameter.dtype}, "
                    "after DistributedDataParallel(model): gradients are not reduced then. Apply "
                    "the policy first, and wrap the model afterwards."
                )


@torch.no_grad()
def _share_digits(ddp: DistributedDataParallel) -> None:
    ignored: Collection[str] = ddp.parameters_to_ignore
    for name, parameter in ddp.module.named_parameters():
        if name not in ignored and update_of(parameter) != "plain":
            dist.broadcast(kept_of(parameter).rest, group=ddp.process_group, group_src=0)


def refuse_change(model: nn.Module) -> None:
    """Raise if DistributedDataParallel has taken note of weights of ``model``.

    Raises:
        PolicyError: their dtypes cannot change any more.
    """
    within = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    own = set(map(id, model.parameters()))
    around = [ddp for ddp in _settled if any(id(p) in own for p in ddp.module.parameters())]
    if within or around:
        raise PolicyError(
            f"The weights of this {type(model).__name__} are in a DistributedDataParallel, which "
            "stops to reduce the gradient of a weight whose dtype changes. Apply or remove the "
            "policy first, and wrap the model afterwards; policies whose variables are float32, "
            "as 'mixed_bfloat16', can come later."
        )


def _name_in(ddp: DistributedDataParallel, parameter: torch.Tensor) -> str:
    return next(
        (name for name, own in ddp.module.named_parameters() if own is parameter), "A weight"
    )
