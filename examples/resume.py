"""Stop a mixed precision run in the middle, save, start anew, and go on bit for bit.

One state_dict holds the optimizer's state and the whole state of the loss scale.
Run it: python examples/resume.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from halfstep import DynamicLossScale
from halfstep.torch import LossScaleOptimizer, apply_policy

# a scale that changes often, so that a lost counter would show
RULE = DynamicLossScale(initial_scale=2.0**20, growth_interval=5)


def make() -> tuple[nn.Module, LossScaleOptimizer]:
    """A model, float16 inside, and its optimizer."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    apply_policy(model, "mixed_float16")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, LossScaleOptimizer(adam, RULE, max_norm=1.0)


def train(model: nn.Module, optimizer: LossScaleOptimizer, steps: range) -> None:
    """Train on batches that depend on the step alone."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(32, 8, generator=draw)
        optimizer.zero_grad()
        optimizer.backward(F.mse_loss(model(x), 40 * x.sum(1, keepdim=True)))
        optimizer.step()


def main() -> bool:
    """Train 40 steps in one go and in two halves; return whether the results are the same bits."""
    torch.manual_seed(0)
    model, optimizer = make()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optimizer, range(40))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "half.pt"
        first, its_optimizer = make()
        first.load_state_dict(start)
        train(first, its_optimizer, range(20))
        torch.save({"model": first.state_dict(), "optimizer": its_optimizer.state_dict()}, file)

        second, its_optimizer = make()
        saved = torch.load(file)
    second.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(second, its_optimizer, range(20, 40))

    weights = zip(model.parameters(), second.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in weights)
    same = same and its_optimizer.scale_history == optimizer.scale_history
    print(f"skipped {optimizer.skipped_steps} steps, scale {optimizer.current_scale:.0f}")
    print("the resumed run is the same, bit for bit" if same else "the resumed run differs")
    return same


if __name__ == "__main__":
    main()
