"""A custom training loop in Keras' words: nothing is written to .grad.

get_scaled_loss, torch.autograd.grad, get_unscaled_gradients, apply_gradients. Between the last two
the gradients are plain tensors in float32, to log, average or change.
Run it: python examples/custom_loop.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from halfstep.torch import LossScaleOptimizer, apply_policy


def train(steps: int = 60) -> list[float]:
    """Fit a small network to a sine; return the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    apply_policy(model, "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.Adam(model.parameters(), lr=0.02))
    weights = list(model.parameters())
    x = torch.linspace(-3, 3, 64).unsqueeze(1)
    losses = []
    for step in range(steps):
        loss = F.mse_loss(model(x), x.sin())
        scaled = torch.autograd.grad(optimizer.get_scaled_loss(loss), weights)
        gradients = optimizer.get_unscaled_gradients(scaled)
        largest = max(gradient.abs().max().item() for gradient in gradients if gradient is not None)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}, largest gradient {largest:.4f}")
    print(f"last loss {losses[-1]:.4f}, nothing in .grad: {all(w.grad is None for w in weights)}")
    return losses


if __name__ == "__main__":
    train()
