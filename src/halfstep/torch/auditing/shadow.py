"""A copy of a model to run in its place, and the random numbers as they were afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..casting import cast_nested

Model = TypeVar("Model", bound=nn.Module)


def shadow(model: Model) -> Model:
    """Return a copy of ``model`` with buffers of its own and parameters that share its memory.

    The parameters are new objects: gradients, hooks and policies that the copy gets do not reach
    the model, and a large model is not held twice.

    >>> model = nn.BatchNorm1d(2)
    >>> twin = shadow(model)
    >>> twin(torch.randn(4, 2)).sum().backward()
    >>> model.weight.grad, model.running_mean, twin.weight.data_ptr() == model.weight.data_ptr()
    (None, tensor([0., 0.]), True)
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if not isinstance(parameter, UninitializedParameter):
            alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = alias
    return copy.deepcopy(model, memo)


def copied(batch: Any) -> Any:
    """Return the batch with tensors of its own, so that a loss may write into them."""
    return cast_nested(
        batch, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad)
    )


@contextmanager
def random_numbers_kept(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put every generator back at the end: torch's, on each device of the model, NumPy's, Python's.

    Args:
        model: whose devices count.
        seed: of torch's generators meanwhile; None leaves them as they are.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(devices)):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
