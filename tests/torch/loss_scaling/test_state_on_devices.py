"""The state of the scale, made on the host where that is free, and with few launches elsewhere."""

from __future__ import annotations

import random

import pytest
import torch

from halfstep import DynamicLossScale, FixedLossScale
from halfstep.core.loss_scale import LossScaleState
from halfstep.torch import LossScaleOptimizer
from halfstep.torch.loss_scaling import host
from halfstep.torch.loss_scaling.state import ScaleState

RULES = [
    DynamicLossScale(initial_scale=8, growth_interval=2, max_scale=32),
    DynamicLossScale(initial_scale=2, growth_interval=3, growth_factor=4, backoff_factor=0.25),
    DynamicLossScale(initial_scale=8, growth_interval=1, hysteresis=3),
    FixedLossScale(64),
]


@pytest.fixture(params=["free", "elsewhere"])
def way(request, monkeypatch):
    if request.param == "elsewhere":
        monkeypatch.setattr(host, "CPU_IS_FREE", False)
    return request.param


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_way_is_the_rule(rule, way):
    state = ScaleState(rule, rule.init(float))
    expected = rule.init(float)
    draws = random.Random(0)
    for _ in range(60):
        bad = draws.random() < 0.4
        expected = rule.update(expected, not bad)
        packed = state.advance(torch.tensor(float(bad)))
        assert LossScaleState(*packed.tolist()) == expected


def test_few_launches_where_nothing_can_be_read(monkeypatch, counts):
    monkeypatch.setattr(host, "CPU_IS_FREE", False)
    state = ScaleState(DynamicLossScale(), DynamicLossScale().init(float))
    state.advance(torch.tensor(0.0))
    found = torch.tensor(1.0)
    with counts() as counter:
        state.advance(found)
    views = {"select", "slice"}
    assert sum(n for name, n in counter.calls.items() if name not in views) <= 6


def test_none_where_it_can(counts):
    state = ScaleState(DynamicLossScale(), DynamicLossScale().init(float))
    found = torch.tensor(1.0)
    state.advance(found)
    with counts() as counter:
        state.advance(found)
    assert set(counter.calls) <= {"detach"}


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_same_training_either_way(kit, fused_case, max_norm, monkeypatch):
    ends = []
    for free in (True, False):
        monkeypatch.setattr(host, "CPU_IS_FREE", free)
        net = kit.net()
        optimizer = LossScaleOptimizer(
            fused_case.make(kit.groups(net, "plain")), 64, max_norm=max_norm
        )
        for step in range(4):
            optimizer.zero_grad()
            optimizer.backward(kit.loss(net, step) * (float("nan") if step == 1 else 1.0))
            optimizer.step()
        ends.append((kit.snapshot(optimizer), optimizer.skipped_steps))
    kit.same(ends[0], ends[1])


def test_a_gradient_whose_square_overflows_is_finite():
    weight = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=2.0**-100), 1)
    optimizer.backward((weight * 2.0**100).sum())
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert weight.tolist() == [-1.0, -1.0]
