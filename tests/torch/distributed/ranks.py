"""What each gloo process runs: every check once, its findings written to a file.

Run as a script (``python ranks.py RANK RANKS FOLDER``), because each process must be a fresh one.
"""

import gc
import logging
import sys
import warnings
from pathlib import Path

import clipping
import memory
import replicated
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training import STEPS, Sent, batches, mean, mine, optimizer_of, train, whole
from ways import (
    FOUR,
    MEMORY,
    MEMORY_FOUR,
    OVERRIDES,
    SIXTEEN,
    TWO,
    WIDTH,
    build,
    ddp,
    fsdp_last,
    shard,
)

from halfstep.torch import apply_policy, remove_policy
from halfstep.torch.distributed import TrainingState

# ------------------------------------------------------------------ training


def same_loss(ways, policy):
    """The mean loss of all ranks, step by step, in every way; and on one process."""
    model = apply_policy(build(), policy, OVERRIDES)
    # one that overflows nowhere, nor in the float16 head that torch's mp_policy makes
    scale = 1024 if policy == "mixed_float16" else None
    found = {"one process": train(model, optimizer_of(model, None, scale), batches()).tolist()}
    for name, make in ways.items():
        model = make(policy)
        optimizer = optimizer_of(model, dist.group.WORLD, scale)
        found[name] = mean(train(model, optimizer, [mine(x, name) for x in batches()]))
    return found


# ------------------------------------------------------------------ one rank overflows


def overflow(make):
    """Rank 1 alone meets an infinite loss in the second step."""
    model = make("mixed_float16")
    optimizer = optimizer_of(model, dist.group.WORLD)
    data = [mine(x, "") for x in batches()]
    train(model, optimizer, data[:1])
    before = [whole(p.detach()).clone() for p in model.parameters()]
    train(model, optimizer, data[1:2], (float("inf") if dist.get_rank() == 1 else 1.0,))
    after = [whole(p.detach()) for p in model.parameters()]
    kept = all(map(torch.equal, before, after))
    skipped, scale = optimizer.last_step_skipped, optimizer.current_scale
    train(model, optimizer, data[2:3])
    moved = not all(map(torch.equal, before, [whole(p.detach()) for p in model.parameters()]))
    return {"kept": kept, "skipped": skipped, "scale": scale, "goes on": moved}


def empty_shard():
    """A weight with one row, over two ranks: the second has nothing, and takes part."""
    torch.manual_seed(0)
    model = fully_shard(apply_policy(nn.Linear(WIDTH, 1, bias=False), "mixed_float16"))
    optimizer = optimizer_of(model, dist.group.WORLD)
    train(model, optimizer, [mine(x, "") for x in batches()[:2]], (1.0, float("inf")))
    return {
        "numbers here": model.weight.to_local().numel(),
        "skipped": optimizer.skipped_steps,
        "scale": optimizer.current_scale,
    }


