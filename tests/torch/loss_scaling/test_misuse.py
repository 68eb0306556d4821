"""An order of calls that would give wrong updates is an error, before anything is touched."""

import pytest
import torch
from torch import nn

from halfstep import Policy, PolicyMap
from halfstep.core.loss_scale import DynamicLossScale, FixedLossScale, NoLossScale
from halfstep.errors import LossScaleError, LossScaleWarning, PolicyError
from halfstep.torch import GradScaler, LossScaleOptimizer, apply_policy, registry


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.tensor([1.0, 2.0]))


@pytest.fixture
def optimizer(weight):
    return LossScaleOptimizer(torch.optim.SGD([weight], lr=0.5), 8)


def test_a_step_on_gradients_that_were_never_scaled(weight, optimizer):
    weight.sum().backward()
    for call in (optimizer.step, optimizer.unscale_):
        with pytest.raises(LossScaleError, match="no loss was scaled since the last step"):
            call()
    assert weight.grad.tolist() == [1.0, 1.0]
    assert weight.tolist() == [1.0, 2.0]


def test_torchs_own_scaler_around_the_optimizer_is_named_and_fits_the_inner_one(weight, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(weight.sum()).backward()
    with pytest.raises(LossScaleError, match=r"take the scaler out, or give it.*inner_optimizer"):
        scaler.step(optimizer)
    scaler.update()
    weight.grad = None
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer.inner_optimizer)
    assert weight.tolist() == [0.5, 1.5]


def test_a_second_step_after_one_scaled_loss(weight, optimizer):
    optimizer.backward(weight.sum())
    optimizer.step()
    with pytest.raises(LossScaleError, match="no loss was scaled since the last step"):
        optimizer.step()


def test_a_backward_after_unscale(weight):
    optimizer = LossScaleOptimizer(torch.optim.SGD([("layer.weight", weight)], lr=0.5), 8)
    optimizer.backward(weight.sum())
    optimizer.unscale_()
    with pytest.raises(LossScaleError, match=r"'layer.weight'.*after unscale_\(\)"):
        optimizer.backward(weight.sum())


@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_the_guard_of_unscale_goes_with_the_step(weight, optimizer, end):
    optimizer.backward(weight.sum())
    optimizer.unscale_()
    getattr(optimizer, end)()
    optimizer.zero_grad()
    optimizer.backward(weight.sum())
    assert weight.grad.tolist() == [8.0, 8.0]
    assert not weight._post_accumulate_grad_hooks


def test_a_backward_onto_gradients_that_the_last_step_left(weight, optimizer):
    optimizer.backward(weight.sum())
    optimizer.step()
    with pytest.raises(LossScaleError, match=r"still had the gradient of the last step"):
        optimizer.backward(weight.sum())


