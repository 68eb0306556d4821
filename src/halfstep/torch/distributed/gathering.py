"""In which dtype FSDP2 gathers weights and sums gradients, from the policy of a module."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...core.policy import DTYPES
from ...errors import PolicyError, nearest
from ..casting import dtype_named
from ..plan import plan_of
from ..rules import LEFT_ALONE


def fsdp_policy(module: nn.Module, *, reduce_dtype: str = "float32") -> MixedPrecisionPolicy:
    """Return the ``mp_policy`` for ``fully_shard(module)`` that does what the module's policy says.

    ::

        every weight may be gathered in 16 bits -> param_dtype = the compute dtype: half the traffic
        one must keep its float32 digits        -> param_dtype = None: gathered in float32, and
                                                   each layer casts inside its own forward

    A weight must keep them if its layer computes in float32, or reads it in float32 (batch and
    group norm). The layers cast their own inputs, and the model its outputs, so FSDP2 does neither.

    Args:
        module: what will be sharded, with a policy: :func:`apply_policy` comes first.
        reduce_dtype: the dtype in which gradients are summed over the ranks. In 16 bits they are
            rounded by each rank before they are added, and in float16 they may overflow, which
            skips the step.

    Raises:
        PolicyError: no module, or one without a policy; or an unknown dtype.

    >>> from halfstep.torch import apply_policy
    >>> block = apply_policy(nn.Sequential(nn.Linear(4, 8), nn.GELU()), "mixed_bfloat16")
    >>> fsdp_policy(block).param_dtype, fsdp_policy(block).reduce_dtype
    (torch.bfloat16, torch.float32)
    """
    if reduce_dtype not in DTYPES:
        raise PolicyError(
            f"fsdp_policy(reduce_dtype={reduce_dtype!r}): allowed are {', '.join(DTYPES)}."
            + nearest(str(reduce_dtype), DTYPES)
        )
    if not isinstance(module, nn.Module):
        raise PolicyError(
            f"fsdp_policy takes the torch.nn.Module that will be sharded, got a "
            f"{type(module).__name__}."
        )
    if plan_of(module) is None:
        raise PolicyError(
            f"fsdp_policy: no policy was applied to this {type(module).__name__}; call "
            "apply_policy first."
        )
    return MixedPrecisionPolicy(
        param_dtype=_gathered(module),
        reduce_dtype=dtype_named(reduce_dtype),
        cast_forward_inputs=False,
    )


def _gathered(module: nn.Module) -> torch.dtype | None:
    """The one 16-bit dtype that every weight below may be gathered in, if there is one."""
    found: set[torch.dtype | None] = set()
    for below in module.modules():
        if not any(True for _ in below.parameters(recurse=False)):
            continue
        plan = plan_of(below)
        keeps = plan is None or plan.rule == LEFT_ALONE or plan.reads_where == "float32"
        found.add(None if keeps or plan is None or not plan.policy.is_low else plan.compute)
    return found.pop() if len(found) == 1 else None
