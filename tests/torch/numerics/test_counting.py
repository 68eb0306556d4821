"""What a device counts is what the core counts, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfstep import ExponentHistogram
from halfstep.core.numerics.record import COUNTED_FORMATS
from halfstep.core.numerics.rows import histogram_of, row
from halfstep.torch.numerics import counting
from halfstep.torch.numerics.counting import bins_of, digest_of, plain_tensor

PATTERNS = torch.arange(2**16).to(torch.int16)
_BITS = np.random.default_rng(1).integers(0, 2**32, 2**18 + 1000, dtype=np.uint32)
RANDOM = torch.from_numpy(_BITS.view(np.float32).copy())
# the borders of the parts in every exponent, and their neighbours
_PARTS = [1.0, 1.8125, 1.8125 - 2**-23, 1.8125 + 2**-23, *(2 - 2**-ones for ones in range(1, 24))]
BORDERS = torch.tensor(
    [sign * p * 2.0**e for e in range(-149, 128) for p in _PARTS for sign in (1, -1)]
)

TENSORS = {
    "every float16": PATTERNS.view(torch.float16),
    "every bfloat16": PATTERNS.view(torch.bfloat16),
    "every float16 in float32": PATTERNS.view(torch.float16).float(),
    "random float32": RANDOM,
    "the borders": BORDERS,
    "no subnormal": RANDOM[RANDOM.abs() > 1e-30],
    "zeros": torch.tensor([0.0, -0.0]),
    "infinities": torch.tensor([float("inf"), -float("inf"), float("nan")]),
    "empty": torch.zeros(0),
}


def reference(tensor):
    return ExponentHistogram.from_array(tensor.double().numpy())


@pytest.mark.parametrize("name", TENSORS)
def test_bins_are_those_of_the_core(name):
    assert histogram_of(bins_of(TENSORS[name]).numpy()) == reference(TENSORS[name])


@pytest.mark.parametrize("name", TENSORS)
def test_the_path_of_an_accelerator_counts_the_same(name, monkeypatch):
    def counts(index, size):
        ones = torch.ones((), dtype=torch.int64).expand(index.shape)
        return torch.zeros(size, dtype=torch.int64).scatter_add_(0, index.long(), ones)

    def raw_bins(chunk):
        return counts(counting._raw_index(chunk, normalise=True), counting._RAW)

    monkeypatch.setattr(counting, "_counts", counts)
    monkeypatch.setattr(counting, "_raw_bins", raw_bins)
    assert histogram_of(bins_of(TENSORS[name]).numpy()) == reference(TENSORS[name])


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**-3])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("name", ["every float16", "random float32", "zeros"])
def test_a_row_answers_as_the_histogram_does(name, scale, divided):
    histogram = reference(TENSORS[name])
    digest = digest_of(bins_of(TENSORS[name]), torch.tensor(scale), divided).numpy()
    found = row(digest, int(np.log2(scale)), "UNSCALED" if divided else "SCALED")
    unscaled = histogram if divided else histogram.scaled(1 / scale)
    for shown, exact in ((found, unscaled), (found.get("scaled", {}), unscaled.scaled(scale))):
        for name_ in COUNTED_FORMATS:
            fit = exact.fit(name_)
            expected = [fit.overflow, fit.flushed, fit.subnormal]
            assert shown.get(name_, [0, 0, 0]) == expected
    counts = (
        {found["low"] + i: c for i, c in enumerate(found.get("counts", ())) if c}
        if ("low" in found)
        else {}
    )
    assert counts == unscaled.exponents
    assert found["count"] == histogram.total
    for kind in ("zeros", "infinities", "nans"):
        assert found.get(kind, 0) == getattr(histogram, kind)


def test_shapes_strides_and_kinds():
    table = torch.randn(6, 8)
    for tensor in (table.t(), table[::2, 1:], table[0, 0], table[:1].expand(5, 8)):
        assert histogram_of(bins_of(tensor).numpy()) == reference(tensor)
    both = torch.complex(table, table + 1)
    assert histogram_of(bins_of(both.conj()).numpy()) == reference(torch.view_as_real(both))
    sparse = torch.sparse_coo_tensor([[0, 0, 3]], [1.0, 2.0, 5.0], (4,), check_invariants=True)
    assert bins_of(plain_tensor(sparse)).sum() == 2  # coalesced: 3 and 5


def test_several_chunks_add_up(monkeypatch):
    whole = bins_of(RANDOM[:5000])
    halves = bins_of(RANDOM[:5000].bfloat16())
    monkeypatch.setattr(counting, "_CHUNKS", {"cpu": 1000})
    assert torch.equal(bins_of(RANDOM[:5000]), whole)
    assert torch.equal(bins_of(RANDOM[:5000].bfloat16()), halves)


def test_what_cannot_be_counted_is_left_out():
    seen = []
    torch.func.vmap(lambda x: seen.append(plain_tensor(x)) or x)(torch.ones(2, 2))
    left_out = [None, 3.0, torch.arange(3), torch.zeros(0), torch.ones(2, device="meta"), *seen]
    assert all(plain_tensor(value) is None for value in left_out[:5])
    assert seen == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TENSORS)
def test_a_gpu_counts_the_same(name):
    assert histogram_of(bins_of(TENSORS[name].cuda()).cpu().numpy()) == reference(TENSORS[name])
