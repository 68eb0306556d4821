"""Each rule of an audit, on facts that were made up: when it speaks, and when it must not."""

from pathlib import Path

import pytest

from halfstep import AdviceError
from halfstep.core.advice import (
    LOSS,
    RULES,
    Constant,
    Facts,
    Failure,
    Finding,
    Hardware,
    Memory,
    OwnCast,
    Product,
    Range,
    Reduction,
    Report,
    Result,
    Weights,
    advise,
)

DOCS = Path(__file__).parents[2] / "docs"


def found(rule, **facts):
    return list(RULES[rule](Facts("mixed_float16", **facts)))


def constant(value, role="added", dtype="float16", feeds="", operation="add"):
    return Constant("norm", operation, dtype, value, role, "f.py:3", feeds)


# ------------------------------------------------------------------------------- epsilon


@pytest.mark.parametrize(
    ("given", "severity", "says"),
    [
        (constant(1e-8), "warning", "1e-08 is 0 in float16"),
        (constant(1e-8, feeds="rsqrt"), "error", "and rsqrt follows"),
        (constant(1e-8, feeds="div"), "error", "and div follows"),
        (constant(1e-8, role="bound", operation="clamp_min"), "warning", "clamp_min of it"),
        (constant(1e-6, feeds="div"), "warning", "more than float16 can hold"),
        (constant(1 - 1e-7, role="bound"), "warning", "the margin is lost"),
        (constant(1 - 1e-4, role="bound", dtype="bfloat16"), "warning", "is 1 in bfloat16"),
    ],
)
def test_an_epsilon_that_vanishes_is_found(given, severity, says):
    [finding] = found("epsilon", constants=(given,))
    assert finding.severity == severity
    assert says in finding.evidence
    assert "f.py:3" in finding.evidence
    assert "overrides={'norm': 'float32'}" in finding.suggestion


@pytest.mark.parametrize(
    "given",
    [
        constant(1e-8, dtype="float32"),
        constant(1e-8, dtype="bfloat16"),
        constant(1e-4, feeds="div"),
        constant(1e-6, feeds="rsqrt"),
        constant(1e-6, feeds="mul"),
        constant(1e-8, role="factor"),
        constant(0.0),
        constant(1.0, role="bound"),
        constant(0.9, role="bound"),
    ],
)
def test_an_epsilon_that_protects_is_left_alone(given):
    assert found("epsilon", constants=(given,)) == []


# ------------------------------------------------------------------------------- constant


def test_a_constant_past_the_largest_number_is_found():
    [mask] = found("constant", constants=(constant(-1e9, role="fill", operation="where"),))
    assert (mask.severity, mask.place) == ("warning", "norm")
    assert "-1e+09 in where becomes -inf in float16, whose largest number is 65504" in mask.evidence
    assert "finfo" in mask.suggestion
    [large] = found("constant", constants=(constant(1e6),))
    assert large.severity == "error"


@pytest.mark.parametrize(
    "given",
    [
        constant(-1e9, role="fill", dtype="bfloat16"),
        constant(65519.0),  # rounds down to 65504
        constant(1e9, role="factor"),
        constant(float("-inf"), role="fill"),
    ],
)
def test_a_constant_that_fits_or_is_meant_is_left_alone(given):
    assert found("constant", constants=(given,)) == []


# ------------------------------------------------------------------------------- reduction


@pytest.mark.parametrize(
    ("given", "severity", "says"),
    [
        (Reduction("attn", "softmax", "float16", 128, 9.0), "hint", "11 significant bits"),
        (Reduction("attn", "softmax", "float16", 20000, 9.0), "warning", "mean probability"),
        (Reduction(LOSS, "softmax", "bfloat16", 10, 9.0), "warning", "8 significant bits"),
        (Reduction("head", "log_softmax", "float16", 10, 9.0), "warning", "a loss is made of"),
        (Reduction("pool", "sum", "float16", 70000, 1.0), "warning", "at worst"),
        (Reduction("n", "norm", "float16", 10000, 700.0), "warning", "7e+04"),
        (Reduction("n", "var", "float16", 4, 300.0), "warning", "9e+04"),
    ],
)
def test_a_reduction_that_may_not_fit_is_found(given, severity, says):
    [finding] = found("reduction", reductions=(given,))
    assert finding.severity == severity
    assert says in finding.evidence


@pytest.mark.parametrize(
    "given",
    [
        Reduction("pool", "sum", "float16", 60000, 1.0),
        Reduction("pool", "mean", "float16", 10**7, 1.0),
        Reduction("pool", "sum", "float32", 10**7, 1.0),
        Reduction("pool", "sum", "bfloat16", 10**7, 1.0),
        Reduction("attn", "softmax", "float32", 10**6, 1.0),
    ],
)
def test_a_reduction_that_fits_is_left_alone(given):
    assert found("reduction", reductions=(given,)) == []


