"""What DistributedDataParallel must be told; ``ranks.py`` imports it from its own folder."""

import torch
import torch.distributed as dist
from memory import POLICIES, same_everywhere, scale_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import batches, mine, optimizer_of
from ways import WIDTH

from halfstep.errors import PolicyError
from halfstep.torch import apply_policy, remove_policy, weights_unchanged
from halfstep.torch.masters import exact_of


class Heads(nn.Module):
    """Two heads with losses of their own, of enough weights to be cast together."""

    def __init__(self, checkpointed=False):
        super().__init__()
        heads = [nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2)]
        self.heads = nn.ModuleList(heads)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            x = x.requires_grad_()
            return [checkpoint(head, x, use_reentrant=True) for head in self.heads]
        return [head(x) for head in self.heads]


def build(policy, checkpointed=False, seed=0):
    torch.manual_seed(seed)
    return apply_policy(Heads(checkpointed), policy)


def ranks_agree_after(losses_of, model, policy):
    """Train on this rank's batches, and see whether all ranks have the same weights then."""
    optimizer = optimizer_of(model, None, scale_of(policy))
    for x in batches():
        optimizer.zero_grad()
        losses_of(model, optimizer, mine(x, ""))
        optimizer.step()
    return same_everywhere([exact_of(p) for p in model.parameters()])


def each_head(model, optimizer, x):
    for output in model(x):
        optimizer.backward(output.square().mean())


def all_heads(model, optimizer, x):
    optimizer.backward(sum(output.square().mean() for output in model(x)))


def in_micro_batches(model, optimizer, x):
    with weights_unchanged(model.module):
        with model.no_sync():
            all_heads(model, optimizer, x[:2])
        all_heads(model, optimizer, x[2:])


def agreements():
    found = {}
    for policy in ("mixed_bfloat16", *POLICIES):
        found[policy, "a loss each"] = ranks_agree_after(
            each_head, DistributedDataParallel(build(policy)), policy
        )
        found[policy, "checkpointed"] = ranks_agree_after(
            all_heads, DistributedDataParallel(build(policy, checkpointed=True)), policy
        )
        found[policy, "unlike seeds"] = ranks_agree_after(
            all_heads, DistributedDataParallel(build(policy, seed=dist.get_rank())), policy
        )
    found["mixed_bfloat16", "checkpointed micro-batches"] = ranks_agree_after(
        in_micro_batches,
        DistributedDataParallel(build("mixed_bfloat16", checkpointed=True)),
        "mixed_bfloat16",
    )
    return found


def says(function):
    try:
        function()
    except PolicyError as error:
        return str(error)
    return ""


def refused():
    """Changing the dtype of a weight that DistributedDataParallel has taken note of."""
    torch.manual_seed(0)
    late = Heads()
    wrapped = DistributedDataParallel(late)
    apply_policy(late, "master_bfloat16")
    trained = DistributedDataParallel(build("kahan_bfloat16"))
    trained(torch.ones(2, WIDTH))
    mixed = DistributedDataParallel(Heads())
    return {
        "seen in forward": says(lambda: wrapped(torch.ones(2, WIDTH))),
        "seen around": says(lambda: remove_policy(trained.module)),
        "seen within": says(lambda: apply_policy(mixed, "master_float16")),
        "float32 variables": says(lambda: remove_policy(apply_policy(mixed, "mixed_float16"))),
    }
