"""Each rule says its cause, and only where it holds."""

import math

import pytest

from halfstep import Fault, TensorFacts
from halfstep.core.causes import batch_reason, explain, parameter_reason
from halfstep.core.evidence import Evidence

NAN = math.nan


def facts(low=1.0, high=1.0, *, zeros=0, inf=0, nan=0, shape=(10,), name="", dtype="float16"):
    nearest = NAN if low == high == 0 else 1e-3
    return TensorFacts(name, shape, dtype, low, high, nearest, zeros, inf, nan)


INFINITE, NOT_A_NUMBER = facts(inf=3), facts(nan=3)


def evidence(operation, *inputs, kind="infinity", **more):
    output = {"infinity": INFINITE, "NaN": NOT_A_NUMBER, "zero": facts(0, 0, zeros=10)}[kind]
    more = {"node": "", "direction": "forward", "dtype": "float16"} | more
    return Evidence(operation, kind=kind, inputs=inputs, output=output, **more)


ONES, ZEROS, WIDE = facts(), facts(0.0, 0.0, zeros=10), facts(-2.0, 3.0)
LARGE = facts(0.0, 1e6, dtype="float32")
MASK = facts(-3.4e38, 0.0, zeros=5)

CASES = [
    # what was seen, what the cause must say, whether another precision is the cure
    (
        evidence("bmm", ONES, ONES, wider=LARGE),
        "as large as 1e+06, and float16 ends at 65504",
        True,
    ),
    (evidence("to_copy", LARGE, wider=LARGE), "a value of 1e+06 is cast to float16", True),
    (evidence("to_copy", MASK, wider=MASK, constant=True), "a mask's constant of 3.4e+38", True),
    (evidence("to_copy", MASK, wider=MASK), "a value of 3.4e+38 is cast to float16", True),
    (evidence("var", ONES, wider=ONES), "overflows on the way in float16", True),
    (
        evidence("div", ZEROS, ZEROS, kind="NaN", epsilon=1e-8),
        "an epsilon of 1e-08 is 0 in float16, whose smallest number is 5.96e-08",
        True,
    ),
    (evidence("div", ONES, ZEROS), "a division by 0", False),
    (evidence("div", ZEROS, ZEROS, kind="NaN"), "0/0", False),
    (evidence("rsqrt", ZEROS), "a division by 0", False),
    (evidence("log", ZEROS), "log of 0", False),
    (evidence("log", WIDE, kind="NaN"), "log of a negative number (-2)", False),
    (evidence("log1p", facts(-1.0, 0.0)), "log1p of -1", False),
    (evidence("div", ONES, ZEROS, node="fn", direction="backward"), "a division by 0", False),
    (evidence("sqrt", WIDE, kind="NaN"), "sqrt of -2, outside of where it is defined", False),
    (evidence("logit", facts(0.5, 2.0), kind="NaN"), "logit of 2, outside of where", False),
    (evidence("logit", facts(0.5, 1.0)), "logit of 1 is infinite", False),
    (evidence("atanh", facts(-1.0, 0.5)), "atanh of -1 is infinite", False),
    (evidence("pow", WIDE, kind="NaN", constants=(-0.5,)), "pow of a negative number (-2)", False),
    (evidence("pow", ZEROS, constants=(-0.5,)), "a negative exponent is a division by 0", False),
    (evidence("acos", WIDE, kind="NaN"), "acos of -2, outside of where it is defined", False),
    (evidence("mul", ONES, kind="NaN", constants=(NAN,)), "called with the number NaN", False),
    (
        evidence("div", ONES, ZEROS, node="sqrt", direction="backward"),
        "the derivative of sqrt at 0",
        False,
    ),
    (
        evidence("_softmax", facts(inf=10), kind="NaN", wider=NOT_A_NUMBER),
        "a row is masked whole",
        False,
    ),
    (evidence("nll_loss_forward", ONES, kind="NaN"), "every target is ignored", False),
    (evidence("nll_loss_forward", INFINITE), "a target's class has probability 0", False),
    (evidence("mean", facts(NAN, NAN, shape=(0,)), kind="NaN"), "mean of no values is 0/0", False),
    (evidence("var", ONES, kind="NaN"), "var of one value", False),
    (evidence("sub", INFINITE, INFINITE, kind="NaN"), "sub met an infinity", False),
    (
        evidence("mul", facts(1e-9, 1e-8), kind="zero", wider=facts(1e-10, 1e-9)),
        "below 5.96e-08, the smallest number of float16 (the largest would be 1e-09)",
        True,
    ),
    (evidence("strange", ONES, wider=INFINITE), "a wider format gives the same", False),
]


@pytest.mark.parametrize(("seen", "says", "rounding"), CASES, ids=[case[1] for case in CASES])
def test_a_rule_says_its_cause(seen, says, rounding):
    reason = explain(seen)

    assert says in reason.cause
    assert reason.rounding is rounding
    assert reason.cure or reason.rounding


def test_an_epsilon_is_no_cause_where_nothing_is_zero():
    seen = evidence("div", ONES, ONES, epsilon=1e-8, wider=LARGE)
    assert "epsilon" not in explain(seen).cause


def test_what_came_in_broken_is_counted():
    assert "NaN: 2 of 10 values of batch[0]" in batch_reason(facts(nan=2, name="batch[0]")).cause
    assert "infinities: 3 of 10" in batch_reason(facts(inf=3, name="x")).cause
    assert (
        "head.weight is not finite already"
        in parameter_reason(facts(inf=1, name="head.weight")).cause
    )


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        (facts(0.0, 2.0, zeros=3, name="x"), "x (10,) float16, from 0 to 2, 3 of 10 zero"),
        (facts(0.0, 0.0, zeros=10), "(10,) float16, all 0"),
        (facts(4.0, 4.0, inf=1, nan=2), "(10,) float16, else 4, 1 of 10 infinite, 2 of 10 NaN"),
        (facts(NAN, NAN, nan=10), "(10,) float16, 10 of 10 NaN"),
        (facts(NAN, NAN, shape=(0, 3)), "(0, 3) float16, empty"),
    ],
)
def test_a_tensor_is_described_in_one_line(given, printed):
    assert str(given) == printed


def test_a_fault_prints_whole_and_no_wider_than_a_terminal():
    fault = Fault(
        "blocks.1", "bmm", "forward", "infinity", "the cause " * 12, "the cure",
        proof="it helped", place="blocks.1 (Attention)", dtype="float16", limit=65504.0,
        inputs=(facts(name="self"),), output=INFINITE, source="model.py:3, in forward: a @ b",
        reached=("the loss", *[f"the gradient of w{i}" for i in range(40)]),
    )  # fmt: skip
    lines = str(fault).splitlines()

    assert lines[0] == "blocks.1 (Attention) made an infinity in the forward pass."
    labels = [line.split()[0] for line in lines[1:] if not line.startswith(" " * 13)]
    assert labels == [
        "operation", "line", "input", "output", "cause", "cure", "replayed", "reached",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 92
    assert "the loss, 40 gradients (w0 and others)" in lines[-1]


def test_what_was_broken_before_says_so():
    fault = Fault("", "batch", "forward", "NaN", "a", "b", place="The batch")
    assert str(fault).startswith("The batch was not finite before the step began.")
