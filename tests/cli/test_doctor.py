"""``halfstep doctor`` on this machine and on made-up ones, and its stopwatch."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass

import pytest
import torch
from click.testing import CliRunner

from halfstep.cli import doctor as doctor_module
from halfstep.cli import survey as survey_module
from halfstep.cli.doctor import doctor
from halfstep.cli.survey import Framework, Survey, framework
from halfstep.cli.verdict import measured, ratios, recommendation
from halfstep.core.accelerators import apple, nvidia, tpu
from halfstep.core.compatibility import judge
from halfstep.core.cpu import cpu_device
from halfstep.torch.devices import OPERATIONS, Operation, measure, time_operation, torch_devices

CPU = cpu_device("AMD EPYC 7763", ["avx2", "f16c"], source="cpuinfo", memory=2**36)
AMX = cpu_device("Xeon 8481C", ["amx_bf16", "avx512_fp16"], source="cpuinfo")
H100 = nvidia("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30, "torch")
V100 = nvidia("Tesla V100-SXM2-16GB", (7, 0), 16 * 2**30, "torch")
GTX = nvidia("NVIDIA GeForce GTX 1660", (7, 5), 6 * 2**30, "torch")


TORCH = (Framework("torch", "2.13.0", "CPU only"),)


def surveyed(*machine, frameworks=TORCH):
    checks = tuple(judge(policy, machine) for policy in ("mixed_float16", "mixed_bfloat16"))
    return Survey("Linux 6.1 (x86_64)", "CPython 3.11.7", frameworks, machine, checks)


@pytest.fixture
def run(monkeypatch):
    def invoke(*arguments, machine=(CPU,), width=100, **survey):
        monkeypatch.setattr(doctor_module, "survey", lambda: surveyed(*machine, **survey))
        return CliRunner(env={"COLUMNS": str(width)}).invoke(doctor, list(arguments))

    return invoke


def words(text):
    return " ".join(text.split())


# ---------------------------------------------------------------- what it prints


def test_a_cpu_is_told_that_float32_is_likely_faster(run):
    found = run()
    assert found.exit_code == 0
    for part in ("AMD EPYC 7763", "F16C, AVX2", "64 GiB", "none found", "CPython 3.11.7", "2.13.0"):
        assert part in found.output
    for part in ("mixed_float16: WARNING", "mixed_bfloat16: WARNING", "Use float32"):
        assert part in words(found.output)
    assert "only be logged once" not in found.output  # this is no log


def test_gpus_with_capability_memory_and_units(run):
    found = run(machine=(AMX, H100, GTX), width=120)
    text = words(found.output)
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0; 80 GiB" in text
    assert "compute capability 7.5, no tensor cores; 6 GiB" in text
    assert "AVX512-FP16 (vector)" in text
    h100 = next(line for line in found.output.splitlines() if line.startswith("│ NVIDIA H100"))
    assert h100.count("tensor cores") == 4
    assert "On NVIDIA H100 80GB HBM3 use mixed_bfloat16" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_terminal_and_cuts_no_column_name(run, width):
    found = run(machine=(AMX, H100, GTX), width=width)
    assert max(len(line) for line in found.output.splitlines()) <= width
    if width >= 80:
        for name in ("float16", "bfloat16", "tensorfloat32", "float8"):
            assert name in found.output
        assert "…" not in found.output


def test_a_framework_that_is_broken_is_told_with_the_reason(run):
    broken = Framework("tensorflow", "", "", "ImportError: libcudart.so.12: no such file")
    text = words(run(frameworks=(broken,), width=120).output)
    assert "tensorflow │ could not be used: ImportError: libcudart.so.12: no such file" in text


@pytest.mark.parametrize(
    ("machine", "start"),
    [
        ([CPU], "Use float32: nothing here"),
        ([AMX], "On Xeon 8481C use mixed_bfloat16: bfloat16 is"),
        ([CPU, V100], "On Tesla V100-SXM2-16GB use mixed_float16: float16 is"),
        ([CPU, GTX], "Use float32: nothing here"),
        ([AMX, GTX], "Use float32: nothing here"),  # the accelerator is what trains
        ([CPU, GTX, H100], "On NVIDIA H100 80GB HBM3 use mixed_bfloat16: it needs no loss scaling"),
        ([CPU, tpu("TPU v4", None, "jax")], "On TPU v4 use mixed_bfloat16"),
        ([CPU, apple("Apple M2", None, "torch")], "Use float32"),
        ([], "Use float32"),
    ],
)
def test_recommendation(machine, start):
    assert recommendation(machine).startswith(start)


def test_json_to_a_file_and_to_standard_output(run, tmp_path):
    path = tmp_path / "doctor.json"
    both = run("--json", str(path), machine=(CPU, H100))
    only = run("--json", "-", machine=(CPU, H100))
    assert "This machine" in both.output
    document = json.loads(only.stdout)
    assert document == json.loads(path.read_text())
    assert [device["kind"] for device in document["devices"]] == ["cpu", "cuda"]
    assert document["devices"][1]["capability"] == [9, 0]
    assert document["devices"][1]["units"]["float8"] == {"by": "tensor cores", "matrix": True}
    assert [check["ok"] for check in document["checks"]] == [True, True]
    assert document["timings"] == []
    assert document["recommendation"].startswith("On NVIDIA H100")


def test_a_file_that_cannot_be_written_is_an_error_without_a_traceback(run, tmp_path):
    found = run("--json", str(tmp_path / "no" / "folder" / "x.json"))
    assert found.exit_code == 1
    assert "x.json" in found.output
    assert isinstance(found.exception, SystemExit)


def test_measure_without_torch_says_so(run):
    for frameworks in ((), (Framework("torch", "", "", "OSError: libc10.so"),)):
        found = run("--measure", frameworks=frameworks)
        assert found.exit_code == 2
        assert "--measure needs torch" in words(found.output)


def test_on_this_machine_with_measurement():
    arguments = ["--measure", "--seconds", "0.02", "--json", "-"]
    found = CliRunner().invoke(doctor, arguments)
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert {f["name"]: f["version"] for f in document["frameworks"]}["torch"] == torch.__version__
    rows = [row for row in document["timings"] if row["device"] == "cpu"]
    assert [(row["operation"], row["dtype"]) for row in rows] == [
        (operation, dtype)
        for operation in ("product", "convolution")
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert all(row["seconds"] > 0 and row["calls"] >= 1 for row in rows)
    (verdict,) = [v for v in document["verdicts"] if v["device"] == "this CPU"]
    assert verdict["sentence"] in document["recommendation"]
    assert verdict["policy"] in ("float32", "mixed_bfloat16", "mixed_float16")


# ---------------------------------------------------------------- frameworks


def test_a_framework_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setitem(survey_module._SEES, "no_such_framework", str)
    assert framework("no_such_framework") is None


def test_a_framework_is_imported_quietly_and_a_failure_told(monkeypatch, tmp_path, capfd):
    (tmp_path / "noisy_framework.py").write_text(
        "import os, logging, warnings\n"
        "os.write(2, b'from C++')\nprint('from Python')\n"
        "logging.getLogger('x').error('a log')\nwarnings.warn('old')\n"
        "__version__ = '1.2'\n"
    )
    (tmp_path / "broken_framework.py").write_text("raise OSError('libcuda.so: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(survey_module._SEES, "noisy_framework", lambda module: "two GPUs")
    monkeypatch.setitem(survey_module._SEES, "broken_framework", str)
    assert framework("noisy_framework") == Framework("noisy_framework", "1.2", "two GPUs")
    assert framework("broken_framework").error == "OSError: libcuda.so: not found"
    assert capfd.readouterr() == ("", "")
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


def test_what_torch_and_jax_say_here():
    assert framework("torch").version == torch.__version__
    found = framework("jax")
    assert found.sees
    assert not found.error


# ---------------------------------------------------------------- the verdict


@dataclass
class Row:
    operation: str
    dtype: str
    seconds: float
    spread: float = 0.0


def rows(half, brain, base=1.0):
    """Seconds of products and convolutions in float32, float16 and bfloat16."""
    return [
        Row(operation, dtype, seconds[i])
        for i, operation in enumerate(("product", "convolution"))
        for dtype, seconds in (
            ("float32", (base, base)), ("bfloat16", brain), ("float16", half)
        )
    ]  # fmt: skip


def test_ratios_are_against_float32_of_the_same_operation():
    found = ratios([Row("product", "float32", 2.0), Row("product", "float16", 1.0),
                    Row("convolution", "float32", 1.0), Row("convolution", "float16", 4.0),
                    Row("convolution", "bfloat16", math.nan)])  # fmt: skip
    assert found == {"float16": {"product": 0.5, "convolution": 4.0}}


def test_a_slow_cpu():
    verdict = measured("this CPU", rows((3.1, 9.8), (3.0, 9.0)))
    assert verdict.policy == "float32"
    assert verdict.sentence == (
        "On this CPU float16 products take 3.1x and convolutions 9.8x the time of float32, "
        "bfloat16 products take 3.0x and convolutions 9.0x: mixed precision will be slower here; "
        "use float32, or mixed_bfloat16 only to save memory."
    )


@pytest.mark.parametrize(
    ("half", "brain", "policy", "word"),
    [
        ((0.3, 0.4), (0.3, 0.4), "mixed_bfloat16", "no loss scaling needed"),
        ((0.3, 0.4), (0.31, 0.42), "mixed_bfloat16", "pays here"),
        ((0.3, 0.4), (0.5, 0.9), "mixed_float16", "use mixed_float16, which pays here."),
        ((9.0, 9.0), (0.6, 0.6), "mixed_bfloat16", "pays here"),
        ((1.0, 1.0), (0.97, 1.05), "float32", "changes little here"),
        ((0.5, 1.9), (2.0, 2.0), "float32", "use mixed_float16 only to save memory"),
    ],
)
def test_which_policy_pays(half, brain, policy, word):
    verdict = measured("GPU", rows(half, brain))
    assert verdict.policy == policy
    assert word in verdict.sentence


def test_what_cannot_be_computed_is_left_out():
    verdict = measured("GPU", rows((0.3, 0.3), (math.nan, math.nan)))
    assert verdict.policy == "mixed_float16"
    assert "bfloat16" not in verdict.sentence
    nothing = measured("GPU", rows((math.nan,) * 2, (math.nan,) * 2))
    assert nothing.policy == "float32"
    assert "nothing could be computed in 16 bits" in nothing.sentence


def test_a_busy_machine_is_told():
    busy = rows((3.0, 3.0), (3.0, 3.0))
    busy[0].spread = 0.6
    assert "machine was busy" in measured("this CPU", busy).sentence


# ---------------------------------------------------------------- the stopwatch


def operation(call, sizes=((1,), (2,), (3,))):
    """An operation whose call is ours; it logs the sizes and dtypes that it meets."""
    log = []

    def make(size, dtype, device):
        return lambda: (log.append((size, dtype)), call(size, dtype))

    return Operation("made up", sizes, make, lambda size: f"size {size[0]}"), log


class Clock:
    """A clock that moves only when a call says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


