"""Operations that stay in float32, or as exact as they were asked for, whatever stands around."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfstep.torch import autocast, explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.parametrize("take", ["sum", "mean", "cumsum", "prod"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, None])
def test_a_sum_has_the_dtype_that_it_is_asked_for(take, dtype):
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)

    def run(x):
        return getattr(layer(x), take)(0, dtype=dtype)

    found = autocast(run, backend="aot_eager")(x)
    assert found.dtype == (dtype or torch.float32)
    torch.testing.assert_close(found, run(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_distances_are_float32_with_their_gradient_taken_apart_or_not(backend, far):
    # over 25 rows they are |x|^2 + |y|^2 - 2xy, of which little is left where rows are near
    points = (torch.randn(40, 3) * 0.01 + 1).requires_grad_()
    layer = nn.Linear(3, 4)

    def run(x):
        return torch.cdist(x, 1.01 * x).square().sum() + 1e-6 * layer(x).sum()

    (reference,) = torch.autograd.grad(run(points), points)
    compiled = autocast(run, backend=backend)
    assert far(compiled(points).detach(), run(points).detach()) < 1e-3
    (found,) = torch.autograd.grad(compiled(points), points)
    assert far(found, reference) < 1e-3


def test_an_average_pool_without_a_16_bit_kernel_runs_in_float32():
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.AvgPool3d(2), nn.Conv3d(2, 2, 2))
    x = torch.randn(1, 1, 5, 5, 5)
    autocast(model, backend="aot_eager")(x).sum().backward()
    rows = explain(model, backend="aot_eager")(x).rows
    pools = [row for row in rows if row.operation.startswith("avg_pool3d")]
    assert {row.operation for row in pools} == {"avg_pool3d", "avg_pool3d_backward"}
    assert {row.dtype for row in pools} == {"float32"}
    assert {row.why for row in pools} == {"left alone: the CPU has no 16-bit kernel for it"}


class Decayed(nn.Module):
    """A buffer that a layer takes, scaled a little by what another makes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scales", torch.ones(2, 4, 2))

    def forward(self, x):
        hidden = self.layer(x)
        with torch.no_grad():
            shrink = 1 - 0.001 * torch.sigmoid(hidden.T @ hidden)
            self.scales.transpose(1, 2).mul_(shrink.view(2, 2, 4))
        return hidden @ self.scales[0]


@pytest.mark.parametrize("train", [True, False])
def test_what_is_kept_in_a_buffer_is_not_rounded(train, far):
    model = Decayed()
    reference = copy.deepcopy(model)
    with torch.set_grad_enabled(train):
        compiled = autocast(model, backend="aot_eager")
        for _ in range(10):
            x = torch.randn(8, 4)
            compiled(x)
            reference(x)
    assert far(model.scales - 1, reference.scales - 1) < 0.05
