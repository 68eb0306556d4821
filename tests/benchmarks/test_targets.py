"""What a step costs beside torch.amp with CUDA's lists: counts, which no clock can blur."""

import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BF16, F16 = torch.bfloat16, torch.float16
SOFTMAXES = 4
"""Of the GPTs with explicit attention: one a layer."""


@pytest.fixture(scope="module", autouse=True)
def repository():
    """The benchmarks are a package of the repository, not an installed one."""
    sys.path.insert(0, str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(ROOT))


@functools.cache
def counted(name, kind, functional=None, micro_batches=1, dtype=BF16, inputs=None):
    from benchmarks.measures import count, start
    from benchmarks.styles import Style
    from benchmarks.workloads import workloads_for

    from halfstep.torch import weights_unchanged

    workload = next(each for each in workloads_for("cpu") if each.name == name)
    style = Style(kind, dtype, functional, cast_forward_inputs=inputs)
    training = start(workload, style)
    training.micro_batches = micro_batches
    if kind == "halfstep" and micro_batches > 1:
        training.around = lambda: weights_unchanged(training.model)
    return count(training)


def amp(name, micro_batches=1, dtype=BF16):
    return counted(name, "torch.amp, CUDA's lists", micro_batches=micro_batches, dtype=dtype)


def listed(name, dtype, inputs=None):
    return counted(name, "halfstep, CUDA's lists", "autocast", dtype=dtype, inputs=inputs)


def casts(counts):
    return sum(counts.casts.values())


def moved(counts):
    return counts.cast_bytes + counts.group_bytes


def test_the_emulated_lists_cast_as_often_as_on_cuda():
    assert casts(amp("gpt-explicit")) == 104
    # one kernel reads float16 and writes float32, another does the reverse for the gradient
    assert casts(amp("gpt-explicit", dtype=F16)) == 104 - 2 * SOFTMAXES


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("dtype", "launches"), [(F16, []), (BF16, ["forward", "backward"])])
def test_softmax_of_float16_casts_inside_of_its_kernel(name, dtype, launches):
    from benchmarks.measures import Observer
    from benchmarks.styles import CudaLists

    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    exact = x.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype), CudaLists(), Observer() as seen:
        y = getattr(x, name)(-1)
        seen.phase = "backward"
        y[:, 0].sum().backward()
    getattr(exact, name)(-1)[:, 0].sum().backward()
    assert [cast.phase for cast in seen.casts] == launches
    assert (y.dtype, x.grad.dtype) == (torch.float32, dtype)
    assert torch.equal(y, getattr(exact, name)(-1))
    assert torch.equal(x.grad, exact.grad.to(dtype))


def test_the_emulated_lists_hold_where_autocast_is_on():
    from benchmarks.styles import CudaLists

    x = torch.ones(2, dtype=F16)
    with CudaLists():
        assert x.softmax(-1).dtype is F16
        with torch.autocast("cpu", F16):
            assert (x.softmax(-1).dtype, x.exp().dtype) == (torch.float32, torch.float32)
            with torch.autocast("cpu", enabled=False):
                assert x.exp().dtype is F16


def test_explicit_attention_in_the_compute_dtype():
    ours, theirs = counted("gpt-explicit", "halfstep", "compute"), amp("gpt-explicit")
    assert casts(ours) <= 5
    assert ours.groups == 2
    assert moved(ours) <= 0.25 * moved(theirs)
    assert ours.saved_bytes <= 0.71 * theirs.saved_bytes


# A pair of casts around each softmax is autocast's list at work: its float32 result is cast for
# the product behind it, and the gradient on its way back. In bfloat16 there is a second pair,
# before the softmax, which no kernel of CUDA's takes in.
@pytest.mark.parametrize(("dtype", "softmax"), [(F16, 2), (BF16, 4)])
@pytest.mark.parametrize(
    ("name", "inputs", "compute"), [("lm-explicit", None, 6), ("gpt-explicit", True, 3)]
)
def test_the_default_casts_only_around_explicit_softmax(name, inputs, compute, dtype, softmax):
    ours, theirs = listed(name, dtype, inputs), amp(name, dtype=dtype)
    without = counted(name, "halfstep", "compute")
    assert (casts(without), without.groups) == (compute, 2)
    assert (casts(ours), ours.groups) == (compute + softmax * SOFTMAXES, 2)
    assert moved(ours) < moved(theirs)
    assert ours.saved_bytes < theirs.saved_bytes


def test_the_default_keeps_a_float32_stream_in_float32():
    norms = branches = 2 * SOFTMAXES
    found = listed("gpt-explicit", F16).casts
    assert found["forward"] == norms + SOFTMAXES
    # the gradient of each branch, and of what each norm was given; the model's inputs have none
    assert found["backward"] == branches + norms - 1 + SOFTMAXES


def test_fused_attention_saves_less():
    ours = counted("gpt-fused", "halfstep", "compute")
    assert ours.saved_bytes <= 0.911 * amp("gpt-fused").saved_bytes


@pytest.mark.parametrize("name", ["convnet", "llama"])
@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_nothing_is_worse(name, functional):
    ours, theirs = counted(name, "halfstep", functional), amp(name)
    assert casts(ours) + ours.groups < casts(theirs)
    assert moved(ours) <= moved(theirs)
    assert ours.saved_bytes <= theirs.saved_bytes
    assert ours.launches < theirs.launches


def test_eight_micro_batches_cast_their_weights_once():
    ours = counted("gpt-explicit", "halfstep", "compute", 8)
    assert moved(ours) <= 0.15 * moved(amp("gpt-explicit", 8))
    assert ours.groups == 1 + 8, "one forward, and one backward a micro-batch"


