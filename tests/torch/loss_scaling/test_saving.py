"""Saved in mid-run and restored into a fresh optimizer, training continues bit for bit."""

import copy
import io
import pickle

import pytest
import torch

from halfstep import DynamicLossScale, FixedLossScale, NoLossScale
from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer

INF = float("inf")
RULE = DynamicLossScale(initial_scale=64, growth_interval=3, hysteresis=2)
# ends in the middle of a growth interval, after skips, with one of two bad steps used up
FIRST = [1.0, INF, 1.0, INF, INF, 1.0, 1.0, INF]
SECOND = [INF, 1.0, 1.0, 1.0, 1.0]


def _train(kit, optimizer, net, schedule, start):
    for step, times in enumerate(schedule, start):

        def closure(step=step, times=times):
            optimizer.zero_grad()
            loss = kit.loss(net, step) * times
            optimizer.backward(loss)
            return loss

        if isinstance(optimizer.inner_optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def _through_disk(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_restored_run_continues_bit_for_bit(kit, dense_case, max_norm):
    net = kit.net()
    optimizer = LossScaleOptimizer(
        dense_case.make(kit.groups(net, "plain")), RULE, max_norm=max_norm
    )
    _train(kit, optimizer, net, FIRST, 0)
    model, saved = _through_disk((net.state_dict(), optimizer.state_dict()))
    _train(kit, optimizer, net, SECOND, len(FIRST))

    other = kit.net(seed=1)
    other.load_state_dict(model)
    restored = LossScaleOptimizer(dense_case.make(kit.groups(other, "plain")), max_norm=max_norm)
    restored.load_state_dict(saved)
    assert restored.loss_scale == RULE
    _train(kit, restored, other, SECOND, len(FIRST))
    kit.same(kit.snapshot(restored), kit.snapshot(optimizer))
    assert restored.current_scale == optimizer.current_scale
    assert restored.skipped_steps == optimizer.skipped_steps
    assert restored.scale_history == optimizer.scale_history
    assert optimizer.skipped_steps == 5


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_between_steps_continues_bit_for_bit(kit, stepping_case, way):
    net = kit.net()
    if way == "pickle" and stepping_case.name == "ThirdParty":
        pytest.skip("its class lives in a conftest, which pickle cannot import")
    optimizer = LossScaleOptimizer(stepping_case.make(kit.groups(net, "plain")), RULE)
    _train(kit, optimizer, net, FIRST, 0)
    if way == "pickle":
        parameters = dict(net.named_parameters())
        parameters, copied = pickle.loads(pickle.dumps((parameters, optimizer)))
        other = kit.net()
        for name, parameter in parameters.items():
            module, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(module), leaf, parameter)
    else:
        other, copied = copy.deepcopy((net, optimizer))
    assert copied.param_groups[0]["params"][0] is other.table.weight
    _train(kit, copied, other, SECOND, len(FIRST))
    _train(kit, optimizer, net, SECOND, len(FIRST))
    kit.same(kit.snapshot(copied), kit.snapshot(optimizer))
    assert copied.scale_history == optimizer.scale_history
    kit.same(copied.state_dict(), optimizer.state_dict())


def test_the_state_dict_fits_a_bare_optimizer(kit, dense_case):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(dense_case.make(kit.groups(ours, "plain")))
    _train(kit, wrapped, ours, [1.0, 1.0], 0)
    bare = dense_case.make(kit.groups(theirs, "plain"))
    theirs.load_state_dict(ours.state_dict())
    bare.load_state_dict(wrapped.state_dict())
    fresh = dense_case.make(kit.groups(kit.net(), "plain"))
    for group, other in zip(bare.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    kit.same(kit.snapshot(bare), kit.snapshot(wrapped))


def test_a_bare_optimizers_state_is_taken_with_a_warning(kit, dense_case):
    ours, theirs = kit.net(), kit.net()
    bare = dense_case.make(kit.groups(theirs, "plain"))

    def plain():
        bare.zero_grad()
        loss = kit.loss(theirs, 0)
        loss.backward()
        return loss

    bare.step(plain)
    wrapped = LossScaleOptimizer(dense_case.make(kit.groups(ours, "plain")), RULE)
    ours.load_state_dict(theirs.state_dict())
    with pytest.warns(UserWarning, match="holds no loss scale"):
        wrapped.load_state_dict(bare.state_dict())
    _train(kit, wrapped, ours, [1.0], 1)
    assert wrapped.current_scale == 64
    kit.same(len(kit.snapshot(wrapped)[1]), 3)


def _broken(saved):
    good = {k: dict(v) if isinstance(v, dict) else v for k, v in saved["loss_scale"].items()}
    yield {**good, "config": {"kind": "dynamc"}}
    yield {**good, "config": {"kind": "dynamic", "min_scale": 0.0}}
    yield {**good, "state": {**good["state"], "scale": 0.0}}
    yield {**good, "state": {**good["state"], "scale": float("nan")}}
    yield {**good, "state": {**good["state"], "bad_steps": -1.0}}
    yield {**good, "state": {"scale": 1.0}}
    yield {**good, "steps": None}
    yield {**good, "history": [[1, 2]]}
    yield {"config": good["config"]}
    yield 3


def test_a_failing_load_leaves_everything_as_it_was(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), RULE)
    _train(kit, optimizer, net, FIRST, 0)
    before = copy.deepcopy(optimizer.state_dict())
    inner = optimizer.inner_optimizer
    state, groups = inner.state, inner.param_groups
    saved = optimizer.state_dict()
    for entry in _broken(saved):
        with pytest.raises(LossScaleError):
            optimizer.load_state_dict({**saved, "loss_scale": entry})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
    late = {0: {"step": torch.zeros(()), "exp_avg": object()}}
    inner.register_load_state_dict_post_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict({**saved, "state": late})
    assert inner.state is state
    assert inner.param_groups is groups
    kit.same(optimizer.state_dict(), before)


def test_the_kind_of_scale_is_the_running_ones(kit):
    """A float16 run that goes on in bfloat16 does not get its scale back, and the reverse."""
    net = kit.net()
    scaled = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), RULE)
    _train(kit, scaled, net, FIRST, 0)
    plain = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), NoLossScale())
    with pytest.warns(UserWarning, match="this optimizer keeps NoLossScale"):
        plain.load_state_dict(scaled.state_dict())
    assert plain.loss_scale == NoLossScale()
    assert not plain.param_groups[0]["fused"]
    fixed = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), 32)
    with pytest.warns(UserWarning, match="this optimizer keeps FixedLossScale"):
        fixed.load_state_dict(plain.state_dict())
    assert fixed.loss_scale == FixedLossScale(32)
    assert fixed.current_scale == 32


