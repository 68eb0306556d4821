"""Weights that are computed from others, under policies that store weights in 16 bits."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from halfstep.torch import LossScaleOptimizer, apply_policy, masters, policy_summary, remove_policy

STORING = ("bfloat16", "kahan_bfloat16", "master_bfloat16", "master_float16")
BUFFERS = "in the dtype that it has: its buffers have that"
KERNELS = "in the dtype that it has: torch has no 16-bit kernels for this"


def old_spectral_norm(layer):
    with warnings.catch_warnings():  # torch deprecates it
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(layer)


def orthogonal(how, trivially):
    return lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map=how, use_trivialization=trivially
    )


class Turned(nn.Module):
    """Multiplies with a matrix that is no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("turn", torch.eye(8))

    def forward(self, weight):
        return self.turn @ weight


class Fed(nn.Module):
    """Computes the weight by layers of its own, one of which is parametrized again."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, weight):
        return weight + self.last(self.first(weight))


def by(kind):
    def parametrized(layer):
        parametrize.register_parametrization(layer, "weight", kind())
        return layer

    return parametrized


def twice(layer):
    return parametrizations.spectral_norm(parametrizations.weight_norm(layer))


KEEP = {
    "spectral_norm": (parametrizations.spectral_norm, BUFFERS),
    "old spectral_norm": (old_spectral_norm, "weights, weight_orig as it is"),
    "weight_norm and spectral_norm": (twice, BUFFERS),
    "exponential": (orthogonal("matrix_exp", True), KERNELS),
    "exponential alone": (orthogonal("matrix_exp", False), KERNELS),
    "cayley": (orthogonal("cayley", True), KERNELS),
    "householder": (orthogonal("householder", False), KERNELS),
    "a buffer": (by(Turned), BUFFERS),
    "layers": (by(Fed), BUFFERS),
}


def _model(parametrized, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(parametrized(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 1))


def _losses(model, steps=8):
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), 64)
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", STORING)
@pytest.mark.parametrize("kind", KEEP)
def test_what_cannot_be_computed_in_16_bits_stays_as_it_is(kind, name):
    parametrized, why = KEEP[kind]
    model = apply_policy(_model(parametrized), name)
    low = torch.float16 if "_float" in name else torch.bfloat16
    for path, parameter in model.named_parameters():
        stays = "parametrizations" in path or path.endswith("_orig")
        assert parameter.dtype is (torch.float32 if stays else low), path
    assert why in str(policy_summary(model))
    losses, expected = _losses(model), _losses(_model(parametrized))
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [name for name in STORING if name != "bfloat16"])
def test_what_can_be_computed_in_16_bits_is_stored_in_them(name):
    model = apply_policy(_model(parametrizations.weight_norm), name)
    assert all(masters.known(parameter) is not None for parameter in model.parameters())
    torch.testing.assert_close(
        _losses(model), _losses(_model(parametrizations.weight_norm)), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("name", ["mixed_bfloat16", "master_bfloat16"])
def test_a_model_that_came_in_16_bits_keeps_its_parametrizations_in_them(name):
    """Their buffers have 16 bits, and no policy casts buffers."""
    model = _model(parametrizations.spectral_norm).bfloat16()
    apply_policy(model, name)
    assert model[0].parametrizations.weight.original.dtype is torch.bfloat16
    loss = model(torch.ones(2, 8)).square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    remove_policy(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
