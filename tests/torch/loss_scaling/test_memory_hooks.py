"""What others see of a step of 16-bit weights: hooks, and the gradients that it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from halfstep.torch import LossScaleOptimizer, apply_policy, weights_unchanged
from halfstep.torch.loss_scaling import wide

NAMES = ("master_float16", "master_bfloat16", "kahan_bfloat16")
REGISTER = {
    "pre": lambda inner, hook: inner.register_step_pre_hook(hook),
    "post": lambda inner, hook: inner.register_step_post_hook(hook),
    "pre, everywhere": lambda _, hook: torch_optimizer.register_optimizer_step_pre_hook(hook),
    "post, everywhere": lambda _, hook: torch_optimizer.register_optimizer_step_post_hook(hook),
}


@pytest.fixture(params=NAMES)
def parted(request, monkeypatch):
    """A model of three layers, each larger than what steps at a time, and its optimizer."""
    monkeypatch.setattr(wide, "PART_BYTES", 64)
    layers = (nn.Linear(4, 4, bias=False) for _ in range(3))
    model = apply_policy(nn.Sequential(*layers), request.param)
    return model, LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), 64)


def _step(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()


@pytest.mark.parametrize("where", REGISTER)
def test_hooks_run_once_a_step_and_see_every_weight(parted, where):
    model, optimizer = parted
    _step(model, optimizer)
    seen = []
    inner = optimizer.inner_optimizer
    hook = REGISTER[where](
        inner, lambda opt, *_: seen.append([p.dtype for p in opt.param_groups[0]["params"]])
    )
    try:
        _step(model, optimizer)
        assert seen == [[torch.float32] * 3]
    finally:
        hook.remove()
    _step(model, optimizer)
    assert len(seen) == 1


def test_copies_that_are_forgotten_after_a_step_leave_it_in_parts(parted):
    """What `weights_unchanged` does after a step must not cost float32 gradients of all weights."""
    model, optimizer = parted
    assert len(optimizer._wide._split()) == 3
    with weights_unchanged(model):
        _step(model, optimizer)
        assert len(optimizer._wide._split()) == 3


# ---------------------------------------------------------------------- unscaled gradients


def _unscaled(clear, dtype="its own"):
    model = apply_policy(nn.Linear(4, 1, bias=False), "master_float16")
    if dtype != "its own":
        model.weight.grad_dtype = dtype
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), 1024)
    optimizer.backward(model(torch.ones(1, 4) / 3).sum())
    optimizer.unscale_()
    assert model.weight.grad.dtype is torch.float32
    clear(optimizer)
    return model.weight


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clearing_unscaled_gradients_lets_them_come_back_in_16_bits(set_to_none):
    weight = _unscaled(lambda optimizer: optimizer.zero_grad(set_to_none))
    assert weight.grad_dtype is torch.float16
    if set_to_none:
        assert weight.grad is None
    else:
        assert torch.equal(weight.grad, torch.zeros(1, 4, dtype=torch.float16))


def test_a_step_leaves_the_unscaled_gradients_in_16_bits():
    weight = _unscaled(lambda optimizer: optimizer.step())
    assert weight.grad_dtype is torch.float16
    torch.testing.assert_close(weight.grad, torch.full((1, 4), 1 / 3, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_dtype_of_gradients_that_somebody_chose_stays(dtype):
    weight = _unscaled(lambda optimizer: optimizer.step(), dtype)
    assert weight.grad_dtype is dtype
