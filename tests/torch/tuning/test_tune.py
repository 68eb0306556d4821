"""Tuning real, small models: the zoo of planted faults, and healthy ones."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from halfstep import AdviceError, Policy, PolicyError, PolicyMap
from halfstep.compare import parse_policies
from halfstep.core.tuning import most_runs
from halfstep.torch import apply_policy, policy_of, tune
from halfstep.torch.tuning.layers import layers_of

_SPEC = importlib.util.spec_from_file_location(
    "fault_zoo", Path(__file__).parents[3] / "benchmarks" / "fault_zoo.py"
)
zoo = importlib.util.module_from_spec(_SPEC)
sys.modules["fault_zoo"] = zoo
_SPEC.loader.exec_module(zoo)

FAULTS = {fault.name: fault for fault in zoo.FAULTS}
STEPS = 8


class Training:
    """A fault of the zoo as something to train."""

    def __init__(self, fault):
        self.fault = fault
        self.make_model, self.make_optimizer = fault.make_model, fault.make_optimizer
        self.loss = fault.loss_fn

    def batches(self, epoch, seed):
        return (self.fault.batch(1000 * seed + 100 * epoch + index) for index in range(100))


@functools.cache
def tuned(name, **arguments):
    fault = FAULTS[name]
    given = {"functional": fault.functional, "output_dtype": fault.output_dtype, "steps": STEPS}
    return tune(Training(fault), fault.policies[0], **{**given, **arguments})


def paths(found):
    return tuple(layer.path for layer in found.layers)


@pytest.mark.parametrize(
    "name",
    [
        "attention-logits", "checkpointed", "rms-norm-pow", "exp", "variance", "in-place",
        "large-weight", "two-at-once", "epsilon", "log-of-softmax", "acos-at-1", "mask-float32-min",
    ],
)  # fmt: skip
def test_the_planted_layers_are_found_and_only_those(name):
    found = tuned(name)
    assert set(paths(found)) == set(FAULTS[name].float32_layers)
    assert found.enough
    runs = found.runs("search") + found.runs("second seed")
    assert runs <= most_runs(len(found.layers), found.candidates)


def test_a_fault_that_hardly_moves_the_loss_is_found_within_a_tolerance_that_sees_it():
    assert paths(tuned("sum")) == ()
    assert paths(tuned("sum", tolerance=0.002)) == FAULTS["sum"].float32_layers


def test_a_fault_that_runs_through_several_layers_is_found_in_them_and_nowhere_else():
    found = tuned("residual-stream")
    planted = FAULTS["residual-stream"].float32_layers
    # finer than the zoo's list: of a block only the parts that the large values meet
    assert all(any(f"{path}.".startswith(f"{p}.") for p in planted) for path in paths(found))
    assert set(planted) <= set(paths(found))
    assert "blocks.2.attn" not in paths(found)


@pytest.mark.parametrize("name", ["vanishing", "loss-scale"])
def test_what_a_loss_scale_cures_needs_no_layer_and_gets_that_scale(name):
    found = tuned(name)
    assert (paths(found), found.runs("search"), found.runs("second seed")) == ((), 1, 1)
    assert all(trial.skipped == 0 for trial in found.trials)


@pytest.mark.parametrize("target", ["mixed_float16", "mixed_bfloat16"])
def test_a_healthy_model_needs_none_after_one_run(target):
    healthy = zoo.Fault("healthy", "", lambda model: None, "", "")
    found = tune(Training(healthy), target, steps=STEPS)
    assert str(found).startswith("None needed")
    assert [trial.purpose for trial in found.trials] == [
        "baseline", "search", "baseline", "second seed",
    ]  # fmt: skip
    assert found.policy.overrides == {}
    assert (found.loss_scale is None) == (target == "mixed_bfloat16")


def test_what_was_found_is_a_policy_file_that_everybody_takes(tmp_path):
    found = tuned("attention-logits")
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(found.policy.get_config()))
    assert parse_policies(str(file)) == {"tuned": found.policy}
    model = apply_policy(FAULTS["attention-logits"].make_model(), found.policy)
    assert policy_of(model.blocks[1].attn).name == "float32"
    # the attention's own arithmetic, and not its projections
    assert policy_of(model.blocks[1].attn.qkv).name == "mixed_float16"
    assert found.policy.loss_scale.initial_scale == found.loss_scale
    assert "overflow" in found.layers[0].evidence


def test_the_same_search_gives_the_same_answer():
    assert tuned("epsilon").to_plain() == tuned.__wrapped__("epsilon").to_plain()


def test_layers_can_be_kept_in_bfloat16_where_that_is_enough():
    found = tuned("exp", keep="mixed_bfloat16")
    assert paths(found) == ("blocks.2.mlp",)
    assert found.policy.overrides["blocks.2.mlp"] == Policy("mixed_bfloat16")


class Line:
    """Fit one weight."""

    @staticmethod
    def make_model():
        return nn.Linear(1, 1)

    @staticmethod
    def make_optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    @staticmethod
    def batches(epoch, seed):
        return torch.ones(4, 8, 1)

    @staticmethod
    def loss(model, batch):
        return model(batch).square().mean() * 1e-3


class Unscalable(torch.autograd.Function):
    """Passes on; its gradient is not finite once the loss was scaled."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(gradient > 1, torch.inf, gradient)


