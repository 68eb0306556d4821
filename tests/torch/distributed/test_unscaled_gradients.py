"""Gradients that were float32 from unscaling to the step, under wrappers that know one dtype."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from halfstep.torch import LossScaleOptimizer, apply_policy

WRAPS = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "ddp, views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": fully_shard,
}
CLEARS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "inner": lambda model, optimizer: optimizer.inner_optimizer.zero_grad(),
}


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _whole(parameter):
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _train(wrap, clear, how, seen):
    torch.manual_seed(0)
    model = apply_policy(
        nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)), "master_float16"
    )
    model = WRAPS[wrap](model)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), 1024)
    if how == "hook":
        optimizer.register_step_pre_hook(
            lambda opt, *_: seen.extend(p.grad.dtype for p in opt.param_groups[0]["params"])
        )
    data = torch.randn(3, 16, 8)
    for batch in data:
        CLEARS[clear](model, optimizer)
        optimizer.backward((model(batch) - 1).square().mean())
        if how == "unscale_":
            optimizer.unscale_()
            seen.extend(p.grad.dtype for p in model.parameters())
        optimizer.step()
    return model


@pytest.mark.parametrize("how", ["unscale_", "hook"])
@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("wrap", WRAPS)
def test_unscaled_gradients_are_cleared_in_any_way(alone, wrap, clear, how):
    seen = []
    model = _train(wrap, clear, how, seen)
    assert seen == [torch.float32] * 12
    grads = [(p.grad.dtype, p.grad_dtype) for p in model.parameters()]
    assert grads == [(torch.float16, torch.float16)] * 4
    expected = _train("none", "optimizer", "neither", [])
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(_whole(ours), theirs.detach(), rtol=1e-3, atol=1e-4)
