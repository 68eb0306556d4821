"""The state that an optimizer has before its first step, for checkpoints to be loaded into."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..loss_scaling import LossScaleOptimizer
from ..loss_scaling.shard_lending import shards_lent, steps_on_shards
from ..masters import update_of
from ..shards import is_dtensor


@torch.no_grad()
def make_state(scaling: LossScaleOptimizer) -> None:
    """Let the inner optimizer make its state, by a step with a learning rate of 0.

    ``torch.distributed.checkpoint`` does that by itself, but on the model's own parameters: of
    16-bit ones the state would have 16 bits, and not every fused kernel takes DTensors.
    """
    inner = scaling.inner_optimizer
    own = [p for group in inner.param_groups for p in group["params"]]
    special = any(is_dtensor(p) or update_of(p) != "plain" for p in own)
    # a stateless one with gradients has stepped before
    if not special or inner.state or any(p.grad is not None for p in own):
        return
    scaling._wide.follow()
    rates = [group.get("lr") for group in inner.param_groups]
    trained = [p for p in own if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in inner.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if _is_tensor(group["lr"]) else 0.0
    try:
        if scaling._wide:
            # as if it was skipped: what is rounded into the weights is what they were
            scaling._wide.step(lambda: _step(inner), torch.ones((), device=own[0].device))
        else:
            _step(inner)
    finally:
        for group, rate in zip(inner.param_groups, rates, strict=True):
            if "lr" in group:
                group["lr"] = rate
        for parameter in trained:
            parameter.grad = None


def _step(inner: torch.optim.Optimizer) -> None:
    with shards_lent(inner) if steps_on_shards(inner) else nullcontext():
        inner.step()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
