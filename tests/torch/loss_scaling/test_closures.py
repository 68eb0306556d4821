"""Closures: evaluated once by most, many times by LBFGS, by nobody knows by others."""

import pytest
import torch

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer

INF = float("inf")


def _closure(kit, optimizer, net, step=0, times=(1.0,)):
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(net, step) * times[min(len(calls), len(times) - 1)]
        calls.append(float(loss.detach()))
        optimizer.backward(loss)
        return loss

    return closure, calls


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_gives_what_the_bare_optimizer_gives(kit, dense_case, keyword):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(dense_case.make(kit.groups(ours, "plain")))
    bare = dense_case.make(kit.groups(theirs, "plain"))
    closure, calls = _closure(kit, wrapped, ours)

    def plain():
        bare.zero_grad()
        loss = kit.loss(theirs, 0)
        loss.backward()
        return loss

    loss = wrapped.step(closure=closure) if keyword else wrapped.step(closure)
    torch.testing.assert_close(loss, bare.step(plain))
    assert float(loss.detach()) == calls[0]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("times", [(INF,), (1.0, INF), (1.0, 1.0, float("nan"))])
def test_an_evaluation_that_is_not_finite_takes_the_whole_step_back(kit, times):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.LBFGS(kit.groups(net, "plain"), lr=0.1, max_iter=4))
    optimizer.step(_closure(kit, optimizer, net)[0])
    before = kit.snapshot(optimizer)
    closure, calls = _closure(kit, optimizer, net, 1, times)
    assert optimizer.step(closure) is None
    assert len(calls) == len(times)
    kit.same(kit.snapshot(optimizer), before)
    assert optimizer.last_step_skipped
    assert optimizer.current_scale == 2.0**14
    optimizer.step(_closure(kit, optimizer, net, 1)[0])
    assert not optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1


def test_a_first_step_that_is_taken_back_leaves_no_state(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.LBFGS(kit.groups(net, "plain")))
    before = kit.snapshot(optimizer)
    optimizer.step(_closure(kit, optimizer, net, 0, (1.0, INF))[0])
    kit.same(kit.snapshot(optimizer), before)
    assert not optimizer.state


def test_settings_that_an_optimizer_changes_in_its_step_are_taken_back():
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["lr"] *= 0.5
            closure()
            self.param_groups[0]["lr"] *= 0.5
            return closure()

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = LossScaleOptimizer(Counts([weight], lr=1.0), 8)
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(0)
        optimizer.backward(weight.sum() * (INF if len(calls) == 2 else 1.0))

    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.last_step_skipped


def test_gradients_from_before_a_closure_are_unscaled_too():
    """Sharpness-aware optimizers climb with the gradients they find and then evaluate again."""

    class Climber(torch.optim.SGD):
        def step(self, closure=None):
            self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
            loss = closure()
            self.seen += [p.grad.clone() for p in self.param_groups[0]["params"]]
            return loss

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = LossScaleOptimizer(Climber([weight], lr=1.0), 8)
    optimizer.backward((weight * 3).sum())

    def closure():
        optimizer.zero_grad()
        optimizer.backward((weight * 5).sum())

    optimizer.step(closure)
    assert [float(grad) for grad in optimizer.inner_optimizer.seen] == [3.0, 5.0]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_closure_that_does_not_scale_its_loss_is_an_error(kit, kind):
    net = kit.net()
    optimizer = LossScaleOptimizer(kind(kit.groups(net, "plain")))
    before = kit.snapshot(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = kit.loss(net, 0)
        loss.backward()
        return loss

    with pytest.raises(LossScaleError, match="no loss was scaled"):
        optimizer.step(closure)
    kit.same(kit.snapshot(optimizer)[0], before[0])


def test_a_closure_may_add_up_micro_batches_and_is_clipped(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(
        torch.optim.LBFGS(kit.groups(net, "plain"), max_iter=1, lr=1.0), max_norm=0.01
    )
    before = kit.snapshot(optimizer)[0]

    def closure():
        optimizer.zero_grad()
        for micro in range(2):
            optimizer.backward(kit.loss(net, 0, micro))
        return torch.zeros(())

    optimizer.step(closure)
    grads = [p.grad for p in kit.groups(net, "plain")]
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.01, rel=1e-3)
    assert float(optimizer.last_grad_norm) > 0.01
    assert not torch.equal(kit.snapshot(optimizer)[0][0], before[0])


def test_an_error_inside_a_closure_comes_out_as_it_is(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.LBFGS(kit.groups(net, "plain")))

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
