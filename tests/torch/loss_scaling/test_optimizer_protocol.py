"""It is an optimizer: for schedulers, trainers, hooks and whoever writes into its groups."""

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer

INF = float("inf")


def _pair(kit, kind, **options):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(kind(kit.groups(ours, "two_groups"), **options))
    return ours, theirs, wrapped, kind(kit.groups(theirs, "two_groups"), **options)


def _step_both(kit, ours, theirs, wrapped, bare, step):
    wrapped.zero_grad()
    wrapped.backward(kit.loss(ours, step))
    wrapped.step()
    bare.zero_grad()
    kit.loss(theirs, step).backward()
    bare.step()


def test_groups_state_and_defaults_are_the_inner_objects(kit):
    inner = torch.optim.AdamW(kit.groups(kit.net(), "two_groups"))
    optimizer = LossScaleOptimizer(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.inner_optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "AdamW" in repr(optimizer)


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "plateau"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.1})],
)
def test_schedulers_drive_it_as_they_drive_the_bare_one(kit, name, kind, options):
    ours, theirs, wrapped, bare = _pair(kit, kind, **options)
    make = SCHEDULERS.get(name, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0))
    schedulers = [make(wrapped), make(bare)]
    for step in range(4):
        _step_both(kit, ours, theirs, wrapped, bare, step)
        for scheduler in schedulers:
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
    for one, other in zip(wrapped.param_groups, bare.param_groups, strict=True):
        for key in ("lr", "momentum", "betas", "initial_lr"):
            assert one.get(key) == other.get(key)
    assert wrapped.param_groups[0]["lr"] != options["lr"]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_a_scheduled_optimizer_can_be_copied(kit):
    import copy

    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")))
    lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    other, copied = copy.deepcopy((net, optimizer))
    before = net.first.weight.detach().clone()
    copied.backward(kit.loss(other, 0))
    copied.step()
    assert torch.equal(net.first.weight, before)
    assert not torch.equal(other.first.weight, before)


def test_groups_added_after_wrapping_are_trained(kit, stepping_case):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(stepping_case.make([ours.table.weight]))
    bare = stepping_case.make([theirs.table.weight])
    _step_both(kit, ours, theirs, wrapped, bare, 0)
    for net, optimizer in ((ours, wrapped), (theirs, bare)):
        optimizer.add_param_group({"params": [net.first.weight], "lr": 0.01})
        net.zero_grad()
    for step in (1, 2):
        _step_both(kit, ours, theirs, wrapped, bare, step)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
    if stepping_case.reads == 0:
        assert all(group["fused"] for group in wrapped.param_groups)


def test_hooks_see_unscaled_gradients_wherever_they_are_registered():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=0.5), 64)
    seen = []

    def hook(owner, args, kwargs):
        seen.append((type(owner).__name__, weight.grad.tolist()))

    handles = [
        optimizer.register_step_pre_hook(hook),
        optimizer.inner_optimizer.register_step_pre_hook(hook),
        register_optimizer_step_pre_hook(hook),
        optimizer.register_step_post_hook(hook),
    ]
    optimizer.backward((weight * 3).sum())
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert seen == [
        ("LossScaleOptimizer", [3.0, 3.0]),
        ("SGD", [3.0, 3.0]),
        ("SGD", [3.0, 3.0]),
        ("LossScaleOptimizer", [3.0, 3.0]),
    ]


