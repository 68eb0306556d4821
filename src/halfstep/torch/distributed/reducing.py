"""Sums of 16-bit gradients over ranks, in float32."""

# DDP looks at a hook's annotations themselves: they must not be strings
from typing import Any

import torch
import torch.distributed as dist

from ..loss_scaling.gradients import widened


def float32_allreduce_hook(
    process_group: dist.ProcessGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Average 16-bit gradients over the ranks in float32: a communication hook for DDP.

    ``DistributedDataParallel`` adds gradients in the dtype of their parameters, which is 16-bit
    under ``"master_bfloat16"`` and the like: each addition rounds. With this hook they are rounded
    once, at the end; the traffic is that of float32 gradients. Wider ones keep their own dtype.

    Args:
        process_group: the first argument of ``register_comm_hook``; None for all ranks.
        bucket: what DDP hands over.

    Source: ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks``, whose hooks narrow.

    >>> import tempfile
    >>> from halfstep.torch import apply_policy
    >>> store = f"file://{tempfile.mkdtemp()}/store"
    >>> dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    >>> model = apply_policy(torch.nn.Linear(2, 1), "master_bfloat16")
    >>> model = torch.nn.parallel.DistributedDataParallel(model)
    >>> model.register_comm_hook(None, float32_allreduce_hook)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> model.module.weight.grad
    tensor([[1., 1.]], dtype=torch.bfloat16)
    >>> dist.destroy_process_group()
    """
    group = dist.group.WORLD if process_group is None else process_group
    if group is None:
        raise RuntimeError("float32_allreduce_hook: torch.distributed is not initialised.")
    wide = widened(bucket.buffer()).div_(group.size())
    work: Any = dist.all_reduce(wide, group=group, async_op=True)

    def narrow(future: torch.futures.Future[Any]) -> torch.Tensor:
        buffer: torch.Tensor = bucket.buffer()
        return buffer.copy_(future.value()[0])

    averaged: torch.futures.Future[torch.Tensor] = work.get_future().then(narrow)
    return averaged
