"""The convolution benchmark of a well-known article about mixed precision, made for GPUs.

800 images of random noise, 256x256x3, with random labels 0 or 1; three Conv2D of 128 filters with
kernel sizes 2, 1 and 1, flattened into one unit; sigmoid in float32; batches of 50. It measures
time and memory: what it can learn is the noise by heart. The article found (TensorFlow, one GPU)
about 490 ms a step and 8.55 GB with float32, 183 ms and 3.57 GB with mixed_float16.

A CPU would take hours, so there it runs on fewer, smaller images, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TITLE = "The blog's benchmark: three convolutions of 128 filters on images of noise"
METRIC = "loss on the training images"
HIGHER_IS_BETTER = False

IMAGES, SIZE, BATCH, EPOCHS = 800, 256, 50, 10
_images: Tensor
_labels: Tensor


def setup(seed: int, device: str) -> str | None:
    """Draw images and labels; on a CPU fewer and smaller ones, which the note returned says."""
    global IMAGES, SIZE, BATCH, EPOCHS, _images, _labels
    note = None
    if device == "cpu":
        IMAGES, SIZE, BATCH, EPOCHS = 40, 32, 5, 2
        note = (
            f"Scaled down for a CPU: {IMAGES} images of {SIZE}x{SIZE} in batches of {BATCH}, "
            f"{EPOCHS} epochs, not 800 of 256x256 in batches of 50, 10 epochs. "
            "The figures say nothing about a GPU."
        )
    draw = torch.Generator().manual_seed(seed)
    _images = torch.rand(IMAGES, 3, SIZE, SIZE, generator=draw)
    _labels = torch.randint(2, (IMAGES, 1), generator=draw).float()
    return note


class Probability(nn.Module):
    """A sigmoid whose input is float32 whatever the layers before it compute in."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same, float32."""
        return torch.sigmoid(x.float())


def make_model() -> nn.Module:
    """Three convolutions without anything between them, as in the article."""
    return nn.Sequential(
        nn.Conv2d(3, 128, 2),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 1),
        nn.Flatten(),
        nn.Linear(128 * (SIZE - 1) ** 2, 1),
        Probability(),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with Keras' defaults."""
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7)


def batches(epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in a new order each epoch."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for rows in order.view(-1, BATCH):
        yield _images[rows], _labels[rows]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Binary cross entropy; a float16 probability of exactly 0 or 1 would make it infinite."""
    images, labels = batch
    return F.binary_cross_entropy(model(images), labels)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Loss on one batch of the training images: there is nothing to generalise to."""
    device = next(model.parameters()).device
    images, labels = _images[:BATCH].to(device), _labels[:BATCH].to(device)
    return {METRIC: F.binary_cross_entropy(model(images), labels).item()}
