"""The compatibility check: its words, its level, and that it speaks once."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest

import halfstep
from halfstep.core.accelerators import amd, apple, nvidia, tpu
from halfstep.core.compatibility import compatibility_check, judge, reset_compatibility_check
from halfstep.core.cpu import cpu_device

PLAIN_CPU = cpu_device("AMD EPYC 7763", ["avx2", "f16c"], source="cpuinfo")
VECTOR_CPU = cpu_device("AMD EPYC 9654", ["avx512_bf16"], source="cpuinfo")
AMX_CPU = cpu_device("Xeon 8481C", ["amx_bf16", "avx512_fp16"], source="cpuinfo")
P100 = nvidia("Tesla P100", (6, 0), None, "torch")
V100 = nvidia("Tesla V100-SXM2-16GB", (7, 0), None, "torch")
A100 = nvidia("NVIDIA A100", (8, 0), None, "torch")
GTX_1660 = nvidia("NVIDIA GeForce GTX 1660", (7, 5), None, "torch")

ELSEWHERE = (
    "If you will use compatible GPU(s) not attached to this host, e.g. by running a multi-worker "
    "model, you can ignore this warning. This message will only be logged once"
)
SEE = (
    "See https://developer.nvidia.com/cuda-gpus for a list of GPUs and their compute capabilities."
)
HEAD = "Mixed precision compatibility check"


@pytest.fixture(autouse=True)
def _fresh():
    reset_compatibility_check()
    yield
    reset_compatibility_check()


def test_the_message_of_the_keras_guide():
    assert judge("mixed_float16", [PLAIN_CPU, V100]).message == (
        f"{HEAD} (mixed_float16): OK\n"
        "Your GPU will likely run quickly with dtype policy mixed_float16 as it has compute "
        "capability of at least 7.0. Your GPU: Tesla V100-SXM2-16GB, compute capability 7.0"
    )


def test_several_gpus():
    found = judge("mixed_float16", [PLAIN_CPU, V100, V100, A100])
    assert found.ok
    assert found.reason == (
        "Your GPUs will likely run quickly with dtype policy mixed_float16 as they all have "
        "compute capability of at least 7.0. Your GPUs: Tesla V100-SXM2-16GB, compute capability "
        "7.0 (x2); NVIDIA A100, compute capability 8.0"
    )


def test_no_gpu():
    found = judge("mixed_float16", [PLAIN_CPU])
    assert not found.ok
    assert found.message == (
        f"{HEAD} (mixed_float16): WARNING\n"
        "The dtype policy mixed_float16 may run slowly because this machine does not have a GPU. "
        "Only Nvidia GPUs with compute capability of at least 7.0 run quickly with mixed_float16.\n"
        "Your CPU, AMD EPYC 7763, has no fast float16 units: float32 is likely faster on it.\n"
        + ELSEWHERE
    )


def test_a_gpu_that_is_too_old():
    found = judge("mixed_float16", [PLAIN_CPU, P100, P100])
    assert not found.ok
    assert found.message == (
        f"{HEAD} (mixed_float16): WARNING\n"
        "Your GPUs may run slowly with dtype policy mixed_float16 because they do not have compute "
        "capability of at least 7.0. Your GPUs:\n"
        f"  Tesla P100, compute capability 6.0 (x2)\n{SEE}\n{ELSEWHERE}"
    )
    one = judge("mixed_float16", [P100]).reason
    assert one.startswith("Your GPU may run slowly with dtype policy mixed_float16 because it does")


def test_some_gpus_too_old():
    lines = judge("mixed_float16", [PLAIN_CPU, P100, V100]).reason.splitlines()
    assert lines == [
        "Some of your GPUs may run slowly with dtype policy mixed_float16 because they do not all "
        "have compute capability of at least 7.0. Your GPUs:",
        "  Tesla P100, compute capability 6.0",
        "  Tesla V100-SXM2-16GB, compute capability 7.0",
        SEE,
    ]


def test_capability_without_tensor_cores():
    found = judge("mixed_float16", [PLAIN_CPU, GTX_1660])
    assert not found.ok
    assert "it does not have fast float16 matrix units" in found.reason
    assert "NVIDIA GeForce GTX 1660, compute capability 7.5, no tensor cores" in found.reason
    assert SEE not in found.reason


def test_bfloat16_needs_8_0_and_float16_is_offered():
    found = judge("mixed_bfloat16", [PLAIN_CPU, V100])
    assert not found.ok
    assert "it does not have compute capability of at least 8.0" in found.reason
    assert "It runs quickly in float16." in found.reason
    assert judge("mixed_bfloat16", [PLAIN_CPU, A100]).ok
    assert "float16." not in judge("mixed_bfloat16", [P100]).reason.replace("bfloat16.", "")


@pytest.mark.parametrize(
    ("gpu", "ok"),
    [
        (amd("AMD Instinct MI250X", "gfx90a", None, "torch"), True),
        (amd("AMD Radeon VII", "gfx906", None, "torch"), False),
        (apple("Apple M2", None, "torch"), False),
        (apple("Apple M5", None, "torch"), True),
    ],
)
def test_gpus_of_others_are_judged_by_their_units(gpu, ok):
    found = judge("mixed_float16", [PLAIN_CPU, gpu])
    assert found.ok is ok
    assert "fast float16 matrix units" in found.reason
    assert gpu.name in found.reason
    assert "compute capability" not in found.reason


def test_tpus():
    machine = [PLAIN_CPU, tpu("TPU v4", None, "jax"), tpu("TPU v4", None, "jax")]
    good, bad = judge("mixed_bfloat16", machine), judge("mixed_float16", machine)
    assert good.ok
    assert "Your TPUs: TPU v4 (x2)" in good.reason
    assert not bad.ok
    assert "Use mixed_bfloat16" in bad.reason
    assert "Use bfloat16" in judge("float16", machine).reason
    assert bad.message.endswith("This message will only be logged once")
    assert "attached to this host" not in bad.message


def test_cpus_with_fast_units():
    found = judge("mixed_bfloat16", [AMX_CPU])
    assert found.ok
    assert "AMX-BF16" in found.reason
    vector = judge("mixed_bfloat16", [VECTOR_CPU])
    assert not vector.ok  # the same rate on paper is no promise: measured, it is often slower
    assert "AVX512-BF16" in vector.reason
    assert "--measure" in vector.reason


def test_a_gpu_that_no_framework_can_use_does_not_count():
    found = judge("mixed_float16", [PLAIN_CPU, replace(A100, usable=False)])
    assert not found.ok
    assert "The driver knows NVIDIA A100, compute capability 8.0, but no framework" in found.reason


def checked(caplog):
    return [record for record in caplog.records if record.name == "halfstep"]


def test_it_is_logged_once_per_policy_and_process(caplog):
    caplog.set_level(logging.INFO, logger="halfstep")
    first = compatibility_check("mixed_float16", [V100])
    assert compatibility_check(halfstep.Policy("mixed_float16", loss_scale=8), [V100]) == first
    assert [record.levelname for record in checked(caplog)] == ["INFO"]
    assert checked(caplog)[0].getMessage() == first.message
    compatibility_check("mixed_bfloat16", [V100])
    compatibility_check("mixed_bfloat16", [V100])
    assert [record.levelname for record in checked(caplog)] == ["INFO", "WARNING"]
    reset_compatibility_check()
    compatibility_check("mixed_float16", [V100])
    assert len(checked(caplog)) == 3


def test_it_is_logged_once_from_many_threads(caplog):
    caplog.set_level(logging.INFO, logger="halfstep")
    threads = [
        threading.Thread(target=compatibility_check, args=("mixed_float16", [V100]))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checked(caplog)) == 1


@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_wide_policies_check_nothing(policy, caplog):
    caplog.set_level(logging.DEBUG, logger="halfstep")
    assert compatibility_check(policy, [PLAIN_CPU]).ok
    assert not checked(caplog)


def test_a_map_checks_every_low_policy_in_it(caplog):
    caplog.set_level(logging.INFO, logger="halfstep")
    policies = halfstep.PolicyMap("mixed_float16", {"a": "mixed_bfloat16", "b": "float32"})
    found = compatibility_check(policies, [V100])
    assert found.policy == "mixed_float16, mixed_bfloat16"
    assert not found.ok
    assert [record.levelname for record in checked(caplog)] == ["INFO", "WARNING"]
    assert compatibility_check(policies, [A100]).ok


def test_left_out_it_takes_the_global_policy_and_this_machine(caplog):
    caplog.set_level(logging.INFO, logger="halfstep")
    assert compatibility_check().ok
    with halfstep.policy_scope("mixed_bfloat16"):
        found = compatibility_check()
    assert found.policy == "mixed_bfloat16"
    assert halfstep.devices()[-1].name in found.message
    assert len(checked(caplog)) == 1


def test_an_unknown_policy():
    with pytest.raises(halfstep.PolicyError, match="mixed_flaot16"):
        compatibility_check("mixed_flaot16")