def accumulated():
    """Gradients of two micro-batches, the first without communication, and of one batch."""
    found = []
    x = mine(batches()[0], "")
    for parts in (1, 2):
        model = fsdp_last("mixed_bfloat16")
        for place, part in enumerate(x.chunk(parts)):
            model.set_requires_gradient_sync(place == parts - 1)
            (model(part).square().mean() / parts).backward()
        found.append(torch.cat([whole(p.grad).flatten() for p in model.parameters()]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def parts_and_removal():
    """A slice of a sharded model is a plain one, and a policy can be taken away and given again."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.ones(2, 8)
    fully_shard(model)
    apply_policy(model, "mixed_bfloat16", output_dtype=None)
    kinds = [model(x).dtype]
    sliced = type(model[:1]).__name__
    kinds.append(remove_policy(model)(x).dtype)
    kinds.append(apply_policy(model, "mixed_float16", output_dtype=None)(x).dtype)
    return {"dtypes": [str(kind) for kind in kinds], "slice": sliced}


# ------------------------------------------------------------------ what is kept, what is sent


class Alive(TorchDispatchMode):
    """Which 16-bit storages were made, and which of them are still there."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.dtype is torch.bfloat16:
                storage = tensor.untyped_storage()
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def bytes(self):
        gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def bytes_between():
    """16-bit bytes alive between forward and backward, and the gradients' error."""
    width, x = 128, torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    one = apply_policy(build(width=width), "mixed_bfloat16")
    with Alive() as alive:
        out = one(x)
        kept = {"one process": alive.bytes()}
    out.sum().backward()
    for name, first in (("policy first", True), ("policy last", False)):
        model = build(width=width)
        model = apply_policy(model, "mixed_bfloat16") if first else model
        shard(model)
        model = model if first else apply_policy(model, "mixed_bfloat16")
        for _ in range(2):
            model.zero_grad()
            with Alive() as alive:
                out = model(x)
                kept[name] = alive.bytes()
            out.sum().backward()
        pairs = zip(model.parameters(), one.parameters(), strict=True)
        kept[name + ", same gradients"] = all(torch.equal(whole(a.grad), b.grad) for a, b in pairs)
    kept["weights"] = sum(2 * p.numel() for p in one.parameters() if p.dim() == 2)
    return kept


def hooks_of_others():
    """A user's own saved_tensors_hooks see what is no weight; a broken promise is still noticed."""
    model = shard(apply_policy(build(width=32), "mixed_bfloat16"))
    x = torch.randn(4, 32)
    seen = []

    def pack(tensor):
        seen.append(tuple(tensor.shape))
        return (tensor,)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        out = model(x)
    out.sum().backward()
    changed = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    fully_shard(apply_policy(changed, "mixed_bfloat16", output_dtype=None))
    out = changed(torch.ones(2, 4))
    with torch.no_grad():
        out.add_(1)
    try:
        out.float().sum().backward()
    except RuntimeError as error:
        said = str(error)
    else:
        said = "nothing"
    return {"saved": seen, "said": said}


def reductions():
    """What gradients are reduced in, for every way."""
    found = {}
    for name, make in (TWO | SIXTEEN).items():
        if name.startswith("tensor"):
            continue
        model = make("mixed_bfloat16")
        loss = model(mine(batches()[0], name)).square().mean()
        with Sent() as sent:
            loss.backward()
        found[name] = sorted(sent.dtypes)
    return found


# ------------------------------------------------------------------ checkpoints


def snapshot(model, optimizer):
    inner = optimizer.inner_optimizer
    states = [inner.state[p] for p in model.parameters()]
    return {
        "weights": [whole(p.detach()).clone() for p in model.parameters()],
        "moments": [whole(state["exp_avg"]).clone() for state in states],
        "steps": [float(whole(state["step"])) for state in states],
        "scale": optimizer.current_scale,
        "skipped": optimizer.skipped_steps,
        "history": [tuple(event) for event in optimizer.scale_history],
    }


def save(folder):
    """Train over one overflow, save on these ranks, and write down what was saved."""
    model = fsdp_last("mixed_float16")
    optimizer = optimizer_of(model, dist.group.WORLD)
    data = [mine(x, "") for x in batches()]
    train(model, optimizer, data[:STEPS], (1.0, float("inf"), 1.0))
    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder / "checkpoint")
    return snapshot(model, optimizer)


def load(folder):
    """Load it into another model on these ranks, and take one more step."""
    model = shard(apply_policy(build(seed=7), "mixed_float16", OVERRIDES))
    optimizer = optimizer_of(model, dist.group.WORLD)
    dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=folder / "checkpoint")
    loaded = snapshot(model, optimizer)
    train(model, optimizer, [mine(batches()[STEPS], "")])
    fused = [group.get("fused") for group in optimizer.param_groups]
    return loaded | {"goes on": not optimizer.last_step_skipped, "fused": fused}


def main(rank, ranks, folder):
    logging.getLogger("halfstep").setLevel(logging.ERROR)
    # FSDP2 warns of every module that ends in a view, as nn.Linear does; DCP of plain CPU tensors
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    if ranks == 4:
        found = {
            "losses": same_loss(FOUR, "mixed_bfloat16"),
            "saved": save(folder),
            "clipped": clipping.on_four(),
            "traffic": clipping.traffic(),
            "memory saved": memory.save(folder),
            "memory losses": memory.losses(MEMORY_FOUR),
        }
    else:
        found = {
            "losses": same_loss(TWO, "mixed_bfloat16"),
            "scaled losses": same_loss(TWO, "mixed_float16"),
            "16-bit losses": same_loss(SIXTEEN, "mixed_bfloat16"),
            "overflow": {"ddp": overflow(ddp), "fsdp2": overflow(fsdp_last)},
            "empty": empty_shard(),
            "accumulated": accumulated(),
            "parts": parts_and_removal(),
            "bytes": bytes_between(),
            "hooks": hooks_of_others(),
            "reductions": reductions(),
            "loaded": load(folder),
            "clipped": clipping.on_two(),
            "traffic": clipping.traffic(),
            "memory loaded": memory.load(folder),
            "memory losses": memory.losses(MEMORY),
            "memory overflow": memory.overflows(),
            "memory reductions": memory.reductions(),
            "memory refused": memory.refused(),
            "deferred": memory.deferred(),
            "wanted": memory.wanted(),
            "replicas agree": replicated.agreements(),
            "replicas refused": replicated.refused(),
        }
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
