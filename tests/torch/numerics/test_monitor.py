"""A recorded step says what the numbers are; nothing of it is left after it, or paid between."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from halfstep import ExponentHistogram
from halfstep.core.numerics.record import KINDS
from halfstep.torch import LossScaleOptimizer, apply_policy


def exact(tensor):
    return ExponentHistogram.from_array(tensor.detach().double().numpy())


def exponents(row):
    return {row["low"] + i: c for i, c in enumerate(row.get("counts", ())) if c}


def adam(net, rate=0.01):
    return torch.optim.AdamW(net.parameters(), rate)


def test_which_steps_and_tensors_are_recorded(kit):
    net = kit.net()
    optimizer = adam(net)
    with kit.monitor(net, optimizer, every=3) as monitor:
        kit.train(net, optimizer, 7)
    read = kit.read()
    assert read.steps() == [1, 4, 7]
    assert monitor.step == 7
    watched = {"embed", "norm", "up", "down", "scores", "head"}
    kinds = {kind: {e["path"] for e in read.of("tensor") if e["kind"] == kind} for kind in KINDS}
    assert kinds["activation"] == kinds["activation_gradient"] == watched
    # the head's weight is the embedding's: counted once
    for kind in ("weight", "weight_gradient", "update"):
        assert kinds[kind] == {"embed", "norm", "up", "down"}
    end = read.of("end")[0]
    assert (end["steps"], end["recorded"], end["skipped"], end["error"]) == (7, 3, 0, None)
    layers = {layer["path"]: layer["class"] for layer in read.header["layers"]}
    assert layers["act"] == "GELU"
    assert read.header["kind"] == "numerics"


def test_rows_are_the_histograms_of_the_tensors(kit):
    net = kit.net()
    optimizer = adam(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    outputs = {}
    net.up.register_forward_hook(lambda m, i, o: (o.retain_grad(), outputs.update(up=o))[0])
    with kit.monitor(net, optimizer, every=5):
        kit.train(net, optimizer, 1)
    rows = kit.read().rows(0)
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name, weight in before.items():
        path, own = name.rsplit(".", 1)
        assert exponents(rows["weight", path, own]) == exact(weight).exponents
        assert exponents(rows["weight_gradient", path, own]) == exact(gradients[name]).exponents
    assert exponents(rows["activation", "up", ""]) == exact(outputs["up"]).exponents
    assert exponents(rows["activation_gradient", "up", ""]) == exact(outputs["up"].grad).exponents
    step = kit.read().of("numerics")[0]
    merged = ExponentHistogram.from_plain(step["weight_gradients"])
    assert merged == ExponentHistogram.merged(map(exact, gradients.values()))


def test_updates_and_how_many_a_16_bit_weight_would_lose(kit):
    net = kit.net()
    optimizer = adam(net, 1e-3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with kit.monitor(net, optimizer, every=5):
        kit.train(net, optimizer, 1)
    rows = kit.read().rows(0)
    for name, old in before.items():
        path, own = name.rsplit(".", 1)
        moved = dict(net.named_parameters())[name].detach() - old
        row = rows["update", path, own]
        share = (moved.abs() / old.abs())[moved != 0]
        finite = share[share.isfinite()]
        assert exponents(row) == exact(finite).exponents
        assert row.get("zeros", 0) == int((moved == 0).sum())
        assert row.get("infinities", 0) == int(share.isinf().sum())
        for dtype in (torch.bfloat16, torch.float16):
            low = old.to(dtype)
            lost = ((low.float() + moved).to(dtype) == low) & (moved != 0)
            count = row.get("lost", {}).get(str(dtype).removeprefix("torch."), 0)
            assert count == int(lost.sum())
    assert any("lost" in rows[key] for key in rows if key[0] == "update")


@pytest.mark.parametrize("max_norm", [None, 0.01])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_run_stays_as_it_is_to_the_last_bit(kit, scaled, max_norm):
    nets = [kit.net(), kit.net()]
    for net, watched in zip(nets, (True, False), strict=True):
        apply_policy(net, "mixed_bfloat16")
        optimizer = adam(net)
        if scaled:
            optimizer = LossScaleOptimizer(optimizer, 1024, max_norm=max_norm)
        monitor = kit.monitor(net, optimizer) if watched else None
        if monitor:
            monitor.attach()
        kit.train(net, optimizer, 4)
        if monitor:
            monitor.detach()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_a_checkpointed_forward_is_counted_once(kit, how):
    rows = []
    for checkpointed in (None, how):
        net = kit.net(checkpointed)
        optimizer = adam(net)
        with kit.monitor(net, optimizer, every=5):
            kit.train(net, optimizer, 1)
        rows.append(kit.read().rows(0))
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        assert {**row, "id": 0} == {**rows[1][key], "id": 0}


def test_hooks_are_there_in_a_recorded_step_and_nowhere_else(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(adam(net))
    monitor = kit.monitor(net, optimizer, every=2).attach()
    installed = []
    for _ in range(4):
        installed.append(kit.hooks(net))
        kit.train(net, optimizer, 1)
    monitor.detach()
    assert [count > 0 for count in installed] == [True, False, True, False]
    assert kit.hooks(net) == 0
    assert optimizer.observers == []


class Broken(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["none", "plain", "scaled", "scaler"])
def test_an_exception_leaves_no_hook_and_a_record_that_says_why(kit, optimizer):
    net = kit.net()
    inner = adam(net)
    scaler = torch.amp.GradScaler("cpu")
    ends = {"none": None, "plain": inner, "scaled": LossScaleOptimizer(inner), "scaler": scaler}

    def run():
        with kit.monitor(net, ends[optimizer], every=1):
            kit.loss(net).backward()
            raise Broken("in the middle of a recorded step")

    with pytest.raises(Broken):
        run()
    assert kit.hooks(net) == 0
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert kit.read().of("end")[0]["error"] == "Broken: in the middle of a recorded step"
    inner.step()  # nothing watches any more


def test_between_recorded_steps_nothing_more_is_dispatched(kit):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    for watched in (False, True):
        net = kit.net()
        optimizer = adam(net)
        if watched:
            monitor = kit.monitor(net, optimizer, every=100).attach()
        kit.train(net, optimizer, 2)
        with Operations() as operations:
            kit.train(net, optimizer, 1)
        seen.append(operations.names)
    monitor.detach()
    assert seen[0] == seen[1]


def test_a_recorded_step_reads_the_host_once(kit, monkeypatch):
    net = kit.net()
    optimizer = LossScaleOptimizer(adam(net))
    reads = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or cpu(self))
    with kit.monitor(net, optimizer, every=2):
        kit.train(net, optimizer, 5)
    assert len(reads) == len(kit.read().steps()) == 3


def test_outputs_of_every_structure(kit):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return {"a": (x * self.weight, None, torch.arange(3)), "b": [x + self.weight]}

    net = Many()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with kit.monitor(net, optimizer):
        output = net(torch.ones(2, 3))
        (output["a"][0] + output["b"][0]).sum().backward()
        optimizer.step()
    names = {e["name"] for e in kit.read().of("tensor") if e["kind"] == "activation_gradient"}
    assert names == {"a.0", "b.0"}


def test_a_policy_and_its_layers_are_in_the_header(kit):
    net = apply_policy(kit.net(), "mixed_bfloat16", {"head": "float32"})
    optimizer = adam(net)
    with kit.monitor(net, optimizer):
        kit.train(net, optimizer, 1)
    read = kit.read()
    assert read.header["policy"] == "mixed_bfloat16"
    layers = {layer["path"]: layer for layer in read.header["layers"]}
    assert (layers["up"]["policy"], layers["up"]["compute_dtype"]) == ("mixed_bfloat16", "bfloat16")
    assert layers["head"]["compute_dtype"] == "float32"
    dtypes = {e["path"]: e["dtype"] for e in read.of("tensor") if e["kind"] == "activation"}
    assert dtypes["up"] == "bfloat16"


def test_without_a_loss_scale_gradients_that_are_not_finite_are_named(kit):
    net = kit.net()
    optimizer = adam(net)
    with kit.monitor(net, optimizer, every=2):
        kit.train(net, optimizer, 1)
        net.up.weight.register_hook(lambda grad: grad * float("nan"))
        kit.train(net, optimizer, 2)
    (event,) = kit.read().of("not_finite")
    assert (event["step"], event["of"]) == (3, 7)
    assert "up.weight" in event["parameters"]


def test_a_killed_run_leaves_a_readable_record(kit):
    net = kit.net()
    optimizer = adam(net)
    monitor = kit.monitor(net, optimizer, every=1).attach()
    kit.train(net, optimizer, 2)
    read = kit.read()  # nothing was closed
    assert read.steps() == [1, 2]
    monitor.detach()


def test_the_advice_of_a_run(kit):
    net = kit.net()
    optimizer = adam(net)
    monitor = kit.monitor(net, optimizer)
    assert monitor.advice() is None
    with monitor:
        kit.train(net, optimizer, 3)
    advice = kit.read().of("end")[0]["advice"]
    assert advice["scale"] == monitor.advice().scale
    assert advice["text"] == str(monitor.advice())
    step = kit.read().of("numerics")
    merged = ExponentHistogram.merged(
        ExponentHistogram.from_plain(each[kind])
        for each in step
        for kind in ("weight_gradients", "activation_gradients")
    )
    assert np.isclose(merged.nonzero, advice["unscaled"]["count"])


def test_tensorboard_gets_the_same(kit, tmp_path, monkeypatch):
    # TensorBoard's own switch for running without TensorFlow, whose import takes ten seconds
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = kit.net()
    optimizer = LossScaleOptimizer(adam(net))
    with SummaryWriter(tmp_path / "board") as writer, kit.monitor(net, optimizer, writer=writer):
        kit.train(net, optimizer, 3, bad={2})
    board = EventAccumulator(str(tmp_path / "board"), {"histograms": 0})
    board.Reload()
    assert "lost in float16/activation/up" in board.Tags()["scalars"]
    scales = [(event.step, event.value) for event in board.Scalars("loss scale")]
    assert scales == [(1, 2.0**15), (2, 2.0**14), (3, 2.0**14)]
    assert [event.step for event in board.Scalars("skipped step (2: a fault)")] == [2]
    first, last = board.Histograms("weight/up.weight")
    assert (first.step, last.step, first.histogram_value.num) == (1, 3, 8 * 16)
