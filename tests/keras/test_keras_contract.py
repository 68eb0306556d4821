"""Keras' own tests of its policies: with this door in place, and with ours instead of theirs."""

from __future__ import annotations

import importlib
import unittest

import pytest

from halfstep.keras import Policy

POLICY_TEST = importlib.import_module("keras.src.dtype_policies.dtype_policy_test")
MAP_TEST = importlib.import_module("keras.src.dtype_policies.dtype_policy_map_test")
LAYER_TEST = importlib.import_module("keras.src.layers.layer_test")


def cases(*modules, about=""):
    """Every test method of Keras' test modules whose name speaks of something."""
    loader = unittest.TestLoader()
    return [
        pytest.param(value, name, id=f"{value.__name__}.{name}")
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
        if value.__module__ == module.__name__
        for name in loader.getTestCaseNames(value)
        if any(word in name for word in about.split("|"))
    ]


def run(case, name):
    try:
        case(name).debug()
    except unittest.SkipTest as reason:
        pytest.skip(str(reason))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "name"), cases(POLICY_TEST, MAP_TEST))
def test_their_policies_do_as_ever(case, name):
    run(case, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "name"), cases(LAYER_TEST, about="dtype|autocast|mixed|policy|build|tracker")
)
def test_their_layers_do_as_ever(case, name):
    run(case, name)


DIFFERENT = {
    "test_repr": "ours shows its loss scale",
    "test_python_serialization": "it compares by what theirs prints",
    "test_get_config_from_config": "ours says what to import",
    "test_properties_uint8": "an integer is no precision to train in",
}
"""What their tests of a policy ask for that ours does otherwise, on purpose."""


OURS = [
    one
    for one in cases(POLICY_TEST)
    if one.values[0] is POLICY_TEST.DTypePolicyTest and one.values[1] not in DIFFERENT
]


@pytest.mark.parametrize(("case", "name"), OURS)
def test_our_policy_does_what_their_tests_of_theirs_say(case, name, monkeypatch):
    monkeypatch.setattr(POLICY_TEST, "DTypePolicy", Policy)
    monkeypatch.setattr(POLICY_TEST, "FloatDTypePolicy", Policy)
    run(case, name)


def test_what_ours_does_otherwise_is_in_their_tests_still():
    names = {one.values[1] for one in cases(POLICY_TEST)}
    assert set(DIFFERENT) <= names
