"""The short way through torch's own layers does what the long way does, or steps aside."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfstep.torch import apply_policy, direct

LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 6, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 3, padding=1), (2, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 1, 2), (1, 1, 3, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "layer norm without weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), (3, 6)),
}


class Twice(nn.Module):
    """Calls its layer twice: the second time all copies are there."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.unused = nn.Linear(1, 1)
        self.between = None

    def forward(self, x, **kwargs):
        first = self.layer(x)
        if self.between is not None:
            self.between(self.layer)
        return first, self.layer(x, **kwargs)


def policied(make, policy="mixed_bfloat16", functional="autocast"):
    """A 16-bit model with a layer of this policy."""
    torch.manual_seed(0)
    around = "mixed_bfloat16" if policy == "float32" else policy
    model = Twice(make())
    return apply_policy(model, around, {"layer": policy}, functional=functional, output_dtype=None)


@pytest.fixture
def operations(monkeypatch):
    """How often each class took the short way."""
    taken = []
    for cls, (forward, operation) in direct._OPERATIONS.items():

        def noted(*args, cls=cls, operation=operation):
            taken.append(cls)
            return operation(*args)

        monkeypatch.setitem(direct._OPERATIONS, cls, (forward, noted))
    monkeypatch.setattr("halfstep.torch.layer._classes", {})
    return taken


@pytest.mark.parametrize("functional", ["autocast", "compute"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways_give_the_same(name, policy, functional, operations, monkeypatch):
    make, shape = LAYERS[name]
    results = []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(direct, "_OPERATIONS", {})
            monkeypatch.setattr("halfstep.torch.layer._classes", {})
        model = policied(make, policy, functional)
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
        taken = len(operations)
        first, second = model(x)
        assert (len(operations) > taken) is short
        (first.float().square().sum() + second.float().sum()).backward()
        gradients = [parameter.grad for parameter in model.layer.parameters()]
        results.append([first, second, x.grad, *gradients])
    for short, long in zip(*results, strict=True):
        assert short.dtype is long.dtype
        assert torch.equal(short, long)


def test_a_weight_that_changes_in_between_is_read_anew():
    def grow(layer):
        with torch.no_grad():
            layer._parameters["weight"].mul_(2)

    model = policied(lambda: nn.Linear(6, 6, bias=False))
    model.between = grow
    first, second = model(torch.ones(1, 6))
    assert torch.equal(second, first * 2)


def test_a_parameter_put_in_another_ones_place_is_read():
    def replace(layer):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(6, 6)))

    model = policied(lambda: nn.Linear(6, 6, bias=False))
    model.between = replace
    _, second = model(torch.ones(1, 6))
    assert not second.any()


def test_gradients_are_on_again_after_a_call_without():
    def quietly(layer):
        layer.weight.requires_grad_(True)

    model = policied(lambda: nn.Linear(6, 6))
    with torch.no_grad():
        model(torch.ones(1, 6))
    model.between = quietly
    _, second = model(torch.ones(1, 6))
    second.sum().backward()
    assert model.layer.weight.grad is not None


def test_a_forward_put_into_the_class_is_called(monkeypatch):
    model = policied(lambda: nn.Linear(6, 6))
    seen = []
    torchs = nn.Linear.forward

    def profiled(self, x):
        seen.append(x.dtype)
        return torchs(self, x)

    monkeypatch.setattr(nn.Linear, "forward", profiled)
    model(torch.ones(1, 6))
    assert seen == [torch.bfloat16] * 2


def test_hooks_run_on_the_short_way():
    model = policied(lambda: nn.Linear(6, 6))
    seen = []
    model.layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    model.layer.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    _, second = model(torch.ones(1, 6))
    assert torch.equal(second[0], model.layer.bias.to(torch.bfloat16))
    assert seen == [torch.bfloat16] * 2


def test_a_weight_that_a_hook_computes_is_the_long_ways(operations):
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = policied(lambda: torch.nn.utils.weight_norm(nn.Linear(6, 6)))
    first, second = model(torch.ones(1, 6))
    assert torch.equal(first, second)
    assert not operations


def test_another_way_to_call_is_the_long_ways(operations):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(input=x)

    model = apply_policy(Named(), "mixed_bfloat16")
    assert model(torch.ones(1, 6)).dtype is torch.float32
    assert not operations


def test_torch_func_takes_the_long_way(operations):
    model = policied(lambda: nn.LayerNorm(6))
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))[1].float().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.ones(2, 1, 6))
    assert gradients["layer.bias"].shape == (2, 6)
    assert not operations


def test_autocast_is_as_it_was_after_an_error():
    model = policied(lambda: nn.LayerNorm(6))
    states = []

    def wrong(layer):
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 5))
        states.append(torch.is_autocast_enabled("cpu"))

    model.between = wrong
    model(torch.ones(1, 6))
    assert states == [True]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_off_inside_of_a_norm(monkeypatch):
    """On CUDA its lists would send the norm to float32."""
    seen = []
    layer_norm = F.layer_norm

    def looked(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return layer_norm(*args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", looked)
    policied(lambda: nn.LayerNorm(6))(torch.ones(1, 6))
    assert seen == [False] * 2


def test_an_error_names_the_layer_in_which_two_dtypes_met():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            self.first(x)
            return self.inner(torch.ones(1, 6, dtype=torch.long))

    model = apply_policy(Wrong(), "mixed_bfloat16")
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(1, 6))
    assert "two dtypes met in 'inner'" in raised.value.__notes__[0]
