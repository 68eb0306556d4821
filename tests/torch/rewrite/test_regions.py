"""Code in which the model's author switched autocast off stays in float32."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep.torch import autocast, explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def off():
    return torch.autocast("cpu", enabled=False)


class Distances(nn.Module):
    """A layer, and distances of points close to each other, which 16 bits would spoil."""

    def __init__(self, through=lambda function, x: function(x)):
        super().__init__()
        self.layer, self.points, self.through = nn.Linear(3, 8), nn.Linear(3, 3), through

    def squared(self, x):
        with off():
            length = self.points(x).square().sum(-1)
            return length[:, None] + length[None] - 2 * self.points(x) @ self.points(x).T

    def forward(self, x):
        return self.through(self.squared, x).sum() + self.layer(x).sum()


def by_module(explanation):
    return {(row.path, row.dtype) for row in explanation.rows if row.flops}


def checkpointed(function, x):
    return checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("through", [lambda function, x: function(x), checkpointed])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_products_between_are_float32_and_their_derivatives(through, backend):
    model, x = Distances(through), torch.randn(16, 3) * 0.01 + 1
    explanation = explain(model, backend=backend)(x)
    assert {row.path for row in explanation.rows if row.flops and row.dtype == "bfloat16"} == {
        "layer"
    }
    assert "torch.autocast(enabled=False)" in str(explanation)
    model(x).backward()
    reference, model.points.weight.grad = model.points.weight.grad, None
    autocast(model, backend="aot_eager")(x).backward()
    torch.testing.assert_close(model.points.weight.grad, reference)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = x * 2
        torch._dynamo.graph_break()
        return self.layer(x)


class InAndOut(nn.Module):
    """One module in a region and outside of one, with a graph break in it."""

    def __init__(self, inside_first):
        super().__init__()
        self.layer, self.inside_first = Broken(), inside_first

    def forward(self, x):
        outs = {}
        for inside in (self.inside_first, not self.inside_first):
            with off() if inside else contextlib.nullcontext():
                outs[inside] = self.layer(x)
        return outs[True], outs[False]


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_region_holds_behind_a_graph_break_and_ends_there(inside_first):
    model, x = InAndOut(inside_first), torch.randn(2, 4)
    model.layer.requires_grad_(False)
    expected = model.layer(x)
    inside, outside = autocast(model, backend="aot_eager")(x)
    assert torch.equal(inside, expected)
    assert not torch.equal(outside, expected)


def test_a_region_around_the_call_is_not_the_models():
    """Whoever rewrites a model switches torch's own autocast off in his training loop."""
    compiled, x = autocast(Broken(), backend="aot_eager"), torch.randn(2, 4)
    with off():
        assert not torch.equal(compiled(x), compiled._orig_mod(x))


def test_a_region_within_a_region_that_is_on_again_is_torchs_own():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def run(x):
        with off():
            x = layers[0](x)
            with torch.autocast("cpu", torch.bfloat16):
                x = layers[1](x)
            x = layers[2](x.float())
        return layers[0](x)

    rows = explain(run, backend="aot_eager")(torch.randn(2, 4)).rows
    products = [row for row in rows if row.operation == "addmm"]
    # the one in between is in 16 bits already, by torch's own hand
    assert ["enabled=False" in row.why for row in products] == [True, True, False]


def test_inductors_caches_tell_regions_apart(monkeypatch):
    from torch._inductor import compile_fx

    keys = []

    def record(graph, inputs, config_patches):
        pass_ = config_patches["joint_custom_pre_pass"]
        keys.append(pass_.uuid())
        pass_.low_operations = 1
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", record)
    layer = nn.Linear(8, 8)

    def first(x):
        with off():
            x = layer(x)
        return layer(x)

    def second(x):
        x = layer(x)
        with off():
            return layer(x)

    for run in (first, second):
        with pytest.raises(Exception, match="nothing runs"):
            autocast(run)(torch.randn(2, 8))  # nothing was painted, for nothing was compiled
    assert len(set(keys)) == 2
