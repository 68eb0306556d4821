"""Another policy for a model whose optimizer is wrapped already, and steps on."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from halfstep import LossScaleWarning, NoLossScale
from halfstep.torch import LossScaleOptimizer, apply_policy, masters, remove_policy

NAMES = ("bfloat16", "master_bfloat16", "kahan_bfloat16")
CHANGES = list(itertools.product(NAMES, NAMES))
INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=2.0**-10, momentum=0.5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2.0**-10),
}


def _start(name, kind, natural=False, layers=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))[:layers]
    if natural:
        model.bfloat16()
    apply_policy(model, name)
    return model, LossScaleOptimizer(INNER[kind](model.parameters()))


def _one(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(model(torch.linspace(-1, 1, 8).reshape(2, 4)).float().square().mean())
    optimizer.step()


def _exact(model):
    return [masters.exact_of(p).float().clone() for p in model.parameters()]


def _averages(optimizer):
    return [
        value.clone()
        for state in optimizer.inner_optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and name != "step"
    ]


@pytest.mark.parametrize("natural", [False, True], ids=["float32", "16-bit"])
@pytest.mark.parametrize("kind", list(INNER))
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_the_next_step_follows_the_new_policy(old, new, kind, natural):
    """Weights, digits and averages stay; the step is one of the new policy's from there."""
    model, optimizer = _start(old, kind, natural)
    for _ in range(3):
        _one(model, optimizer)
    before, averages = _exact(model), _averages(optimizer)
    apply_policy(model, new)
    tolerance = {"bfloat16": 2.0**-8, "kahan_bfloat16": 2.0**-15, "master_bfloat16": 0}[new]
    if not natural:
        for now, then in zip(_exact(model), before, strict=True):
            torch.testing.assert_close(now, then, rtol=tolerance, atol=tolerance / 16)
    _one(model, optimizer)
    for now, then in zip(_exact(model), before, strict=True):
        assert (now - then).abs().max() < 2.0**-8, "a step of 2**-10 and a rounding"
    wide = torch.bfloat16 if new == "bfloat16" else torch.float32
    after = _averages(optimizer)
    assert {a.dtype for a in after} == {wide}
    for now, then in zip(after, averages, strict=True):
        assert then.count_nonzero()
        assert (now.float() - then.float()).norm() < then.float().norm()
    if new != "bfloat16":
        assert all(masters.known(p).update == new.split("_")[0] for p in model.parameters())


@pytest.mark.parametrize(("old", "new"), CHANGES[3:6] + CHANGES[6:8])
def test_digits_of_a_model_that_had_16_bits_by_itself_go_over(old, new):
    model, optimizer = _start(old, "SGD", natural=True)
    for _ in range(3):
        _one(model, optimizer)
    before = _exact(model)
    assert any((b.bfloat16().float() != b).any() for b in before)
    apply_policy(model, new)
    tolerance = {"bfloat16": 2.0**-8, "kahan_bfloat16": 2.0**-15, "master_bfloat16": 0}[new]
    for now, then in zip(_exact(model), before, strict=True):
        torch.testing.assert_close(now, then, rtol=tolerance, atol=tolerance / 16)


@pytest.mark.parametrize("name", NAMES)
def test_a_float32_optimizer_takes_the_policy_and_gives_it_back(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = LossScaleOptimizer(INNER["AdamW"](model.parameters()), None)
    for step in range(4):
        _one(model, optimizer)
        (apply_policy(model, name) if step % 2 == 0 else remove_policy(model))
    _one(model, optimizer)
    assert model.weight.dtype is torch.float32
    assert {a.dtype for a in _averages(optimizer)} == {torch.float32}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kahan_bfloat16", "master_bfloat16"),
        ("master_bfloat16", "kahan_bfloat16"),
        ("master_bfloat16", "bfloat16"),
        ("bfloat16", "master_bfloat16"),
    ],
)
def test_a_compiled_step_follows_too(old, new):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        ours, theirs = (_start(old, "SGD", layers=1) for _ in range(2))
        counter = CompileCounterWithBackend("eager")
        whole = torch.compile(_one, fullgraph=True, backend=counter)
        for made, step in ((ours, whole), (theirs, _one)):
            for _ in range(2):
                step(*made)
            apply_policy(made[0], new)
            for _ in range(2):
                step(*made)
        apply_policy(nn.Linear(2, 2), "kahan_bfloat16")
        graphs = counter.frame_count
        whole(*ours)
        assert counter.frame_count == graphs, "a policy of another model compiles nothing anew"
        _one(*theirs)
    torch._dynamo.reset()
    for now, then in zip(_exact(ours[0]), _exact(theirs[0]), strict=True):
        torch.testing.assert_close(now, then, rtol=2.0**-8, atol=2.0**-12)


