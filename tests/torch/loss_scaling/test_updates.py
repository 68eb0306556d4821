"""The updates are those of the bare optimizer on the unscaled gradients, to float32 rounding."""

import pytest
import torch

from halfstep import DynamicLossScale, FixedLossScale, NoLossScale
from halfstep.torch import LossScaleOptimizer

# 1000 is no power of two: the unscaling rounds, as it may
SCALES = [DynamicLossScale(initial_scale=2.0**12, growth_interval=2), FixedLossScale(1000.0)]


def _run_both(kit, case, variant, scale, micros=1, max_norm=None, steps=3):
    """Train one net with a scaled optimizer, its twin with the bare one; return both."""
    norms = []
    sparse = variant == "sparse"
    ours, theirs = kit.net(sparse), kit.net(sparse)
    wrapped = LossScaleOptimizer(case.make(kit.groups(ours, variant)), scale, max_norm=max_norm)
    bare = case.make(kit.groups(theirs, variant))
    clipped = [p for group in bare.param_groups for p in group["params"]]
    for step in range(steps):

        def scaled(step=step):
            wrapped.zero_grad()
            losses = [kit.loss(ours, step, micro) / micros for micro in range(micros)]
            for loss in losses:
                wrapped.backward(loss)
            return sum(losses).detach()

        def plain(step=step):
            bare.zero_grad()
            losses = [kit.loss(theirs, step, micro) / micros for micro in range(micros)]
            for loss in losses:
                loss.backward()
            if max_norm is not None:
                norms.append(torch.nn.utils.clip_grad_norm_(clipped, max_norm))
            return sum(losses).detach()

        if case.evaluates:
            torch.testing.assert_close(wrapped.step(scaled), bare.step(plain), rtol=1e-3, atol=1e-4)
        else:
            scaled()
            wrapped.step()
            plain()
            bare.step()
    if norms and not case.evaluates:
        torch.testing.assert_close(wrapped.last_grad_norm, norms[-1], rtol=1e-4, atol=1e-6)
    return ours, theirs, wrapped


def _assert_near(ours, theirs, rtol=2e-5, atol=2e-6):
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scale", SCALES, ids=["dynamic", "fixed"])
@pytest.mark.parametrize("variant", ["plain", "two_groups", "without_grad"])
def test_dense_updates_equal_the_bare_optimizers(kit, dense_case, variant, scale):
    if dense_case.evaluates and variant == "two_groups":
        pytest.skip("LBFGS takes one group")
    before = [p.detach().clone() for p in kit.net().parameters()]
    ours, theirs, wrapped = _run_both(kit, dense_case, variant, scale)
    # a line search turns the rounding of the last bit into another step length
    searches = dense_case.name == "LBFGS-wolfe" and isinstance(scale, FixedLossScale)
    _assert_near(ours, theirs, **({"rtol": 5e-2, "atol": 1e-3} if searches else {}))
    moved = [not torch.equal(p, q) for p, q in zip(ours.parameters(), before, strict=True)]
    assert moved == [True, True, True, False]
    assert wrapped.skipped_steps == 0


def test_accumulated_updates_equal_the_bare_optimizers(kit, dense_case):
    ours, theirs, _ = _run_both(kit, dense_case, "plain", SCALES[0], micros=3)
    _assert_near(ours, theirs)


@pytest.mark.parametrize("max_norm", [0.3, 1e6], ids=["clips", "does not clip"])
def test_clipped_updates_equal_those_after_clip_grad_norm(kit, dense_case, max_norm):
    # clipped gradients are no gradient field: LBFGS runs away, and rounding grows with it
    loose = dense_case.evaluates
    ours, theirs, _ = _run_both(
        kit, dense_case, "plain", SCALES[0], max_norm=max_norm, steps=1 if loose else 2
    )
    _assert_near(ours, theirs, **({"rtol": 2e-2, "atol": 2e-3} if loose else {}))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_updates_equal_the_bare_optimizers(kit, sparse_case):
    ours, theirs, _ = _run_both(kit, sparse_case, "sparse", SCALES[0])
    _assert_near(ours, theirs)
    assert ours.table.weight.grad.is_sparse