def test_hooks_on_state_dicts_run(kit):
    optimizer = LossScaleOptimizer(torch.optim.SGD(kit.groups(kit.net(), "plain")))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, saved: calls.append(saved.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", 1, "loaded"]


def test_hooks_on_an_optimizer_that_evaluates_its_closure_are_refused(kit):
    optimizer = LossScaleOptimizer(torch.optim.LBFGS(kit.groups(kit.net(), "plain")))
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(LossScaleError, match="evaluates its closure itself"):
        optimizer.step(lambda: None)


def test_what_an_optimizer_adds_to_the_protocol_is_reached(kit):
    class ScheduleFree(kit.ThirdParty):
        def train(self):
            return "training"

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = LossScaleOptimizer(ScheduleFree([weight]))
    assert optimizer.train() == "training"
    for name in ("nothing", "_step_supports_amp_scaling"):
        with pytest.raises(AttributeError, match=name):
            getattr(optimizer, name)


def test_fabric_sets_it_up_and_steps_it():
    fabric_package = pytest.importorskip("lightning_fabric")
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1)
    module = torch.nn.Linear(4, 2)
    inner = LossScaleOptimizer(torch.optim.AdamW(module.parameters(), lr=0.1))
    model, optimizer = fabric.setup(module, inner)
    for times, moves in ((1.0, True), (INF, False), (1.0, True)):
        optimizer.zero_grad()
        before = module.weight.detach().clone()
        fabric.backward(inner.scale(model(torch.ones(3, 4)).sum() * times))
        optimizer.step()
        assert torch.equal(module.weight, before) is not moves
    assert inner.skipped_steps == 1
    assert "loss_scale" in optimizer.state_dict()


def test_the_keras_words_do_what_backward_and_step_do(kit, stepping_case):
    ours, theirs, third = kit.net(), kit.net(), kit.net()
    keras = LossScaleOptimizer(stepping_case.make(kit.groups(ours, "plain")), max_norm=0.3)
    torchs = LossScaleOptimizer(stepping_case.make(kit.groups(theirs, "plain")), max_norm=0.3)
    trained = kit.groups(ours, "plain")
    for step, times in enumerate([1.0, INF, 1.0]):
        scaled = keras.get_scaled_loss(kit.loss(ours, step) * times)
        grads = keras.get_unscaled_gradients(torch.autograd.grad(scaled, trained))
        if times == 1.0:
            true = torch.autograd.grad(kit.loss(ours, step), trained)
            torch.testing.assert_close(list(grads), list(true))
        kept = [grad.clone() for grad in grads]
        keras.apply_gradients(zip(grads, trained, strict=True))
        for grad, before in zip(grads, kept, strict=True):
            assert torch.equal(grad.nan_to_num(), before.nan_to_num())
        torchs.zero_grad()
        torchs.backward(kit.loss(theirs, step) * times)
        torchs.step()
        assert keras.last_step_skipped is torchs.last_step_skipped is (times == INF)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)
        assert one.grad is None
    assert keras.scale_history == torchs.scale_history
    assert torch.equal(third.unused.weight, ours.unused.weight)


def test_apply_gradients_updates_only_what_it_is_given_and_keeps_grad():
    one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = LossScaleOptimizer(torch.optim.SGD([one, two], lr=1.0), 8)
    one.grad = two.grad = torch.full((2,), 5.0)
    optimizer.apply_gradients([(torch.ones(2, dtype=torch.float16), one), (None, two)])
    assert (one.tolist(), two.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert one.grad.tolist() == [5.0, 5.0]
    with pytest.raises(LossScaleError, match="pair 0, shape"):
        optimizer.apply_gradients([(torch.ones(2), torch.nn.Parameter(torch.ones(2)))])
    assert optimizer.get_unscaled_gradients([None, torch.full((1,), 4.0).half()]) == [
        None,
        torch.tensor([0.5]),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_step_waits_for_nothing_and_the_history_arrives():
    weight = torch.nn.Parameter(torch.ones(64, device="cuda"))
    optimizer = LossScaleOptimizer(torch.optim.AdamW([weight], lr=0.1), max_norm=1.0)
    schedule = [1.0, INF, 1.0, 1.0, INF] * 40  # more steps than there are slots to report in
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        for times in schedule:
            optimizer.zero_grad()
            optimizer.backward((weight * weight).sum() * times)
            optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 160
    assert optimizer.scale_history[-1].skipped
    assert optimizer.state_dict()["state"][0]["step"].device.type == "cpu"
