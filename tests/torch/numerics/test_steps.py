"""Every way to take a step ends it once, with its gradients unscaled."""

from __future__ import annotations

import pickle

import pytest
import torch

from halfstep import ExponentHistogram, NoLossScale
from halfstep.core.numerics.record import KINDS
from halfstep.core.record import read_record
from halfstep.torch import GradScaler, LossScaleOptimizer


def exact(tensor):
    return ExponentHistogram.from_array(tensor.detach().double().numpy())


def exponents(row):
    return {row["low"] + i: c for i, c in enumerate(row.get("counts", ())) if c}


def adam(net, rate=0.01):
    return torch.optim.AdamW(net.parameters(), rate)


@pytest.mark.parametrize("unscaled_first", [False, True])
def test_gradients_are_recorded_without_the_loss_scale(kit, unscaled_first):
    net, plain = kit.net(), kit.net()
    kit.loss(plain).backward()
    optimizer = LossScaleOptimizer(adam(net), 2.0**10)
    with kit.monitor(net, optimizer, every=5):
        optimizer.backward(kit.loss(net))
        if unscaled_first:
            optimizer.unscale_()
        optimizer.step()
    step, rows = kit.read().of("numerics")[0], kit.read().rows(0)
    assert step["scale"] == 2.0**10
    assert step["loss"] == pytest.approx(kit.loss(plain).item())
    histogram = exact(plain.up.weight.grad)
    row = rows["weight_gradient", "up", "weight"]
    assert exponents(row) == histogram.exponents
    fit, scaled = histogram.fit("float16"), histogram.fit("float16", 2.0**10)
    assert row.get("float16", [0, 0, 0]) == [fit.overflow, fit.flushed, fit.subnormal]
    at_scale = row.get("scaled", {}).get("float16", [0, 0, 0])
    assert at_scale == [scaled.overflow, scaled.flushed, scaled.subnormal]
    merged = ExponentHistogram.from_plain(step["weight_gradients"])
    assert merged == ExponentHistogram.merged(exact(p.grad) for p in plain.parameters())


def test_a_scale_that_is_no_power_of_two_is_divided_out(kit):
    net, plain = kit.net(), kit.net()
    kit.loss(plain).backward()
    optimizer = LossScaleOptimizer(adam(net), 1000)
    with kit.monitor(net, optimizer, every=5):
        kit.train(net, optimizer, 1)
    rows = kit.read().rows(0)
    low = exact(plain.up.weight.grad).highest
    assert max(exponents(rows["weight_gradient", "up", "weight"])) == pytest.approx(low, abs=1)
    assert kit.read().of("numerics")[0]["scale"] == 1000.0


def test_a_loss_scale_that_is_none_and_a_scaler_that_is_disabled(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(adam(net), NoLossScale())
    with kit.monitor(net, optimizer):
        kit.train(net, optimizer, 3)
    assert [step["scale"] for step in kit.read().of("numerics")] == [1.0, 1.0]
    assert kit.read().header["loss_scale"] is None
    inner, scaler = adam(net), GradScaler("cpu", enabled=False)
    with kit.monitor(net, scaler):
        for _ in range(3):
            inner.zero_grad()
            scaler.scale(kit.loss(net)).backward()
            scaler.step(inner)
            scaler.update()
    read = kit.read()
    assert read.steps() == [1, 3]
    assert ("update", "up", "weight") in read.rows(1)
    pickle.dumps(scaler)  # nothing is left in it


def test_the_optimizer_alone_under_torchs_fused_scaling(kit):
    net, plain = kit.net(), kit.net()
    kit.loss(plain).backward()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with kit.monitor(net, optimizer):
        scaler.scale(kit.loss(net)).backward()
        scaler.step(optimizer)
    row = kit.read().rows(0)["weight_gradient", "up", "weight"]
    assert exponents(row) == exact(plain.up.weight.grad).exponents


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_grad_scalers_of_both_kinds(kit, kind):
    net, plain = kit.net(), kit.net()
    optimizer, scaler = adam(net), kind("cpu", init_scale=2.0**8)
    with kit.monitor(net, scaler, every=2):
        for bad in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(kit.loss(net) * bad).backward()
            scaler.step(optimizer)
            scaler.update()
    read = kit.read()
    assert read.steps() == [1, 3]
    assert [step["scale"] for step in read.of("numerics")] == [2.0**8, 2.0**7]
    assert [(skip["step"], skip["not_finite"]) for skip in read.of("skip")] == [(2, 7)]
    assert read.of("skip")[0]["reason"] == "loss"
    kit.loss(plain).backward()
    row = read.rows(0)["weight_gradient", "up", "weight"]
    assert exponents(row) == exact(plain.up.weight.grad).exponents
    assert not {"scale", "step", "update"} & set(vars(scaler))


def test_without_an_optimizer_each_forward_begins_a_step(kit):
    net, watched = kit.net(), kit.net()
    optimizer, other = adam(net), adam(watched)
    with kit.monitor(watched, every=2):
        kit.train(watched, other, 3)
        with torch.no_grad():
            kit.loss(watched)  # no step
    kit.train(net, optimizer, 3)
    read = kit.read()
    assert read.steps() == [1, 3]
    assert read.of("end")[0]["steps"] == 3
    for kind in KINDS:
        assert any(key[0] == kind for key in read.rows(0))
    own = {name: p.grad for name, p in net.named_parameters()}
    row = read.rows(1)["weight_gradient", "norm", "weight"]
    assert exponents(row) == exact(own["norm.weight"]).exponents


def test_accumulation_adds_up_and_is_one_step(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(adam(net))
    with kit.monitor(net, optimizer, every=1):
        for _ in range(2):
            optimizer.zero_grad()
            for part in (slice(0, 1), slice(1, 4)):
                optimizer.backward(kit.loss(net, part) / 2)
            optimizer.step()
    read = kit.read()
    assert read.steps() == [1, 2]
    assert read.rows(0)["activation", "up", ""]["count"] == 4 * 5 * 16
    assert read.rows(0)["activation_gradient", "up", ""]["count"] == 4 * 5 * 16
    assert read.rows(0)["weight_gradient", "up", "weight"]["count"] == 8 * 16


def test_closures_and_an_optimizer_that_evaluates_them(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.LBFGS(net.parameters(), max_iter=2))

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(net)
        optimizer.backward(loss)
        return loss

    with kit.monitor(net, optimizer, every=1):
        optimizer.step(closure)
    assert kit.read().steps() == [1]
    assert read_record(kit.path).events[-1]["event"] == "end"
