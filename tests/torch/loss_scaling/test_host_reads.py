"""What a scaled step reads on the host beyond what the bare optimizer reads."""

import pytest
import torch

from halfstep.torch import LossScaleOptimizer
from halfstep.torch.loss_scaling import host


def _reads(kit, optimizer, net, backward, steps=3):
    counts = []
    for step in range(steps):
        optimizer.zero_grad()
        with kit.reads() as counter:
            backward(kit.loss(net, step))
            optimizer.step()
        counts.append(counter.reads)
    return counts


def _scaled_reads(kit, case, max_norm):
    net = kit.net()
    optimizer = LossScaleOptimizer(case.make(kit.groups(net, "plain")), max_norm=max_norm)
    return _reads(kit, optimizer, net, optimizer.backward)


def _bare_reads(kit, case, fused):
    net = kit.net()
    optimizer = case.make(kit.groups(net, "plain"))
    if fused:
        for group in optimizer.param_groups:
            group.update(fused=True, foreach=False)
    return _reads(kit, optimizer, net, lambda loss: loss.backward())


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Take the way of an accelerator, whose memory the host does not see."""
    monkeypatch.setattr(host, "CPU_IS_FREE", False)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_on_a_cpu_no_optimizer_needs_a_read(kit, dense_case, max_norm):
    if dense_case.evaluates:
        pytest.skip("it evaluates its loss itself, and reads that")
    bare = _bare_reads(kit, dense_case, fused=dense_case.reads == 0)
    assert _scaled_reads(kit, dense_case, max_norm) <= bare


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_fused_step_reads_nothing_whatever_the_users_setting(kit, fused_case, max_norm):
    bare = _bare_reads(kit, fused_case, fused=True)
    extra = [a - b for a, b in zip(_scaled_reads(kit, fused_case, max_norm), bare, strict=True)]
    assert extra == [0, 0, 0]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_every_other_optimizer_reads_one_flag_a_step(kit, flag_case, max_norm):
    bare = _bare_reads(kit, flag_case, fused=False)
    ours = _scaled_reads(kit, flag_case, max_norm)
    assert [a - b for a, b in zip(ours, bare, strict=True)] == [1, 1, 1]


def test_the_counter_sees_a_read(kit):
    with kit.reads() as counter:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert counter.reads == 2


def test_a_step_without_a_scale_reads_nothing(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.RMSprop(kit.groups(net, "plain")), 1024)
    optimizer.backward(kit.loss(net, 0))
    with kit.reads() as counter:
        optimizer.unscale_()
    assert counter.reads == 0


def test_the_users_own_fused_setting_comes_back_in_the_state_dict(kit):
    for setting in ({}, {"foreach": True}, {"fused": False}, {"fused": True}):
        net = kit.net()
        bare = torch.optim.AdamW(kit.groups(net, "plain"), **setting)
        before = {key: bare.param_groups[0][key] for key in ("fused", "foreach")}
        optimizer = LossScaleOptimizer(bare)
        assert optimizer.param_groups[0]["fused"] is True
        saved = optimizer.state_dict()["param_groups"][0]
        assert {key: saved[key] for key in ("fused", "foreach")} == before


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)), "complex"),
        (lambda: torch.nn.Parameter(torch.ones(2, device="meta")), "meta"),
    ],
)
def test_groups_that_cannot_be_fused_stay_as_they_are(make, why):
    optimizer = LossScaleOptimizer(torch.optim.AdamW([make(), torch.nn.Parameter(torch.ones(2))]))
    assert not optimizer.param_groups[0]["fused"], why


def test_differentiable_optimizers_are_not_fused_and_work():
    weight = torch.ones(2, requires_grad=True).clone()  # a leaf cannot be updated with a graph
    weight.retain_grad()
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=0.25, differentiable=True), 8)
    assert not optimizer.param_groups[0]["fused"]
    optimizer.backward((weight * 2).sum())
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]


def test_a_subclass_with_its_own_step_is_not_fused():
    class Louder(torch.optim.AdamW):
        def step(self, closure=None):
            self.called = True
            return super().step(closure)

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = LossScaleOptimizer(Louder([weight]), 8)
    assert not optimizer.param_groups[0]["fused"]
    optimizer.backward(weight.sum() * float("nan"))
    optimizer.step()
    assert not hasattr(optimizer.inner_optimizer, "called")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_turn_the_fused_kernels_off_for_good(kit):
    net = kit.net(sparse=True)
    optimizer = LossScaleOptimizer(torch.optim.Adagrad([net.table.weight]))
    assert optimizer.param_groups[0]["fused"]
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()
        assert not optimizer.param_groups[0]["fused"]
    optimizer.add_param_group({"params": [net.first.weight]})
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_state_that_was_there_before_wrapping_is_carried_on(kit, fused_case):
    ours, theirs = kit.net(), kit.net()
    inner = fused_case.make(kit.groups(ours, "plain"))
    bare = fused_case.make(kit.groups(theirs, "plain"))
    for step in range(2):
        for net, optimizer in ((ours, inner), (theirs, bare)):
            optimizer.zero_grad()
            kit.loss(net, step).backward()
            optimizer.step()
    wrapped = LossScaleOptimizer(inner, 1024)
    wrapped.zero_grad()
    bare.zero_grad()
    wrapped.backward(kit.loss(ours, 2))
    kit.loss(theirs, 2).backward()
    wrapped.step()
    bare.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
