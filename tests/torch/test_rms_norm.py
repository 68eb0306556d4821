"""``nn.RMSNorm``: one kernel on an accelerator, small operations in float32 on a CPU."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from halfstep.torch import apply_policy


class Given(TorchFunctionMode):
    """Keeps the dtypes of the tensors that rms_norm is called with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.rms_norm:
            self.dtypes = [t.dtype for t in (*args, *kwargs.values()) if torch.is_tensor(t)]
        return func(*args, **kwargs)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("policy", "device", "expected"),
    [
        ("mixed_bfloat16", "cpu", torch.float32),
        ("mixed_bfloat16", "meta", torch.bfloat16),  # as on every device but a CPU
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_rms_norm_gets_one_dtype_and_float32_where_it_has_no_kernel(
    policy, device, given, expected
):
    model = apply_policy(nn.RMSNorm(8, device=device), policy, output_dtype=None)
    with Given() as seen:
        output = model(torch.ones(2, 8, dtype=given, device=device))
    assert seen.dtypes == [expected, expected]
    assert output.dtype is torch.bfloat16


def test_rms_norm_between_float32_and_a_layer_casts_once_each_way(counts):
    model = apply_policy(nn.RMSNorm(8), "mixed_bfloat16", output_dtype=None)
    x = torch.randn(2, 8, requires_grad=True)
    with counts() as seen:
        model(x).sum().backward()
    assert seen.casts == [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


def test_per_sample_gradients_of_an_rms_norm():
    model = apply_policy(nn.RMSNorm(8), "mixed_bfloat16")

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    batch, weights = torch.randn(3, 8), dict(model.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, batch)["weight"]
    alone = [torch.func.grad(loss)(weights, x)["weight"] for x in batch]
    assert torch.allclose(found, torch.stack(alone), atol=1e-3)
