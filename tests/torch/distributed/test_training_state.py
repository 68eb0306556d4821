"""What a training state saves and brings back, in one process."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from halfstep import FixedLossScale
from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.distributed import TrainingState

INF = float("inf")


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))


def step(model, optimizer, factor=1.0):
    optimizer.zero_grad()
    optimizer.backward(model(torch.ones(2, 4)).square().mean() * factor)
    optimizer.step()


def test_a_training_state_brings_back_the_loss_scale_and_the_users_own_settings():
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()))
    for factor in (1.0, float("inf")):
        step(model, optimizer, factor)
    state = copy.deepcopy(TrainingState(model, optimizer).state_dict())
    assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [None]
    other = apply_policy(make(), "mixed_float16")
    resumed = LossScaleOptimizer(torch.optim.AdamW(other.parameters()))
    TrainingState(other, resumed).load_state_dict(state)
    assert (resumed.current_scale, resumed.skipped_steps) == (2.0**14, 1)
    assert resumed.param_groups[0]["fused"], "the fused kernels are on again"
    step(model, optimizer)
    step(other, resumed)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_training_state_takes_a_plain_optimizer():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sorted(TrainingState(model, optimizer).state_dict()) == ["model", "optimizer", "stepped"]


def test_a_state_without_a_loss_scale_changes_nothing():
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    state = TrainingState(model, optimizer).state_dict()
    del state["loss_scale"]
    state["model"]["0.weight"] = torch.zeros(4, 4)
    with pytest.raises(LossScaleError, match="loss_scale"):
        TrainingState(model, optimizer).load_state_dict(state)
    assert model[0].weight.abs().sum() > 0


# ------------------------------------------------------------------ before the first step

KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "dampened": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5),
    "stateless": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-2),
}
POLICIES = ["mixed_float16", "mixed_bfloat16", "master_float16", "kahan_bfloat16"]


def started(policy, kind="adamw", sharded=False):
    torch.manual_seed(0)
    model = apply_policy(make(), policy)
    if sharded:
        for layer in (*model.children(), model):
            fully_shard(layer)
    return model, LossScaleOptimizer(KINDS[kind](model.parameters()))


def whole(model):
    with torch.no_grad():
        return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def resumed(model, optimizer, other, another, folder):
    dcp.save({"all": TrainingState(model, optimizer)}, checkpoint_id=folder)
    dcp.load({"all": TrainingState(other, another)}, checkpoint_id=folder)


# DCP warns of every tensor that is on the CPU and of no rank
quiet = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_saving_before_the_first_step_changes_nothing(policy, kind):
    (model, optimizer), (other, another) = started(policy, kind), started(policy, kind)
    TrainingState(model, optimizer).state_dict()
    assert not optimizer.state
    for each in ((model, optimizer), (other, another)):
        step(*each)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_saving_before_the_first_step_changes_no_plain_optimizer():
    torch.manual_seed(0)
    model = make()
    other = copy.deepcopy(model)
    for each, looks in ((model, True), (other, False)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        if looks:
            TrainingState(each, optimizer).state_dict()
        each(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@quiet
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["adamw", "dampened", "stateless"])
def test_what_took_no_step_is_loaded_as_that(alone, tmp_path, policy, kind, sharded):
    """Even into an optimizer that has stepped."""
    model, optimizer = started(policy, kind, sharded)
    other, another = started(policy, kind, sharded)
    step(other, another)
    resumed(model, optimizer, other, another, tmp_path / "checkpoint")
    for each in ((model, optimizer), (other, another)):
        step(*each)
    assert all(map(torch.equal, whole(model), whole(other)))


@quiet
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("policy", ["mixed_float16", "master_float16"])
@pytest.mark.parametrize("kind", ["adamw", "stateless"])
def test_a_run_whose_every_step_was_skipped_goes_on(alone, tmp_path, policy, kind, sharded):
    """Its gradients still stand, and are left standing."""
    model, optimizer = started(policy, kind, sharded)
    step(model, optimizer, INF)
    grads = [parameter.grad for parameter in model.parameters()]
    other, another = started(policy, kind, sharded)
    resumed(model, optimizer, other, another, tmp_path / "checkpoint")
    assert all(grad is p.grad for grad, p in zip(grads, model.parameters(), strict=True))
    assert another.current_scale == optimizer.current_scale == 2.0**14
    for each in ((model, optimizer), (other, another)):
        step(*each)
    assert all(map(torch.equal, whole(model), whole(other)))


def test_a_load_that_fails_leaves_no_state():
    model, optimizer = started("mixed_float16")
    state = TrainingState(model, optimizer).state_dict()
    del state["optimizer"]["state"]["0.weight"]
    with pytest.raises(RuntimeError, match="Missing optimizer state"):
        TrainingState(model, optimizer).load_state_dict(state)
    assert not optimizer.state


# ------------------------------------------------------------------ loss scales of another kind


@quiet
@pytest.mark.parametrize(
    ("saved", "running"),
    [
        ("mixed_float16", "mixed_bfloat16"),
        ("mixed_bfloat16", "mixed_float16"),
        ("master_float16", "master_bfloat16"),
    ],
)
def test_the_kind_of_scale_is_the_running_ones(alone, tmp_path, saved, running):
    model, optimizer = started(saved)
    step(model, optimizer)
    other, another = started(running)
    before = another.loss_scale
    dcp.save({"all": TrainingState(model, optimizer)}, checkpoint_id=tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match=f"this optimizer keeps {type(before).__name__}"):
        dcp.load({"all": TrainingState(other, another)}, checkpoint_id=tmp_path / "checkpoint")
    assert another.loss_scale == before
    assert another.current_scale == before.first_scale
    weight, twin = model[0].weight, other[0].weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], another.state[twin]["exp_avg"])
    step(other, another)
    assert not another.last_step_skipped


@quiet
def test_a_fixed_scale_is_loaded_into_a_dynamic_one(alone, tmp_path):
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters()), 32)
    other, another = started("mixed_float16")
    resumed(model, optimizer, other, another, tmp_path / "checkpoint")
    assert (another.loss_scale, another.current_scale) == (FixedLossScale(32), 32)


def test_a_scale_that_cannot_be_read_is_named():
    model, optimizer = started("mixed_float16")
    state = TrainingState(model, optimizer).state_dict()
    for text in ("{", '{"steps": 1}'):
        with pytest.raises(LossScaleError, match=r"state_dict\['loss_scale'\]"):
            TrainingState(model, optimizer).load_state_dict({**state, "loss_scale": text})


# ------------------------------------------------------------------ mistakes


def test_arguments_of_another_kind_are_named():
    model, optimizer = started("mixed_float16")
    with pytest.raises(LossScaleError, match="got a LossScaleOptimizer and a Sequential"):
        TrainingState(optimizer, model)
    with pytest.raises(LossScaleError, match="one torch.optim.Optimizer, got .* and a list"):
        TrainingState(model, [optimizer])


def test_an_optimizer_of_another_model_is_named():
    (model, optimizer), (_, strange) = started("mixed_float16"), started("mixed_float16")
    where = r"param_groups\[0\]\['params'\]\[0\], shape \(4, 4\), of this AdamW is no parameter"
    with pytest.raises(LossScaleError, match=where):
        TrainingState(model, strange).state_dict()
    state = TrainingState(model, optimizer).state_dict()
    with pytest.raises(LossScaleError, match=where):
        TrainingState(model, strange).load_state_dict(state)


def test_an_optimizer_of_a_part_of_the_model_is_saved():
    model = apply_policy(make(), "mixed_float16")
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model[2].parameters()))
    step(model, optimizer)
    state = TrainingState(model, optimizer).state_dict()
    assert sorted(state["optimizer"]["state"]) == ["2.0.bias", "2.0.weight"]
