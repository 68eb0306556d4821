"""A script written for torch.amp: only the import of GradScaler is changed.

Run it: python examples/grad_scaler_drop_in.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from halfstep.torch import GradScaler  # was: from torch.amp import GradScaler


def train(steps: int = 30) -> tuple[list[float], GradScaler]:
    """Return the losses and the scaler; the eighth batch is broken on purpose."""
    torch.manual_seed(0)
    device = "cpu"
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = GradScaler(device)
    x, y = torch.randn(64, 16), torch.randint(4, (64,))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        if step == 7:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scaler.get_scale():.0f}")
    for event in scaler.scale_history:  # what torch.amp's cannot say
        print(f"step {event.step}: skipped {event.skipped}, scale now {event.scale:.0f}")
    return losses, scaler


if __name__ == "__main__":
    train()
