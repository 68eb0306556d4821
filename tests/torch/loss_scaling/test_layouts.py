"""Weights, gradients and state that lie in memory in different orders: the same steps as unwrapped.

The fused kernels of torch.optim, which a wrapped optimizer runs, take all of them as flat memory.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.loss_scaling import fusion

KINDS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
LAST = torch.channels_last


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 6, 6)


def _train(model, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if isinstance(optimizer, LossScaleOptimizer):
            optimizer.backward(loss)
        else:
            loss.backward()
        optimizer.step()


def _same(model, other):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.contiguous(), two.contiguous(), rtol=1e-5, atol=1e-6)


def _pair(make):
    model, x = _model()
    other = copy.deepcopy(model)
    ours = LossScaleOptimizer(make(model.parameters()), 1024)
    return (model, ours), (other, make(other.parameters())), x


def test_a_model_turns_channels_last_between_two_steps(make):
    *pairs, x = _pair(make)
    for model, optimizer in pairs:
        _train(model, optimizer, x, 3)
        model.to(memory_format=LAST)
        _train(model, optimizer, x, 3)
    _same(pairs[0][0], pairs[1][0])


def test_a_contiguous_checkpoint_goes_on_in_a_channels_last_model(make):
    *pairs, x = _pair(make)
    saved = []
    for model, optimizer in pairs:
        _train(model, optimizer, x, 3)
        saved.append(copy.deepcopy(optimizer.state_dict()))
        model.to(memory_format=LAST)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter].clear()
        _train(model, optimizer, x, 1)
        optimizer.load_state_dict(saved[-1])
        _train(model, optimizer, x, 2)
    _same(pairs[0][0], pairs[1][0])


def test_masters_follow_weights_that_turn_channels_last():
    ends = []
    for turned in (False, True):
        model, x = _model()
        apply_policy(model, "master_float16")
        if turned:
            model.to(memory_format=LAST)
        optimizer = LossScaleOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
        _train(model, optimizer, x, 4)
        ends.append([p.detach().float().contiguous() for p in model.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)


def test_gradients_that_are_handed_in(make):
    (model, ours), (other, theirs), x = _pair(make)
    x = x.to(memory_format=LAST)
    weights = list(model.parameters())
    scaled = torch.autograd.grad(ours.get_scaled_loss(model(x).square().mean()), weights)
    assert scaled[0].stride() != weights[0].stride(), "the case in question"
    ours.apply_gradients(zip(ours.get_unscaled_gradients(scaled), weights, strict=True))
    _train(other, theirs, x, 1)
    _same(model, other)


def test_a_parameter_with_gaps(make):
    torch.manual_seed(0)
    values, factors = torch.randn(4, 8)[:, ::2], torch.randn(4, 4)
    gaps, dense = nn.Parameter(values), nn.Parameter(values.clone())
    ours, theirs = LossScaleOptimizer(make([gaps]), 1024), make([dense])
    for _ in range(4):
        ours.zero_grad()
        ours.backward((gaps * factors).square().sum())
        ours.step()
        theirs.zero_grad()
        (dense * factors).square().sum().backward()
        theirs.step()
    torch.testing.assert_close(gaps.detach(), dense.detach())


def test_the_fused_kernels_run_where_all_lie_alike(make):
    model, x = _model()
    model.to(memory_format=LAST)
    optimizer = LossScaleOptimizer(make(model.parameters()), 1024)
    _train(model, optimizer, x, 2)
    # the 1x1 convolution's strides differ from its gradient's, where they mean nothing
    assert fusion.is_fused(optimizer.inner_optimizer)
    assert fusion.layouts_fit(optimizer.inner_optimizer)