def test_a_new_gradient_at_the_address_of_the_last_one():
    """Zeros that a loop puts there may be given the memory that the last gradients had."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)])
    optimizer = LossScaleOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), 8)
    taken = 0
    for step in range(4):
        addresses = {id(p.grad) for p in model.parameters() if p.grad is not None}
        model.zero_grad()
        if step % 2:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
                taken += id(p.grad) in addresses
        optimizer.backward(model(torch.ones(2, 8)).square().mean())
        optimizer.step()
        assert not optimizer.last_step_skipped
    assert taken, "no address came back: this tests nothing"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")  # torch's advice
def test_a_backward_that_builds_a_graph_onto_gradients_of_the_last_step(weight, optimizer):
    optimizer.backward(weight.sum())
    optimizer.step()
    with pytest.raises(LossScaleError, match=r"still had the gradient of the last step"):
        optimizer.backward((weight * weight).sum(), create_graph=True)


def test_a_gradient_of_the_last_step_is_not_used_again():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = LossScaleOptimizer(torch.optim.SGD([used, unused], lr=0.5), 8)
    optimizer.backward((used + unused).sum())
    optimizer.step()
    used.grad = None
    optimizer.backward(used.sum())
    with pytest.raises(LossScaleError, match=r"\[1\].*still has the gradient of the last step"):
        optimizer.step()
    assert unused.tolist() == [0.5, 0.5]


def test_derivatives_beside_the_gradients_of_the_last_step(weight, optimizer):
    """``torch.autograd.grad`` adds to nothing: a custom loop needs no zero_grad()."""
    optimizer.backward(weight.sum())
    optimizer.step()
    scaled = torch.autograd.grad(optimizer.get_scaled_loss((weight * 3).sum()), [weight])
    unscaled = optimizer.get_unscaled_gradients(scaled)
    assert unscaled[0].tolist() == [3.0, 3.0]
    before = weight.detach().clone()
    optimizer.apply_gradients(zip(unscaled, [weight], strict=True))
    assert torch.equal(weight, before - 0.5 * unscaled[0])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clear", ["optimizer", "module", "late"])
def test_any_way_to_clear_the_gradients_is_fine(clear, set_to_none):
    module = torch.nn.Linear(2, 1)
    optimizer = LossScaleOptimizer(torch.optim.SGD(module.parameters(), lr=0.5), 8)
    for _ in range(3):
        loss = optimizer.scale(module(torch.ones(2)).sum())
        (module if clear == "module" else optimizer).zero_grad(set_to_none=set_to_none)
        if clear == "late":
            loss = optimizer.scale(module(torch.ones(2)).sum())
            optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        assert module.weight.grad.tolist() == [[8.0, 8.0]]
        optimizer.step()


def test_wrapping_what_is_wrapped(optimizer):
    with pytest.raises(LossScaleError, match="wrapped in a LossScaleOptimizer already"):
        LossScaleOptimizer(optimizer)


def test_wrapping_what_is_no_optimizer(weight):
    with pytest.raises(LossScaleError, match=r"takes a torch.optim.Optimizer, got a list"):
        LossScaleOptimizer([weight])


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), "1", [1.0]])
def test_a_norm_that_clips_nothing_sensible(weight, max_norm):
    with pytest.raises(LossScaleError, match="must be positive"):
        LossScaleOptimizer(torch.optim.SGD([weight]), max_norm=max_norm)


def test_a_loss_that_does_not_require_grad(weight, optimizer):
    with pytest.raises(LossScaleError, match="does not require grad"):
        optimizer.backward(weight.detach().sum())
    with torch.no_grad(), pytest.raises(LossScaleError, match="does not require grad"):
        optimizer.scale(weight.sum())


@pytest.mark.parametrize("loss", ["loss", 1.0, None, ["loss"]])
def test_a_loss_that_is_no_tensor(optimizer, loss):
    with pytest.raises(LossScaleError, match="must be a Tensor or an iterable of Tensors"):
        optimizer.scale(loss)


def test_float16_parameters_are_refused_by_name(weight):
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    pattern = r"param_groups\[0\]\['params'\]\[1\] \('b'\), shape \(3,\).*float16.*float32"
    with pytest.raises(LossScaleError, match=pattern):
        LossScaleOptimizer(torch.optim.SGD([("a", weight), ("b", half)]))
    LossScaleOptimizer(torch.optim.SGD([weight, half]), NoLossScale())


def test_float16_parameters_of_a_new_group_are_refused_and_not_added(weight, optimizer):
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(LossScaleError, match=r"param_groups\[1\]\['params'\]\[0\]"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_parameters_made_float16_later_are_refused_at_the_step(kind):
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = LossScaleOptimizer(kind(module.parameters()))
    module.half()
    before = module.weight.detach().clone()
    optimizer.backward(module.weight.float().sum())
    with pytest.raises(LossScaleError, match=r"float16"):
        optimizer.step()
    assert torch.equal(module.weight, before)


def test_dict_subclasses_and_named_tuples_keep_their_type(weight, optimizer):
    from collections import OrderedDict, namedtuple

    Losses = namedtuple("Losses", "one two")
    loss = weight.sum()
    assert isinstance(optimizer.scale(Losses(loss, [loss])), Losses)
    assert optimizer.scale(Losses(loss, [loss])).two[0].item() == 24.0
    scaled = optimizer.scale(OrderedDict(a=loss, b={"c": (loss,)}))
    assert type(scaled) is OrderedDict
    assert scaled["b"]["c"][0].item() == 24.0
    assert [x.item() for x in optimizer.scale(loss for _ in range(2))] == [24.0, 24.0]


def test_the_scale_of_the_policies_is_taken(weight):
    other = torch.nn.Parameter(torch.ones(1))

    def wanted(**policies):
        for parameter, policy in zip((weight, other), policies.values(), strict=False):
            registry.register(parameter, policy)
        return LossScaleOptimizer(torch.optim.SGD([weight, other])).loss_scale

    assert wanted() == DynamicLossScale()
    assert wanted(a=Policy("mixed_bfloat16")) == NoLossScale()
    assert wanted(a=Policy("mixed_float16", loss_scale=64)) == FixedLossScale(64)
    both = {"a": Policy("mixed_float16", loss_scale=64), "b": Policy("float32")}
    assert wanted(**both) == FixedLossScale(64)
    with pytest.raises(PolicyError, match=r"FixedLossScale.*DynamicLossScale|Dynamic.*Fixed"):
        wanted(a=Policy("mixed_float16", loss_scale=64), b=Policy("mixed_float16"))
    registry.forget(weight)
    registry.forget(other)
    assert wanted() == DynamicLossScale()
    assert PolicyMap("mixed_float16").loss_scale == DynamicLossScale()


def test_the_registry_does_not_keep_parameters_alive():
    import gc
    import weakref

    parameter = torch.nn.Parameter(torch.ones(1))
    registry.register(parameter, Policy("float32"))
    reference = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    ("value", "rule"), [("dynamic", DynamicLossScale()), (64, FixedLossScale(64))]
)
def test_a_given_scale_wins_over_the_policies(weight, value, rule):
    registry.register(weight, Policy("mixed_bfloat16"))
    assert LossScaleOptimizer(torch.optim.SGD([weight]), value).loss_scale == rule


def test_gradients_of_their_own_do_not_hide_what_the_last_step_left():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight], lr=0.1), 64)
    optimizer.backward(weight.square().sum())
    optimizer.step()
    torch.autograd.grad(optimizer.scale(weight.square().sum()), [weight])
    with pytest.raises(LossScaleError, match="still had the gradient of the last step"):
        optimizer.backward(weight.square().sum())


def test_complex_gradients_that_are_conjugated_in_words_only():
    start = torch.tensor([1 + 2j, 3 - 1j])
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = LossScaleOptimizer(torch.optim.SGD([ours], lr=0.1), 64)
    optimizer.backward(ours.conj().abs().sum())
    assert ours.grad.is_conj(), "the case in question"
    optimizer.step()
    theirs.conj().abs().sum().backward()
    torch.optim.SGD([theirs], lr=0.1).step()
    torch.testing.assert_close(ours.detach(), theirs.detach())


def _trained(policy, step_of):
    model = apply_policy(nn.Linear(4, 1), policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = step_of(optimizer)
    for _ in range(2):
        step(model(torch.ones(2, 4)).sum())


def _bare(optimizer):
    def step(loss):
        loss.backward()
        optimizer.step()

    return step


def _by_scaler(scaler):
    def step_of(optimizer):
        def step(loss):
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return step

    return step_of


def _declined(optimizer):
    wrapped = LossScaleOptimizer(optimizer, NoLossScale())

    def step(loss):
        wrapped.backward(loss)
        wrapped.step()

    return step


def test_a_forgotten_loss_scale_is_said():
    with pytest.warns(LossScaleWarning, match="SGD.step: .*mixed_float16.*nobody scales") as said:
        _trained("mixed_float16", _bare)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_a_loss_scale_that_somebody_else_minds_or_nobody_wants_is_not_missed():
    _trained("mixed_bfloat16", _bare)
    _trained(Policy("mixed_float16", loss_scale=None), _bare)
    _trained("mixed_float16", _declined)
    _trained("mixed_float16", _by_scaler(torch.amp.GradScaler("cpu")))
    _trained("mixed_float16", _by_scaler(GradScaler("cpu")))


def test_a_backward_for_another_optimizers_weights_may_follow_unscale():
    heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    model = apply_policy(_Both(heads), "mixed_float16")
    first, second = (
        LossScaleOptimizer(torch.optim.SGD(head.parameters(), lr=0.1), 8) for head in heads
    )
    losses = model(torch.ones(2, 4))
    first.backward(losses[0])
    first.unscale_()
    second.backward(losses[1])  # the weights of both were cast by one node
    with pytest.raises(LossScaleError, match="after unscale_"):
        first.backward(model(torch.ones(2, 4))[0])


class _Both(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, x):
        return [head(x).sum() for head in self.heads]
