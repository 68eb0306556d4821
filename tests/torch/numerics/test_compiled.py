"""What was compiled, before or after the monitor was made, is recorded like the rest."""

from __future__ import annotations

import pytest
import torch

from halfstep import PolicyError
from halfstep.torch import LossScaleOptimizer, NumericsMonitor


def adam(net, rate=0.01):
    return torch.optim.AdamW(net.parameters(), rate)


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_model_runs_eagerly_in_recorded_steps_only(kit, wrapped):
    compiled_calls = []

    def backend(graph, inputs):
        def run(*args):
            compiled_calls.append(len(compiled_calls))
            return graph.forward(*args)

        return run

    net = kit.net()
    model = torch.compile(net, backend=backend) if wrapped else net
    if not wrapped:
        net.compile(backend=backend)
    optimizer = adam(net)
    calls = []
    with kit.monitor(model, optimizer, every=3):
        for _ in range(5):
            before = len(compiled_calls)
            kit.train(model, optimizer, 1)
            calls.append(len(compiled_calls) > before)
    assert calls == [False, True, True, False, True]
    read = kit.read()
    assert read.steps() == [1, 4]
    assert ("activation_gradient", "up", "") in read.rows(1)


def test_a_compiled_model_needs_something_that_ends_a_step(kit):
    with pytest.raises(PolicyError, match="this model is compiled"):
        NumericsMonitor(torch.compile(kit.net(), backend="eager"))


@pytest.mark.parametrize("what", ["model", "loss", "step"])
def test_what_is_compiled_after_the_monitor_was_made_is_counted_too(kit, what):
    net = kit.net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with kit.monitor(net, optimizer, every=2):
        model = torch.compile(net, backend="eager") if what == "model" else net
        loss = torch.compile(kit.loss, backend="eager") if what == "loss" else kit.loss

        def step():
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        step = torch.compile(step, backend="eager") if what == "step" else step
        for _ in range(3):
            step()
    read = kit.read()
    assert read.steps() == [1, 3]
    for place in (0, 1):
        assert {("activation", "up", ""), ("update", "up", "weight")} <= read.rows(place).keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
def test_a_compiled_step_of_a_loss_scale_optimizer_is_recorded(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.SGD(net.parameters(), 0.01))
    with kit.monitor(net, optimizer, every=2):

        @torch.compile(backend="eager")
        def step():
            optimizer.zero_grad()
            optimizer.backward(kit.loss(net))
            optimizer.step()

        for _ in range(3):
            step()
    assert kit.read().steps() == [1, 3]
    assert ("activation_gradient", "up", "") in kit.read().rows(1)
