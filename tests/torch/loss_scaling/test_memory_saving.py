"""Masters and compensations in checkpoints and copies; and what each policy costs in bytes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from halfstep import LossScaleError, NoLossScale
from halfstep.torch import LossScaleOptimizer, apply_policy, masters, remove_policy
from halfstep.torch.loss_scaling import wide

NAMES = ("master_bfloat16", "master_float16", "kahan_bfloat16")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=["AdamW", "SGD", "RMSprop", "Muon", "ThirdParty"])
def some_case(request, kit):
    return next(case for case in kit.cases if case.name == request.param)


def _training(kit, case, name, steps=0, seed=0):
    net = kit.net(seed=seed)
    if name is not None:
        apply_policy(net, name)
    # a scale that does not depend on the policy
    optimizer = LossScaleOptimizer(case.make(kit.groups(net, "plain")), NoLossScale())
    _go_on(kit, net, optimizer, range(steps))
    return net, optimizer


def _go_on(kit, net, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        optimizer.step()


def _exact(net):
    trained = [net.table.weight, net.first.weight, net.last.weight]
    return [masters.exact_of(p).float().clone() for p in trained]


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_a_run_goes_on_bit_for_bit(kit, some_case, name):
    net, optimizer = _training(kit, some_case, name, steps=3)
    saved = _through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    again, continued = _training(kit, some_case, name, seed=1)
    again.load_state_dict(saved["net"])
    continued.load_state_dict(saved["optimizer"])
    kit.same(_exact(again), _exact(net))
    _go_on(kit, net, optimizer, range(3, 5))
    _go_on(kit, again, continued, range(3, 5))
    kit.same(_exact(again), _exact(net))
    kit.same(kit.snapshot(continued), kit.snapshot(optimizer))


def test_a_checkpoint_goes_into_a_float32_model_and_back(kit, some_case, name):
    net, optimizer = _training(kit, some_case, name, steps=3)
    wide, theirs = _training(kit, some_case, None, seed=1)
    wide.load_state_dict(net.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    kit.same([p.detach() for p in kit.groups(wide, "plain")], _exact(net))
    back, again = _training(kit, some_case, name, seed=2)
    back.load_state_dict(net.state_dict())
    again.load_state_dict(optimizer.state_dict())
    kit.same(_exact(back), _exact(net))
    # and a checkpoint that was float32 all along
    fresh, loaded = _training(kit, some_case, None, seed=3)
    fresh.load_state_dict(wide.state_dict())
    loaded.load_state_dict(theirs.state_dict())
    apply_policy(fresh, name)
    kit.same(_exact(fresh), _exact(net))
    _go_on(kit, fresh, loaded, range(3, 4))


def test_one_memory_policy_loads_what_another_saved(kit):
    case = next(case for case in kit.cases if case.name == "AdamW")
    net, optimizer = _training(kit, case, "kahan_bfloat16", steps=3)
    other, loaded = _training(kit, case, "master_bfloat16", seed=1)
    other.load_state_dict(net.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    kit.same(_exact(other), _exact(net))


def test_loading_an_optimizer_changes_no_weight(kit, name):
    case = next(case for case in kit.cases if case.name == "AdamW")
    _, optimizer = _training(kit, case, name, steps=2)
    for policy in (name, None):
        net, other = _training(kit, case, policy, seed=1)
        before = copy.deepcopy(net.state_dict())
        other.load_state_dict(optimizer.state_dict())
        kit.same(dict(net.state_dict()), dict(before))


def test_the_bare_optimizer_reads_it_and_it_reads_a_bare_one(kit, name):
    case = next(case for case in kit.cases if case.name == "AdamW")
    _, optimizer = _training(kit, case, name, steps=2)
    bare = case.make(kit.groups(kit.net(), "plain"))
    bare.load_state_dict(optimizer.state_dict())
    for group in bare.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    bare.step()
    state = bare.state_dict()
    with pytest.warns(UserWarning, match="bare optimizer"):
        optimizer.load_state_dict(state)


def test_a_failing_load_leaves_everything_as_it_was(kit, name):
    case = next(case for case in kit.cases if case.name == "AdamW")
    net, optimizer = _training(kit, case, name, steps=2)
    before = kit.snapshot(optimizer), _exact(net)
    wrong = copy.deepcopy(optimizer.state_dict())
    key = "compensation" if name.startswith("kahan") else "master"
    wrong["state"][1][key] = torch.zeros(3)
    with pytest.raises(LossScaleError, match=rf"the {key} of param_groups\[0\]\['params'\]\[1\]"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0]["params"].append(9)
    with pytest.raises(ValueError, match="different number|doesn't match"):
        optimizer.load_state_dict(wrong)
    kit.same((kit.snapshot(optimizer), _exact(net)), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(kit, some_case, name, copied):
    if some_case.name == "ThirdParty" and copied is not copy.deepcopy:
        pytest.skip("a class of a conftest cannot be pickled")
    net, optimizer = _training(kit, some_case, name, steps=2)
    if copied is copy.deepcopy:
        again, continued = copied((net, optimizer))
    else:
        continued = copied(optimizer)
        again = None
    _go_on(kit, net, optimizer, range(2, 4))
    if again is not None:
        _go_on(kit, again, continued, range(2, 4))
        kit.same(_exact(again), _exact(net))
        kit.same(list(remove_policy(again).parameters()), list(remove_policy(net).parameters()))
    else:
        parameters = [p for group in continued.param_groups for p in group["params"]]
        assert {masters.update_of(p) for p in parameters} == {name.partition("_")[0]}


# ---------------------------------------------------------------------- bytes


def _held(model, optimizer):
    """Bytes a weight that are there between two steps, before gradients are cleared."""
    tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
    for state in optimizer.state_dict()["state"].values():
        tensors += [v for v in state.values() if torch.is_tensor(v) and v.dim()]
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(own.values()) / sum(p.numel() for p in model.parameters())


def _copied(model, inputs):
    """Bytes a weight of the copies that a forward pass makes and keeps for the backward pass."""
    made = {}

    def note(tensor):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        place = tensor.untyped_storage().data_ptr()
        if tensor.shape in {p.shape for p in model.parameters()} and place not in own:
            made[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(inputs).sum()
    total = sum(t.untyped_storage().nbytes() for t in made.values())
    del loss
    return total / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("policy", "held", "copies"),
    [
        ("float32", 4 + 4 + 8, 0),
        ("mixed_bfloat16", 4 + 4 + 8, 2),
        ("master_bfloat16", 2 + 2 + 8 + 4, 0),
        ("kahan_bfloat16", 2 + 2 + 8 + 2, 0),
        ("bfloat16", 2 + 2 + 4, 0),
    ],
)
def test_bytes_of_a_weight_under_adam(policy, held, copies):
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    if policy != "float32":
        apply_policy(model, policy)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()), NoLossScale())
    inputs = torch.ones(1, 32, requires_grad=True)
    assert _copied(model, inputs) == copies
    optimizer.backward(model(inputs).sum())
    optimizer.step()
    assert _held(model, optimizer) == held


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("first", ["a batch", "the optimizer"])
@pytest.mark.parametrize("name", NAMES)
def test_lazy_layers_are_kept_once_they_have_values(name, first):
    torch.manual_seed(0)
    model = apply_policy(nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1)), name)
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    if first == "a batch":
        model(inputs)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), 64)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((model(inputs) - 1).square().mean())
        optimizer.backward(losses[-1])
        optimizer.step()
    assert losses[-1] < losses[0]
    for parameter in model.parameters():
        assert parameter.dtype.itemsize == 2
        kept = masters.known(parameter)
        assert kept.rest.shape == parameter.shape
        assert not torch.equal(masters.exact_of(parameter), parameter.float())


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", [*NAMES, "mixed_float16"])
def test_a_lazy_layer_that_is_used_late_waits(name, monkeypatch):
    """As with a bare optimizer of torch, which steps what has a gradient."""
    monkeypatch.setattr(wide, "PART_BYTES", 64)
    model = apply_policy(nn.ModuleList([nn.LazyLinear(8), nn.LazyLinear(8)]), name)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), 64)
    assert optimizer.state_dict()["state"] == {}
    for step in range(4):
        optimizer.zero_grad()
        hidden = model[0](torch.ones(2, 8))
        optimizer.backward((model[1](hidden) if step >= 2 else hidden).square().mean())
        if step % 2:
            optimizer.unscale_()
        optimizer.step()
        assert len(optimizer.state_dict()["state"]) == (4 if step >= 2 else 2)
    assert not optimizer.last_step_skipped
