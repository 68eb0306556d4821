"""Values that are refined a little at a time, in a loop that is written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfstep.torch import autocast, explain


class Refined(nn.Module):
    """``x = x + small * f(x)``: a sampler, the steps of an equation, the refinement of a flow."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        for _ in range(12):
            x = x + 0.02 * self.down(torch.tanh(self.up(x)))
        return x


class InnerSteps(nn.Module):
    """Weights after a few steps of gradient descent, and what they make of an input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        weight = self.layer.weight
        for _ in range(6):
            gradient = torch.func.grad(lambda w: F.mse_loss(x @ w.T, x.flip(0)))(weight)
            weight = weight - 0.05 * gradient
        return x @ weight.T


class Coordinates(nn.Module):
    """Places in an image, moved a little: a number of pixels, of which a fraction counts."""

    def __init__(self):
        super().__init__()
        self.move = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("grid", torch.arange(400.0).view(1, 1, 1, -1).expand(1, 2, 4, -1))

    def forward(self, x):
        start = self.grid.expand(len(x), -1, -1, -1)
        places = start
        for _ in range(3):
            places = places + 0.1 * self.move(x + places - start)
        return places - start


MODELS = {
    "refined": (Refined, lambda: torch.randn(4, 8)),
    "inner steps": (InnerSteps, lambda: torch.randn(16, 8)),
    "coordinates": (Coordinates, lambda: torch.randn(2, 2, 4, 400)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_refined_is_as_near_to_float32_as_under_autocast(name, far):
    build, make = MODELS[name]
    model, x = build(), make()

    def results(run):
        mine = copy.deepcopy(model)
        out = run(mine)
        out.square().sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in mine.parameters()])

    def theirs(mine):
        with torch.autocast("cpu", torch.bfloat16):
            return mine(x).float()

    exact = results(lambda mine: mine(x))
    found = results(lambda mine: autocast(mine, backend="aot_eager")(x))
    for ours, autocasts, reference in zip(found, results(theirs), exact, strict=True):
        assert 0 < far(ours, reference) <= 1.1 * far(autocasts, reference)


def test_a_bias_is_added_in_16_bits():
    weight, bias = torch.randn(8, 8), torch.randn(8)

    def layers(x):
        return torch.tanh(x @ weight + bias) @ weight

    rows = explain(layers, backend="aot_eager")(torch.randn(4, 8)).rows
    assert {row.dtype for row in rows if row.operation in ("add", "tanh")} == {"bfloat16"}