CPU_DEVICE = torch.device("cpu")


def test_it_grows_until_float32_takes_long_enough(monkeypatch):
    clock = Clock(monkeypatch)
    made, _ = operation(
        lambda size, dtype: clock.pass_(0.004 * 2 ** size[0]), [(n,) for n in range(9)]
    )
    found = time_operation(made, CPU_DEVICE)
    assert {timing.size for timing in found} == {"size 2"}  # 16 ms; 8 ms is too short
    assert [timing.seconds for timing in found] == pytest.approx([0.016] * 3)


def test_time_that_does_not_grow_with_the_work_is_overhead(monkeypatch):
    clock = Clock(monkeypatch)
    took = {1: 0.05, 2: 0.05, 3: 0.09}
    made, _ = operation(lambda size, dtype: clock.pass_(took[size[0]]))
    assert time_operation(made, CPU_DEVICE)[0].size == "size 3"


def test_a_very_slow_dtype_stops_the_growth_and_the_time_is_bounded(monkeypatch):
    clock = Clock(monkeypatch)

    def call(size, dtype):
        clock.pass_(5.0 if dtype == torch.float16 else 0.0001)

    made, log = operation(call)
    found = time_operation(made, CPU_DEVICE)
    assert found[0].size == "size 1"
    assert found[2].seconds == 5.0
    assert sum(dtype == torch.float16 for _, dtype in log) <= 4
    assert clock.now < 25


