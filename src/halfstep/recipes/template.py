"""My recipe: two spirals, told apart by a small network.

Run it:    halfstep compare THIS_FILE --html result.html
Then change it, function by function, into your own training run. Nothing here knows about
precision: the same functions are run once under each policy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How long to train when the command gives neither --steps nor --epochs. STEPS works as well.
EPOCHS = 10

# Which number of evaluate() counts, and whether more of it is better.
METRIC = "accuracy"
HIGHER_IS_BETTER = True

# Two results count as the same when they differ by no more than this share of the first one. It
# is not used here: evaluate() says how many "examples" its accuracy is a share of, and then one
# binomial standard error decides.
SAME_WITHIN = 0.01

_points: Tensor
_labels: Tensor


def setup(seed: int, device: str) -> str | None:
    """Optional. Runs once, before anything else: load your data here.

    Return a string to have it shown with the result, or None.
    """
    global _points, _labels
    draw = torch.Generator().manual_seed(seed)
    angle = torch.rand(2000, generator=draw) * 9
    _labels = torch.randint(2, (2000,), generator=draw)
    turned = angle + torch.pi * _labels
    _points = torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1) / 5
    return None


def make_model() -> nn.Module:
    """Return a new model, float32 and on the CPU. It is moved to the device for you.

    Random weights are fine: every policy gets a copy of the same ones.
    """
    return nn.Sequential(
        nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over the model's parameters. Loss scaling is added around it."""
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def batches(epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training batches of one epoch, the same ones for the same arguments.

    A batch is a tensor, or a tuple, list or dict of tensors; it is moved to the device for you.
    """
    draw = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(1600, generator=draw)
    for rows in order.view(-1, 64):
        yield _points[rows], _labels[rows]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the training loss, a scalar. The model is in training mode."""
    points, labels = batch
    return F.cross_entropy(model(points), labels)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return numbers by name. The model is in evaluation mode and no gradients are kept.

    "examples" is optional: how many examples METRIC is a share of.
    """
    device = next(model.parameters()).device
    points, labels = _points[1600:].to(device), _labels[1600:].to(device)
    right = model(points).argmax(1) == labels
    return {"accuracy": right.float().mean().item(), "examples": len(labels)}
