"""What an audit sees in real modules, and that it leaves everything as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfstep import AdviceError, PolicyError, policy_scope
from halfstep.torch import apply_policy, audit, policy_of

QUIET = ("hardware", "batch-size", "alignment")


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


BATCH = (torch.linspace(-1, 1, 64).view(4, 16), torch.tensor([0, 1, 2, 3]))


class Code(nn.Module):
    """A module without weights that runs a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def model_with(function):
    return nn.Sequential(nn.Linear(16, 16), Code(function), nn.Linear(16, 8))


def findings(function, policy="mixed_float16", silence=QUIET, **arguments):
    report = audit(model_with(function), policy, BATCH, cross_entropy, silence=silence, **arguments)
    return {(f.rule, f.severity, f.place): f for f in report}


def test_a_plain_model_gets_no_findings():
    assert findings(F.gelu) == {}


def test_a_model_on_unaligned_sizes_is_told_per_layer():
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 8))
    report = audit(model, "mixed_bfloat16", BATCH, cross_entropy, silence=["hardware"])
    assert {(f.rule, f.place) for f in report} == {("alignment", "0"), ("alignment", "2")}
    assert "out 30" in report.findings[0].evidence
    assert "50.0%" not in report.findings[1].evidence  # 16 x 30 against 30 x 8
    assert "66.7% of the batch's matrix arithmetic" in report.findings[0].evidence


def test_convolutions_and_attention_are_products_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 12, 3, groups=1, padding=1)
            self.back = nn.ConvTranspose1d(12, 8, 3, padding=1)
            self.depthwise = nn.Conv1d(8, 8, 3, groups=8, padding=1)

        def forward(self, x, y):
            x = self.depthwise(self.back(self.conv(x)))
            heads = x.unflatten(1, (2, 4)).transpose(2, 3).contiguous()
            return F.scaled_dot_product_attention(heads, heads, heads)

    report = audit(
        Net(), "mixed_bfloat16", {"x": torch.ones(2, 8, 6), "y": None}, silence=["hardware"]
    )
    found = {(f.place, f.evidence.partition(";")[0]) for f in report if f.rule == "alignment"}
    assert ("conv", "convolution in bfloat16: out channels 12 is no multiple of 8") in found
    assert ("back", "convolution in bfloat16: in channels 12 is no multiple of 8") in found
    assert any("head size 4" in evidence for place, evidence in found if place == "")
    assert not any(place == "depthwise" for place, _ in found)


@pytest.mark.parametrize(
    ("function", "severity", "says"),
    [
        (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8), "error", "rsqrt"),
        (lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-9), "error", "div"),
        (lambda x: F.normalize(x, dim=-1), "error", "clamp_min"),
        (lambda x: (x.sigmoid().clamp(1e-9, 1 - 1e-9)).log(), "error", "log follows"),
        (lambda x: x + torch.tensor(1e-9), "warning", "1e-09 is 0 in float16"),
    ],
)
def test_an_epsilon_is_found_where_it_is_added_with_what_follows(function, severity, says):
    found = findings(function, silence=[*QUIET, "reduction", "overflow"])
    finding = found["epsilon", severity, "1"]
    assert says in finding.evidence
    assert "test_audit.py" in finding.evidence


def test_the_same_epsilon_is_fine_in_bfloat16_and_in_float32():
    def function(x):
        return x / (x.norm(dim=-1, keepdim=True) + 1e-9)

    assert findings(function, "mixed_bfloat16") == {}
    assert findings(function, overrides={"1": "float32"}) == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 9, x, -1e9),
        lambda x: x + torch.full_like(x, -1e4) * 0 + -1e9 * 0 + (x < 9) * 0 - 1e9,
    ],
)
def test_a_constant_that_does_not_fit_is_found(function):
    found = findings(function, silence=[*QUIET, "overflow"])
    assert ("constant", "warning", "1") in found


def test_a_constant_that_torch_refuses_is_found_with_the_failure():
    found = findings(lambda x: x.masked_fill(x > 9, -1e9))
    assert "masked_fill becomes -inf" in found["constant", "warning", "1"].evidence
    assert "RuntimeError: value cannot be" in found["failure", "error", "1"].evidence


def test_an_overflow_is_found_and_an_infinity_that_was_put_in_is_none():
    found = findings(lambda x: x * 1e3 * 1e3)
    assert found["overflow", "error", "1"].evidence.startswith("mul in float16 made ")
    masked = findings(lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1).nan_to_num())
    assert not any(rule == "overflow" for rule, *_ in masked)


def test_softmax_and_sums_in_16_bits_are_found():
    found = findings(lambda x: x.softmax(-1) + (x + 5e3).sum(-1, keepdim=True) * 1e-5)
    assert "softmax over 16 values" in found["reduction", "hint", "1"].evidence
    assert "sum of 16 values" in found["reduction", "warning", "1"].evidence


def test_casts_of_a_modules_own_are_found_and_halfsteps_are_not():
    found = findings(lambda x: x.float().mul(2))
    assert list(found) == [("own-casts", "hint", "1")]
    assert "Code calls .float(), float16 to float32" in found["own-casts", "hint", "1"].evidence
    assert findings(lambda x: x.to(x.dtype)) == {}


