"""A small convolution network reads scikit-learn's handwritten digits.

Data, loss and test are those of ``digits_mlp``; only the model is another.
"""

from __future__ import annotations

import torch
from torch import nn

from halfstep.recipes.digits_mlp import batches as batches
from halfstep.recipes.digits_mlp import evaluate as evaluate
from halfstep.recipes.digits_mlp import loss as loss

TITLE = "Handwritten digits, convolution network with batch normalisation"
EPOCHS = 8
METRIC = "accuracy"
HIGHER_IS_BETTER = True


def make_model() -> nn.Module:
    """Two 3x3 convolutions with batch norm at 8x8 and 4x4 pixels, then one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3)
