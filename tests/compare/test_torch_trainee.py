import random

import numpy as np
import pytest
import torch
from torch import nn

from halfstep import Policy, PolicyError, PolicyMap, RecipeError
from halfstep.compare.engine import Plan
from halfstep.compare.torch_trainee import TorchTrainee, initial_weights, move, pick_device


def start(recipe, policy="float32", seed=0):
    given = Policy(policy) if isinstance(policy, str) else policy
    return TorchTrainee(recipe, given, initial_weights(recipe, seed), "cpu", seed)


def losses(trainee, recipe, steps=4, seed=0):
    plan = Plan(steps=steps, seed=seed)
    return [
        trainee.step(batch, plan.step_seed(step)).loss
        for step, (_, batch) in enumerate(plan.batches(recipe))
    ]


def test_float32_is_the_plain_training_loop_bit_for_bit(recipe):
    tiny = recipe()
    plan = Plan(steps=4)
    torch.manual_seed(0)
    model = tiny.call("make_model")
    optimizer = tiny.call("make_optimizer", model)
    expected = []
    for step, (_, batch) in enumerate(plan.batches(tiny)):
        torch.manual_seed(plan.step_seed(step))
        optimizer.zero_grad()
        loss = tiny.call("loss", model, batch)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses(start(tiny), tiny) == expected


def test_policies_start_from_the_same_weights_and_drop_the_same_units(recipe):
    tiny = recipe()
    # the gradients of this problem overflow float16 under the first dynamic scale
    policies = ("float32", Policy("mixed_float16", loss_scale=64), "mixed_bfloat16")
    exact, half, bfloat = (losses(start(tiny, policy), tiny) for policy in policies)
    # with another dropout mask the losses would differ by their own size
    assert half == pytest.approx(exact, rel=0.02)
    assert bfloat == pytest.approx(exact, rel=0.1)
    assert half != exact


def test_the_seed_decides_the_weights(recipe):
    tiny = recipe()
    assert losses(start(tiny, seed=1), tiny) != losses(start(tiny), tiny)


def test_random_numbers_of_numpy_and_python_are_the_same_for_every_policy(recipe):
    tiny = recipe(
        """
        import random, numpy
        def loss(model, batch):
            seen.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
            return model(batch["x"]).square().mean()
        """
    )
    first, second = start(tiny), start(tiny)
    batch = {"x": torch.ones(1, 3)}
    first.step(batch, 7)
    second.step(batch, 7)
    second.step(batch, 8)
    a, b, c = tiny.module.seen
    assert a == b
    assert a != c
    random.seed()
    np.random.seed()


def test_float16_has_a_loss_scale_and_the_others_have_none(recipe):
    batch = {"x": torch.ones(1, 3)}
    scales = {
        name: start(recipe(), name).step(batch, 0).scale
        for name in ("float32", "mixed_bfloat16", "mixed_float16")
    }
    assert scales == {"float32": None, "mixed_bfloat16": None, "mixed_float16": 2.0**15}
    fixed = Policy("mixed_float16", loss_scale=64)
    assert start(recipe(), fixed).step(batch, 0).scale == 64


def test_a_skipped_step_is_seen_and_backs_the_scale_off(recipe):
    overflowing = recipe(
        "def loss(model, batch): return model(batch['x']).square().mean() * batch['by']"
    )
    trainee = start(overflowing, "mixed_float16")
    batch = {"x": torch.ones(1, 3), "by": torch.tensor(1e30)}
    result = trainee.step(batch, 0)
    assert result.skipped
    assert result.scale == 2.0**14


def test_a_policy_map_reaches_the_layers(recipe):
    seeing = recipe(
        """
        def loss(model, batch):
            model[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
            return model(batch["x"]).square().mean()
        """
    )
    for policy in (PolicyMap("mixed_bfloat16", {"0": "float32"}), "mixed_bfloat16"):
        start(seeing, policy).step({"x": torch.ones(1, 3)}, 0)
    assert seeing.module.seen == [torch.float32, torch.bfloat16]


def test_evaluation_is_without_gradients_and_in_evaluation_mode(recipe):
    tiny = recipe(
        """
        def evaluate(model):
            seen.append((model.training, torch.is_grad_enabled()))
            return {"error": torch.tensor(0.5)}
        def loss(model, batch):
            seen.append((model.training, torch.is_grad_enabled()))
            return model(batch["x"]).mean()
        """
    )
    trainee = start(tiny)
    assert trainee.evaluate() == {"error": 0.5}
    trainee.step({"x": torch.ones(1, 3)}, 0)
    assert tiny.module.seen == [(False, False), (True, True)]


def test_a_policy_that_changes_nothing_is_noted(recipe):
    assert start(recipe(), "float32").notes == []
    assert len(start(recipe(), PolicyMap("float32", {"0": "float32"})).notes) == 1


def test_a_policy_that_fits_no_layer_is_an_error_of_that_policy(recipe):
    with pytest.raises(PolicyError, match="nowhere"):
        start(recipe(), PolicyMap("mixed_float16", {"nowhere": "float32"}))


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("def make_model(): return 3", r"make_model\(\) returned 3"),
        ("def make_model(): return undefined", r"line \d+: make_model\(\): NameError"),
    ],
)
def test_a_model_that_is_none_is_the_recipes_fault(recipe, added, said):
    with pytest.raises(RecipeError, match=said):
        start(recipe(added))


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("def loss(model, batch): return None", "returned None; it must return a scalar tensor"),
        ("def loss(model, batch): return model(batch['x'])", r"shape \(2, 1\)"),
        ("def loss(model, batch): return 0.5", "returned 0.5"),
    ],
)
def test_a_loss_that_is_no_scalar_is_the_recipes_fault(recipe, added, said):
    with pytest.raises(RecipeError, match=said):
        start(recipe(added)).step({"x": torch.ones(2, 3)}, 0)


@pytest.mark.parametrize("returned", ["None", "0.5", "{'a': 'high'}", "{'a': torch.ones(2)}"])
def test_metrics_that_are_no_numbers_are_the_recipes_fault(recipe, returned):
    with pytest.raises(RecipeError, match="must return a dict of numbers"):
        start(recipe(f"def evaluate(model): return {returned}")).evaluate()


def test_batches_of_any_nesting_are_moved_and_their_containers_are_new():
    from typing import NamedTuple

    class Pair(NamedTuple):
        a: object
        b: object

    batch = {"x": torch.ones(1), "more": [(torch.ones(2), "text"), Pair(torch.ones(3), 4)]}
    moved = move(batch, "meta")
    assert moved["x"].device.type == "meta"
    assert moved["more"][0][0].device.type == "meta"
    assert moved["more"][0][1] == "text"
    assert isinstance(moved["more"][1], Pair)
    assert moved["more"][1].a.device.type == "meta"
    assert batch["x"].device.type == "cpu"


def test_a_device_that_is_not_there_is_said():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="--device nonsense"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        assert pick_device() == "cpu"
        with pytest.raises(RecipeError, match="--device cuda"):
            pick_device("cuda")


def test_the_model_is_the_users_own(recipe):
    assert isinstance(start(recipe())._model, nn.Sequential)
