"""A small model and the ways to be distributed; ``ranks.py`` imports it from its own folder."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from halfstep.torch import apply_policy
from halfstep.torch.distributed import float32_allreduce_hook, fsdp_policy

WIDTH = 16
OVERRIDES = {"head": "float32"}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width=WIDTH, checkpointed=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 1)
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options)


def shard(model, mesh=None, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    # by itself: FSDP2 takes weights of one dtype only, and an override leaves the head in float32
    fully_shard(model.head, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


# ------------------------------------------------------------------ the ways to be distributed


def ddp(policy, hook=None):
    wrapped = DistributedDataParallel(apply_policy(build(), policy, OVERRIDES))
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    return wrapped


def fsdp_last(policy):
    return shard(apply_policy(build(), policy, OVERRIDES))


def fsdp_first(policy):
    return apply_policy(shard(build()), policy, OVERRIDES)


def fsdp_torch_mp(policy):
    # its 16-bit weights reach the float32 head too, so there is no override here
    mp = MixedPrecisionPolicy(getattr(torch, policy.removeprefix("mixed_")), torch.float32)
    return apply_policy(shard(build(), mp_policy=mp), policy)


def fsdp_our_mp(policy, **options):
    model = apply_policy(build(), policy, OVERRIDES)
    for block in (*model.blocks, model.head):
        fully_shard(block, mp_policy=fsdp_policy(block, **options))
    return fully_shard(model, mp_policy=fsdp_policy(model, **options))


def fsdp_checkpointed(policy):
    return shard(apply_policy(build(checkpointed=True), policy, OVERRIDES))


def parallel(model, mesh):
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tensor_last(policy):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallel(apply_policy(build(), policy, OVERRIDES), mesh)


def tensor_first(policy):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return apply_policy(parallel(build(), mesh), policy, OVERRIDES)


def sequence_parallel(policy):
    """The norms see a part of each sequence: their gradients are sums that are not made yet."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = apply_policy(build(), policy, OVERRIDES)
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    head = ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate())
    return parallelize_module(model, mesh, {"head": head})


def two_dimensions(policy):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = apply_policy(parallel(build(), mesh["tensor"]), policy, OVERRIDES)
    return shard(model, mesh["data"])


def two_dimensions_last(policy):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallel(apply_policy(build(), policy, OVERRIDES), mesh["tensor"])
    return shard(model, mesh["data"])


def hybrid(policy):
    """Sharded over two ranks, and replicated over the two pairs of them (HSDP)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return shard(apply_policy(build(), policy, OVERRIDES), mesh)


def hybrid_last(policy):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return apply_policy(shard(build(), mesh), policy, OVERRIDES)


TWO = {
    "ddp": ddp,
    "fsdp2, policy last": fsdp_first,
    "fsdp2, policy first": fsdp_last,
    "fsdp2, torch's mp_policy": fsdp_torch_mp,
    "fsdp2, fsdp_policy": fsdp_our_mp,
    "fsdp2, checkpointed": fsdp_checkpointed,
    "tensor parallel, policy first": tensor_last,
    "tensor parallel, policy last": tensor_first,
}
MEMORY = {
    "ddp": ddp,
    "ddp, float32 hook": lambda policy: ddp(policy, float32_allreduce_hook),
    "fsdp2, policy last": fsdp_first,
    "fsdp2, policy first": fsdp_last,
    "fsdp2, fsdp_policy": fsdp_our_mp,
    "tensor parallel, policy first": tensor_last,
    "tensor parallel, policy last": tensor_first,
}
FOUR = {
    "ddp": ddp,
    "fsdp2, policy first": fsdp_last,
    "fsdp2 x tensor parallel": two_dimensions,
    "fsdp2, hybrid": hybrid,
    "fsdp2, hybrid, policy last": hybrid_last,
}
MEMORY_FOUR = FOUR | {"fsdp2 x tensor parallel, policy first": two_dimensions_last}
SIXTEEN = {
    "ddp, float16 hook": lambda policy: ddp(policy, default_hooks.fp16_compress_hook),
    "fsdp2, reduce_dtype": lambda policy: fsdp_our_mp(policy, reduce_dtype="bfloat16"),
}
