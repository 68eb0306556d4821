"""Train a classifier on handwritten digits in mixed_float16.

Two lines make it mixed precision: apply_policy around the model, LossScaleOptimizer around the
optimizer. Run it: python examples/train_classifier.py [--policy mixed_bfloat16] [--epochs 4]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from halfstep.torch import LossScaleOptimizer, apply_policy, policy_summary


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1797 images of 8x8 pixels in 0..1, and their labels, in a random order."""
    found = load_digits()
    order = torch.randperm(len(found.target))
    images = torch.tensor(found.data, dtype=torch.float32) / 16
    return images[order], torch.tensor(found.target)[order]


def train(policy: str, epochs: int) -> float:
    """Return the accuracy on the last 397 images."""
    torch.manual_seed(0)
    images, labels = digits()
    model = nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64), nn.GELU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    apply_policy(model, policy, {"5": "float32"})
    print(policy_summary(model))
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), max_norm=1.0)

    for epoch in range(epochs):
        for rows in torch.randperm(1400).split(70):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.backward(loss)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, scale {optimizer.current_scale:.0f}")

    model.eval()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    accuracy = right.float().mean().item()
    print(f"accuracy {accuracy:.3f}, skipped steps {optimizer.skipped_steps}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    train(arguments.policy, arguments.epochs)
