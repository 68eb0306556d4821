"""What a monitor takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfstep import PolicyError, RecordError
from halfstep.torch import NumericsMonitor


def adam(net, rate=0.01):
    return torch.optim.AdamW(net.parameters(), rate)


def test_chosen_modules(kit):
    net = kit.net()
    optimizer = adam(net)
    for modules, expected in (
        (["up"], {"up"}),
        ("up|down", {"up", "down"}),
        (lambda path, module: isinstance(module, nn.GELU), {"act"}),
    ):
        with kit.monitor(net, optimizer, modules=modules):
            kit.train(net, optimizer, 1)
        assert {e["path"] for e in kit.read().of("tensor")} == expected


def test_no_record_at_all_and_one_monitor_twice(kit, tmp_path):
    net = kit.net()
    optimizer = adam(net)
    monitor = NumericsMonitor(net, optimizer, every=1, record=None)
    with monitor:
        kit.train(net, optimizer, 1)
    assert list(tmp_path.iterdir()) == []
    assert monitor.gradients["weight_gradient"].nonzero
    with monitor:
        assert monitor.step == 0
        kit.train(net, optimizer, 2)
    assert monitor.step == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"optimizer": object()}, "this is a object"),
        ({"modules": ["upp"]}, "Did you mean 'up'"),
        ({"modules": lambda path, module: False}, "chooses none of the 8 modules"),
    ],
)
def test_arguments_that_do_not_fit(kit, arguments, words):
    with pytest.raises(PolicyError, match=words):
        NumericsMonitor(kit.net(), **arguments)


def test_a_model_that_is_none():
    with pytest.raises(PolicyError, match=r"must be an nn\.Module"):
        NumericsMonitor([1, 2])


def test_attaching_twice_and_a_path_that_cannot_be_written(kit, tmp_path):
    net = kit.net()
    monitor = kit.monitor(net).attach()
    with pytest.raises(PolicyError, match="attached already"):
        monitor.attach()
    monitor.detach()
    monitor.detach()  # the second one does nothing
    with pytest.raises(RecordError, match="cannot write"):
        NumericsMonitor(net, record=tmp_path).attach()
    assert kit.hooks(net) == 0
