"""A small training on this rank, and what can be seen of it; a gloo process imports it."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WIDTH

from halfstep.torch import LossScaleOptimizer

BATCH, STEPS = 8, 3


def batches():
    return torch.randn(STEPS + 2, BATCH, WIDTH, generator=torch.Generator().manual_seed(1))


def mine(x, name):
    """This rank's part of a batch; ranks that share a model's layers share its data."""
    if name.startswith("tensor"):
        return x
    groups = 2 if "x tensor" in name else dist.get_world_size()
    return x.chunk(groups)[dist.get_rank() // (dist.get_world_size() // groups)]


def optimizer_of(model, group=None, loss_scale=None, kind=torch.optim.AdamW, **options):
    inner = kind(model.parameters(), lr=1e-2)
    return LossScaleOptimizer(inner, loss_scale, process_group=group, **options)


def train(model, optimizer, data, factors=(1.0,) * STEPS):
    losses = []
    for x, factor in zip(data, factors, strict=False):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        optimizer.backward(loss * factor)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def mean(values):
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sent(TorchDispatchMode):
    """The dtypes that reductions over ranks are done in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in func.__name__:
            leaves = torch.utils._pytree.tree_leaves(args)
            self.dtypes |= {str(t.dtype) for t in leaves if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))