def test_a_fault_in_the_loss_is_no_layers_and_is_said_after_two_runs():
    class Scales(Line):
        @staticmethod
        def make_optimizer(model):
            return torch.optim.SGD(model.parameters(), lr=100.0)

        @staticmethod
        def loss(model, batch):
            return Unscalable.apply(Line.loss(model, batch))

    found = tune(Scales, steps=4)
    assert found.enough is False
    assert found.runs("search") == 2
    assert str(found).startswith("Nothing found")


def test_a_training_that_fails_in_float32_is_an_error():
    class Fails(Line):
        @staticmethod
        def loss(model, batch):
            return model(batch).mean() * float("nan")

    with pytest.raises(AdviceError, match="in float32 the loss is not finite at step 0 of seed 0"):
        tune(Fails, steps=4)


def test_an_epoch_without_batches_is_an_error():
    class Empty(Line):
        @staticmethod
        def batches(epoch, seed):
            return []

    with pytest.raises(AdviceError, match="gave no batch"):
        tune(Empty, steps=4)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"target": "float32"}, AdviceError, "32 bits or more"),
        ({"target": "mixed_flaot16"}, PolicyError, "Did you mean"),
        ({"keep": "mixed_float16"}, AdviceError, "kept from"),
        ({"tolerance": -1}, AdviceError, "at least 0"),
        ({"steps": 0}, AdviceError, "at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(arguments, error, says):
    with pytest.raises(error, match=says):
        tune(None, **arguments)


def test_random_numbers_are_left_as_they_were():
    before = torch.get_rng_state()
    tune(Line, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------- the candidates

LOW = Policy("mixed_float16")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.many[1] = self.many[0]
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.loss = nn.MSELoss()


def test_what_cannot_have_its_own_policy_is_one_candidate():
    layers = layers_of(Odd(), LOW, "autocast")
    assert layers.members == {
        "": ("", "scale"),
        "attention": ("attention", "attention.out_proj"),
        "many.0": ("many.0", "many.1"),
    }


@pytest.mark.parametrize(
    "kept", [(), ("",), ("attention",), ("", "many.0"), ("many.0", "attention")]
)
def test_every_choice_of_candidates_is_a_policy_that_applies(kept):
    model = Odd()
    layers = layers_of(model, LOW, "autocast")
    apply_policy(model, layers.policy_map(LOW, Policy("float32"), kept))
    for name, members in layers.members.items():
        for path in members:
            wanted = "float32" if name in kept else "mixed_float16"
            assert policy_of(model.get_submodule(path)).name == wanted


def test_a_map_says_no_more_than_it_must():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    layers = layers_of(model, LOW, "autocast")
    kept = layers.policy_map(LOW, Policy("float32"), ["0", "0.0", "0.1"])
    assert kept == PolicyMap("mixed_float16", {"0": "float32"})
    assert layers.policy_map(LOW, Policy("float32"), layers.names).overrides.keys() == {""}
