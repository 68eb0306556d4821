"""What a rewrite says about what it cannot take, and what it cannot see."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from halfstep import PolicyError, PolicyMap, PolicyWarning
from halfstep.torch import autocast, explain

# Dynamo looks at users' objects, and what they say when looked at is not the model's business
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def eager(model, policy="mixed_bfloat16", **keywords):
    return autocast(model, policy, backend="aot_eager", **keywords)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 8)

    def forward(self, x):
        x = self.before(x)
        torch._dynamo.graph_break()
        return self.lstm(x)[0]


def test_a_module_that_is_not_captured_is_told():
    compiled = eager(Recurrent())
    with pytest.warns(PolicyWarning, match=r"did not capture lstm \(LSTM\)"):
        compiled(torch.randn(3, 2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(3, 2, 8))  # once
    explanation = explain(Recurrent(), backend="aot_eager")(torch.randn(3, 2, 8))
    assert explanation.uncaptured == ("lstm (LSTM)",)
    assert "not captured or not called, so float32: lstm (LSTM)" in str(explanation)


def test_dynamo_can_be_told_to_capture_an_lstm(gradients_of, far):
    model, x = Recurrent(), torch.randn(3, 2, 8)

    def run(wrap):
        return lambda mine: wrap(mine)(x).square().mean().backward()

    with torch._dynamo.config.patch(allow_rnn=True):
        ours = gradients_of(model, run(eager))
        assert explain(model, backend="aot_eager")(x).uncaptured == ()
    assert 0 < far(ours, gradients_of(model, run(lambda mine: mine))) < 0.03


def test_nothing_painted_is_an_error():
    with pytest.raises(PolicyError, match=r"nothing runs in bfloat16: no matrix product"):
        eager(nn.LayerNorm(8))(torch.randn(2, 8))
    with pytest.raises(PolicyError, match="nothing runs in bfloat16"):
        explain(lambda x: x + 1, backend="aot_eager")(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"backend": "inducter"}, r"backend='inducter'.*Did you mean 'inductor'"),
        ({"level": "some"}, r"level='some'"),
        ({"allow": "mm"}, r"give a list of names"),
        ({"allow": ["mmm"]}, r"no operation of this name.*Did you mean 'mm'"),
        ({"allow": ["as_strided"]}, r"it must stay"),
        ({"allow": ["mm"], "deny": ["mm"]}, r"in both"),
        ({"policy": "float16"}, r"its variables are float16"),
        ({"policy": "float32"}, r"float32 everywhere"),
        ({"policy": PolicyMap("mixed_bfloat16", {"1": "mixed_float16"})}, r"one 16-bit format"),
        ({"policy": PolicyMap("mixed_bfloat16", {"haed": "float32"})}, r"matches no layer"),
    ],
)
def test_what_does_not_fit_is_an_error(keywords, message):
    with pytest.raises(PolicyError, match=message):
        autocast(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **keywords)
    with pytest.raises(PolicyError, match="must be a module or function"):
        autocast(3)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        (("cuda",), {"dtype": torch.float16}),
        ((), {"device_type": "cpu", "enabled": False}),
        ((torch.device("cpu"), torch.bfloat16), {}),
        ((), {}),
    ],
)
def test_what_is_meant_for_torchs_context_manager_is_told_so(arguments, keywords):
    with pytest.raises(PolicyError, match=r"no context manager.*apply_policy\(model, 'mixed_flo"):
        autocast(*arguments, **keywords)


def test_explaining_puts_back_a_buffer_that_a_forward_replaces():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            y = self.layer(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y - self.mean

    model = Average()
    before = model.mean
    explain(model, "mixed_bfloat16", backend="aot_eager")(torch.ones(2, 4))
    assert model.mean is before
    assert torch.equal(before, torch.zeros(4))
