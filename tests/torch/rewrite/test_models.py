"""Whole models, rewritten: every matrix product in 16 bits, few casts, gradients as near as
``torch.autocast``'s."""

from __future__ import annotations

import pytest
import torch

from halfstep.torch import explain

# casts of the rewritten graph and of torch.autocast with CUDA's lists, forward and backward
CASTS = {
    "mlp": (16, 19),
    "gpt": (28, 32),
    "gpt fused": (24, 28),
    "llama": (27, 44),
    "convnet": (11, 11),
    "convnet in place": (11, 11),
}


@pytest.mark.parametrize("name", CASTS)
def test_all_products_are_low_with_no_more_casts_than_autocast(
    name, model_and_batch, torch_autocast
):
    model, batch = model_and_batch(name)
    explanation = explain(model, backend="aot_eager")(*batch)
    low, products = explanation.low_products
    assert low == products > 0
    ours, theirs = CASTS[name]
    assert explanation.casts <= ours
    assert torch_autocast(model, batch) == theirs
    assert explanation.graphs == 1
    assert not explanation.breaks


@pytest.mark.parametrize("name", CASTS)
def test_gradients_are_as_near_to_float32_as_autocasts(
    name, model_and_batch, torch_autocast, gradients_of, rewritten, far
):
    model, batch = model_and_batch(name)
    exact = gradients_of(model, lambda mine: mine(*batch).backward())
    theirs = gradients_of(model, lambda mine: torch_autocast(mine, batch))
    ours = rewritten(model, batch)
    assert ours.dtype == torch.float32
    assert 0 < far(ours, exact) <= 1.05 * far(theirs, exact)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_float16_is_nearer_than_bfloat16(name, model_and_batch, gradients_of, rewritten, far):
    model, batch = model_and_batch(name)
    exact = gradients_of(model, lambda mine: mine(*batch).backward())
    assert far(rewritten(model, batch, "mixed_float16"), exact) < 0.002


def test_inductor_compiles_the_painted_graph(model_and_batch, gradients_of, far):
    from halfstep.torch import autocast

    model, batch = model_and_batch("mlp")
    exact = gradients_of(model, lambda mine: mine(*batch).backward())
    compiled = autocast(model)
    compiled(*batch).backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert 0 < far(ours, exact) < 0.01
