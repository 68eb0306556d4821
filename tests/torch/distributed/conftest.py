"""The processes are started once; every test looks at what they found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# what the processes run: they import each other from their own folder
collect_ignore = [
    "clipping.py",
    "memory.py",
    "ranks.py",
    "replicated.py",
    "training.py",
    "ways.py",
]


def launch(ranks, folder):
    script = Path(__file__).with_name("ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    reports = [folder / f"found-{ranks}-{rank}.pt" for rank in range(ranks)]
    return [torch.load(report, weights_only=True) for report in reports]


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="package")
def four(folder):
    """What each of four processes found; they leave a checkpoint in the folder."""
    return launch(4, folder)


@pytest.fixture(scope="package")
def two(folder, four):
    """What each of two processes found; they load that checkpoint."""
    return launch(2, folder)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
