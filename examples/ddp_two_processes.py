"""Mixed precision under DistributedDataParallel: nothing changes, and all ranks skip together.

Apply the policy first, then wrap the model. Two processes on the CPU talk over gloo and meet at a
file, so that no port is needed. Run it: python examples/ddp_two_processes.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from halfstep.torch import LossScaleOptimizer, apply_policy

RANKS = 2


def train(rank: int, folder: str) -> None:
    """Train on this rank's share; rank 0 meets one batch that overflows."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    apply_policy(model, "mixed_float16")
    parallel = DistributedDataParallel(model)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(parallel.parameters(), lr=0.01), max_norm=1.0)

    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(32, 8, generator=draw)
    for step in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(parallel(x), x.sum(1, keepdim=True))
        if step == 5 and rank == 0:
            loss = loss * float("inf")
        optimizer.backward(loss)
        optimizer.step()

    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save((optimizer.skipped_steps, weights), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def main() -> bool:
    """Return whether both ranks skipped the same steps and hold the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder,), nprocs=RANKS)
        results = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(RANKS)]
    skipped = [count for count, _ in results]
    same = torch.equal(results[0][1], results[1][1])
    print(f"steps skipped on each rank {skipped}, same weights {same}")
    return same and skipped == [max(1, skipped[0])] * RANKS


if __name__ == "__main__":
    raise SystemExit(not main())
