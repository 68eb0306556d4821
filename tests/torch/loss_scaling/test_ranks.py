"""Two gloo processes: one rank's overflow skips the step on both, and the scales stay equal."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer


def test_ranks_agree_on_skipping(tmp_path):
    script = Path(__file__).with_name("ranks.py")
    reports = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "rendezvous"), str(report)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, report in enumerate(reports)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (torch.load(report, weights_only=True) for report in reports)
    start = 2.0**15
    for first in (0, 7):
        rows = list(zip(one, two, strict=True))[first : first + 7]
        assert rows[0] == ((False, start, True), (False, start, True))
        assert rows[1] == ((True, start / 2, False), (True, start / 2, False))
        assert rows[2] == ((True, start / 4, False), (True, start / 4, False))
        # a rank without gradients follows the other, and changes nothing of its own
        assert rows[3] == ((False, start / 4, False), (False, start / 4, True))
        assert rows[4] == ((True, start / 8, False), (True, start / 8, False))
        # nobody has gradients: nothing was decided, and the scale stays
        assert rows[5] == ((False, start / 8, False), (False, start / 8, False))
        assert rows[6] == ((3, 3), (3, 3))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_an_optimizer_with_a_group_says_that_it_cannot_be_copied(alone):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = LossScaleOptimizer(torch.optim.SGD([weight]), process_group=alone)
    with pytest.raises(LossScaleError, match="cannot be pickled or copied"):
        copy.deepcopy(optimizer)


@pytest.mark.parametrize("told", [False, True])
def test_sharded_gradients_are_unscaled_and_clipped(alone, told):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    weight = torch.nn.Parameter(distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)]))
    twin = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    bare = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    optimizer = LossScaleOptimizer(
        torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        64,
        max_norm=1.0,
        process_group=alone if told else None,
    )
    optimizer.backward((weight * weight).sum().full_tensor())
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(10.0)
    (twin * twin).sum().backward()
    torch.nn.utils.clip_grad_norm_([twin], 1.0)
    bare.step()
    torch.testing.assert_close(weight.full_tensor().detach(), twin.detach())
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert isinstance(momentum, DTensor), "state of a DTensor is placed as it is"
    optimizer.zero_grad()
    optimizer.backward((weight * float("inf")).sum().full_tensor())
    optimizer.step()
    assert optimizer.last_step_skipped
    torch.testing.assert_close(weight.full_tensor().detach(), twin.detach())
