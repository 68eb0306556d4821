"""Weights of 16 bits on several ranks: their masters and compensations are shards as they are."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from training import STEPS, Sent, batches, mean, mine, optimizer_of, train, whole
from ways import MEMORY, OVERRIDES, build, ddp, fsdp_first, fsdp_last, shard, tensor_last

from halfstep.errors import PolicyError
from halfstep.torch import apply_policy, remove_policy
from halfstep.torch.distributed import TrainingState
from halfstep.torch.masters import kept_of

POLICIES = ("master_bfloat16", "master_float16", "kahan_bfloat16")
INF = float("inf")


def scale_of(policy):
    return 1024 if policy == "master_float16" else None


def losses(ways):
    """The mean loss of all ranks, and on one process; the first step's masters, too."""
    found = {}
    for policy in POLICIES:
        one = apply_policy(build(), policy, OVERRIDES)
        optimizer = optimizer_of(one, None, scale_of(policy))
        exact = rests(one)
        found[policy, "one process"] = train(one, optimizer, batches()).tolist()
        for name, make in ways.items():
            model = make(policy)
            optimizer = optimizer_of(model, None, scale_of(policy))
            alike = all(map(close, exact, rests(model)))
            trained = mean(train(model, optimizer, [mine(x, name) for x in batches()]))
            placed = all(
                isinstance(kept_of(p).rest, DTensor) == isinstance(p, DTensor)
                for p in model.parameters()
                if p.dtype is not torch.float32
            )
            found[policy, name] = {"losses": trained, "same digits": alike, "placed": placed}
    return found


def close(a, b):
    # a compensation may be cut from one that was rounded to 16 bits before
    return torch.equal(a, b) if a.dtype is torch.float32 else torch.allclose(a, b, rtol=2**-7)


def rests(model):
    """What is kept of each 16-bit weight, whole."""
    low = [p for p in model.parameters() if p.dtype is not torch.float32]
    return [whole(kept_of(p).rest).clone() for p in low]


def snapshot(model, optimizer):
    """Everything that a step may change, whole, from this rank's point of view."""
    found = [whole(p.detach()).clone() for p in model.parameters()]
    for parameter in model.parameters():
        state = optimizer.inner_optimizer.state[parameter]
        found += [whole(value).clone() for _, value in sorted(state.items())]
    return found + rests(model)


def same_everywhere(tensors):
    """Whether rank 0 has the same, bit for bit."""
    mine_ = torch.cat([tensor.double().flatten() for tensor in tensors])
    theirs = mine_.clone()
    dist.broadcast(theirs, 0)
    return torch.equal(mine_, theirs)


def overflows():
    """Rank 1 alone meets an infinite loss in the second step."""
    found = {}
    ways = {"ddp": ddp, "fsdp2": fsdp_last, "tensor parallel": tensor_last}
    for policy in ("master_float16", "kahan_bfloat16"):
        for name, make in ways.items():
            model = make(policy)
            optimizer = optimizer_of(model, None, 1024)
            data = [mine(x, name) for x in batches()]
            train(model, optimizer, data[:1])
            before = snapshot(model, optimizer)
            factor = INF if dist.get_rank() == 1 else 1.0
            train(model, optimizer, data[1:2], (factor,))
            kept = all(map(torch.equal, before, snapshot(model, optimizer)))
            skipped = optimizer.last_step_skipped
            train(model, optimizer, data[2:3])
            after = snapshot(model, optimizer)
            found[policy, name] = {
                "kept": kept,
                "skipped": skipped,
                "goes on": not all(map(torch.equal, before, after)),
                "in step": same_everywhere(after),
            }
    return found


def reductions():
    """In which dtype 16-bit gradients are summed."""
    found = {}
    for name in ("ddp", "ddp, float32 hook", "fsdp2, policy first", "fsdp2, fsdp_policy"):
        model = MEMORY[name]("master_bfloat16")
        loss = model(mine(batches()[0], name)).square().mean()
        with Sent() as sent:
            loss.backward()
        found[name] = sorted(sent.dtypes)
    return found


# ------------------------------------------------------------------ checkpoints


def make(policy, seed=0):
    model = shard(apply_policy(build(seed=seed), policy, OVERRIDES))
    return model, optimizer_of(model, None, 1024)


def save(folder):
    """Train over one overflow, save on these ranks, and write down what was saved."""
    found = {}
    for policy in POLICIES:
        model, optimizer = make(policy)
        train(model, optimizer, [mine(x, "") for x in batches()[:STEPS]], (1.0, INF, 1.0))
        where = folder / f"checkpoint-{policy}"
        dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=where)
        found[policy] = snapshot(model, optimizer)
    return found


def load(folder):
    """Load it into other models on these ranks, and take one more step."""
    found = {}
    for policy in POLICIES:
        model, optimizer = make(policy, seed=7)
        where = folder / f"checkpoint-{policy}"
        dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=where)
        loaded = snapshot(model, optimizer)
        train(model, optimizer, [mine(batches()[STEPS], "")])
        states = optimizer.inner_optimizer.state.values()
        found[policy] = {
            "loaded": loaded,
            "skipped": optimizer.skipped_steps,
            "state": {str(state["exp_avg"].dtype) for state in states},
            "goes on": not all(map(torch.equal, loaded, snapshot(model, optimizer))),
        }
    return found


# ------------------------------------------------------------------ what cannot be


def deferred():
    """Built on the meta device, sharded, and only then given memory, in either order."""
    found = {}
    for name, first in (("policy first", True), ("policy last", False)):
        with torch.device("meta"):
            model = build()
        model = apply_policy(model, "master_float16") if first else model
        shard(model)
        model = model if first else apply_policy(model, "master_float16")
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        optimizer = optimizer_of(model)
        train(model, optimizer, [mine(x, "") for x in batches()])
        model.to("cpu")
        exact = rests(model)[1]
        found[name] = (optimizer.current_scale, float(exact.mean()), exact.dtype is torch.float32)
    return found


def wanted():
    """The loss scale that a policy wants, where FSDP2 has put other parameters in its place."""
    kinds = {}
    for policy in ("mixed_bfloat16", "master_bfloat16", "mixed_float16"):
        for name, make in (("policy first", fsdp_last), ("policy last", fsdp_first)):
            kinds[policy, name] = type(optimizer_of(make(policy)).loss_scale).__name__
    return kinds


def refused():
    """Another dtype after FSDP2 took note of them; a bare optimizer; and what is possible."""
    found = {}
    model = fsdp_first("master_bfloat16")
    bare = torch.optim.AdamW(model.parameters())
    model(mine(batches()[0], "")).sum().backward()
    for name, action in (("bare", bare.step), ("removed", lambda: remove_policy(model))):
        try:
            action()
        except PolicyError as error:
            found[name] = str(error)
    exact = [p.clone() for p in build().parameters()]
    early = remove_policy(fsdp_last("master_bfloat16"))
    back = [whole(p.detach()) for p in early.parameters()]
    found["digits come back"] = all(map(torch.equal, exact, back))
    return found
