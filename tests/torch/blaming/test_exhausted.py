"""When the loss scale gives up, the error says what broke, if that was asked for."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from halfstep import DynamicLossScale, LossScaleExhausted
from halfstep.torch import GradScaler, LossScaleOptimizer, blame_on_exhausted

AT_THE_FLOOR = DynamicLossScale(initial_scale=1, patience=1)


class Noisy(nn.Module):
    """Breaks only where dropout lets the one large value pass."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.linear(x)).log()


def loss_fn(model, batch):
    return model(batch).nan_to_num(neginf=float("inf")).mean()


BATCH = torch.ones(1, 2)


def train(model, step, asked=True):
    """Enough steps to run out of patience: some draws of the dropout are harmless."""
    for _ in range(1000):
        with blame_on_exhausted(model, loss_fn, BATCH) if asked else nullcontext():
            model.zero_grad()
            step(loss_fn(model, BATCH))


def with_optimizer(optimizer):
    def step(loss):
        optimizer.backward(loss)
        optimizer.step()

    return step


def positive(model):
    with torch.no_grad():
        model.linear.weight.fill_(1.0)
        model.linear.bias.fill_(1.0)
    return model


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = positive(Noisy())
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, with_optimizer(LossScaleOptimizer(sgd, AT_THE_FLOOR))


def test_the_error_holds_the_fault_of_the_very_step(trained):
    with pytest.raises(LossScaleExhausted) as caught:
        train(*trained)

    fault = caught.value.fault
    assert fault.operation == "log"
    assert "log of 0" in str(caught.value)
    assert "not a scaling problem" in str(caught.value)
    assert "Not finite last" in str(caught.value)


def test_the_generators_go_on_as_without_it(trained):
    state, drawn = torch.get_rng_state(), []
    for asked in (False, True):
        torch.set_rng_state(state)
        with pytest.raises(LossScaleExhausted):
            train(*trained, asked)
        drawn.append(torch.rand(2))

    assert torch.equal(*drawn)


def test_a_grad_scaler_is_as_good():
    model = positive(Noisy()).eval()
    with torch.no_grad():
        model.linear.bias.fill_(-2.0)  # 1 + 1 - 2: the log of 0, whatever the dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = GradScaler("cpu", init_scale=1.0, min_scale=1.0)

    def step(loss):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    with pytest.raises(LossScaleExhausted) as caught:
        train(model, step)

    assert caught.value.fault.operation == "log"


def test_a_finite_replay_is_said_to_be_one():
    model = positive(Noisy()).eval()
    with (
        pytest.raises(LossScaleExhausted, match="A replay of this step is finite") as caught,
        blame_on_exhausted(model, loss_fn, BATCH),
    ):
        raise LossScaleExhausted("given up")
    assert caught.value.fault is None


def test_other_errors_pass_through(trained):
    model, _ = trained
    with pytest.raises(KeyError), blame_on_exhausted(model, loss_fn, None):
        raise KeyError