def test_a_style_that_cannot_run_is_a_row_that_says_why(monkeypatch):
    from benchmarks import suite
    from benchmarks.measures import start
    from benchmarks.styles import Style
    from benchmarks.workloads import TINY

    def refuse(training):
        raise RuntimeError("could not create a primitive. Run with more words")

    monkeypatch.setattr(suite, "count", refuse)
    training, counts, why = suite._started(TINY[0], Style("torch.amp", BF16), "cpu")
    assert (type(training), counts, why) == (
        type(start(TINY[0], Style("float32"))),
        None,
        "could not create a primitive",
    )


def test_counts_are_compared_with_the_same_lists():
    from benchmarks import pages, worse

    def row(kind, functional, moved):
        found = {"workload": "w", "kind": kind, "dtype": "bfloat16", "functional": functional}
        found |= {"style": f"{kind} {functional}", "casts": {"forward": 1}, "groups": 0}
        found |= {"cast_bytes": moved, "group_bytes": 0, "saved_bytes": 1, "time": None}
        return found | {"why": None, "launches": 1}

    rows = [
        row("torch.amp", None, 10),
        row("torch.amp, CUDA's lists", None, 20),
        row("halfstep", "autocast", 5),
        row("halfstep", "compute", 4),
        row("halfstep, CUDA's lists", "autocast", 30),
    ]
    table = pages.accumulation_table({"accumulation": rows, "micro_batches": 8})
    ratios = [cells[-2:] for cells in table.rows]
    assert ratios == [["", ""], ["", ""], ["0.50", ""], ["0.40", "0.20"], ["", "1.50"]]
    found = worse.table({"steps": rows, "host_time": []})
    assert [cells[1:4] for cells in found.rows] == [
        ["halfstep, CUDA's lists autocast", "bytes moved by casts", "1.50x"]
    ]


def test_compiled_steps_that_are_slower_are_in_the_table_of_what_is_worse():
    from benchmarks import worse

    def timed(median):
        return {"median": median, "low": median - 0.01, "high": median + 0.01}

    def row(kind, ratio):
        found = {"workload": "w", "kind": kind, "dtype": "bfloat16", "style": kind, "graphs": 1}
        found |= {"casts": {"forward": 1}, "groups": 0, "cast_bytes": 1, "group_bytes": 0}
        return found | {"saved_bytes": 1, "launches": 1, "time": {"to_amp": ratio}}

    def whole(style, first, ratio):
        found = {"workload": "w", "style": style, "first_steps": first}
        return found | {"to_amp": timed(ratio), "to_compiled_amp": timed(ratio)}

    found = worse.table(
        {
            "steps": [],
            "host_time": [],
            "compiled": [
                row("torch.amp", None),
                row("halfstep", timed(1.1)),
                row("halfstep rewrite", timed(0.9)),
            ],
            "whole_steps": [
                whole("torch.amp float16", 0.0, 1.0),
                whole("torch.amp float16, model compiled", 10.0, 1.0),
                whole("halfstep float16, model compiled", 5.0, 1.2),
                whole("halfstep float16, whole step compiled", 40.0, 0.5),
            ],
        }
    )
    assert [cells[1:] for cells in found.rows] == [
        ["halfstep, compiled", "time", "1.10x", "(4)"],
        ["halfstep float16, model compiled", "time", "1.20x", "(2)"],
        ["halfstep float16, whole step compiled", "first 3 steps, compiling", "4.00x", "(5)"],
    ]


def test_counters_on_the_cpu_are_no_wait():
    from benchmarks.measures import count, kept_on_cpu, start
    from benchmarks.styles import Style
    from benchmarks.workloads import TINY

    def adamax(parameters):
        return torch.optim.Adamax(parameters)

    def asgd(parameters):
        return torch.optim.ASGD(parameters)

    counts = count(start(TINY[0], Style("float32"), optimizer=adamax), kept_on_cpu(adamax))
    assert counts.host_reads == 0
    assert counts.counter_reads > 0
    assert not kept_on_cpu(asgd), "its counters lie beside the parameters"
    counts = count(start(TINY[0], Style("float32"), optimizer=asgd), kept_on_cpu(asgd))
    assert counts.host_reads > 0
    assert counts.counter_reads == 0


def test_inputs_are_cast_where_they_start_a_residual_stream():
    from benchmarks.styles import styles_of
    from benchmarks.workloads import workloads_for

    for workload in workloads_for("cpu"):
        inputs, _ = workload.data("cpu")
        assert not workload.stream or inputs.is_floating_point(), workload.name
    plain, streams = styles_of("cpu"), styles_of("cpu", streams=True)
    assert not any(style.cast_forward_inputs for style in plain)
    more = {style.name for style in streams} - {style.name for style in plain}
    kinds = ("halfstep", "halfstep, CUDA's lists")
    words = ("float16", "bfloat16")
    assert more == {f"{kind} {word}, autocast, inputs cast" for kind in kinds for word in words}


def test_nothing_is_cast_in_between_where_all_has_16_bits():
    everything = counted("mlp", "16 bits throughout")
    assert casts(everything) == 3, "of the inputs, of the outputs and of their gradient"
    assert everything.groups == 0


def test_memory_styles_keep_16_bit_weights_and_train():
    from benchmarks.measures import start
    from benchmarks.styles import Style
    from benchmarks.workloads import workloads_for

    mlp = next(each for each in workloads_for("cpu") if each.name == "mlp")
    for kind in ("halfstep masters", "halfstep Kahan"):
        training = start(mlp, Style(kind, BF16))
        weights = list(training.model.parameters())
        before = [weight.detach().clone() for weight in weights]
        for _ in range(3):
            training.step()
        assert {weight.dtype for weight in weights} == {BF16}, kind
        assert not any(map(torch.equal, before, weights)), kind
