"""The ten faults of ``torch.amp`` 2.13, each shown not to happen here.

Where it is cheap the fault itself is shown beside it, so that the claim stays true. The ninth,
the stale cache of ``torch.autocast``, concerns policies and is tested with them.
"""

import pytest
import torch

from halfstep import DynamicLossScale
from halfstep.errors import LossScaleError, LossScaleExhausted
from halfstep.torch import GradScaler, LossScaleOptimizer

INF = float("inf")


def _weight():
    return torch.nn.Parameter(torch.tensor([1.0, 2.0]))


def _iterate(scaler, optimizer, weight, times):
    optimizer.zero_grad()
    scaler.scale((weight * weight).sum() * times).backward()
    scaler.step(optimizer)
    try:
        scaler.update()
    except LossScaleExhausted:
        return True
    return False


def test_fault_1_upstreams_scale_reaches_zero_and_the_weights_become_nan():
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(166):
        _iterate(scaler, optimizer, weight, INF)
    assert scaler.get_scale() == 0.0
    _iterate(scaler, optimizer, weight, 1.0)
    assert weight.isnan().all()


@pytest.mark.parametrize("fused", [True, False])
def test_fault_1_no_number_of_bad_steps_takes_the_scale_below_its_floor(fused):
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    scaler = GradScaler("cpu")
    raised = [_iterate(scaler, optimizer, weight, INF) for _ in range(170)]
    assert not any(raised[:15])
    assert all(raised[16:])
    assert scaler.get_scale() == 1.0
    assert weight.tolist() == [1.0, 2.0]
    _iterate(scaler, optimizer, weight, 1.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.8, 1.6]))


def test_fault_1_a_tiny_scale_judges_the_unscaled_gradients():
    """Upstream looks before it multiplies: at 2**-126 a gradient of 4 unscales to infinity."""
    rule = DynamicLossScale(initial_scale=2.0**-126, min_scale=2.0**-126)
    for kind in (torch.optim.SGD, torch.optim.RMSprop):
        weight = _weight()
        optimizer = LossScaleOptimizer(kind([weight], lr=0.1), rule)
        optimizer.backward(weight.sum())
        weight.grad.fill_(4.0 * 2**100)
        optimizer.step()
        assert optimizer.last_step_skipped
        assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("keyword", [True, False])
def test_fault_2_a_closure_is_right_or_an_error(keyword):
    weight = _weight()
    scaler = GradScaler("cpu", init_scale=1024.0)

    def closure():
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        scaler.scale(loss).backward()
        return loss

    def step():
        if keyword:
            return scaler.step(optimizer, closure=closure)
        return scaler.step(optimizer, closure)

    optimizer = torch.optim.LBFGS([weight])
    scaler.scale(weight.sum())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        step()
    assert weight.tolist() == [1.0, 2.0]
    optimizer = torch.optim.SGD([weight], lr=0.25)
    loss = step()
    assert float(loss.detach()) == 5.0
    assert weight.tolist() == [0.5, 1.0]
    assert weight.grad.tolist() == [2.0, 4.0]


def test_fault_3_a_backward_after_unscale_raises():
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(LossScaleError, match=r"after unscale_\(\)"):
        scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(weight.sum()).backward()
    assert weight.grad.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fault_4_a_step_skipped_inside_of_a_fused_kernel_is_known(kind):
    for known in (_scaler_says, _optimizer_says):
        weight = _weight()
        assert known(kind([weight], lr=0.1, fused=True), weight, INF) is True
        assert weight.tolist() == [1.0, 2.0]
        assert known(kind([weight], lr=0.1, fused=True), weight, 1.0) is False
        assert weight.tolist() != [1.0, 2.0]


def _scaler_says(optimizer, weight, times):
    scaler = GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(weight.sum() * times).backward()
    scaler.step(optimizer)
    said = scaler.last_step_skipped
    scaler.update()
    assert scaler.skipped_steps == int(said)
    assert [event.skipped for event in scaler.scale_history] == [True] * int(said)
    return said


def _optimizer_says(optimizer, weight, times):
    wrapped = LossScaleOptimizer(optimizer)
    posted = []
    wrapped.register_step_post_hook(lambda opt, *_: posted.append(opt.last_step_skipped))
    wrapped.zero_grad()
    wrapped.backward(weight.sum() * times)
    wrapped.step()
    assert posted == [wrapped.last_step_skipped]
    return wrapped.last_step_skipped


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}])
def test_fault_5_float16_parameters_are_refused_by_fused_optimizers_too(options):
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([half], lr=0.1, **options)
    half.data = half.data.half()
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(half.float().sum()).backward()
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\. .*\[0\]"):
            call(optimizer)
    assert half.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("fused", [True, False])
def test_fault_6_an_optimizer_without_gradients_does_nothing(fused):
    weight = _weight()
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    scaler = GradScaler("cpu", growth_interval=1)
    scaler.scale(torch.ones((), requires_grad=True)).backward()
    scaler.step(optimizer)
    assert not scaler.last_step_skipped
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW])
def test_fault_7_bfloat16_gradients_are_unscaled_and_judged(kind):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    twin = torch.nn.Parameter(weight.detach().clone())
    bare = kind([twin], lr=0.5)
    (twin * 3).sum().backward()
    bare.step()
    optimizer = LossScaleOptimizer(kind([weight], lr=0.5), 1024)
    optimizer.backward((weight * 3).sum())
    optimizer.step()
    assert torch.equal(weight, twin)
    assert weight.grad.tolist() == [3.0, 3.0]
    optimizer.zero_grad()
    optimizer.backward((weight * INF).sum())
    optimizer.step()
    assert torch.equal(weight, twin)


def test_fault_8_one_optimizers_overflow_does_not_back_off_the_other():
    one, two = _weight(), _weight()
    first = LossScaleOptimizer(torch.optim.AdamW([one]))
    second = LossScaleOptimizer(torch.optim.AdamW([two]))
    first.backward(one.sum() * INF)
    second.backward(two.sum())
    second.step()
    first.step()
    assert (first.current_scale, second.current_scale) == (2.0**14, 2.0**15)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("door", ["optimizer", "scaler"])
def test_fault_10_a_gradient_of_another_dtype_is_an_error_before_anything_is_touched(kind, door):
    good = _weight()
    low = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    low.grad_dtype = torch.float32
    inner = kind([good, low], lr=0.1)
    scaler = GradScaler("cpu", init_scale=2.0)
    wrapped = LossScaleOptimizer(inner, 2) if door == "optimizer" else None
    loss = good.sum() + low.sum()
    (wrapped.scale(loss) if wrapped else scaler.scale(loss)).backward()
    assert low.grad.dtype == torch.float32
    with pytest.raises(LossScaleError, match=r"\[1\], shape \(2,\), has dtype torch.bfloat16"):
        wrapped.step() if wrapped else scaler.step(inner)
    assert good.tolist() == [1.0, 2.0]
    assert good.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False, "momentum": 0.5}])
def test_fault_10_sgd_steps_with_it(options):
    low = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    low.grad_dtype = torch.float32
    optimizer = LossScaleOptimizer(torch.optim.SGD([low], lr=0.25, **options), 8)
    for times in (1.0, INF):
        optimizer.zero_grad()
        optimizer.backward(low.sum() * times)
        optimizer.step()
        assert low.tolist() == [0.75, 0.75]
    assert optimizer.last_step_skipped
