"""What is run to find and to prove a policy, with a trainer that only pretends."""

import json
import math

import pytest

from halfstep import AdviceError, Policy, PolicyMap
from halfstep.core.tuning import KeptLayer, Losses, Proof, Trial, Tuning, find_kept, most_runs

BASELINE = tuple(2.0 / (1 + step) for step in range(20))
LAYERS = [f"layer{i}" for i in range(40)]


class Pretender:
    """Goes wrong unless what is guilty on a seed is kept."""

    def __init__(self, guilty, off=2.0, noise=0.0, baseline=BASELINE):
        self.guilty, self.off, self.noise_of, self.losses = guilty, off, noise, baseline
        self.calls = []

    def baseline(self, seed):
        self.calls.append(("baseline", seed))
        return Losses(self.losses)

    def noise(self, seed):
        self.calls.append(("noise", seed))
        return Losses(tuple(loss * (1 + self.noise_of) for loss in self.losses))

    def low(self, kept, seed):
        self.calls.append((kept, seed))
        if self.guilty(seed) <= kept:
            return Losses(self.losses)
        if math.isinf(self.off):
            return Losses((math.nan,), reason="RuntimeError: no")
        return Losses(tuple(loss * self.off for loss in self.losses))


def run(trainer, seeds=(0, 1), ranked=LAYERS):
    proof = Proof(trainer)
    return find_kept(proof, ranked, seeds), proof


def count(proof, purpose):
    return sum(trial.purpose == purpose for trial in proof.trials)


def test_a_healthy_model_needs_nothing_after_one_run_and_one_on_the_other_seed():
    kept, proof = run(Pretender(lambda seed: set()))
    assert kept.needed_on == {}
    assert [(t.purpose, t.kept, t.seed) for t in proof.trials] == [
        ("baseline", None, 0), ("search", (), 0), ("baseline", None, 1), ("second seed", (), 1),
    ]  # fmt: skip


@pytest.mark.parametrize("off", [2.0, math.inf])
@pytest.mark.parametrize(
    "guilty", [{"layer7"}, {"layer0", "layer39"}, {"layer3", "layer4", "layer20"}]
)
def test_what_was_planted_is_found_and_every_claim_is_run_on_the_other_seed(guilty, off):
    kept, proof = run(Pretender(lambda seed: guilty, off))
    assert kept.needed_on == dict.fromkeys(kept.needed_on, (0, 1))
    assert set(kept.needed_on) == guilty
    second = [set(t.kept) for t in proof.trials if t.purpose == "second seed"]
    assert second[0] == guilty
    assert sorted(map(sorted, second[1:])) == sorted(sorted(guilty - {g}) for g in guilty)
    runs = count(proof, "search") + count(proof, "second seed")
    assert runs <= most_runs(len(guilty), len(LAYERS))


def test_what_only_the_second_seed_shows_is_added():
    kept, _ = run(Pretender(lambda seed: {"layer5"} if seed == 0 else {"layer5", "layer9"}))
    assert kept.needed_on == {"layer5": (0, 1), "layer9": (1,)}


def test_what_was_needed_on_one_seed_only_says_so():
    kept, _ = run(Pretender(lambda seed: {"layer5"} if seed == 0 else set()))
    assert kept.needed_on == {"layer5": (0,)}


def test_what_the_second_seed_makes_superfluous_is_dropped():
    class Either(Pretender):
        def low(self, kept, seed):
            enough = {"a", "b"} & kept if seed == 0 else "b" in kept
            return Losses(self.losses if enough else (math.nan,))

    kept, _ = run(Either(None), ranked=["a", "b", "c"])
    assert kept.needed_on == {"b": (0, 1)}


def test_where_keeping_everything_does_not_help_that_is_the_answer_after_two_runs():
    kept, proof = run(Pretender(lambda seed: {"the loss function"}))
    assert kept.needed_on is None
    assert count(proof, "search") == 2


def test_the_noise_is_only_run_for_a_finite_miss_and_once_a_seed():
    _, broken = run(Pretender(lambda seed: {"layer7"}, math.inf))
    assert count(broken, "noise") == 0
    _, off = run(Pretender(lambda seed: {"layer7"}, 1.5))
    assert count(off, "noise") == 2
    # a miss within twice the noise is none
    kept, noisy = run(Pretender(lambda seed: {"layer7"}, 1.5, noise=0.3))
    assert kept.needed_on == {}
    assert count(noisy, "noise") == 2


def test_no_training_is_run_twice():
    trainer = Pretender(lambda seed: {"layer3", "layer30"} if seed else {"layer3"}, 1.5)
    run(trainer)
    assert len(trainer.calls) == len(set(trainer.calls))


@pytest.mark.parametrize(
    ("baseline", "says"), [((1.0, math.nan), "not finite at step 1 of seed 0"), ((), "after 0")]
)
def test_a_training_that_fails_in_float32_is_an_error(baseline, says):
    with pytest.raises(AdviceError, match=says):
        run(Pretender(lambda seed: set(), baseline=baseline))


def tuning(**changed):
    policy = Policy("mixed_float16")
    facts = {
        "target": "mixed_float16", "keep": "float32", "enough": True,
        "layers": (KeptLayer("attn", (0, 1), "9% overflow"), KeptLayer("", (1,))),
        "policy": PolicyMap(policy, {"attn": "float32"}), "loss_scale": 1024.0, "candidates": 12,
        "trials": (Trial("search", (), 0, False, math.inf, 0.01),), "tolerance": 0.01,
        "steps": 50, "seeds": (0, 1),
    }  # fmt: skip
    return Tuning(**{**facts, **changed})


def test_what_was_found_is_printed_with_its_evidence():
    assert str(tuning()).splitlines() == [
        "2 of 12 layers must stay in float32:",
        "(1 search run of 50 steps beside float32's on seed 0, 0 on seed 1; the loss may differ "
        "by 1% of float32's, and by twice its noise.)",
        "  attn: 9% overflow",
        "  (the code of the model itself)",
        "    needed on seed 1 only",
        "Start from a loss scale of 1024.",
    ]
    assert str(tuning(layers=())).startswith("None needed: every one of 12 layers can follow")
    nothing = str(tuning(layers=(), enough=False))
    assert nothing.startswith("Nothing found")
    assert "Start from" not in nothing


def test_what_was_found_is_json_with_a_policy_that_can_be_read_back():
    plain = json.loads(json.dumps(tuning().to_plain(), allow_nan=False))
    assert (plain["format"], plain["version"]) == ("halfstep-tune", 1)
    assert PolicyMap.from_config(plain["policy"]) == tuning().policy
    assert plain["trials"][0]["deviation"] == {"$float": "inf"}
