"""16-bit weights that lose no update: masters and compensations, under every optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halfstep import LossScaleError, NoLossScale, PolicyError
from halfstep.torch import (
    GradScaler,
    LossScaleOptimizer,
    apply_policy,
    masters,
    policy_of,
    remove_policy,
)
from halfstep.torch.loss_scaling import wide

NAMES = ("master_bfloat16", "master_float16", "kahan_bfloat16")
DTYPES = {"master_bfloat16": torch.bfloat16, "master_float16": torch.float16}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def _wrapped(kit, case, name, scale="its own", **options):
    net = apply_policy(kit.net(), name)
    inner = case.make(kit.groups(net, "plain"))
    given = {} if scale == "its own" else {"loss_scale": scale}
    return net, LossScaleOptimizer(inner, **given, **options)


def _feed(optimizer, seed, scale=1.0):
    """Give every parameter the same gradient in every run, one that 16 bits hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = torch.randn(parameter.shape, generator=generator).bfloat16() * scale
            parameter.grad = grad.to(parameter.dtype)


def _exact(net):
    return [masters.exact_of(p).float().clone() for p in net.parameters()]


# ---------------------------------------------------------------------- training


def _regression(policy, steps=120):
    """A weight of 1 on its way to 1.5 in steps of at most 2**-9."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    if policy != "float32":
        apply_policy(model, policy)
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=2.0**-9))
    inputs = torch.eye(4)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward((model(inputs) - 1.5).square().sum())
        with optimizer.lost_updates() as lost:
            optimizer.step()
    return model, lost


def test_plain_bfloat16_does_not_train_where_the_memory_policies_do():
    exact, _ = _regression("float32")
    assert exact.weight.min() > 1.15
    stuck, lost = _regression("bfloat16")
    assert torch.equal(stuck.weight.float(), torch.ones(1, 4))
    assert (lost.updates, lost.lost, lost.share) == (4, 4, 1.0)
    for name in ("master_bfloat16", "kahan_bfloat16"):
        model, lost = _regression(name)
        assert abs(model.weight.float() - exact.weight).max() <= 2.0**-7, name
        assert (lost.updates, lost.lost, lost.unseen) == (4, 0, 4), name


@pytest.mark.parametrize("name", ["master_bfloat16", "master_float16"])
def test_masters_follow_a_float32_run_bit_for_bit(kit, stepping_case, name):
    net, optimizer = _wrapped(kit, stepping_case, name, scale=1)
    theirs = kit.net()
    bare = stepping_case.make(kit.groups(theirs, "plain"))
    if stepping_case.reads == 0:  # the same kernels on both sides
        for group in bare.param_groups:
            group.update(fused=True, foreach=False)
    for step in range(3):
        _feed(optimizer, step)
        _feed(bare, step)
        optimizer._now.stage = type(optimizer._now.stage).SCALED
        optimizer.step()
        bare.step()
    for low, exact, other in zip(net.parameters(), _exact(net), theirs.parameters(), strict=True):
        assert low.dtype is DTYPES[name]
        assert torch.equal(exact, other.detach())
        assert torch.equal(low.detach(), other.detach().to(low.dtype))


def test_kahan_follows_a_float32_run_within_16_bits(kit, stepping_case):
    net, optimizer = _wrapped(kit, stepping_case, "kahan_bfloat16")
    theirs = kit.net()
    bare = stepping_case.make(kit.groups(theirs, "plain"))
    for step in range(3):
        _feed(optimizer, step)
        _feed(bare, step)
        optimizer.step()
        bare.step()
    for low, exact, other in zip(net.parameters(), _exact(net), theirs.parameters(), strict=True):
        assert low.dtype is torch.bfloat16
        torch.testing.assert_close(exact, other.detach(), rtol=2.0**-13, atol=2.0**-13)
        torch.testing.assert_close(low.float(), other.detach(), rtol=2.0**-7, atol=2.0**-9)


def test_state_is_float32_and_stands_under_the_models_own_parameters(kit, stepping_case, name):
    net, optimizer = _wrapped(kit, stepping_case, name)
    optimizer.backward(kit.loss(net, 0))
    optimizer.step()
    own = [p for p in net.parameters() if p.grad is not None]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} >= {id(p) for p in own}
    assert {id(p) for p in optimizer.inner_optimizer.state} <= {id(p) for p in own}
    kinds = {v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)}
    assert kinds <= {torch.float32}


def test_a_skipped_step_changes_nothing(kit, stepping_case, name):
    net, optimizer = _wrapped(kit, stepping_case, name, scale=64)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()
    before = kit.snapshot(optimizer), _exact(net)
    optimizer.zero_grad()
    optimizer.backward(kit.loss(net, 2) * float("inf"))
    optimizer.step()
    assert optimizer.last_step_skipped
    kit.same((kit.snapshot(optimizer), _exact(net)), before)


def test_a_sum_half_way_between_two_weights_survives_a_skipped_step():
    weight = nn.Linear(1, 1, bias=False)
    apply_policy(weight, "kahan_bfloat16")
    with torch.no_grad():
        weight.weight.fill_(1 + 2.0**-7)  # odd: a tie rounds away from it
    masters.keep(weight.weight, weight.weight.detach().float() + 2.0**-8, "kahan")
    optimizer = LossScaleOptimizer(torch.optim.SGD(weight.parameters(), lr=0.1), 8)
    optimizer.backward(weight(torch.ones(1, 1)).sum() * float("inf"))
    optimizer.step()
    assert weight.weight.item() == 1 + 2.0**-7
    assert masters.exact_of(weight.weight).item() == 1 + 2.0**-7 + 2.0**-8


def test_a_large_model_steps_in_parts(kit, stepping_case, name, monkeypatch):
    whole, at_once = _wrapped(kit, stepping_case, name)
    monkeypatch.setattr(wide, "PART_BYTES", 64)
    split, in_parts = _wrapped(kit, stepping_case, name)
    if stepping_case.name != "ThirdParty":  # of which nothing is known
        assert len(in_parts._wide._split()) == 3
    for step in range(2):
        for net, optimizer in ((whole, at_once), (split, in_parts)):
            optimizer.zero_grad()
            optimizer.backward(kit.loss(net, step))
            optimizer.step()
    kit.same(list(whole.state_dict().values()), list(split.state_dict().values()))
    kit.same(_exact(whole), _exact(split))


# ---------------------------------------------------------------------- gradients


def test_unscaled_gradients_are_float32_and_clip_as_such():
    model = apply_policy(nn.Linear(4, 1, bias=False), "master_float16")
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2.0**15)
    before = masters.exact_of(model.weight).clone()
    optimizer.backward((model(torch.ones(1, 4)) * 2.0**-28).sum())
    assert model.weight.grad.dtype is torch.float16
    optimizer.unscale_()
    assert model.weight.grad.tolist() == [[2.0**-28] * 4]  # float16 ends at 2**-24
    nn.utils.clip_grad_norm_(model.parameters(), 2.0**-28)
    optimizer.step()
    after = masters.exact_of(model.weight)
    torch.testing.assert_close(before - after, torch.full((1, 4), 2.0**-29), rtol=1, atol=2e-8)
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(1, 4)).sum())
    assert model.weight.grad.dtype is torch.float16


@pytest.mark.parametrize("scale", [None, 256])
def test_clipping_is_that_of_float32(kit, name, scale):
    scale = NoLossScale() if scale is None else scale
    case = next(case for case in kit.cases if case.name == "RMSprop")
    net, optimizer = _wrapped(kit, case, name, scale, max_norm=0.05)
    theirs = kit.net()
    bare = case.make(kit.groups(theirs, "plain"))
    _feed(optimizer, 0, 256 if scale == 256 else 1.0)
    _feed(bare, 0)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
    if scale == 256:
        optimizer._now.stage = type(optimizer._now.stage).SCALED
    optimizer.step()
    bare.step()
    torch.testing.assert_close(optimizer.last_grad_norm, expected)
    for exact, other in zip(_exact(net), theirs.parameters(), strict=True):
        torch.testing.assert_close(exact, other.detach(), rtol=1e-4, atol=1e-5)


def test_one_launch_widens_all_gradients_and_one_writes_all_weights(kit, counts):
    # two more look whether anybody has written to a weight
    case = next(case for case in kit.cases if case.name == "AdamW")
    net, optimizer = _wrapped(kit, case, "master_bfloat16")
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        with counts() as counter:
            optimizer.step()
    assert counter.calls["_foreach_copy_"] == 4
    assert counter.casts == []
    assert not counter.calls["copy_"]


def test_gradients_may_be_accumulated_in_float32():
    model = apply_policy(nn.Linear(2, 1, bias=False), "master_bfloat16")
    model.weight.grad_dtype = torch.float32
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    before = masters.exact_of(model.weight).clone()
    for size in (1.0, 2.0**-10):  # in bfloat16 the second would vanish
        optimizer.backward((model(torch.eye(2)) * size).sum())
    optimizer.step()
    moved = before - masters.exact_of(model.weight)
    torch.testing.assert_close(moved, torch.full((1, 2), 1 + 2.0**-10), rtol=0, atol=1e-6)


def test_the_keras_words_take_float32_gradients(kit, name):
    case = next(case for case in kit.cases if case.name == "SGD")
    net, optimizer = _wrapped(kit, case, name, 1024)
    weights = kit.groups(net, "plain")
    scaled = torch.autograd.grad(optimizer.get_scaled_loss(kit.loss(net, 0)), weights)
    before = _exact(net)
    grads = optimizer.get_unscaled_gradients(scaled)
    optimizer.apply_gradients(zip(grads, weights, strict=True))
    assert all(w.grad is None and w.grad_dtype is w.dtype for w in weights)
    for weight, old, new, grad in zip(net.parameters(), before, _exact(net), grads, strict=False):
        torch.testing.assert_close(old - new, 0.1 * grad, rtol=1e-2, atol=1e-4), weight


# ---------------------------------------------------------------------- policies and models


def test_a_float32_weight_keeps_its_digits_there_and_back(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = copy.deepcopy(model.state_dict())
    apply_policy(model, name)
    low = {k for k, p in model.named_parameters() if p.dtype is not torch.float32}
    assert {"0.weight", "3.bias"} <= low
    assert not any(k.startswith("2.") for k in low)  # batch norm stays float32
    remove_policy(model)
    after = model.state_dict()
    for key, value in before.items():
        tolerance = 2.0**-15 if name.startswith("kahan") else 0
        torch.testing.assert_close(after[key], value, rtol=tolerance, atol=0)


def test_remove_policy_gives_what_was_trained(kit):
    case = next(case for case in kit.cases if case.name == "AdamW")
    net, optimizer = _wrapped(kit, case, "master_float16")
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()
    exact = _exact(net)
    assert any(not torch.equal(e.half().float(), e) for e in exact)
    remove_policy(net)
    kit.same([p.detach() for p in net.parameters()], exact)
    optimizer.zero_grad()
    optimizer.backward(kit.loss(net, 3))
    optimizer.step()  # the same optimizer goes on, in float32
    assert not any(torch.equal(p, e) for p, e in zip(kit.groups(net, "plain"), exact, strict=False))


def test_tied_weights_have_one_master():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    apply_policy(model, "master_bfloat16")
    assert model[0].weight is model[1].weight
    assert torch.equal(masters.exact_of(model[0].weight), before)
    assert torch.equal(remove_policy(model)[1].weight, before)


def test_frozen_weights_cost_no_master(name):
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    apply_policy(model, name)
    assert masters.known(model.weight) is None
    assert masters.known(model.bias) is not None


def test_weights_that_are_loaded_into_the_model_count(kit, name):
    case = next(case for case in kit.cases if case.name == "SGD")
    net, optimizer = _wrapped(kit, case, name)
    optimizer.backward(kit.loss(net, 0))
    optimizer.step()
    other = apply_policy(kit.net(seed=1), name)
    untouched = masters.exact_of(net.first.weight).clone()
    with torch.no_grad():
        net.last.weight.copy_(other.last.weight)
    if name == "kahan_bfloat16":  # what was cut off the old weight may stay, if it rounds away
        exact = masters.exact_of(net.last.weight).bfloat16()
        assert torch.equal(exact, other.last.weight)
    else:
        assert torch.equal(masters.exact_of(net.last.weight), other.last.weight.float())
    assert torch.equal(masters.exact_of(net.first.weight), untouched)
    with torch.no_grad():
        net.first.weight[0] = 3.0  # what is not written to keeps its digits
    exact = masters.exact_of(net.first.weight)
    assert torch.equal(exact[1:], untouched[1:])
    assert exact[0].bfloat16().unique().tolist() == [3.0]


def _by_data(weight):
    weight.data.copy_(torch.full_like(weight, 3.0))


def _by_another_tensor(weight):
    weight.data = torch.full_like(weight, 3.0)


def _by_a_vector(weight):
    nn.utils.vector_to_parameters(torch.full((weight.numel(),), 3.0).to(weight.dtype), [weight])


def _by_a_state_dict(weight):
    layer = nn.Module()
    layer.weight = weight
    layer.state_dict()["weight"].fill_(3.0)


@pytest.mark.parametrize(
    "write",
    [_by_data, _by_another_tensor, _by_a_vector, _by_a_state_dict],
    ids=lambda f: f.__name__,
)
def test_writes_that_no_version_counts_are_not_undone(name, write):
    model = apply_policy(nn.Linear(4, 2, bias=False), name)
    nn.init.constant_(model.weight, 100.3)
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=2.0**-9))
    for first in (True, False):
        optimizer.zero_grad()
        optimizer.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        if first:
            write(model.weight)
    exact = masters.exact_of(model.weight)
    rest = 2.0**-8 if name == "kahan_bfloat16" else 0.0  # of the old one, which may round away
    torch.testing.assert_close(exact, torch.full_like(exact, 3.0 - 2.0**-9), rtol=1e-6, atol=rest)


def test_the_digits_of_what_was_written_past_the_version_are_not_given_back():
    model = apply_policy(nn.Linear(4, 2, bias=False), "master_bfloat16")
    model.weight.data.fill_(2.0)
    assert torch.equal(remove_policy(model).weight, torch.full((2, 4), 2.0))


def test_a_bare_optimizer_is_refused_before_it_changes_anything(name):
    model = apply_policy(nn.Linear(3, 3), name)
    before = model.weight.detach().clone()
    bare = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    for _ in range(2):
        with pytest.raises(PolicyError, match=rf"AdamW.*{name}.*LossScaleOptimizer\(AdamW"):
            bare.step()
    scaler = GradScaler("cpu")
    bare.zero_grad()
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    with pytest.raises((PolicyError, ValueError), match="LossScaleOptimizer"):
        scaler.step(bare)
    assert torch.equal(model.weight, before)
    wrapped = LossScaleOptimizer(bare)
    wrapped.zero_grad()
    wrapped.backward(model(torch.ones(1, 3)).sum())
    wrapped.step()
    with pytest.raises(PolicyError):
        bare.step()


def test_an_optimizer_made_before_the_policy_follows_it(kit, name):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain"), lr=0.01), 8)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()
        apply_policy(net, name)
    assert net.first.weight.dtype is not torch.float32
    assert masters.known(net.first.weight) is not None


def test_16_bit_state_of_earlier_steps_is_widened():
    model = nn.Linear(3, 3).bfloat16()
    bare = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    bare.step()
    apply_policy(model, "master_bfloat16")
    optimizer = LossScaleOptimizer(bare)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}
    optimizer.step()


def test_closures(kit, name):
    net = apply_policy(kit.net(), name)
    optimizer = LossScaleOptimizer(torch.optim.Adam(kit.groups(net, "plain"), lr=0.05))

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(net, 0)
        optimizer.backward(loss)
        return loss

    first = optimizer.step(closure).item()
    for _ in range(10):
        last = optimizer.step(closure).item()
    assert last < first
    lbfgs = LossScaleOptimizer(torch.optim.LBFGS(kit.groups(net, "plain")))
    with pytest.raises(LossScaleError, match="LBFGS evaluates its closure itself"):
        lbfgs.step(closure)


def test_groups_that_come_later_and_schedulers(kit, name):
    net = apply_policy(kit.net(), name)
    optimizer = LossScaleOptimizer(torch.optim.SGD([net.table.weight], lr=0.5), 8)
    optimizer.add_param_group({"params": [net.first.weight, net.last.weight], "lr": 0.25})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    for step in range(2):
        before = _exact(net)
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()
        moved = [bool((a != b).any()) for a, b in zip(before, _exact(net), strict=True)][:3]
        assert moved == ([True] * 3 if step == 0 else [False] * 3)
        scheduler.step()


def test_hooks_see_unscaled_float32_gradients(kit, name):
    case = next(case for case in kit.cases if case.name == "Adam")
    net, optimizer = _wrapped(kit, case, name, 1024)
    seen = []
    optimizer.register_step_pre_hook(
        lambda opt, *_: seen.append(opt.param_groups[0]["params"][0].grad.clone())
    )
    optimizer.inner_optimizer.register_step_pre_hook(
        lambda opt, *_: seen.append(opt.param_groups[0]["params"][0].grad.clone())
    )
    optimizer.backward(kit.loss(net, 0))
    scaled = net.table.weight.grad.float()
    optimizer.step()
    for grad in seen:
        torch.testing.assert_close(grad, scaled / 1024)
    assert len(seen) == 2
    assert policy_of(net).name == name


@pytest.mark.parametrize("unused_first", [False, True])
def test_weights_without_a_gradient_stay_as_they_are(name, unused_first):
    """A branch that this batch did not take: its weights get no gradient, the others step."""
    model = apply_policy(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), name)
    unused, used = (0, 1) if unused_first else (1, 0)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    before = [layer.weight.detach().clone() for layer in model]
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model[used](torch.ones(1, 2)).float().sum())
        optimizer.step()
    assert torch.equal(model[unused].weight, before[unused])
    assert not torch.equal(model[used].weight, before[used])
    with pytest.raises(PolicyError, match="LossScaleOptimizer"):
        optimizer.inner_optimizer.step()
