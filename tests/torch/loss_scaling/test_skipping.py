"""A skipped step changes nothing, is visible, and is not skipped for ever without a word."""

import pytest
import torch

from halfstep import DynamicLossScale, FixedLossScale
from halfstep.errors import LossScaleExhausted
from halfstep.torch import LossScaleOptimizer, ScaleEvent

INF, NAN = float("inf"), float("nan")


def _step(kit, optimizer, net, step, times=1.0):
    optimizer.zero_grad()
    optimizer.backward(kit.loss(net, step) * times)
    optimizer.step()


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_skipped_step_leaves_parameters_and_state_bit_identical(
    kit, stepping_case, bad, max_norm
):
    net = kit.net()
    optimizer = LossScaleOptimizer(stepping_case.make(kit.groups(net, "plain")), max_norm=max_norm)
    for step in range(2):
        _step(kit, optimizer, net, step)
    before = kit.snapshot(optimizer)
    _step(kit, optimizer, net, 2, times=bad)
    kit.same(kit.snapshot(optimizer), before)
    assert optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1
    assert optimizer.current_scale == 2.0**14
    _step(kit, optimizer, net, 3)
    assert not optimizer.last_step_skipped
    assert not torch.equal(kit.snapshot(optimizer)[0][0], before[0][0])


def test_after_a_skipped_first_step_the_run_is_the_bare_one(kit, stepping_case):
    """Upstream leaves fused SGD's momentum uninitialised here."""
    ours, theirs = kit.net(), kit.net()
    wrapped = LossScaleOptimizer(stepping_case.make(kit.groups(ours, "plain")))
    bare = stepping_case.make(kit.groups(theirs, "plain"))
    _step(kit, wrapped, ours, 0, times=INF)
    for step in range(3):
        _step(kit, wrapped, ours, step)
        bare.zero_grad()
        kit.loss(theirs, step).backward()
        bare.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_upstreams_fused_sgd_leaves_momentum_uninitialised_when_its_first_step_is_skipped():
    """The trap that the test above is about; should it go, `late_momentum` can go too."""
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.full_like(weight, INF)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    made = []
    with pytest.MonkeyPatch.context() as patch:
        empty_like = torch.empty_like
        patch.setattr(
            torch, "empty_like", lambda x: made.append(empty_like(x).fill_(7)) or made[-1]
        )
        optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    assert buffer is made[0]
    assert buffer.eq(7).all()


def test_a_parameter_that_joins_late_gets_its_momentum(kit):
    """Fused SGD raises when some parameters have momentum and others do not yet."""
    for dampening in (0.0, 0.5):
        ours = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        theirs = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
        wrapped = LossScaleOptimizer(torch.optim.SGD(ours, **options), 8)
        bare = torch.optim.SGD(theirs, **options)
        for count in (1, 2, 2):
            wrapped.zero_grad()
            bare.zero_grad()
            wrapped.backward(sum(p.square().sum() for p in ours[:count]))
            sum(p.square().sum() for p in theirs[:count]).backward()
            wrapped.step()
            bare.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_the_history_has_one_event_for_each_skip_and_each_change(kit):
    net = kit.net()
    rule = DynamicLossScale(initial_scale=16, growth_interval=2, hysteresis=2)
    optimizer = LossScaleOptimizer(torch.optim.SGD(kit.groups(net, "plain"), lr=0.01), rule)
    for step, times in enumerate([1, 1, INF, NAN, 1, INF, 1, 1]):
        _step(kit, optimizer, net, step, times)
    assert optimizer.scale_history == [
        ScaleEvent(2, 32.0, False),
        ScaleEvent(3, 32.0, True),
        ScaleEvent(4, 16.0, True),
        ScaleEvent(6, 16.0, True),
        ScaleEvent(8, 32.0, False),
    ]
    assert optimizer.skipped_steps == 3


