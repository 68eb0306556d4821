"""Gradients of a step in which no loss was scaled: zeros, another rank's, or a mistake."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer, apply_policy


def make(policy="mixed_float16", **options):
    torch.manual_seed(0)
    model = apply_policy(nn.Linear(4, 2), policy)
    return model, LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), **options)


def step(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(1, 4)).square().sum())
    optimizer.step()


def zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.filterwarnings("ignore:This state dict is of a bare optimizer")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "master_float16"])
def test_torchs_own_functions_save_and_load_a_fresh_optimizer(policy):
    model, optimizer = make(policy)
    step(model, optimizer)
    optimizer.zero_grad()
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    other, another = make(policy)
    set_state_dict(other, another, model_state_dict=weights, optim_state_dict=state)
    for one, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, twin)
        assert all(torch.equal(v, another.state[twin][k]) for k, v in optimizer.state[one].items())
    step(other, another)
    assert not another.last_step_skipped


@pytest.mark.parametrize("policy", ["mixed_float16", "master_float16"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_that_are_zero_need_no_scale_and_are_no_good_step(policy, max_norm):
    model, optimizer = make(policy, max_norm=max_norm)
    zero_gradients(model)
    optimizer.step()
    assert len(optimizer.state) == 2
    assert optimizer.last_step_skipped is False
    assert optimizer.state_dict()["loss_scale"]["state"]["finite_steps"] == 0
    step(model, optimizer)
    assert optimizer.state_dict()["loss_scale"]["state"]["finite_steps"] == 1


@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
def test_one_that_is_not_zero_is_refused(value):
    model, optimizer = make()
    before = model.weight.detach().clone()
    zero_gradients(model)
    model.weight.grad[1, 3] = value
    with pytest.raises(LossScaleError, match="no loss was scaled since the last step"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert not optimizer.state


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_group_in_which_nobody_scaled_is_refused_and_goes_on_afterwards(alone, unscaled):
    model, optimizer = make(process_group=alone)
    before = model.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    if unscaled:
        optimizer.unscale_()
    with pytest.raises(LossScaleError, match="no rank of process_group scaled a loss"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    step(model, optimizer)
    assert not torch.equal(model.weight, before)
    zero_gradients(model)
    optimizer.step()
    assert optimizer.last_step_skipped is False
