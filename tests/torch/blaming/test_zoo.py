"""The first producer is named in every planted fault, and nobody is blamed where all is well."""

import pytest

from halfstep.torch import blame

pytestmark = [
    # planted: the variance of one value
    pytest.mark.filterwarnings("ignore:var... degrees of freedom:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*loss_type=None:UserWarning"),
]


def test_the_first_producer_is_named(fault, policy):
    # with its cure, which replays the step several times, in float16 only: that is slow enough
    found = blame(
        fault.prepare(policy),
        fault.loss_fn,
        fault.batch(0),
        loss_scale=fault.loss_scale,
        prove=policy == "mixed_float16",
    )

    assert found is not None
    assert found.path == fault.path
    assert fault.operation in found.operation
    assert found.direction == fault.direction
    if policy == "mixed_float16":
        assert all(words in f"{found.cause} {found.cure}" for words in fault.says)
        assert set(found.layers) == set(fault.float32_layers)
    assert found.cure


def test_what_rounding_broke_is_whole_in_float32(rounded):
    found = blame(
        rounded.prepare("float32"),
        rounded.loss_fn,
        rounded.batch(0),
        loss_scale=rounded.loss_scale,
    )

    assert found is None


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_nobody_is_blamed_without_a_fault(healthy, precision):
    assert blame(healthy.prepare(precision), healthy.loss_fn, healthy.batch()) is None


def test_there_are_enough_of_both(zoo):
    assert len(zoo.FAULTS) >= 18
    assert len({fault.operation for fault in zoo.FAULTS}) >= 12
