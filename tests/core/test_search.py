"""The search for what must be kept, on oracles whose answer is known."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.search import Found, most_trials, smallest_kept


def layers(count):
    return [f"layer{i}" for i in range(count)]


class Oracle:
    """A monotone trial that counts, and refuses to be asked the same twice."""

    def __init__(self, goes_well):
        self.goes_well, self.seen = goes_well, []

    def __call__(self, kept):
        assert kept not in self.seen
        self.seen.append(kept)
        return self.goes_well(kept)


@st.composite
def planted(draw):
    ranked = draw(st.permutations(layers(draw(st.integers(1, 300)))))
    guilty = draw(st.sets(st.sampled_from(ranked), max_size=6))
    return ranked, guilty


@given(planted(), st.booleans())
def test_it_finds_what_was_planted_and_only_that_in_few_trials(case, all_goes_well):
    ranked, guilty = case
    trial = Oracle(lambda kept: guilty <= kept)
    found = smallest_kept(trial, ranked, all_goes_well=all_goes_well)
    assert set(found.kept) == guilty
    assert len(found.kept) == len(guilty)
    assert found.enough
    assert found.trials == len(trial.seen) <= most_trials(len(guilty), len(ranked))


@st.composite
def clauses(draw):
    """Monotone in general: of every clause at least one must be kept."""
    names = layers(draw(st.integers(1, 12)))
    one = st.sets(st.sampled_from(names), min_size=1)
    return names, draw(st.lists(one, max_size=4))


@given(clauses())
def test_nothing_can_be_left_out_whatever_the_monotone_oracle(case):
    names, wanted = case

    def goes_well(kept):
        return all(clause & kept for clause in wanted)

    found = smallest_kept(Oracle(goes_well), names)
    kept = frozenset(found.kept)
    assert goes_well(kept)
    assert not any(goes_well(kept - {name}) for name in kept)
    assert found.trials <= most_trials(len(kept), len(names))


@given(clauses())
def test_where_one_set_is_inside_every_other_that_goes_well_it_is_found(case):
    names, wanted = case
    good = [
        frozenset(chosen)
        for size in range(len(names) + 1)
        for chosen in combinations(names, size)
        if all(clause & frozenset(chosen) for clause in wanted)
    ]
    least = frozenset.intersection(*good)
    if least in good:
        found = smallest_kept(lambda kept: kept in good, names)
        assert frozenset(found.kept) == least


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_with_nothing_to_keep_there_is_one_trial(count):
    assert smallest_kept(lambda kept: True, layers(count)) == Found((), True, 1)


def test_a_guilty_layer_that_was_ranked_first_is_found_in_two_trials():
    found = smallest_kept(lambda kept: "layer0" in kept, layers(300), all_goes_well=True)
    assert found == Found(("layer0",), True, 2)


def test_where_keeping_everything_goes_wrong_too_that_is_said_after_two_trials():
    assert smallest_kept(lambda kept: False, layers(40)) == Found((), False, 2)


def test_without_any_candidate_there_is_nothing_to_search():
    assert smallest_kept(lambda kept: False, []) == Found((), False, 1)


def test_what_is_known_to_be_needed_stays_and_is_the_start():
    trial = Oracle(lambda kept: {"layer3", "layer9"} <= kept)
    found = smallest_kept(trial, layers(16), kept=["layer3"], all_goes_well=True)
    assert found.kept == ("layer3", "layer9")
    assert all("layer3" in kept for kept in trial.seen)


def test_of_two_that_either_help_the_one_ranked_first_is_kept():
    found = smallest_kept(lambda kept: bool({"layer2", "layer5"} & kept), layers(8))
    assert found.kept == ("layer2",)


def test_a_repeated_name_is_one_candidate():
    found = smallest_kept(lambda kept: "layer1" in kept, ["layer1", "layer1", "layer0"])
    assert found.kept == ("layer1",)