def test_a_load_between_scaling_and_the_step_is_noticed(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), RULE)
    saved = optimizer.state_dict()
    optimizer.backward(kit.loss(net, 0))
    optimizer.load_state_dict(saved)
    with pytest.raises(LossScaleError, match="no loss was scaled"):
        optimizer.step()


def test_the_state_of_a_grad_scaler_is_refused_and_its_run_goes_on_as_the_error_says():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    bare, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.scale((weight * weight).sum()).backward()
    scaler.step(bare)
    scaler.update()
    saved = _through_disk({"optimizer": bare.state_dict(), "scaler": scaler.state_dict()})
    optimizer = LossScaleOptimizer(torch.optim.AdamW([weight]))
    before = optimizer.state_dict()
    with pytest.raises(LossScaleError, match=r"GradScaler.*initial_scale=512\.0"):
        optimizer.load_state_dict(saved["scaler"])
    assert optimizer.state_dict() == before
    rule = DynamicLossScale(initial_scale=saved["scaler"]["scale"])
    optimizer = LossScaleOptimizer(torch.optim.AdamW([weight]), rule)
    with pytest.warns(UserWarning, match=r"starts anew at 512\.0"):
        optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.current_scale == 512.0
    assert optimizer.state[weight]["step"].item() == 1
