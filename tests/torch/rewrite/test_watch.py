"""Calls that Dynamo does not compile are said aloud, and do not switch the rewrite off."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from halfstep import PolicyError, PolicyWarning
from halfstep.torch import autocast, explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks"),
]


def eager(model, **keywords):
    return autocast(model, backend="aot_eager", **keywords)


def counted_by_flops(call, x):
    with FlopCounterMode(display=False):
        return call(x)


INSIDE = {
    "FlopCounterMode": (counted_by_flops, "FlopCounterMode"),
    "vmap": (lambda call, x: torch.vmap(call)(x), "transform of torch.func"),
}


@pytest.mark.parametrize("of", ["module", "function"])
@pytest.mark.parametrize("name", INSIDE)
def test_a_call_that_dynamo_cannot_compile_is_told_and_harms_no_other(name, of):
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    compiled = eager(layer if of == "module" else lambda x: layer(x))
    run, told = INSIDE[name]
    assert not torch.equal(compiled(x), layer(x))
    with pytest.warns(PolicyWarning, match=f"{told}.*this call was float32"):
        torch.testing.assert_close(run(compiled, x), layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PolicyWarning)
        assert not torch.equal(compiled(x), layer(x))
        run(compiled, x)  # once


def test_the_first_call_may_be_inside_of_a_mode():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    compiled = eager(layer)
    with pytest.warns(PolicyWarning, match="inside of FlopCounterMode"):
        counted_by_flops(compiled, x)
    assert not torch.equal(compiled(x), layer(x))


def test_code_that_dynamo_gave_up_is_told_and_brought_back_by_a_reset():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    compiled = eager(layer)
    compiled(x)
    counted_by_flops(torch.compile(layer, backend="eager"), x)
    with pytest.warns(PolicyWarning, match=r"ran none of its graphs.*torch\._dynamo\.reset"):
        assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()
    assert not torch.equal(compiled(x), layer(x))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, name):
        return self.layer(x) * len(name)


def test_the_recompile_limit_is_told():
    compiled, x = eager(Named()), torch.randn(4, 8)
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled(x, "a")
        compiled(x, "b")
        with pytest.warns(PolicyWarning) as told:
            compiled(x, "c")
        compiled(x, "c")  # once
    assert len(told) == 1
    assert "reached its recompile limit" in str(told[0].message)


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number, self.first, self.second = number, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x) * (1 + self.number)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_part_that_falls_back_is_told_and_explained():
    model, x = Blocks(), torch.randn(4, 8)
    with torch._dynamo.config.patch(recompile_limit=2):
        with pytest.warns(PolicyWarning) as told:
            eager(model)(x)
        torch._dynamo.reset()
        explanation = explain(model, backend="aot_eager")(x)
    said = " ".join(str(each.message) for each in told)
    assert "reached its recompile limit" in said
    assert "blocks.3.second (Linear)" in said
    assert "blocks.3.second (Linear)" in explanation.uncaptured
    assert not {"blocks.0.second (Linear)", "blocks.1.second (Linear)"} & {*explanation.uncaptured}
    assert "recompile limit" in str(explanation)


def test_what_cannot_be_rewritten_raises_at_every_call():
    compiled = eager(nn.LayerNorm(8))
    for _ in range(2):
        with pytest.raises(PolicyError, match="nothing runs in bfloat16"):
            compiled(torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_layer_in_eval_is_in_16_bits_too():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 4, 8)
    model = nn.Sequential(layer)
    with torch.no_grad():
        assert not torch.equal(eager(model)(x), model(x))
        rows = explain(model, backend="aot_eager")(x).rows
    assert {row.dtype for row in rows if row.flops} == {"bfloat16"}
    assert torch.backends.mha.get_fastpath_enabled()
