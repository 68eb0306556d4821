import json
import os
import subprocess
import sys
import types

import pytest

from halfstep import Policy, PolicyMap
from halfstep.compare import resident_memory, torch_trainee
from halfstep.compare.trainers import trainer_of

MIB = 2**20

BIG = """
import torch
from torch import nn
print("a recipe may print")
def make_model():
    print("here too")
    return nn.Linear(2048, 4096)
def make_optimizer(model): return torch.optim.SGD(model.parameters(), lr=0.1)
def batches(epoch, seed):
    while True: yield torch.ones(1, 2048)
def loss(model, batch): return model(batch).mean()
def evaluate(model): return {"m": 0.0}
"""


def measure(recipe, policies, device, steps=3):
    return trainer_of(recipe).starter(recipe, device, 0).measure_memory(policies, steps)


def test_the_peak_of_a_child_holds_weights_and_gradients(recipe, monkeypatch):
    monkeypatch.setattr(resident_memory, "REPEATS", 2)
    lost = PolicyMap("mixed_float16", {"nowhere": "float32"})
    policies = {"float32": Policy("float32"), "lost": lost}
    found = list(measure(recipe(source=BIG), policies, "cpu", steps=2))
    assert [each["policy"] for each in found] == ["float32", "lost"] * 2
    for each in found[::2]:
        # 2048 x 4096 float32 weights are 32 MiB, their gradients as much again
        assert 64 * MIB <= each["bytes"] <= 64 * MIB + 45 * MIB
        assert "child process" in each["method"]
    # a policy that does not fit says why and takes nobody with it
    assert "nowhere" in found[1]["error"]


def test_a_recipe_that_does_not_load_is_said(recipe):
    tiny = recipe()
    tiny.file.write_text("1 / 0")
    found = list(measure(tiny, {"float32": Policy("float32")}, "cpu"))
    [each] = {json.dumps(one) for one in found}
    assert "ZeroDivisionError" in each
    assert "bytes" not in each


def test_no_process_is_left_when_measuring_is_stopped(recipe, monkeypatch):
    slow = recipe("def setup(seed, device):\n    import time; time.sleep(60)")
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

        def communicate(self, *args, **options):
            if len(started[0].args) and not hasattr(self, "stopped"):
                self.stopped = True
                raise KeyboardInterrupt
            return super().communicate(*args, **options)

    monkeypatch.setattr(resident_memory.subprocess, "Popen", Watched)
    with pytest.raises(KeyboardInterrupt):
        list(measure(slow, {"float32": Policy("float32")}, "cpu"))
    assert started[0].poll() is not None


def test_measuring_that_takes_too_long_is_given_up(recipe, monkeypatch):
    monkeypatch.setattr(resident_memory, "TIMEOUT", 0.01)
    [each] = measure(recipe(), {"float32": Policy("float32")}, "cpu")
    assert "more than 0.01 seconds" in each["error"]


def test_without_fork_every_measurement_is_a_process_of_its_own(recipe, monkeypatch):
    jobs = []

    def run(job):
        jobs.append(job)
        yield {"policy": next(iter(job["policies"])), "bytes": 1, "method": "m"}

    monkeypatch.setattr(resident_memory, "_can_fork", lambda: False)
    monkeypatch.setattr(resident_memory, "_run_program", run)
    policies = {"a": Policy("float32"), "b": Policy("mixed_float16")}
    found = list(measure(recipe(), policies, "cpu"))
    assert [each["policy"] for each in found] == ["a", "b"] * resident_memory.REPEATS
    assert all(job["repeats"] == 1 for job in jobs)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is a POSIX module")
def test_without_proc_the_peak_comes_from_rusage(monkeypatch):
    monkeypatch.setattr(resident_memory, "_peak_from_proc", lambda train: os.stat("/nothing/there"))
    peak, method = resident_memory._peak_of(lambda: None)
    assert peak >= 0
    assert "ru_maxrss" in method


def test_on_cuda_it_is_the_allocators_peak_above_what_was_there(recipe, monkeypatch):
    import torch

    calls = []
    fake = types.SimpleNamespace(
        empty_cache=lambda: calls.append("empty"),
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        memory_allocated=lambda device: 100,
        max_memory_allocated=lambda device: 350,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    steps = types.SimpleNamespace(step=lambda batch, seed: calls.append("step"))
    monkeypatch.setattr(torch_trainee.Starter, "__call__", lambda start, policy: steps)
    [each] = measure(recipe(), {"a": Policy("float32")}, "cuda:0", steps=2)
    assert each == {"policy": "a", "bytes": 250, "method": "peak of the CUDA allocator"}
    assert calls == ["empty", "reset", "step", "step"]


def test_on_cuda_a_policy_that_fails_says_why(recipe, monkeypatch):
    import torch

    def fail(*args):
        raise RuntimeError("out of memory")

    nothing = types.SimpleNamespace(
        empty_cache=list, reset_peak_memory_stats=str, memory_allocated=len
    )
    monkeypatch.setattr(torch, "cuda", nothing)
    monkeypatch.setattr(torch_trainee.Starter, "__call__", fail)
    [each] = measure(recipe(), {"a": Policy("float32")}, "cuda")
    assert "out of memory" in each["error"]
