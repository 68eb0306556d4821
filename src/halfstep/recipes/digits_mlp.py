"""A small perceptron reads scikit-learn's handwritten digits (1797 real images of 8x8 pixels).

Data: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, as
``sklearn.datasets.load_digits`` ships them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

TITLE = "Handwritten digits, perceptron with two hidden layers"
EPOCHS = 15
METRIC = "accuracy"
HIGHER_IS_BETTER = True
BATCH = 64


@cache
def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images (N, 1, 8, 8) in 0..1, training labels, test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=450, stratify=digits.target, random_state=0
    )
    return images[train], images[test], labels[train], labels[test]


def make_model() -> nn.Module:
    """64 - 256 - 256 - 10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def batches(epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in a new order each epoch; the last, smaller batch is left out."""
    images, _, labels, _ = split()
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch)
    )
    for rows in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
        yield images[rows], labels[rows]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, in nats."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Accuracy and cross entropy on the 450 test images."""
    _, images, _, labels = split()
    device = next(model.parameters()).device
    logits = model(images.to(device)).cpu()
    right = (logits.argmax(1) == labels).float().mean().item()
    return {
        "accuracy": right,
        "loss": F.cross_entropy(logits, labels).item(),
        "examples": len(labels),
    }