def test_the_scale_follows_the_rule_of_the_core(kit):
    net = kit.net()
    rule = DynamicLossScale(
        initial_scale=4, growth_interval=1, min_scale=1, max_scale=8, patience=100
    )
    optimizer = LossScaleOptimizer(torch.optim.SGD(kit.groups(net, "plain"), lr=0.01), rule)
    state = rule.init(float)
    for step in range(30):
        finite = step % 7 < 3
        _step(kit, optimizer, net, step, 1.0 if finite else INF)
        state = rule.update(state, finite)
        assert optimizer.current_scale == state.scale
        assert optimizer.skipped_steps == state.skipped_steps


def test_a_step_without_any_gradient_does_nothing_and_the_scale_stays(kit, stepping_case):
    net = kit.net()
    rule = DynamicLossScale(growth_interval=1)
    optimizer = LossScaleOptimizer(stepping_case.make(kit.groups(net, "plain")), rule)
    before = kit.snapshot(optimizer)
    optimizer.step()
    other = torch.ones((), requires_grad=True)
    optimizer.backward(other * 2)
    optimizer.step()
    kit.same(kit.snapshot(optimizer), before)
    assert optimizer.current_scale == 2.0**15
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize(
    "rule", [DynamicLossScale(initial_scale=16, patience=3), FixedLossScale(4, 3)]
)
def test_exhaustion_is_raised_with_what_is_known(kind, rule):
    good = torch.nn.Linear(2, 2)
    bad = torch.nn.Linear(2, 2)
    named = [(f"good.{n}", p) for n, p in good.named_parameters()]
    named += [(f"bad.{n}", p) for n, p in bad.named_parameters()]
    optimizer = LossScaleOptimizer(kind(named), rule)
    steps = 4 if isinstance(rule, DynamicLossScale) else 3
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(good.weight.sum() + (bad.weight * NAN).sum())
        if optimizer.skipped_steps < steps - 1:
            optimizer.step()
    with pytest.raises(LossScaleExhausted) as caught:
        optimizer.step()
    message = str(caught.value)
    scale = 1 if isinstance(rule, DynamicLossScale) else 4
    for part in (
        f"scale is {scale}, its floor is {scale}",
        f"last {steps} steps in a row",
        "not a scaling problem",
        "param_groups[0]['params'][2] ('bad.weight'), shape (2, 2)",
    ):
        assert part in message
    assert "good.weight" not in message


def test_a_finite_step_after_exhaustion_goes_on(kit):
    net = kit.net()
    rule = DynamicLossScale(initial_scale=1, patience=1)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain")), rule)
    with pytest.raises(LossScaleExhausted):
        _step(kit, optimizer, net, 0, NAN)
    before = net.first.weight.detach().clone()
    _step(kit, optimizer, net, 1)
    assert not torch.equal(net.first.weight, before)


def test_a_scheduler_that_asks_is_held_back(kit):
    net = kit.net()
    optimizer = LossScaleOptimizer(torch.optim.AdamW(kit.groups(net, "plain"), lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for step, times in enumerate([1, INF, 1]):
        _step(kit, optimizer, net, step, times)
        if not optimizer.last_step_skipped:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.25]


def test_two_optimizers_of_a_gan_each_keep_their_own_scale():
    torch.manual_seed(0)
    maker, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    makers = LossScaleOptimizer(torch.optim.AdamW(maker.parameters()), max_norm=1.0)
    critics = LossScaleOptimizer(torch.optim.RMSprop(critic.parameters()))
    for step, (maker_times, critic_times) in enumerate([(1, INF), (INF, 1), (1, 1), (1, INF)]):
        order = [makers, critics] if step % 2 else [critics, makers]
        fake = maker(torch.ones(3, 2))
        for optimizer in order:
            optimizer.zero_grad()
        for optimizer in order:
            if optimizer is makers:
                makers.backward(
                    critic(fake).square().mean() * maker_times,
                    inputs=list(maker.parameters()),
                    retain_graph=True,
                )
            else:
                critics.backward(critic(fake.detach()).mean() * critic_times)
        for optimizer in reversed(order):
            optimizer.step()
        assert makers.last_step_skipped is (maker_times == INF)
        assert critics.last_step_skipped is (critic_times == INF)
    assert (makers.current_scale, critics.current_scale) == (2.0**14, 2.0**13)
    assert (makers.skipped_steps, critics.skipped_steps) == (1, 2)