# ------------------------------------------------------------------------------- overflow


def test_what_overflowed_is_an_error_and_what_came_near_a_warning():
    [lost] = found("overflow", ranges=(Range("a", "bmm", "float16", 6e4, 300.0, lost=2),))
    assert lost.severity == "error"
    assert "made 2 values that are not finite from finite ones up to 300" in lost.evidence
    [near] = found("overflow", ranges=(Range("a", "bmm", "float16", 32752.0, 300.0),))
    assert near.severity == "warning"
    assert "a factor of 2 below" in near.evidence


@pytest.mark.parametrize(
    "given",
    [
        Range("a", "bmm", "float16", 16000.0, 300.0),
        Range("a", "bmm", "bfloat16", 1e30, 1e15),
        Range("a", "bmm", "float32", 1e30, 1e15, lost=1),
    ],
)
def test_a_result_with_room_is_left_alone(given):
    assert found("overflow", ranges=(given,)) == []


# ------------------------------------------------------------------------------- result


def test_an_output_or_a_loss_in_16_bits_is_found():
    [output] = found("result", results=(Result("", "float16", "float16", "logits", "addmm"),))
    assert output.evidence == "the output logits is float16; addmm made it"
    [loss] = found("result", results=(Result(LOSS, "bfloat16", "bfloat16"),))
    assert (loss.place, loss.evidence) == (LOSS, "the loss is bfloat16")
    [late] = found("result", results=(Result(LOSS, "float32", "float16", operation="mean"),))
    assert "the cast came too late" in late.evidence


def test_results_in_float32_are_left_alone():
    float32 = (Result("", "float32", "float16", "logits"), Result(LOSS, "float32", "float32"))
    assert found("result", results=float32) == []


# ------------------------------------------------------------------------------- own casts


def own_cast(**changed):
    facts = {"call": ".float()", "before": "float16", "after": "float32", **changed}
    return OwnCast("norm", "RMSNorm", where="f.py:3", **facts)


@pytest.mark.parametrize(
    ("cast", "severity", "says"),
    [
        (own_cast(), "hint", "RMSNorm calls .float(), float16 to float32, once a batch (f.py:3)"),
        (own_cast(flops=50), "warning", "5.0% of the matrix arithmetic then ran in float32"),
        (own_cast(flops=5), "hint", "0.5% of"),
        (own_cast(call=".half()", before="float32", after="float16"), "warning", "float16"),
        (
            own_cast(call="autocast(enabled=False)", before="", after="", times=3),
            "hint",
            "RMSNorm runs with autocast(enabled=False), 3 operations a batch",
        ),
    ],
)
def test_a_cast_of_a_modules_own_is_found(cast, severity, says):
    [finding] = found("own-casts", casts=(cast,), total_flops=1000)
    assert finding.severity == severity
    assert says in finding.evidence


def test_without_casts_there_is_nothing_to_say():
    assert found("own-casts", total_flops=1000) == []


# ------------------------------------------------------------------------------- weights


def test_weights_that_are_not_float32_from_the_start_are_found():
    [late] = found("weights", weights=(Weights("h", ("weight",), "float16", "float32"),))
    assert late.evidence.startswith("weight: float16 when the policy came")
    [pure] = found("weights", weights=(Weights("", ("w",), "float32", "bfloat16"),))
    assert "2**-9" in pure.evidence
    assert "mixed_bfloat16" in pure.suggestion
    [forgotten] = found("weights", global_policy="mixed_float16")
    assert "apply_policy(model)" in forgotten.suggestion
    assert found("weights") == []


# ------------------------------------------------------------------------------- alignment


def product(dtype="float16", flops=100, **sizes):
    return Product("head", "addmm", dtype, tuple(sizes.items()), flops)


def test_sizes_that_are_no_multiple_are_found_with_what_padding_brings():
    [finding] = found(
        "alignment", products=(product(**{"in": 64, "out": 50257}),), tensor_cores=True
    )
    assert finding.severity == "warning"
    assert "out 50257 is no multiple of 8; 100.0% of" in finding.evidence
    assert "pad out to 50264: 0.0% more arithmetic" in finding.suggestion


