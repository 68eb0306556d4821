import math
from dataclasses import dataclass, field

import pytest

from halfstep import LossScaleExhausted, RecipeError
from halfstep.compare.engine import DIVERGED_AFTER, Plan, Race, plan_for
from halfstep.compare.trainee import StepResult


@dataclass
class Fake:
    """A trainee that plays back losses; an exception among them is raised."""

    losses: list = field(default_factory=list)
    log: list = field(default_factory=list)
    name: str = ""
    metrics: dict = field(default_factory=lambda: {"m": 1.0, "examples": 10})

    def step(self, batch, seed):
        place = sum(1 for name, *_ in self.log if name == self.name)
        self.log.append((self.name, batch["x"].sum().item(), seed))
        loss = self.losses[place] if place < len(self.losses) else 1.0
        if isinstance(loss, BaseException):
            raise loss
        return StepResult(seconds=0.1, loss=loss)

    def evaluate(self):
        if isinstance(self.metrics, Exception):
            raise self.metrics
        return self.metrics


def race(recipe, plan, **losses):
    """Run a race and return its events and the log of its steps."""
    events, log = [], []
    trainees = {
        name: each if isinstance(each, Fake) else Fake(each) for name, each in losses.items()
    }
    for name, fake in trainees.items():
        fake.name, fake.log = name, log
    Race(recipe, trainees, plan, events.append).run()
    return events, log


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def test_every_policy_sees_the_same_batches_and_seeds_in_the_same_order(recipe):
    _, log = race(recipe(), Plan(steps=7), a=[], b=[], c=[])
    seen = {name: [(batch, seed) for who, batch, seed in log if who == name] for name in "abc"}
    assert len(seen["a"]) == 7
    assert seen["a"] == seen["b"] == seen["c"]
    assert len({seed for _, seed in seen["a"]}) == 7


def test_no_policy_always_goes_first(recipe):
    _, log = race(recipe(), Plan(steps=6), a=[], b=[], c=[])
    rounds = ["".join(name for name, *_ in log[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_stays_not_finite_is_divergence_and_the_others_go_on(recipe, bad):
    events, _ = race(recipe(), Plan(steps=20), a=[1.0, 1.0, *[bad] * 18], b=[])
    [stopped] = of(events, "stopped")
    assert (stopped["policy"], stopped["status"], stopped["step"]) == ("a", "diverged", 2)
    assert str(DIVERGED_AFTER) in stopped["reason"]
    steps = of(events, "step")
    assert sum(e["policy"] == "a" for e in steps) == 2 + DIVERGED_AFTER
    assert sum(e["policy"] == "b" for e in steps) == 20


def test_a_few_losses_that_are_not_finite_are_no_divergence(recipe):
    row = [math.nan] * (DIVERGED_AFTER - 1)
    events, _ = race(recipe(), Plan(steps=20), a=[*row, 1.0, *row, 1.0], b=[])
    assert of(events, "stopped") == []


def test_an_exhausted_loss_scale_is_divergence(recipe):
    events, _ = race(recipe(), Plan(steps=5), a=[1.0, LossScaleExhausted("at the floor")], b=[])
    [stopped] = of(events, "stopped")
    assert (stopped["status"], stopped["step"]) == ("diverged", 1)
    assert stopped["reason"] == "at the floor"


def test_an_exception_takes_one_policy_out_with_its_reason(recipe):
    error = RuntimeError("not implemented for 'Half'")
    events, _ = race(recipe(), Plan(steps=5), a=[], b=[error])
    [stopped] = of(events, "stopped")
    assert (stopped["policy"], stopped["status"], stopped["step"]) == ("b", "failed", 0)
    assert "RuntimeError: not implemented for 'Half'" in stopped["reason"]
    assert sum(e["policy"] == "a" for e in of(events, "step")) == 5


def test_an_exception_in_an_evaluation_takes_one_policy_out(recipe):
    broken = Fake(metrics=ZeroDivisionError("division by zero"))
    events, _ = race(recipe(), Plan(steps=2), a=[], b=broken)
    assert [e["policy"] for e in of(events, "stopped")] == ["b"]
    assert {e["policy"] for e in of(events, "step")} == {"a"}


def test_when_no_policy_gets_through_the_first_step_the_recipe_is_at_fault(recipe):
    broken = ValueError("shapes")
    with pytest.raises(RecipeError, match=r"no policy got through .* ValueError: shapes"):
        race(recipe(), Plan(steps=5), a=[broken], b=[broken])


def test_a_recipe_error_is_nobodys_divergence(recipe):
    with pytest.raises(RecipeError, match="returned None"):
        race(recipe(), Plan(steps=5), a=[RecipeError("loss returned None")], b=[])


def test_ctrl_c_is_not_swallowed(recipe):
    with pytest.raises(KeyboardInterrupt):
        race(recipe(), Plan(steps=5), a=[1.0, KeyboardInterrupt()], b=[])


def test_the_race_ends_when_everyone_is_out(recipe):
    late = RuntimeError("later")
    events, log = race(recipe(), Plan(steps=50), a=[1.0, late], b=[1.0, 1.0, late])
    assert len(of(events, "stopped")) == 2
    assert len(log) == 5


def test_evaluations_come_first_at_intervals_and_last(recipe):
    events, _ = race(recipe(), Plan(steps=16), a=[])
    assert [e["step"] for e in of(events, "evaluation")] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert of(events, "evaluation")[0]["metrics"] == {"m": 1.0}
    assert of(events, "evaluation")[0]["examples"] == 10


def test_by_epochs_it_evaluates_at_the_end_of_each(recipe):
    events, _ = race(recipe(), Plan(epochs=3), a=[])
    assert [e["step"] for e in of(events, "evaluation")] == [0, 3, 6, 9]
    assert len(of(events, "step")) == 9


def test_steps_go_on_over_epochs_with_new_batches(recipe):
    _, log = race(recipe(), Plan(steps=5), a=[])
    sums = [batch for _, batch, _ in log]
    assert len(set(sums)) == 5
    _, again = race(recipe(), Plan(steps=5), a=[])
    assert [batch for _, batch, _ in again] == sums
    _, other = race(recipe(), Plan(steps=5, seed=1), a=[])
    assert not set(sums) & {batch for _, batch, _ in other}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return []", "gave no batch"),
        ("return None", "NoneType"),
        ("raise OSError('no data')", "OSError: no data"),
    ],
)
def test_batches_that_give_none_are_the_recipes_fault(recipe, body, said):
    broken = recipe(f"def batches(epoch, seed): {body}")
    with pytest.raises(RecipeError, match=said) as error:
        race(broken, Plan(steps=5), a=[])
    assert str(broken.file) in str(error.value)


@pytest.mark.parametrize(
    ("constants", "given", "plan"),
    [
        ("STEPS = 4", {}, Plan(steps=4)),
        ("STEPS = 4", {"steps": 9}, Plan(steps=9)),
        ("STEPS = 4", {"epochs": 2}, Plan(epochs=2)),
        ("STEPS = None; EPOCHS = 3", {}, Plan(epochs=3)),
        ("STEPS = None", {}, Plan(epochs=1)),
    ],
)
def test_the_command_goes_before_the_recipe(recipe, constants, given, plan):
    assert plan_for(recipe(constants), **given) == plan
