"""A model with a policy under DistributedDataParallel, on two gloo processes."""

import contextlib
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halfstep import Policy
from halfstep.torch import LossScaleOptimizer, apply_policy


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x, part):
        for layer in self.layers[: 2 if part else 4]:
            x = layer(x).relu()
        return self.head(x)


def _worker(rank, file, find_unused, steps, queue):
    logging.getLogger("halfstep").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = Model()
        if not find_unused:
            del model.unused
        apply_policy(model, "mixed_float16", {"head": "float32"})
        wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
        optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        data = torch.randn(steps, 2, 4, 8, generator=torch.Generator().manual_seed(1))
        for step in range(steps):
            optimizer.zero_grad()
            # accumulate over two micro-batches, the first without synchronising
            for micro in range(2):
                quiet = wrapped.no_sync() if micro == 0 and not find_unused else None
                with quiet or contextlib.nullcontext():
                    loss = wrapped(data[step, rank], find_unused).square().mean()
                    optimizer.backward(loss / 2)
            optimizer.step()
        unused = model.unused.weight.grad is None if find_unused else None
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        queue.put((rank, weights.numpy(), optimizer.current_scale, unused))
    finally:
        dist.destroy_process_group()


def _run(tmp_path, find_unused, steps=4):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_worker, args=(r, tmp_path / "store", find_unused, steps, queue))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    results = sorted((queue.get(timeout=120) for _ in processes), key=lambda r: r[0])
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return results


def _single(find_unused, steps=4):
    torch.manual_seed(0)
    model = Model()
    if not find_unused:
        del model.unused
    apply_policy(model, Policy("mixed_float16", loss_scale=None), {"head": "float32"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(steps, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        optimizer.zero_grad()
        (model(data[step].flatten(0, 1), find_unused).square().mean() * 1024).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("find_unused", [False, True])
def test_two_processes_train_like_one(find_unused, tmp_path, relative_error):
    (_, first, scale, unused), (_, second, other_scale, _) = _run(tmp_path, find_unused)
    assert (first == second).all()
    assert scale == other_scale
    assert relative_error(torch.from_numpy(first), _single(find_unused)) < 2e-3
    if find_unused:
        assert unused, "a parameter that no rank used keeps no gradient, as without a policy"