def test_a_product_in_float32_behind_a_cast_is_a_warning():
    found = findings(lambda x: (x.float() @ torch.ones(16, 16)).to(x.dtype), functional="compute")
    assert "of the matrix arithmetic then ran in float32" in next(iter(found.values())).evidence
    assert list(found) == [("own-casts", "warning", "1")]


def test_autocast_that_is_switched_off_inside_is_found():
    def function(x):
        with torch.autocast("cpu", enabled=False):
            return x * 2

    found = findings(function)
    assert "autocast(enabled=False)" in found["own-casts", "hint", "1"].evidence


def test_a_16_bit_dtype_that_is_written_down_is_a_warning():
    found = findings(lambda x: (x.float() * 2).half())
    assert ("own-casts", "warning", "1") in found
    assert ".half()" in found["own-casts", "warning", "1"].evidence


def test_an_output_and_a_loss_in_16_bits_are_found():
    def half_loss(model, batch):
        return cross_entropy(model, batch).half()

    model = model_with(F.gelu)
    report = audit(model, "mixed_float16", BATCH, half_loss, silence=QUIET, output_dtype=None)
    assert [(f.rule, f.place) for f in report if f.rule == "result"] == [
        ("result", ""), ("result", "(loss)"),
    ]  # fmt: skip


def test_a_loss_that_was_cast_too_late_is_found():
    def late(model, batch):
        return (model(batch[0]).half() - 1).square().mean().float()

    report = audit(model_with(F.gelu), "mixed_float16", BATCH, late, silence=QUIET)
    [found] = [f for f in report if f.rule == "result"]
    assert "mean computed it in float16: the cast came too late" in found.evidence


def test_weights_that_were_16_bits_before_are_found_in_their_layer():
    model = model_with(F.gelu)
    model[2].half()
    report = audit(model, "mixed_float16", BATCH, cross_entropy, silence=QUIET)
    assert [(f.rule, f.place) for f in report] == [("weights", "2")]
    assert "weight, bias: float16 when the policy came" in report.findings[0].evidence


def test_a_policy_without_float32_variables_is_told_once():
    report = audit(model_with(F.gelu), "bfloat16", BATCH, cross_entropy, silence=QUIET)
    assert [(f.rule, f.place) for f in report] == [("weights", "")]
    assert report.findings[0].evidence.startswith("4 parameters")


def test_a_global_policy_that_reached_no_model_is_told():
    with policy_scope("mixed_float16"):
        report = audit(model_with(F.gelu), None, BATCH, cross_entropy, silence=QUIET)
    assert [f.rule for f in report] == ["weights"]
    assert "the global policy is mixed_float16" in report.findings[0].evidence


def test_a_model_with_a_policy_is_audited_as_it_is():
    model = apply_policy(model_with(lambda x: x + 1e-9), "mixed_float16", {"1": "float32"})
    assert len(audit(model, None, BATCH, cross_entropy, silence=QUIET)) == 0
    again = audit(model, "mixed_float16", BATCH, cross_entropy, silence=QUIET)
    assert [f.rule for f in again] == ["epsilon"]
    assert policy_of(model[1]).name == "float32"


def test_the_batch_could_grow_with_the_bytes_counted():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    report = audit(model, "mixed_bfloat16", torch.ones(1024, 256), silence=["hardware"])
    [found] = report
    assert found.rule == "batch-size"
    # four inputs of a quarter of a million numbers each, the first of them in float32
    assert "4 MiB of float32" in found.evidence
    assert "2 MiB" in found.evidence


def test_nothing_is_changed():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(16), nn.Linear(16, 8)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            np.random.rand()
            random.random()
            return self.linear(self.drop(self.norm(x)))

    def loss(model, batch):
        batch[0].add_(1)
        return cross_entropy(model, batch)

    model = apply_policy(Draws(), "mixed_bfloat16")
    cross_entropy(model, BATCH).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    batch = (BATCH[0].clone(), BATCH[1])
    draws = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    audit(model, "mixed_float16", batch, loss)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(batch[0], BATCH[0])
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (np.random.get_state()[1] == draws[1]).all()
    assert random.getstate() == draws[2]
    assert policy_of(model.linear).name == "mixed_bfloat16"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_compiled_and_checkpointed_and_tied_models_are_audited():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.eps = Code(lambda x: x + 1e-9)

        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
            return self.eps(self.second(x))

    model = torch.compile(Net(), backend="eager")
    report = audit(model, "mixed_float16", BATCH[0], silence=QUIET)
    assert [(f.rule, f.place) for f in report] == [("epsilon", "eps")]


def test_what_fails_without_a_policy_too_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shape"):
        audit(model_with(F.gelu), "mixed_float16", torch.ones(4, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"silence": ["epsilonn"]}, AdviceError, "Did you mean 'epsilon'"),
        ({"policy": "mixed_flaot16"}, PolicyError, "mixed_float16"),
        ({"overrides": {"nowhere": "float32"}}, PolicyError, "matches no layer"),
        ({"model": 3}, PolicyError, "nn.Module"),
    ],
)
def test_a_mistake_is_told(arguments, error, says):
    given = {"model": model_with(F.gelu), "policy": "mixed_float16", "batch": BATCH[0]}
    with pytest.raises(error, match=says):
        audit(**{**given, **arguments})
