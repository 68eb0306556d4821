"""Running eagerly for a while, by several at once."""

import gc

import pytest
from torch._dynamo import eval_frame

from halfstep.torch.eager import eagerly


def stance():
    return eval_frame._stance.stance


@pytest.fixture(autouse=True)
def nobody_before():
    assert stance() == "default"
    yield
    assert stance() == "default"


def test_it_lasts_until_the_last_one_ends_in_any_order():
    one = eagerly()
    assert stance() == "force_eager"
    other = eagerly()
    one.__exit__(None, None, None)
    assert stance() == "force_eager"
    other.__exit__(None, None, None)
    assert stance() == "default"


def test_an_end_counts_once():
    with eagerly() as _:
        once = eagerly()
        once.__exit__(None, None, None)
        once.__exit__(None, None, None)
        assert stance() == "force_eager"


def test_what_is_forgotten_ends():
    forgotten = eagerly()
    assert stance() == "force_eager"
    del forgotten
    gc.collect()
    assert stance() == "default"