def test_alignment_matters_by_its_share_and_where_there_are_tensor_cores():
    small = (product(flops=5, out=9), product(flops=95, out=8))
    assert [f.severity for f in found("alignment", products=small, tensor_cores=True)] == ["hint"]
    [elsewhere] = found("alignment", products=(product(out=9),))
    assert elsewhere.severity == "hint"
    assert "no tensor cores here" in elsewhere.evidence


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (product(out=24), 0),
        (product("bfloat16", out=24), 0),
        (product("float8_e4m3fn", out=24), 1),  # 16 numbers of 8 bits
        (product("float8_e5m2", out=32), 0),
        (product("float32", out=9), 0),
    ],
)
def test_the_multiple_is_that_of_the_format(given, count):
    assert len(found("alignment", products=(given,))) == count


def test_padding_that_would_cost_more_than_it_brings_is_not_suggested():
    [finding] = found("alignment", products=(product(**{"in channels": 3}),), tensor_cores=True)
    assert finding.suggestion.startswith("leave it")


# ------------------------------------------------------------------------------- batch size


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (4 * 2**20, 2 * 2**20, "a batch twice as large"),
        (3 * 2**20, 2 * 2**20, "a batch 1.5 times as large"),
        (5 * 2**20, 4 * 2**20, None),
        (4 * 2**10, 2 * 2**10, None),  # kilobytes: nobody's worry
        (4 * 2**20, 0, None),
    ],
)
def test_a_batch_that_could_grow_is_told_with_the_memory(before, after, says):
    findings = found("batch-size", memory=Memory(before, after, 2**20))
    assert [f.suggestion.startswith(says) for f in findings] == ([True] if says else [])


def test_without_evidence_the_batch_is_left_alone():
    assert found("batch-size") == []


# ------------------------------------------------------------------------------- the others


def test_hardware_without_fast_units_is_told():
    slow, fast = Hardware("mixed_float16", False, "no units\nhere"), Hardware("x", True, "")
    [finding] = found("hardware", hardware=(slow, fast))
    assert finding.evidence == "no units here"


def test_a_batch_that_does_not_run_is_an_error():
    [finding] = found("failure", failure=Failure("blocks.0", "RuntimeError: no", "f.py:3"))
    assert (finding.severity, finding.place) == ("error", "blocks.0")
    assert finding.evidence == "RuntimeError: no (f.py:3)"
    assert found("failure") == []


EVERYTHING = Facts(
    "mixed_float16",
    products=(product(out=9),),
    constants=(constant(1e-8, feeds="div"), constant(-1e9, role="fill")),
    reductions=(Reduction("attn", "softmax", "float16", 128, 9.0),),
    ranges=(Range("a", "bmm", "float16", 6e4, 300.0, lost=2),),
    results=(Result("", "float16", "float16"),),
    casts=(own_cast(),),
    weights=(Weights("h", ("weight",), "float16", "float32"),),
    hardware=(Hardware("mixed_float16", False, "no units"),),
    memory=Memory(4 * 2**20, 2 * 2**20, 2**20),
    failure=Failure("", "RuntimeError: no"),
)


def test_every_rule_speaks_and_the_worst_comes_first():
    report = advise(EVERYTHING)
    assert {finding.rule for finding in report} == set(RULES)
    order = [finding.severity for finding in report]
    assert order == sorted(order, key=["error", "warning", "hint"].index)
    assert report.worst == "error"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_can_be_silenced_by_its_name(rule):
    loud, quiet = advise(EVERYTHING), advise(EVERYTHING, silence=[rule, rule])
    assert [f for f in loud if f.rule != rule] == list(quiet)
    assert quiet.silenced == (rule,)
    assert f"silenced: {rule}" in str(quiet)


def test_silencing_what_is_no_rule_is_an_error_with_the_nearest_name():
    with pytest.raises(AdviceError, match="Did you mean 'epsilon'"):
        advise(EVERYTHING, silence=["epsilonn"])


def test_nothing_found_says_so():
    report = advise(Facts("mixed_bfloat16"))
    assert str(report) == "Under mixed_bfloat16: nothing found"
    assert (report.worst, len(report), report.at_least("hint")) == (None, 0, ())


def test_what_is_alike_in_many_places_is_printed_once():
    def finding(place):
        return Finding("constant", "warning", place, "same", f"override {place!r}")

    printed = str(Report("mixed_float16", tuple(finding(f"blocks.{i}") for i in range(12))))
    assert printed.count("same") == 1
    assert "blocks.0, blocks.1, blocks.2 and 9 more" in printed
    assert printed.startswith("Under mixed_float16: 12 warnings")


def test_a_report_is_plain_values():
    plain = advise(EVERYTHING).to_plain()
    assert (plain["format"], plain["version"], plain["worst"]) == ("halfstep-audit", 1, "error")
    assert plain["findings"][0].keys() == {"rule", "severity", "place", "evidence", "suggestion"}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_own_page(rule):
    page = DOCS / f"audit-{rule}.md"
    assert f"`{rule}`" in page.read_text(encoding="utf-8")
