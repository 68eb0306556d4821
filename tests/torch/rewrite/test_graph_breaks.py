"""Policies of modules where Dynamo leaves its graph in one and shares what follows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfstep import PolicyMap
from halfstep.torch import autocast, explain

# Dynamo looks at tensors, and what they say when looked at is not the model's business
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def product(x, y, low):
    return (x.bfloat16() @ y.bfloat16()).float() if low else x @ y


def linear(layer, x, low):
    if not low:
        return layer(x)
    return F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()


class Between(nn.Module):
    """What follows the break names the module: it reads one of its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)

    def expected(self, x, low):
        return linear(self.second, linear(self.first, x, low), low)


class Forgotten(nn.Module):
    """What follows the break does not: it reads none of its attributes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        y = self.inner(x)
        torch._dynamo.graph_break()
        return y @ y.T

    def expected(self, x, low):
        y = linear(self.inner, x, low)
        return product(y, y.T, low)


def broken_product(x):
    torch._dynamo.graph_break()
    return x @ x.T


class Calling(Forgotten):
    """The break is in a function that knows no module."""

    def forward(self, x):
        return broken_product(self.inner(x))


class Twice(nn.Module):
    """Two of its modules are of one class, and one of them is called twice."""

    def __init__(self, block):
        super().__init__()
        self.one, self.other = block(), block()

    def forward(self, x):
        return self.one(self.other(self.one(x)))

    def expected(self, x, low):
        for name in ("one", "other", "one"):
            x = getattr(self, name).expected(x, low[name])
        return x


class Looped(nn.Module):
    """Dynamo gives up a function that breaks its graph in a loop, and compiles what it calls."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("block", "kept"), [(Between, "one"), (Forgotten, "other"), (Calling, "one")]
)
def test_a_break_inside_of_modules_with_policies_of_their_own(block, kept):
    model, x = Twice(block), torch.randn(8, 8) / 3
    compiled = autocast(model, PolicyMap("mixed_bfloat16", {kept: "float32"}), backend="aot_eager")
    low = {name: name != kept for name in ("one", "other")}
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model.expected(x, low), rtol=0, atol=0)
    compiled(x).sum().backward()
    theirs = copy.deepcopy(model)
    theirs.zero_grad()
    theirs.expected(x, low).sum().backward()
    for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.05)


def test_a_layer_of_a_broken_module_may_have_its_own_policy():
    model, x = Twice(Between), torch.randn(8, 8) / 3
    policies = PolicyMap("mixed_bfloat16", {"one.second": "float32", "other": "float32"})
    out = autocast(model, policies, backend="aot_eager")(x)
    one = model.one
    y = model.other(one.second(linear(one.first, x, low=True)))
    torch.testing.assert_close(out, one.second(linear(one.first, y, low=True)), rtol=0, atol=0)
    rows = explain(model, policies, backend="aot_eager")(x).rows
    assert {(row.path, row.dtype) for row in rows if row.flops} == {
        ("one.first", "bfloat16"), ("one.second", "float32"),
        ("other.first", "float32"), ("other.second", "float32"),
    }  # fmt: skip


@pytest.mark.parametrize("block", [Between, Forgotten])
def test_a_break_in_a_loop(block):
    model, x = Looped(block), torch.randn(8, 8) / 3
    policies = PolicyMap("mixed_bfloat16", {"blocks.1": "float32"})
    expected = x
    for number, each in enumerate(model.blocks):
        expected = each.expected(expected, low=number != 1)
    compiled = autocast(model, policies, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


class WithHead(Looped):
    def __init__(self):
        super().__init__(Between)
        self.head = Forgotten()

    def forward(self, x):
        return self.head(super().forward(x))


def test_graphs_are_shared_where_the_policies_are_the_same():
    made = []
    for policies in ("mixed_bfloat16", PolicyMap("mixed_bfloat16", {"head": "float32"})):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = autocast(WithHead(), policies, backend="aot_eager")
        for _ in range(2):
            compiled(torch.randn(8, 8, requires_grad=True))
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made == [4, 4]  # two for all blocks, and two for the head
