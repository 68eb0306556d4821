"""The loss-scale rule against a slow reference in plain Python, in every array library."""

from __future__ import annotations

import json
import math
import pickle
import struct
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep import DynamicLossScale, FixedLossScale, LossScaleError, LossScaleState, NoLossScale
from halfstep.core.loss_scale import as_loss_scale, loss_scale_from_config

# a busy machine must not fail a test
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def float32(x: float) -> float:
    """Round a Python float to float32 by way of its bytes."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


@dataclass
class Reference:
    """The rule as the design states it, one `if` after the other, with plain numbers."""

    rule: DynamicLossScale
    scale: float
    good: int = 0
    bad: int = 0
    skipped: int = 0

    def step(self, finite: bool) -> None:
        if finite:
            self.bad = 0
            self.good += 1
            if self.good == self.rule.growth_interval:
                self.good = 0
                self.scale = min(float32(self.scale * self.rule.growth_factor), self.rule.max_scale)
            return
        self.good = 0
        self.bad += 1
        self.skipped += 1
        if self.bad >= self.rule.hysteresis:
            self.scale = max(float32(self.scale * self.rule.backoff_factor), self.rule.min_scale)

    @property
    def values(self) -> tuple[float, ...]:
        return (self.scale, self.good, self.bad, self.skipped)


def trace(rule: DynamicLossScale, steps: list[bool]) -> list[tuple[float, ...]]:
    reference, found = Reference(rule, rule.initial_scale), []
    for finite in steps:
        reference.step(finite)
        found.append(reference.values)
    return found


def numbers(state: LossScaleState) -> tuple[float, ...]:
    return tuple(float(value) for value in state)


@st.composite
def rules(draw: st.DrawFn) -> DynamicLossScale:
    def scale(low: float, high: float) -> float:
        return float32(2.0 ** draw(st.floats(math.log2(low), math.log2(high))))

    low = draw(st.sampled_from([2.0**-126, 1e-3, 1.0, 3.0]) | st.just(scale(2.0**-126, 2.0**20)))
    high = max(low, draw(st.sampled_from([low, 2.0**24, 2.0**120])))
    first = min(max(scale(2.0**-126, 2.0**120), low), high)
    return DynamicLossScale(
        initial_scale=first,
        growth_interval=draw(st.sampled_from([1, 2, 3, 7, 50])),
        growth_factor=draw(st.sampled_from([2.0, 1.5, 1.001, 100.0])),
        backoff_factor=draw(st.sampled_from([0.5, 0.9, 0.3, 0.999, 1e-6])),
        hysteresis=draw(st.sampled_from([1, 2, 3, 10])),
        min_scale=low,
        max_scale=high,
    )


runs = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12)
steps_strategy = runs.map(lambda parts: [finite for finite, count in parts for _ in range(count)])


@settings(UNTIMED, max_examples=300)
@given(rules(), steps_strategy, st.sampled_from([bool, np.bool_, np.array]))
def test_numpy_agrees_with_the_reference_and_keeps_its_limits(rule, steps, flag):
    state = rule.init()
    for finite, expected in zip(steps, trace(rule, steps), strict=True):
        state = rule.update(state, flag(finite))
        assert numbers(state) == expected
        assert rule.min_scale <= state.scale <= rule.max_scale
        assert 0 < state.scale < math.inf
        assert all(np.asarray(value).dtype == np.float32 for value in state)


@settings(UNTIMED, max_examples=25)
@given(rules(), steps_strategy)
def test_torch_agrees_with_the_reference(rule, steps):
    state = rule.init(torch.tensor)
    for finite, expected in zip(steps, trace(rule, steps), strict=True):
        state = rule.update(state, torch.tensor(finite))
        assert numbers(state) == expected


@settings(UNTIMED, max_examples=30)
@given(rules(), steps_strategy)
def test_jax_agrees_with_the_reference_under_jit_and_scan(rule, steps):
    @jax.jit
    def run(finites):
        def body(state, finite):
            state = rule.update(state, finite)
            return state, state

        return jax.lax.scan(body, rule.init(jnp.float32), finites)[1]

    history = run(jnp.array(steps, bool))
    found = list(zip(*(np.asarray(field).tolist() for field in history), strict=True))
    assert found == trace(rule, steps)


MIX = [True] * 7 + [False] * 3 + [True] * 5 + [False] + [True] * 9 + [False] * 30 + [True] * 4


@pytest.mark.parametrize("rule", [DynamicLossScale(growth_interval=3, hysteresis=2),
                                  FixedLossScale(1024), NoLossScale()])  # fmt: skip
def test_the_three_array_libraries_give_the_same_numbers(rule):
    states = [rule.init(make) for make in (np.float32, torch.tensor, jnp.float32)]
    update = jax.jit(rule.update)
    for finite in MIX:
        states = [
            rule.update(states[0], np.bool_(finite)),
            rule.update(states[1], torch.tensor(finite)),
            update(states[2], jnp.array(finite)),
        ]
        assert numbers(states[0]) == numbers(states[1]) == numbers(states[2])
        flags = [bool(rule.exhausted(state)) for state in states]
        assert flags[0] == flags[1] == flags[2]


# ---------------------------------------------------------------- the rule, point by point


def after(rule, steps, state=None):
    state = rule.init() if state is None else state
    for finite in steps:
        state = rule.update(state, finite)
    return state


def test_the_defaults_are_those_of_the_design():
    assert DynamicLossScale() == DynamicLossScale(
        initial_scale=2.0**15,
        growth_interval=2000,
        growth_factor=2.0,
        backoff_factor=0.5,
        hysteresis=1,
        min_scale=1.0,
        max_scale=2.0**24,
    )


def test_it_grows_after_exactly_growth_interval_finite_steps_and_counts_anew():
    rule = DynamicLossScale(growth_interval=2000)
    state = after(rule, [True] * 1999)
    assert numbers(state) == (2.0**15, 1999, 0, 0)
    state = after(rule, [True], state)
    assert numbers(state) == (2.0**16, 0, 0, 0)
    assert numbers(after(rule, [True] * 1999, state)) == (2.0**16, 1999, 0, 0)


def test_a_bad_step_starts_the_count_anew():
    rule = DynamicLossScale(growth_interval=3, initial_scale=8)
    assert after(rule, [True, True, False, True, True]).scale == 4
    assert after(rule, [True, True, False, True, True, True]).scale == 8


def test_hundreds_of_bad_steps_stay_at_the_floor_and_recover():
    rule = DynamicLossScale(growth_interval=10)
    state = after(rule, [False] * 500)
    assert numbers(state) == (1.0, 0, 500, 500)
    assert after(rule, [True] * 10, state).scale == 2


def test_thousands_of_finite_steps_stay_at_the_ceiling():
    rule = DynamicLossScale(growth_interval=1)
    state = after(rule, [True] * 500)
    assert state.scale == 2.0**24
    assert after(rule, [False], state).scale == 2.0**23


def test_hysteresis_tolerates_bad_steps_in_a_row_but_not_one_more():
    rule = DynamicLossScale(initial_scale=64, hysteresis=3)
    assert after(rule, [False, False]).scale == 64
    assert after(rule, [False, False, True, False, False]).scale == 64
    assert after(rule, [False, False, False]).scale == 32
    assert after(rule, [False] * 5).scale == 8  # every further one in the row
    assert after(rule, [False] * 5).skipped_steps == 5


def test_every_bad_step_is_counted_as_skipped():
    for rule in (DynamicLossScale(), FixedLossScale(8)):
        assert after(rule, [True, False, True, False, False]).skipped_steps == 3


def test_a_floor_that_is_no_power_of_the_factor_is_met_exactly():
    rule = DynamicLossScale(initial_scale=100, min_scale=0.1, max_scale=1000.1, growth_interval=1)
    assert after(rule, [False] * 50).scale == np.float32(0.1) == rule.min_scale
    assert after(rule, [True] * 50).scale == np.float32(1000.1) == rule.max_scale


def test_exhausted_needs_the_floor_and_patience():
    rule = DynamicLossScale(initial_scale=4, patience=3)
    flags = []
    state = rule.init()
    for _ in range(5):
        state = rule.update(state, False)
        flags.append(bool(rule.exhausted(state)))
    assert flags == [False, False, True, True, True]
    assert not rule.exhausted(rule.update(state, True))
    assert not DynamicLossScale(patience=3).exhausted(after(DynamicLossScale(), [False] * 5))


def test_a_fixed_scale_stays_skips_and_is_exhausted_by_patience():
    rule = FixedLossScale(1024, patience=2)
    state = after(rule, [True, True, False])
    assert numbers(state) == (1024, 0, 1, 1)
    assert not rule.exhausted(state)
    assert rule.exhausted(after(rule, [False], state))
    assert rule.skips


def test_no_loss_scale_does_nothing():
    rule = NoLossScale()
    state = after(rule, MIX)
    assert numbers(state) == (1, 0, 0, 0)
    assert not rule.exhausted(state)
    assert not rule.skips


# ---------------------------------------------------------------- torch, on the device


class Ops(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [DynamicLossScale(growth_interval=2, hysteresis=2),
                                  FixedLossScale(8), NoLossScale()])  # fmt: skip
def test_an_update_reads_nothing_on_the_host(rule):
    state = rule.init(lambda x: torch.tensor(x))
    flags = [torch.tensor(finite) for finite in MIX]
    with Ops() as ops:
        for finite in flags:
            state = rule.update(state, finite)
            rule.exhausted(state)
    assert not [n for n in ops.names if "_local_scalar_dense" in n or "_to_copy" in n]
    with Ops() as control:
        float(state.scale)
    assert "aten._local_scalar_dense.default" in control.names


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_tensors_keep_device_and_dtype(device, dtype):
    # a meta tensor has no data: a read on the host, or a move, would raise
    rule = DynamicLossScale(growth_interval=1, hysteresis=2)
    state = rule.init(lambda x: torch.tensor(x, device=device, dtype=dtype))
    finite = torch.tensor(True, device=device)
    for new in (rule.update(state, finite), rule.update(rule.update(state, finite), finite)):
        assert all(field.device.type == device for field in new)
        assert all(field.dtype == dtype and field.shape == () for field in new)


def test_update_changes_nothing_in_place():
    rule = DynamicLossScale(growth_interval=1)
    state = rule.init(torch.tensor)
    before = [(id(field), field._version, float(field)) for field in state]
    rule.update(state, torch.tensor(True))
    rule.update(state, torch.tensor(False))
    assert [(id(field), field._version, float(field)) for field in state] == before


def test_update_traces_whole_under_torch_compile():
    rule = DynamicLossScale(growth_interval=2)
    compiled = torch.compile(rule.update, fullgraph=True, backend="eager")
    one = two = rule.init(torch.tensor)
    for finite in MIX:
        one, two = compiled(one, torch.tensor(finite)), rule.update(two, torch.tensor(finite))
        assert numbers(one) == numbers(two)


def test_a_state_survives_jit_with_every_field():
    rule = DynamicLossScale(initial_scale=4, growth_interval=2, min_scale=2)
    state = jax.jit(lambda s: s)(rule.init(jnp.float32))
    assert isinstance(state, LossScaleState)
    for _ in range(5):
        state = jax.jit(rule.update)(state, jnp.array(False))
    assert numbers(state) == (2, 0, 5, 5)


# ---------------------------------------------------------------- configuration

ALL = [DynamicLossScale(), DynamicLossScale(8, 3, 1.5, 0.1, 2, 0.1, 64, 5),
       FixedLossScale(1024), FixedLossScale(0.1, patience=2), NoLossScale()]  # fmt: skip


@pytest.mark.parametrize("rule", ALL, ids=repr)
def test_config_pickle_and_hash_round_trip(rule):
    again = loss_scale_from_config(json.loads(json.dumps(rule.get_config())))
    assert again == rule == pickle.loads(pickle.dumps(rule))
    assert hash(again) == hash(rule)
    assert type(again) is type(rule)


def test_different_rules_differ():
    assert len(set(ALL)) == len(ALL)


@settings(UNTIMED)
@given(rules())
def test_any_rule_round_trips(rule):
    assert loss_scale_from_config(json.loads(json.dumps(rule.get_config()))) == rule


@pytest.mark.parametrize(
    "config", [{}, {"kind": "dynamo"}, {"kind": "fixed"}, {"kind": "none", "value": 1}]
)
def test_a_config_that_is_none_is_refused(config):
    with pytest.raises(LossScaleError, match="loss_scale_from_config"):
        loss_scale_from_config(config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"initial_scale": 0}, "min_scale=1.0 to max_scale"),
        ({"initial_scale": -1}, "min_scale=1.0 to max_scale"),
        ({"initial_scale": 2.0**25}, "max_scale=16777216.0"),
        ({"initial_scale": math.nan}, "nan"),
        ({"initial_scale": "8"}, "'8'.*a number"),
        ({"growth_interval": 0}, "whole number"),
        ({"growth_interval": 2.5}, "whole number"),
        ({"growth_interval": math.inf}, "whole number"),
        ({"growth_interval": math.nan}, "whole number"),
        ({"growth_interval": 2**24 + 1}, "from 1 to"),
        ({"growth_factor": 1}, "above 1"),
        ({"growth_factor": 0.5}, "above 1"),
        ({"growth_factor": math.inf}, "above 1"),
        ({"growth_factor": 1e38}, "at most"),
        ({"backoff_factor": 0}, "above 0 and below 1"),
        ({"backoff_factor": 1}, "above 0 and below 1"),
        ({"hysteresis": 0}, "whole number"),
        ({"hysteresis": True}, "whole number"),
        ({"min_scale": 0}, "at least"),
        ({"min_scale": -1}, "at least"),
        ({"min_scale": 1e-40}, "at least"),
        ({"max_scale": math.inf}, "from min_scale=1.0"),
        ({"max_scale": 1e300}, "from min_scale=1.0"),
        ({"max_scale": 10**400}, "from min_scale=1.0"),
        ({"max_scale": 0.5}, "from min_scale=1.0"),
        ({"patience": 0}, "whole number"),
    ],
)
def test_a_dynamic_rule_that_cannot_work_is_refused(arguments, words):
    (name,) = arguments
    with pytest.raises(LossScaleError, match=rf"DynamicLossScale\({name}=.*{words}"):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize("value", [0, -8, math.inf, math.nan, 1e-40, 10**400, "8", None, True])
def test_a_fixed_scale_that_cannot_work_is_refused(value):
    with pytest.raises(LossScaleError, match="positive number"):
        FixedLossScale(value)


@pytest.mark.parametrize("patience", [0, 1.5, "x", math.inf])
def test_a_patience_that_is_none_is_refused(patience):
    with pytest.raises(LossScaleError, match="patience"):
        FixedLossScale(8, patience=patience)


def test_what_stands_for_a_loss_scale():
    assert as_loss_scale("dynamic") == DynamicLossScale()
    assert (
        as_loss_scale(8) == as_loss_scale(8.0) == as_loss_scale(np.float32(8)) == FixedLossScale(8)
    )
    assert as_loss_scale(None) == NoLossScale()
    assert as_loss_scale(NoLossScale()) == NoLossScale()
    for wrong in ("static", [8], True, np.ones(2)):
        with pytest.raises(LossScaleError, match="must be 'dynamic', a positive number"):
            as_loss_scale(wrong)


def test_a_rule_is_frozen():
    with pytest.raises(AttributeError):
        DynamicLossScale().initial_scale = 1
