"""Operations that stay in float32, or as exact as they were asked for, whatever stands around."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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
