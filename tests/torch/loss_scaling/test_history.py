"""The history of a device is read when its copies have arrived, and never waited for."""

import pytest
import torch

from halfstep.core.loss_scale import DynamicLossScale, LossScaleState
from halfstep.torch import ScaleEvent
from halfstep.torch.loss_scaling import history
from halfstep.torch.loss_scaling.history import KEPT_EVENTS, History


class Event:
    """Passes when the test says so."""

    def __init__(self):
        self.passed = False

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True


@pytest.fixture
def device(monkeypatch):
    """A device whose copies arrive when the test lets them: two slots, one event for each copy."""
    events = []

    def mark():
        events.append(Event())
        return events[-1]

    reader = history.DeviceReader(torch.zeros(2, 4), mark)
    monkeypatch.setattr(history, "_HostReader", lambda: reader)
    return events


def _state(scale, skipped=0):
    return torch.tensor([scale, 0.0, 0.0, skipped])


def test_states_are_seen_once_they_have_arrived(device):
    seen = History(LossScaleState(8.0, 0.0, 0.0, 0.0))
    assert seen.record(1, _state(4.0, 1)) == []
    assert list(seen.events) == []
    device[0].passed = True
    assert [row.scale for row in seen.record(2, _state(2.0, 2))] == [4.0]
    assert list(seen.events) == [ScaleEvent(1, 4.0, True)]
    seen.drain()
    assert list(seen.events) == [ScaleEvent(1, 4.0, True), ScaleEvent(2, 2.0, True)]


def test_a_state_that_finds_no_room_is_left_out_and_the_next_makes_up_for_it(device):
    seen = History(LossScaleState(8.0, 0.0, 0.0, 0.0))
    for step in (1, 2, 3):
        seen.record(step, _state(8.0 / 2**step, step))
    assert len(device) == 2
    seen.drain()
    seen.record(4, _state(1.0, 3))
    seen.drain()
    assert [event.step for event in seen.events] == [1, 2, 4]
    assert seen.events[-1] == ScaleEvent(4, 1.0, True)


def test_a_copy_in_flight_is_not_overwritten_by_a_later_one(device):
    seen = History(LossScaleState(8.0, 0.0, 0.0, 0.0))
    packed = _state(4.0, 1)
    seen.record(1, packed)
    packed.copy_(_state(2.0, 2))  # the state goes on in place
    seen.record(2, packed)
    device[0].passed = device[1].passed = True
    assert [row.scale for row in seen.record(3, packed)] == [4.0, 2.0]


def test_the_history_of_a_run_that_skips_for_ever_is_bounded():
    seen = History(LossScaleState(8.0, 0.0, 0.0, 0.0))
    for step in range(KEPT_EVENTS + 10):
        seen.record(step, _state(8.0, step + 1))
    assert len(seen.events) == KEPT_EVENTS
    assert seen.events[-1].step == KEPT_EVENTS + 9


def test_the_exhaustion_of_a_row_is_decided_by_the_core():
    rule = DynamicLossScale(initial_scale=1, patience=2)
    seen = History(LossScaleState(1.0, 0.0, 0.0, 0.0))
    (row,) = seen.record(1, torch.tensor([1.0, 0.0, 2.0, 2.0]))
    assert rule.exhausted(row)
    (row,) = seen.record(2, torch.tensor([1.0, 0.0, 1.0, 3.0]))
    assert not rule.exhausted(row)
