"""What ``allow=``, ``deny=`` and a PolicyMap ask for is done, or said not to be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfstep import PolicyError, PolicyMap, PolicyWarning
from halfstep.torch import autocast, explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def gelus():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def dtypes(explanation, *operations):
    return {row.dtype for row in explanation.rows if row.operation in operations}


def test_a_denied_operation_takes_its_derivative_along():
    x = torch.randn(2, 8)
    plain = explain(gelus(), backend="aot_eager")(x)
    assert dtypes(plain, "gelu", "gelu_backward") == {"bfloat16"}
    denied = explain(gelus(), deny=["gelu"], backend="aot_eager")(x)
    assert dtypes(denied, "gelu", "gelu_backward") == {"float32"}


def test_what_inductor_takes_apart_is_denied_in_all_its_parts():
    x = torch.randn(2, 8)
    assert "bfloat16" in dtypes(explain(gelus())(x), "erf", "mul")
    assert dtypes(explain(gelus(), deny=["gelu"])(x), "erf", "mul", "add") == {"float32"}


@pytest.mark.parametrize(
    ("name", "operation", "module"),
    [
        ("softmax", "_softmax", nn.Softmax(-1)),
        ("layer_norm", "native_layer_norm", nn.LayerNorm(8)),
        (torch.ops.aten.silu, "silu", nn.SiLU()),
        (torch.ops.aten.silu.default, "silu", nn.SiLU()),
        ("aten.tanh", "tanh", nn.Tanh()),
    ],
)
def test_an_operation_has_several_names(name, operation, module):
    model = nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 8))
    x = torch.randn(2, 8)
    for keyword, dtype in (("deny", "float32"), ("allow", "bfloat16")):
        asked = explain(model, backend="aot_eager", **{keyword: [name]})(x)
        assert dtypes(asked, operation) == {dtype}
        assert f"{keyword}= asked for it" in str(asked)


@pytest.mark.parametrize("keyword", ["allow", "deny"])
def test_a_name_that_matches_nothing_is_told(keyword):
    compiled = autocast(gelus(), backend="aot_eager", **{keyword: ["gelu", "silu"]})
    with pytest.warns(PolicyWarning, match=r"no operation of the first call is called silu, as"):
        compiled(torch.randn(2, 8))
    compiled(torch.randn(2, 8))  # once


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"deny": ["linear"]}, r"'linear'.*taken apart.*mm, addmm"),
        ({"deny": None}, r"deny=None\): give a list"),
        ({"allow": 3}, r"allow=3\): give a list"),
        ({"allow": [3]}, r"allow=\.\.\.3\.\.\.\): give names"),
        ({"deny": [F.softmax]}, r"function softmax.*give names"),
        ({"allow": [torch.ops.aten.mm], "deny": ["mm"]}, r"\['mm'\] in both"),
    ],
)
def test_what_names_no_operation_is_an_error(keywords, message):
    with pytest.raises(PolicyError, match=message):
        autocast(nn.Linear(2, 2), **keywords)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_a_key_that_holds_for_no_operation_is_told():
    policies = PolicyMap("mixed_bfloat16", {"attention.out_proj": "float32"})
    compiled = autocast(SelfAttention(), policies, backend="aot_eager")
    with pytest.warns(PolicyWarning, match=r"belongs to attention\.out_proj of the PolicyMap"):
        compiled(torch.randn(2, 4, 8))
    policies = PolicyMap("mixed_bfloat16", {"attention": "float32"})
    autocast(SelfAttention(), policies, backend="aot_eager")(torch.randn(2, 4, 8))


class Sharing(nn.Module):
    """One layer in two containers."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.one, self.other = nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Tanh())

    def forward(self, x):
        return self.other(self.one(x))


@pytest.mark.parametrize("key", ["one", "one.0", "other", "other.0"])
def test_a_shared_layer_has_the_policy_of_the_name_it_is_called_by(key):
    policies = PolicyMap("mixed_bfloat16", {key: "float32"})
    rows = explain(Sharing(), policies, backend="aot_eager")(torch.randn(2, 8)).rows
    found = {(row.path, row.dtype) for row in rows if row.flops}
    mine = key.removesuffix(".0")
    rest = {"one": "other", "other": "one"}[mine]
    assert found == {(f"{mine}.0", "float32"), (f"{rest}.0", "bfloat16")}