def test_rounds_take_every_dtype_in_turn_and_change_who_is_first(monkeypatch):
    clock = Clock(monkeypatch)
    made, log = operation(lambda size, dtype: clock.pass_(0.1), [(1,)])
    found = time_operation(made, CPU_DEVICE)
    warm = 3 * 4
    rounds = [tuple(d for _, d in log[i : i + 3]) for i in range(warm, len(log), 3)]
    assert all(len(set(turn)) == 3 for turn in rounds)
    assert len({turn[0] for turn in rounds}) == 3
    assert [timing.calls for timing in found] == [len(rounds)] * 3


def test_warm_up_is_not_counted(monkeypatch):
    clock = Clock(monkeypatch)
    calls = []

    def call(size, dtype):
        calls.append(dtype)
        clock.pass_(0.9 if calls.count(dtype) == 1 else 0.02)

    made, _ = operation(call, [(1,)])
    for timing in time_operation(made, CPU_DEVICE):
        assert timing.seconds == pytest.approx(0.02)
        assert timing.spread == pytest.approx(0, abs=1e-9)


def test_a_dtype_that_the_device_cannot_do_is_told_and_the_rest_timed(monkeypatch):
    clock = Clock(monkeypatch)

    def call(size, dtype):
        if dtype == torch.float16:
            raise RuntimeError("\"conv\" not implemented for 'Half'\nmore")
        clock.pass_(0.02)

    made, _ = operation(call)
    single, brain, half = time_operation(made, CPU_DEVICE)
    assert (single.error, brain.error) == ("", "")
    assert half.error == "\"conv\" not implemented for 'Half'"
    assert math.isnan(half.seconds)
    assert half.calls == 0
    assert measured("GPU", [single, brain, half]).policy == "float32"


