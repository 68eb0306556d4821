"""Under DistributedDataParallel one rank watches, or each does with a record of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.core.record import read_record
from halfstep.torch import LossScaleOptimizer, NumericsMonitor

RECORDS = ("run.jsonl", "each-{rank}.jsonl")


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for record in RECORDS:
            _train(rank, f"{folder}/{record}")
    finally:
        dist.destroy_process_group()


def _train(rank, record):
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with NumericsMonitor(model, optimizer, every=2, record=record):
        for step in range(3):
            optimizer.zero_grad()
            data = torch.full((2, 4), float(step + rank + 1)) * torch.arange(4)
            bad = float("inf") if (step, rank) == (1, 1) else 1.0
            optimizer.backward((model(data) * bad).square().mean())
            optimizer.step()


def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    names = ["each-0.jsonl", "each-1.jsonl", "run.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names
    for name in names:
        events = read_record(tmp_path / name).events
        assert [e["step"] for e in events if e["event"] == "numerics"] == [1, 3]
        assert {e["path"] for e in events if e["event"] == "tensor"} == {"0", "1"}
        # the gradients are equal on all ranks, so each sees the other's infinity
        (skip,) = [e for e in events if e["event"] == "skip"]
        assert (skip["step"], skip["not_finite"]) == (2, 4)
