"""Each skipped step is written, also between recorded ones: its parameters, and a judgement."""

from __future__ import annotations

import pytest
import torch

from halfstep import DynamicLossScale, LossScaleExhausted
from halfstep.torch import LossScaleOptimizer
from halfstep.torch.loss_scaling.history import DeviceReader
from halfstep.torch.numerics.skipping import SkipWatch


def scaled(net, **rule):
    return LossScaleOptimizer(torch.optim.SGD(net.parameters(), 0.01), DynamicLossScale(**rule))


def overflowing(limit):
    """A hook that makes a gradient infinite where the loss scale is above a limit."""
    return lambda grad: torch.where(grad.abs().amax() > limit, torch.inf, grad)


def test_the_search_for_the_first_scale_is_a_probe_of_named_parameters(kit):
    net = kit.net()
    optimizer = scaled(net, initial_scale=2.0**20)
    net.up.weight.register_hook(overflowing(100.0))
    with kit.monitor(net, optimizer, every=100):
        kit.train(net, optimizer, 12)
    read = kit.read()
    skips = read.of("skip")
    assert len(skips) == optimizer.skipped_steps > 1
    assert {tuple(skip["parameters"]) for skip in skips} == {("up.weight",)}
    assert {(skip["verdict"], skip["reason"]) for skip in skips} == {("probe", "search")}
    assert [skip["scale"] for skip in skips] == [2.0 ** (20 - i) for i in range(len(skips))]
    assert all(skip["next_scale"] == skip["scale"] / 2 for skip in skips)
    assert [skip["in_a_row"] for skip in skips] == list(range(1, len(skips) + 1))
    (run,) = read.of("skips")
    assert (run["first"], run["last"], run["verdict"]) == (1, len(skips), "probe")
    assert (skips[0]["not_finite"], skips[0]["of"]) == (1, 7)


def test_a_scale_that_grew_too_far_is_a_probe(kit):
    net = kit.net()
    optimizer = scaled(net, initial_scale=4.0, growth_interval=3)
    before = net.up.weight.grad
    with kit.monitor(net, optimizer, every=100):
        kit.train(net, optimizer, 4)
        assert before is None
        optimizer.zero_grad()
        handle = net.up.weight.register_hook(lambda grad: grad * float("inf"))
        kit.train(net, optimizer, 1)
        handle.remove()
        kit.train(net, optimizer, 1)
    read = kit.read()
    assert [(event["step"], event["scale"]) for event in read.of("scale")] == [(3, 8.0)]
    (skip,) = read.of("skip")
    assert (skip["step"], skip["reason"], skip["verdict"]) == (5, "growth", "probe")


def test_what_goes_on_is_a_fault_and_exhaustion_is_written(kit):
    net = kit.net()
    optimizer = scaled(net, initial_scale=8.0, patience=3)

    def run():
        with kit.monitor(net, optimizer, every=100):
            kit.train(net, optimizer, 2)
            net.down.bias.register_hook(lambda grad: grad * float("nan"))
            kit.train(net, optimizer, 50)

    with pytest.raises(LossScaleExhausted):
        run()
    read = kit.read()
    assert len(read.of("skip")) == optimizer.skipped_steps
    (run,) = read.of("skips")
    assert (run["verdict"], run["first"]) == ("fault", 3)
    end = read.of("end")[0]
    assert end["error"].startswith("LossScaleExhausted")
    assert end["skipped"] == optimizer.skipped_steps


def test_a_loss_that_is_not_finite_is_a_fault(kit):
    net = kit.net()
    optimizer = scaled(net)
    with kit.monitor(net, optimizer, every=2):
        kit.train(net, optimizer, 4, bad={2, 3})
    read = kit.read()
    assert [skip["reason"] for skip in read.of("skip")] == ["loss", "loss"]
    assert read.of("skip")[0]["loss"] == float("inf")
    skipped = {step["step"]: step["skipped"] for step in read.of("numerics")}
    assert skipped == {1: False, 3: True}
    assert not any(key[0] == "update" for key in read.rows(1))


class Event:
    """Passes when the test says so."""

    def __init__(self):
        self.passed = False

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True


def test_on_an_accelerator_skips_are_written_when_they_have_arrived():
    weight, bias = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    named = [("weight", weight), ("unused", torch.nn.Parameter(torch.ones(1))), ("bias", bias)]
    written, marks = [], []

    def mark():
        marks.append(Event())
        return marks[-1]

    watch = SkipWatch(named, DynamicLossScale, written.append)
    watch.begin(torch.tensor(16.0))
    watch._reader = DeviceReader(torch.zeros(8, 3 + len(named)), mark)
    finite, bad = torch.tensor(0.0), torch.tensor(1.0)
    weight.grad, bias.grad = torch.tensor([1.0, 2.0]), torch.tensor([1.0])
    watch._send(1, finite, torch.tensor(16.0), torch.tensor(2.5))
    bias.grad = torch.tensor([float("nan")])
    watch._send(2, bad, torch.tensor(8.0), torch.tensor(3.5))
    bias.grad = torch.tensor([1.0])  # the next step's: what was sent is what it was
    watch._receive(wait=False)
    assert written == []
    watch._send(3, finite, torch.tensor(8.0), torch.tensor(2.5))
    for event in marks:
        event.passed = True
    watch._receive(wait=False)
    assert [event["event"] for event in written] == ["skip", "skips"]
    skip = written[0]
    assert (skip["step"], skip["parameters"], skip["of"]) == (2, ["bias"], 2)
    assert (skip["scale"], skip["next_scale"], skip["loss"]) == (16.0, 8.0, 3.5)
