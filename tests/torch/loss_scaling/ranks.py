"""What each of two gloo processes runs; a file of its own, because spawn imports it by path."""

import sys

import torch
import torch.distributed as dist

from halfstep.torch import LossScaleOptimizer

INF = float("inf")


def main(rank, rendezvous, report):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    seen = []
    for kind in (torch.optim.AdamW, torch.optim.RMSprop):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = LossScaleOptimizer(
            kind([weight], lr=0.1), max_norm=1.0, process_group=dist.group.WORLD
        )
        # per rank: a factor of the loss, or None for a rank that has no gradient in this step
        for factors in [(1.0, 1.0), (INF, 1.0), (1.0, INF), (None, 1.0), (INF, None), (None, None)]:
            optimizer.zero_grad()
            before = weight.detach().clone()
            if factors[rank] is not None:
                optimizer.backward((weight * weight).sum() * factors[rank])
            optimizer.step()
            moved = not torch.equal(weight, before)
            seen.append((optimizer.last_step_skipped, optimizer.current_scale, moved))
        seen.append((optimizer.skipped_steps, len(optimizer.scale_history)))
    torch.save(seen, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
