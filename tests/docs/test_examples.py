"""The examples run as they are, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_classifier_learns_the_digits_in_float16() -> None:
    assert load("train_classifier")["train"]("mixed_float16", epochs=3) > 0.93


def test_the_custom_loop_learns_without_touching_grad(capsys: pytest.CaptureFixture[str]) -> None:
    losses = load("custom_loop")["train"](steps=60)
    assert losses[-1] < 0.1 * losses[0]
    assert "nothing in .grad: True" in capsys.readouterr().out


def test_one_network_of_the_gan_skips_steps_and_the_other_does_not() -> None:
    mean, make, judge = load("gan")["train"](steps=150)
    assert judge.skipped_steps > 0
    assert make.skipped_steps == 0
    assert make.current_scale == make.loss_scale.first_scale
    assert (mean - load("gan")["GOAL"]).abs().max() < 1


def test_the_drop_in_scaler_skips_the_broken_batch_and_says_so() -> None:
    losses, scaler = load("grad_scaler_drop_in")["train"](steps=12)
    assert losses[-1] < losses[0]
    assert [(event.step, event.skipped) for event in scaler.scale_history] == [(8, True)]


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    assert load("resume")["main"]()


# "keras_guide_tensorflow", "keras_guide_torch", "keras_guide_jax": one backend a process
@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_the_keras_guide_runs_and_prints_what_it_always_did(backend: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"keras_guide_{backend}.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^([\w. ]+): (.*)$", done.stdout, flags=re.MULTILINE))
    assert printed["Compute dtype"] == printed["x.dtype"] == "float16"
    assert printed["Variable dtype"] == printed["dense1.kernel.dtype"] == "float32"
    assert printed["Outputs dtype"] == "float32"
    # the very line that the guide for TensorFlow 2.1 shows
    assert printed["Loss scale"] == (
        "DynamicLossScale(current_loss_scale=32768.0, num_good_steps=30, "
        "initial_loss_scale=32768.0, increment_period=2000, multiplier=2.0)"
    )
    assert "loss_scale=FixedLossScale(1024.0)" in done.stdout
    assert float(printed["Test accuracy after fit"]) > 0.6
    assert float(printed["Test accuracy after the loop"]) > 0.6


# "torchrun_fsdp2" is run by tests/torch/distributed


def test_no_example_is_left_out_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.stem}' not in here] == []


def test_the_distributed_example_runs_as_a_script_on_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "ddp_two_processes.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "same weights True" in done.stdout
