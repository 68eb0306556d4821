"""What ``fsdp_policy`` says of a module, and what a training state saves, in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.errors import LossScaleError, PolicyError
from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.distributed import TrainingState, float32_allreduce_hook, fsdp_policy


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_are_read_in_16_bits_are_gathered_in_16_bits(dtype):
    policy = fsdp_policy(apply_policy(make(), f"mixed_{dtype}"))
    assert (policy.param_dtype, policy.reduce_dtype) == (getattr(torch, dtype), torch.float32)
    assert (policy.output_dtype, policy.cast_forward_inputs) == (None, False)


@pytest.mark.parametrize(
    "model",
    [
        lambda: apply_policy(make(), "mixed_bfloat16", {"2.0": "float32"}),
        lambda: apply_policy(make(), "mixed_bfloat16", {"2.0": "mixed_float16"}),
        lambda: apply_policy(nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)), "mixed_float16"),
    ],
    ids=["a float32 layer", "two dtypes", "batch norm"],
)
def test_weights_that_keep_their_digits_are_gathered_in_float32(model):
    assert fsdp_policy(model()).param_dtype is None


def test_reductions_in_16_bits_are_an_option():
    model = apply_policy(make(), "mixed_bfloat16")
    assert fsdp_policy(model, reduce_dtype="bfloat16").reduce_dtype is torch.bfloat16


def test_mistakes_are_named():
    with pytest.raises(PolicyError, match="call apply_policy first"):
        fsdp_policy(make())
    with pytest.raises(PolicyError, match="'half'.*allowed are"):
        fsdp_policy(apply_policy(make(), "mixed_bfloat16"), reduce_dtype="half")


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float32, torch.bfloat16])
def test_the_hook_for_sums_in_float32_cuts_no_wider_gradient(alone, dtype):
    model = nn.Linear(3, 1, bias=False, dtype=dtype)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, float32_allreduce_hook)
    x = torch.full((1, 3), (1 + 1j) / 3 if dtype.is_complex else 1 / 3, dtype=dtype)
    wrapped(x).sum().abs().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(x).sum().abs().backward()
    assert torch.equal(model.weight.grad, expected.weight.grad)


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(2, 4)).square().mean() * factor)
    optimizer.step()


def test_a_training_state_brings_back_the_loss_scale_and_the_users_own_settings():
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()))
    for factor in (1.0, float("inf")):
        step(model, optimizer, factor)
    state = copy.deepcopy(TrainingState(model, optimizer).state_dict())
    assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [None]
    other = apply_policy(make(), "mixed_float16")
    resumed = LossScaleOptimizer(torch.optim.AdamW(other.parameters()))
    TrainingState(other, resumed).load_state_dict(state)
    assert (resumed.current_scale, resumed.skipped_steps) == (2.0**14, 1)
    assert resumed.param_groups[0]["fused"], "the fused kernels are on again"
    step(model, optimizer)
    step(other, resumed)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_training_state_takes_a_plain_optimizer():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sorted(TrainingState(model, optimizer).state_dict()) == ["model", "optimizer"]


def test_a_state_without_a_loss_scale_changes_nothing():
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    state = TrainingState(model, optimizer).state_dict()
    del state["loss_scale"]
    state["model"]["0.weight"] = torch.zeros(4, 4)
    with pytest.raises(LossScaleError, match="loss_scale"):
        TrainingState(model, optimizer).load_state_dict(state)
    assert model[0].weight.abs().sum() > 0
