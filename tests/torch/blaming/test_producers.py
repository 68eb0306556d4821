"""Who made it, where that is easily confused: masks, counts, infinities that go on, two at once."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfstep.torch import apply_policy, blame


class Calls(nn.Module):
    """Runs a function as a module's forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def network(function):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Calls(function), nn.Linear(8, 3))


def classify(model, batch):
    return F.cross_entropy(model(batch).float(), torch.zeros(len(batch), dtype=torch.long))


def mean_square(model, batch):
    return model(batch).float().square().mean()


def attend(x):
    scores = x @ x.t()
    for _ in range(5):
        scores = scores * 1.0  # memory that is freed, and free for the constant
    above = torch.ones(len(x), len(x)).triu().bool()  # the last row is not masked, the first is
    return scores.masked_fill(above, torch.tensor(-math.inf, dtype=x.dtype)).softmax(-1) @ x


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_mask_that_comes_into_being_unseen_is_on_purpose(policy):
    model = network(attend)
    if policy != "float32":
        apply_policy(model, policy)

    found = blame(model, classify, torch.randn(6, 4))

    assert (found.path, found.operation) == ("1", "_softmax")
    assert "masked whole" in found.cause


def test_infinities_that_reach_a_product_of_matrices_are_no_mask():
    # the softmax of the loss makes the first NaN, as of a row that is masked whole
    def gumbel(x):
        uniform = torch.full_like(x, 0.5)
        uniform[0, 0] = 0
        return x - uniform.log()

    found = blame(network(gumbel), classify, torch.randn(6, 4))

    assert (found.path, found.operation, found.cause) == ("1", "log", "log of 0")


def test_a_count_of_zero_is_seen_as_the_divisor():
    def loss(model, batch):
        kept = (batch > 1e6).sum()
        return model(batch).sum() / kept

    found = blame(network(torch.relu), loss, torch.randn(6, 4))

    assert (found.operation, found.cause) == ("div", "div: a division by 0")
    assert [(each.name, each.dtype, each.zeros) for each in found.inputs][1:] == [
        ("other", "int64", 1)
    ]


@pytest.mark.parametrize("loud", ["1", "1 and another"])
def test_a_fault_that_float32_cures_is_told_from_one_behind_it(loud):
    def halved(x):
        return x * 1e5 * (x * 0 + 1) if loud == "1" else (x * 1e5 * (x * 0 + 1)).half().to(x.dtype)

    model = network(lambda x: x * 300)
    model.append(Calls(halved))
    apply_policy(model, "mixed_float16", functional="compute")

    found = blame(model, mean_square, 300 * torch.randn(6, 4))

    assert found.path == "1"
    if loud == "1":
        assert found.proof.endswith("everything is finite")
    else:
        assert found.cure == "run '1' in float32"
        assert found.layers == ("1",)
        assert "cures this, and is still not finite: 3 (Calls) (_to_copy: a value of" in found.proof


def test_the_epsilon_that_is_proposed_helps():
    def loss(model, batch):
        return (1000 * model(batch).square().sum()) / (model(batch) * 0).abs().sum()

    batch = torch.randn(6, 4)
    found = blame(network(torch.relu), loss, batch)
    epsilon = float(found.cure.split("an epsilon of ")[1].split()[0])

    assert blame(network(torch.relu), lambda m, b: m(b).sum() * 1000 / epsilon, batch) is None
