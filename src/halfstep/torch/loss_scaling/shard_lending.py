"""A step of an optimizer on this rank's shards, which are plain tensors.

Adam, AdamW, SGD and Adagrad update each number by itself, so that a step on the shards is a step
on the whole. Their fused kernels take plain tensors everywhere; of DTensors, Adam's do only, and
not beside plain ones (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..shards import is_dtensor, local, placed_like
from .fusion import is_fused

Pair = tuple[Tensor, Tensor]


def steps_on_shards(optimizer: Optimizer) -> bool:
    """Whether the optimizer's next step is to be one on plain shards of its DTensors."""
    return (
        is_fused(optimizer)
        and not torch.compiler.is_compiling()
        and any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"])
    )


@contextmanager
def shards_lent(optimizer: Optimizer) -> Iterator[None]:
    """Lend the optimizer the shards of its DTensors, their gradients and their state.

    The state that it makes meanwhile is placed as the parameter is; what a checkpoint of several
    ranks looks for are DTensors.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    pairs = [(p, _shard(p)) for parameters in groups for p in parameters if is_dtensor(p)]
    lent = {id(parameter): shard for parameter, shard in pairs}
    own = _lend_state(optimizer.state, pairs)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [lent.get(id(p), p) for p in parameters]
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
        _take_back(optimizer.state, pairs, own)


def _shard(parameter: Tensor) -> Tensor:
    shard = local(parameter).detach()
    grad = parameter.grad
    shard.grad = None if grad is None else local(grad)
    return shard


def _lend_state(state: Any, pairs: list[Pair]) -> dict[int, dict[str, Any]]:
    own = {}
    for parameter, shard in pairs:
        if parameter in state:
            entries = own[id(parameter)] = state.pop(parameter)
            state[shard] = {
                name: local(value) if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
    return own


def _take_back(state: Any, pairs: list[Pair], own: dict[int, dict[str, Any]]) -> None:
    for parameter, shard in pairs:
        lent = state.pop(shard, None)
        if lent is None:
            continue
        entries = own.get(id(parameter), {})
        for name in entries.keys() - lent.keys():
            del entries[name]
        for name, value in lent.items():
            before = entries.get(name)
            if not (isinstance(before, Tensor) and local(before) is value):
                entries[name] = _placed(name, value, parameter, shard)
        state[parameter] = entries


def _placed(name: str, value: Any, parameter: Tensor, shard: Tensor) -> Any:
    # a counter of a parameter with no dimension looks as the parameter does
    if name == "step" or not isinstance(value, Tensor) or value.shape != shard.shape:
        return value
    return placed_like(value, parameter)