def test_other_parameters_in_a_group_are_followed():
    model, optimizer = _start("kahan_bfloat16", "SGD")
    _one(model, optimizer)
    other = apply_policy(nn.Linear(4, 4), "master_bfloat16")
    optimizer.param_groups[0]["params"][:] = list(other.parameters())
    before = _exact(other)
    _one(other, optimizer)
    moved = [(a - b).abs().max() for a, b in zip(_exact(other), before, strict=True)]
    assert 0 < max(moved) < 2.0**-8


def test_other_parameters_inside_a_graph_are_refused():
    model, optimizer = _start("kahan_bfloat16", "SGD")
    _one(model, optimizer)
    other = apply_policy(nn.Linear(4, 4), "master_bfloat16")
    optimizer.param_groups[0]["params"][:] = list(other.parameters())
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Take one step outside first"):
        step()
    optimizer.step()
    torch._dynamo.reset()


def test_a_policy_that_is_taken_away_and_given_again_costs_no_average():
    model, optimizer = _start("master_bfloat16", "AdamW", natural=True)
    _one(model, optimizer)
    before, averages = _exact(model), _averages(optimizer)
    remove_policy(model)
    apply_policy(model, "master_bfloat16")
    for now, then in zip(_exact(model), before, strict=True):
        assert torch.equal(now, then)
    for now, then in zip(_averages(optimizer), averages, strict=True):
        assert torch.equal(now, then)
    remove_policy(model)
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(2, 4).bfloat16()).float().square().mean())
    optimizer.step()
    assert {a.dtype for a in _averages(optimizer)} == {torch.bfloat16}


def test_copies_follow_their_own_policies():
    model, optimizer = _start("kahan_bfloat16", "SGD")
    _one(model, optimizer)
    other, second = copy.deepcopy((model, optimizer))
    apply_policy(other, "master_bfloat16")
    before = _exact(model) + _exact(other)
    for made in ((model, optimizer), (other, second)):
        _one(*made)
    for now, then in zip(_exact(model) + _exact(other), before, strict=True):
        assert (now - then).abs().max() < 2.0**-8
    assert masters.known(model[0].weight).update == "kahan"
    assert masters.known(other[0].weight).update == "master"


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("name", ["mixed_bfloat16", *NAMES])
def test_parameters_may_trade_places(swapping, name):
    torch.manual_seed(0)
    model = apply_policy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), name)
    other = apply_policy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), name)
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=2.0**-10))
    model.load_state_dict(other.state_dict())
    for now, then in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(now, then)
        rounded = masters.exact_of(now).to(now.dtype)
        assert torch.equal(rounded, then), "no digit of the old weight is left"
    before = _exact(model)
    model.to(torch.device("cpu"))
    _one(model, optimizer)
    moved = [(a - b).abs().max() for a, b in zip(_exact(model), before, strict=True)]
    assert max(moved) < 2.0**-7
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("by", ["a policy", "a group"])
def test_a_scale_that_is_wanted_later_is_missed_aloud(by):
    layers = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
    for layer, policy in zip(layers, ("mixed_bfloat16", "mixed_float16"), strict=True):
        apply_policy(layer, policy)
    optimizer = LossScaleOptimizer(torch.optim.SGD(layers[0].parameters(), lr=0.1))
    change = {
        "a policy": lambda: apply_policy(layers[0], "mixed_float16"),
        "a group": lambda: optimizer.add_param_group({"params": list(layers[1].parameters())}),
    }[by]
    with pytest.warns(LossScaleWarning, match="wants a loss scale, and the LossScaleOptimizer"):
        change()


def test_a_scale_that_was_declined_is_not_missed():
    layer = apply_policy(torch.nn.Linear(4, 1), "mixed_bfloat16")
    optimizer = LossScaleOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), NoLossScale())
    apply_policy(layer, "mixed_float16")  # a warning would be an error here
    assert optimizer.loss_scale == NoLossScale()
