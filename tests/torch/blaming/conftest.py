"""The zoos of the benchmarks, which are no package of the tests: loaded by their paths."""

import importlib.util
import sys
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"halfstep_{name}", _BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc):
    if {"fault", "policy"} <= set(metafunc.fixturenames):
        pairs = [(f, policy) for f in _load("fault_zoo").FAULTS for policy in f.policies]
        ids = [f"{fault.name}-{policy}" for fault, policy in pairs]
        metafunc.parametrize(("fault", "policy"), pairs, ids=ids)
    elif "rounded" in metafunc.fixturenames:
        faults = [f for f in _load("fault_zoo").FAULTS if "float32" not in f.policies]
        metafunc.parametrize("rounded", faults, ids=lambda fault: fault.name)
    elif "healthy" in metafunc.fixturenames:
        models = _load("healthy_zoo").HEALTHY
        metafunc.parametrize("healthy", models, ids=lambda model: model.name)


@pytest.fixture(scope="session")
def zoo():
    """The faults by name, and what makes them."""
    return _load("fault_zoo")


@pytest.fixture(scope="session")
def fault_named(zoo):
    return {fault.name: fault for fault in zoo.FAULTS}.__getitem__
