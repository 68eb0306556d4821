"""What ``fsdp_policy`` says of a module, and what the hook sums, in one process."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.errors import PolicyError
from halfstep.torch import apply_policy
from halfstep.torch.distributed import float32_allreduce_hook, fsdp_policy


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
    with pytest.raises(PolicyError, match=r"takes the torch.nn.Module .* got a int"):
        fsdp_policy(5)
    with pytest.raises(PolicyError, match="'half'.*allowed are"):
        fsdp_policy(apply_policy(make(), "mixed_bfloat16"), reduce_dtype="half")


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
