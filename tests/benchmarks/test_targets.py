"""What a step costs beside torch.amp with CUDA's lists: counts, which no clock can blur."""

import functools
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16


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
def counted(name, kind, functional=None, micro_batches=1):
    from benchmarks.measures import count, start
    from benchmarks.styles import Style
    from benchmarks.workloads import workloads_for

    from halfstep.torch import weights_unchanged

    workload = next(each for each in workloads_for("cpu") if each.name == name)
    training = start(workload, Style(kind, BF16, functional))
    training.micro_batches = micro_batches
    if kind == "halfstep" and micro_batches > 1:
        training.around = lambda: weights_unchanged(training.model)
    return count(training)


def amp(name, micro_batches=1):
    return counted(name, "torch.amp, CUDA's lists", micro_batches=micro_batches)


def casts(counts):
    return sum(counts.casts.values())


def moved(counts):
    return counts.cast_bytes + counts.group_bytes


def test_the_emulated_lists_cast_as_often_as_on_cuda():
    assert casts(amp("gpt-explicit")) == 104


def test_explicit_attention_in_the_compute_dtype():
    ours, theirs = counted("gpt-explicit", "halfstep", "compute"), amp("gpt-explicit")
    assert casts(ours) <= 5
    assert ours.groups == 2
    assert moved(ours) <= 0.25 * moved(theirs)
    assert ours.saved_bytes <= 0.71 * theirs.saved_bytes


def test_fused_attention_saves_less():
    ours = counted("gpt-fused", "halfstep", "compute")
    assert ours.saved_bytes <= 0.911 * amp("gpt-fused").saved_bytes


@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_a_convnet_is_nowhere_worse(functional):
    ours, theirs = counted("convnet", "halfstep", functional), amp("convnet")
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
