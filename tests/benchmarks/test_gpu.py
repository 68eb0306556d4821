"""``python -m benchmarks.gpu`` runs from end to end; on a CPU, with tiny sizes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    words = ["--device", "cpu", "--tiny", "--only", "mlp-8192", "--eager", "--seconds", "200"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("gpu-*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text(), done.stdout


def test_every_row_has_numbers_or_says_why_not(results):
    rows = results[0]["rows"]
    by_style = {row["style"]: row for row in rows}
    assert "no TF32" in by_style["float32 with TF32"]["why"]
    assert "not installed" in by_style["Transformer Engine bfloat16"]["why"]
    measured = [row for row in rows if row["why"] is None]
    expected = {
        "float32", "torch.amp bfloat16", "Fabric float16", "halfstep bfloat16, compute",
        "halfstep masters bfloat16", "halfstep Kahan bfloat16",
    }  # fmt: skip
    assert expected <= {row["style"] for row in measured}
    for row in measured:
        assert row["seconds"] > 0
        assert row["flops"] == 195584, "4 products of 8 x 32 x 32, a head, and their gradients"


def test_the_counts_are_those_of_a_step(results):
    by_style = {row["style"]: row for row in results[0]["rows"]}
    assert sum(by_style["float32"]["casts"].values()) == 0
    amp, ours = by_style["torch.amp bfloat16"], by_style["halfstep bfloat16, compute"]
    assert sum(ours["casts"].values()) + ours["groups"] < sum(amp["casts"].values())
    assert by_style["halfstep float16, compute"]["host_reads"] == 0


def test_the_page_names_the_command_and_what_each_row_is_compared_with(results):
    written, page, printed = results
    assert written["command"].startswith("python -m benchmarks.gpu --device cpu --tiny")
    assert written["command"] in page
    assert "/ torch.amp" in page
    assert re.search(r"\| float32 \| [\d.]+ \|", page)
    assert "mlp-8192" in printed


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "sees no GPU" in done.stderr


def test_a_row_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu import Late, at_most

    def spin(limit, until):
        with at_most(limit):
            while time.monotonic() < until:
                pass

    begin = time.monotonic()
    with pytest.raises(Late):
        spin(0.05, begin + 60)
    spin(60, time.monotonic() + 0.1)


def test_rows_are_compared_with_torch_amp_in_the_same_dtype_and_form(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.gpu_tables import rival_of, worse

    def row(kind, dtype, compiled, seconds):
        return {
            "workload": "w", "style": f"{kind} {dtype} {compiled}", "kind": kind, "dtype": dtype,
            "compiled": compiled, "seconds": seconds, "quartiles": [seconds, seconds], "why": None,
        }  # fmt: skip

    amp, fast = row("torch.amp", "bfloat16", False, 1.0), row("torch.amp", "bfloat16", True, 0.5)
    ours, slow = row("halfstep", "bfloat16", False, 0.9), row("halfstep", "bfloat16", True, 0.7)
    rows = [amp, fast, ours, slow, row("halfstep", "float16", False, 9.0)]
    assert rival_of(ours, rows) is amp
    assert rival_of(slow, rows) is fast
    assert rival_of(rows[-1], rows) is None
    assert worse(rows).rows == [["w", "halfstep bfloat16 True", "1.40"]]
