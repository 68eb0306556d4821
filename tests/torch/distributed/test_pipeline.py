"""A pipeline of two gloo processes: only the last stage has a loss, and all step together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from halfstep.torch import LossScaleOptimizer, apply_policy


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What each of the two stages found."""
    folder = tmp_path_factory.mktemp("pipeline")
    script = Path(__file__).with_name("pipeline.py")
    reports = [folder / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "rendezvous"), str(report)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, report in enumerate(reports)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(report, weights_only=True) for report in reports]


def alone(policy):
    """The same training on one process, in the same micro-batches."""
    torch.manual_seed(0)
    first, last = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 8)
    model = nn.Sequential(apply_policy(first, policy), apply_policy(last, policy))
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for x in torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        found = [(model(part) - part).square().mean() for part in x.chunk(2)]
        for loss in found:
            optimizer.backward(loss / 2)
        optimizer.step()
        losses.append(float(torch.stack(found).detach().mean()))
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("way", ["mixed_float16", "master_float16", "looked at"])
def test_a_pipeline_trains_like_one_process(stages, way):
    losses, weights = alone("mixed_float16" if way == "looked at" else way)
    assert stages[1][way]["losses"] == pytest.approx(losses, rel=1e-4)
    found = stages[0][way]["weights"] + stages[1][way]["weights"]
    for one, other in zip(weights, found, strict=True):
        # 16-bit gradients are halved before or after they are added; AdamW moves by 0.01 a step
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    assert stages[0][way]["scale"] == stages[1][way]["scale"] == 2.0**15


@pytest.mark.parametrize("policy", ["mixed_float16", "master_float16"])
@pytest.mark.parametrize("bad", [0, 1])
def test_an_overflow_on_one_stage_skips_on_both(stages, policy, bad):
    for stage in stages:
        found = stage["overflow"][policy, bad]
        assert found == {"kept": True, "skipped": True, "scale": 2.0**14, "goes on": True}


def test_a_forgotten_scale_is_an_error_on_every_stage(stages):
    for stage in stages:
        told, silent = stage["forgotten"][True], stage["forgotten"][False]
        assert "no rank of process_group scaled a loss" in told["said"]
        assert "no loss was scaled since the last step" in silent["said"]
        assert "stages of a pipeline that have no loss need process_group=" in silent["said"]
        assert (told["kept"], silent["kept"]) == (True, True)


def test_a_stage_without_a_loss_reads_one_flag_once(stages):
    assert [stage["reads"] for stage in stages] == [[1, 0, 0], [0, 0, 0]]
