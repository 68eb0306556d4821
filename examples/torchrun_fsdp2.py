"""Mixed precision under FSDP2: sharded weights, one overflow, a checkpoint, all on two processes.

Run it:  torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.distributed import TrainingState, fsdp_policy


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def build(seed: int) -> tuple[nn.Module, LossScaleOptimizer]:
    """Return a sharded model in mixed_float16 and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), Block(32), Block(32), nn.Linear(32, 1))
    apply_policy(model, "mixed_float16", {"3": "float32"})  # the head keeps its digits
    for layer in (model[1], model[2], model):
        # blocks are gathered in float16; the root, which has the head, in float32
        fully_shard(layer, mp_policy=fsdp_policy(layer))
    # made after sharding: it must hold the shards; they tell it which ranks skip together
    inner = torch.optim.AdamW(model.parameters(), lr=0.003)
    return model, LossScaleOptimizer(inner, max_norm=1.0)


def train(model: nn.Module, optimizer: LossScaleOptimizer, steps: range) -> float:
    """Train on this rank's share; rank 0 meets one batch that overflows."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in steps:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        bad = step == 5 and dist.get_rank() == 0
        optimizer.backward(loss * float("inf") if bad else loss)
        optimizer.step()
    return loss.item()


def main() -> None:
    """Train, save, go on in another model from what was saved, and compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    where = Path(folder[0]) / "checkpoint"

    model, optimizer = build(seed=0)
    train(model, optimizer, range(10))
    dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=where)
    loss = train(model, optimizer, range(10, 15))

    other, resumed = build(seed=1)
    dcp.load({"training": TrainingState(other, resumed)}, checkpoint_id=where)
    same = train(other, resumed, range(10, 15)) == loss
    skipped = resumed.skipped_steps, resumed.current_scale
    print(f"rank {dist.get_rank()}: skipped {skipped[0]}, scale {skipped[1]:g}, resumed {same}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