def test_median_and_quartiles(monkeypatch):
    clock = Clock(monkeypatch)
    steps = iter([0.02] * 4 + [0.1, 0.2, 0.3, 0.4, 9.0])
    made, _ = operation(lambda size, dtype: clock.pass_(next(steps)), [(1,)])
    (found,) = time_operation(made, CPU_DEVICE, dtypes=["float32"])
    assert found.seconds == pytest.approx(0.25)  # the first four fill the second
    assert found.spread == pytest.approx(0.25)


def test_the_real_operations_compute_their_gradients_in_the_dtype():
    for made, size in zip(OPERATIONS, [(8, 8), (2, 8, 8)], strict=True):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gradients = made.make(size, dtype, CPU_DEVICE)()
            assert len(gradients) == 2
            assert all(grad.dtype == dtype for grad in gradients)
            assert all(grad.abs().sum() > 0 for grad in gradients)


def test_sizes_grow_and_suit_tensor_cores():
    product, convolution = OPERATIONS
    assert all(side % 8 == 0 for size in product.sizes for side in size)
    assert all(channels % 8 == 0 for _, channels, _ in convolution.sizes)
    for made, work in ((product, lambda s: s[0] ** 3), (convolution, lambda s: s[0] * s[1] ** 2)):
        grown = [work(size) for size in made.sizes]
        assert all(2 <= b / a <= 8 for a, b in itertools.pairwise(grown))


def test_measure_names_device_and_operations():
    found = measure(CPU_DEVICE, dtypes=["float32"], seconds=0.005)
    assert [(t.device, t.operation, t.dtype) for t in found] == [
        ("cpu", "product", "float32"), ("cpu", "convolution", "float32")
    ]  # fmt: skip
    assert torch_devices()[0] == CPU_DEVICE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_waited_for():
    gpu = next(device for device in torch_devices() if device.type == "cuda")
    found = measure(gpu, seconds=0.2)
    single = next(t for t in found if (t.operation, t.dtype) == ("product", "float32"))
    # a launch alone takes microseconds, whatever the size
    assert single.seconds > 1e-3