def test_clipping_a_sparse_gradient_takes_the_norm_of_the_summed_rows():
    # the same row twice, uncoalesced: 3 + 4 is 7 there, not 5
    table = torch.nn.Parameter(torch.zeros(3, 1))
    optimizer = LossScaleOptimizer(torch.optim.SGD([table], lr=1.0), 4.0, max_norm=3.5)
    loss = torch.nn.functional.embedding(torch.tensor([1, 1]), table, sparse=True)
    optimizer.backward((loss * torch.tensor([[3.0], [4.0]])).sum())
    optimizer.step()
    assert float(optimizer.last_grad_norm) == 7.0
    torch.testing.assert_close(table.detach(), torch.tensor([[0.0], [-3.5], [0.0]]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_gradients_are_unscaled_after_a_step(kit, kind):
    ours, theirs = kit.net(), kit.net()
    optimizer = LossScaleOptimizer(kind(kit.groups(ours, "plain"), lr=0.1), 1024)
    optimizer.backward(kit.loss(ours, 0))
    assert not torch.allclose(ours.first.weight.grad, torch.zeros(()))
    optimizer.step()
    kit.loss(theirs, 0).backward()
    torch.testing.assert_close(ours.first.weight.grad, theirs.first.weight.grad)


def test_unscale_gives_the_true_gradients_and_a_users_change_is_what_is_applied(kit):
    ours, theirs = kit.net(), kit.net()
    optimizer = LossScaleOptimizer(torch.optim.Adam(kit.groups(ours, "plain")), 1024)
    bare = torch.optim.Adam(kit.groups(theirs, "plain"))
    optimizer.backward(kit.loss(ours, 0))
    kit.loss(theirs, 0).backward()
    optimizer.unscale_()
    optimizer.unscale_()
    torch.testing.assert_close(ours.last.weight.grad, theirs.last.weight.grad)
    for net in (ours, theirs):
        torch.nn.utils.clip_grad_value_(net.parameters(), 0.01)
    optimizer.step()
    bare.step()
    _assert_near(ours, theirs)


def test_clipping_after_unscale_uses_the_gradients_as_they_are_then():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=1.0), 64, max_norm=1.0)
    optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
    optimizer.unscale_()
    assert weight.grad.tolist() == [3.0, 4.0]
    weight.grad[0] = 0.0
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, -1.0]))
    assert float(optimizer.last_grad_norm) == 4.0


def test_complex_and_float64_parameters_are_unscaled_too():
    for dtype in (torch.complex64, torch.float64):
        weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        twin = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = LossScaleOptimizer(torch.optim.Adam([weight]), 1024, max_norm=0.5)
        bare = torch.optim.Adam([twin])
        optimizer.backward((weight * weight.conj()).real.sum())
        (twin * twin.conj()).real.sum().backward()
        torch.nn.utils.clip_grad_norm_([twin], 0.5)
        optimizer.step()
        bare.step()
        torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


def test_parameters_of_two_dtypes_are_judged_together():
    wide = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    low = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = LossScaleOptimizer(torch.optim.SGD([wide, low], lr=0.25), 8, max_norm=100.0)
    optimizer.backward(wide.sum() * 3 + low.float().sum() * 4)
    optimizer.step()
    assert wide.tolist() == [0.25, 0.25]
    assert low.tolist() == [0.0, 0.0]
    assert float(optimizer.last_grad_norm) == pytest.approx((2 * 9 + 2 * 16) ** 0.5)
    optimizer.zero_grad()
    optimizer.backward(wide.sum() + low.float().sum() * float("inf"))
    optimizer.step()
    assert optimizer.last_step_skipped
    assert wide.tolist() == [0.25, 0.25]


def test_no_loss_scale_passes_everything_straight_through(kit, stepping_case):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(stepping_case.make(kit.groups(ours, "plain")), NoLossScale())
    bare = stepping_case.make(kit.groups(theirs, "plain"))
    for step in range(2):
        wrapped.zero_grad()
        bare.zero_grad()
        loss = kit.loss(ours, step)
        assert wrapped.scale(loss) is loss
        loss.backward()
        kit.loss(theirs, step).backward()
        wrapped.unscale_()
        wrapped.step()
        bare.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert wrapped.current_scale == 1.0
    assert wrapped.scale_history == []


def test_no_loss_scale_still_clips(kit):
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(
        torch.optim.SGD(kit.groups(ours, "plain"), lr=1.0), NoLossScale(), max_norm=0.05
    )
    kit.loss(ours, 0).backward()
    kit.loss(theirs, 0).backward()
    norm = torch.nn.utils.clip_grad_norm_(kit.groups(theirs, "plain"), 0.05)
    wrapped.step()
    torch.optim.SGD(kit.groups(theirs, "plain"), lr=1.0).step()
    _assert_near(ours, theirs)
    torch.testing.assert_close(wrapped.last_grad_norm, norm)
