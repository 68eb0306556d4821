"""Clipping by the norm of gradients that lie on several ranks, and what a step sends and reads."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from training import batches, mean, mine, optimizer_of, train, whole
from ways import (
    FOUR,
    OVERRIDES,
    TWO,
    build,
    fsdp_last,
    parallel,
    sequence_parallel,
    tensor_last,
    two_dimensions,
)

from halfstep.errors import LossScaleError
from halfstep.torch import GradScaler, apply_policy
from halfstep.torch.loss_scaling import host
from halfstep.torch.shards import is_dtensor, local

MAX_NORM = 0.5
INF = float("inf")


def as_torch_does(model, scale):
    """What ``clip_grad_norm_`` finds.

    Of DTensors on several meshes, or beside plain tensors, it wants whole ones (torch 2.13).
    """
    grads = [p.grad / scale for p in model.parameters()]
    if len({getattr(grad, "device_mesh", None) for grad in grads}) > 1:
        grads = [whole(grad) for grad in grads]
    return float(whole(nn.utils.get_total_norm(grads)))


def one_way(model, scale, data):
    """The norm of the first step, torch's own, and the losses of the next."""
    optimizer = optimizer_of(model, None, scale, max_norm=MAX_NORM)
    optimizer.backward(model(data[0]).square().mean())
    theirs = as_torch_does(model, scale or 1)
    optimizer.step()
    ours = float(optimizer.last_grad_norm)
    return {"norm": ours, "theirs": theirs, "losses": mean(train(model, optimizer, data[1:]))}


def clipped(ways):
    """For every way, with a scale and without one; no process group is passed."""
    found = {}
    for policy, scale in (("mixed_float16", 1024), ("mixed_bfloat16", None)):
        one = apply_policy(build(), policy, OVERRIDES)
        found[policy, "one process"] = one_way(one, scale, batches())
        for name, make in ways.items():
            if name != "fsdp2, torch's mp_policy":  # there the head is in 16 bits
                found[policy, name] = one_way(
                    make(policy), scale, [mine(x, name) for x in batches()]
                )
    return found


def on_two():
    found = clipped(TWO | {"sequence parallel": sequence_parallel})
    return found | {"idle": rank_without_any(), "scaler": grad_scaler()}


def grad_scaler():
    """The drop-in scaler: rank 1 alone meets an infinity in its shards."""
    found = {}
    for name, make in {"fsdp2": fsdp_last, "tensor parallel": tensor_last}.items():
        model, scaler = make("mixed_float16"), GradScaler("cpu")
        optimizer = torch.optim.AdamW(model.parameters())
        loss = model(mine(batches()[0], name)).square().mean()
        scaler.scale(loss).backward()
        if dist.get_rank() == 1:
            local(next(p for p in model.parameters() if is_dtensor(p)).grad).fill_(INF)
        before = [whole(p.detach()).clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        after = [whole(p.detach()) for p in model.parameters()]
        found[name] = (scaler.get_scale(), all(map(torch.equal, before, after)))
    return found


def rank_without_any():
    """Rank 1 holds no gradients at all, with a scale and without one."""
    found = []
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model = fsdp_last(policy)
        optimizer = optimizer_of(model, None, max_norm=MAX_NORM)
        before = [p.detach().clone().to_local() for p in model.parameters()]
        optimizer.backward(model(mine(batches()[0], "")).square().mean())
        squares = sum(float(p.grad.to_local().square().sum()) for p in model.parameters())
        if dist.get_rank() == 1:
            optimizer.zero_grad()
        optimizer.step()
        norm = float(optimizer.last_grad_norm) * optimizer.current_scale
        after = [p.detach().to_local() for p in model.parameters()]
        found.append((norm, squares**0.5, not all(map(torch.equal, before, after))))
    return found


# ------------------------------------------------------------------ meshes that are a part of all


def said(action):
    try:
        action()
    except LossScaleError as error:
        return str(error)
    return "nothing"


def pairs():
    """Two pairs of tensor-parallel ranks: a mesh that does not say whether the pairs agree."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    model = apply_policy(parallel(build(), mesh), "mixed_float16", OVERRIDES)
    silent = optimizer_of(model, None, 1024, max_norm=MAX_NORM)
    silent.backward(model(batches()[0]).square().mean())
    refused = said(silent.step)
    silent.zero_grad()
    told = optimizer_of(model, dist.group.WORLD, 1024, max_norm=MAX_NORM)
    told.backward(model(batches()[0]).square().mean())
    told.step()
    norm = float(told.last_grad_norm)
    told.zero_grad()
    bad = INF if dist.get_rank() == 3 else 1.0
    told.backward(model(batches()[0]).square().mean() * bad)
    told.step()
    return {"refused": refused, "norm": norm, "skipped": told.last_step_skipped}


def on_four():
    return clipped(FOUR) | {"pairs": pairs()}


# ------------------------------------------------------------------ what a step sends and reads


class Seen(TorchDispatchMode):
    """Collectives, reads on the host, and steps by a fused kernel."""

    def __init__(self):
        super().__init__()
        self.sent, self.read, self.fused = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.sent += func.namespace in ("c10d", "_c10d_functional")
        self.read += func is torch.ops.aten._local_scalar_dense.default
        self.fused += "_fused_" in func.__name__
        return func(*args, **(kwargs or {}))


def traffic():
    """What the second step of each optimizer sends and reads, as on a device."""
    ways = {"fsdp2": fsdp_last, "tensor parallel": tensor_last}
    if dist.get_world_size() == 4:
        ways = {"fsdp2 x tensor parallel": two_dimensions}
    free, host.CPU_IS_FREE = host.CPU_IS_FREE, False
    try:
        return {
            (name, kind.__name__, max_norm): second_step(make, kind, max_norm, name)
            for name, make in ways.items()
            for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
            for max_norm in (None, MAX_NORM)
        } | {
            (name, "undone", None): second_step(make, torch.optim.RMSprop, None, name, "device")
            for name, make in ways.items()
        }
    finally:
        host.CPU_IS_FREE = free


def second_step(make, kind, max_norm, name, skip="auto"):
    model = make("mixed_float16")
    optimizer = optimizer_of(model, None, 1024, kind, max_norm=max_norm, skip=skip)
    train(model, optimizer, [mine(batches()[0], name)])
    optimizer.zero_grad()
    optimizer.backward(model(mine(batches()[1], name)).square().mean())
    with Seen() as seen:
        optimizer.step()
    states = optimizer.inner_optimizer.state
    placed = all(
        type(value) is type(parameter.data)
        for parameter, state in states.items()
        for key, value in state.items()
        if key != "step"
    )
    return {"sent": seen.sent, "read": seen.read, "fused": seen.fused, "placed": placed}
