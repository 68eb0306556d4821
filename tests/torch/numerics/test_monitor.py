"""A recorded step says what the numbers are; nothing of it is left after it, or paid between."""

from __future__ import annotations

import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from halfstep import ExponentHistogram, NoLossScale, PolicyError, RecordError
from halfstep.core.numerics.record import KINDS
from halfstep.core.record import read_record
from halfstep.torch import GradScaler, LossScaleOptimizer, NumericsMonitor, apply_policy


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
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


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


def test_a_compiled_model_needs_something_that_ends_a_step(kit):
    with pytest.raises(PolicyError, match="this model is compiled"):
        NumericsMonitor(torch.compile(kit.net(), backend="eager"))


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
