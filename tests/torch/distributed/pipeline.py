"""What each of two gloo processes runs: a stage of a pipeline, of which the last one has the loss.

Run as a script (``python pipeline.py RANK RENDEZVOUS REPORT``).
"""

import copy
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.loss_scaling import host

MICRO, STEPS = 2, 3


def layers():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 8)]


def batches():
    return torch.randn(STEPS, 8, 8, generator=torch.Generator().manual_seed(1))


def mse(output, target):
    return (output - target).square().mean()


class Stage:
    """One half of the model on this rank, with the schedule and the optimizer of a user."""

    def __init__(self, policy, scaled=True, **options):
        self.part = apply_policy(layers()[dist.get_rank()], policy)
        self.optimizer = LossScaleOptimizer(
            torch.optim.AdamW(self.part.parameters(), lr=1e-2),
            process_group=dist.group.WORLD,
            **options,
        )
        stage = PipelineStage(self.part, dist.get_rank(), 2, torch.device("cpu"))
        self.schedule = ScheduleGPipe(stage, MICRO, loss_fn=self.scaled_loss if scaled else mse)

    def scaled_loss(self, output, target):
        return self.optimizer.scale(mse(output, target))

    def backward(self, x):
        self.optimizer.zero_grad()
        if dist.get_rank() == 0:
            self.schedule.step(x)
            return None
        losses = []
        self.schedule.step(target=x, losses=losses)
        return float(torch.stack(losses).mean() / self.optimizer.scale_tensor)

    def weights(self):
        return [parameter.detach().clone() for parameter in self.part.parameters()]


def train(policy, look=False, **options):
    """Losses (of the last stage) and weights, as if the user knew of no pipeline."""
    stage = Stage(policy, **options)
    losses = []
    for x in batches():
        losses.append(stage.backward(x))
        if look:
            stage.optimizer.unscale_()
        stage.optimizer.step()
    return {"losses": losses, "weights": stage.weights(), "scale": stage.optimizer.current_scale}


def overflow(policy, bad):
    """One stage alone meets an infinity in the second step."""
    stage = Stage(policy)
    stage.backward(batches()[0])
    stage.optimizer.step()
    before, state = stage.weights(), copy.deepcopy(stage.optimizer.state_dict()["state"])
    stage.backward(batches()[1])
    if dist.get_rank() == bad:
        next(stage.part.parameters()).grad.fill_(float("inf"))
    stage.optimizer.step()
    kept = all(map(torch.equal, before, stage.weights()))
    after = stage.optimizer.state_dict()["state"]
    kept = kept and all(torch.equal(state[0][key], after[0][key]) for key in state[0])
    skipped, scale = stage.optimizer.last_step_skipped, stage.optimizer.current_scale
    stage.backward(batches()[2])
    stage.optimizer.step()
    moved = not all(map(torch.equal, before, stage.weights()))
    return {"kept": kept, "skipped": skipped, "scale": scale, "goes on": moved}


def forgotten(group):
    """Nobody scales the loss."""
    stage = Stage("mixed_float16", scaled=False)
    if not group:
        stage.optimizer = LossScaleOptimizer(stage.optimizer.inner_optimizer)
    before = stage.weights()
    stage.backward(batches()[0])
    try:
        stage.optimizer.step()
    except LossScaleError as error:
        said = str(error)
    else:
        said = "nothing"
    return {"said": said, "kept": all(map(torch.equal, before, stage.weights()))}


class Reads(TorchDispatchMode):
    """Counts the reads on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads():
    """The reads of each step, as on a device."""
    free, host.CPU_IS_FREE = host.CPU_IS_FREE, False
    try:
        stage, found = Stage("mixed_float16"), []
        for x in batches():
            stage.backward(x)
            with Reads() as seen:
                stage.optimizer.step()
            found.append(seen.count)
        return found
    finally:
        host.CPU_IS_FREE = free


def main(rank, rendezvous, report):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {
        "mixed_float16": train("mixed_float16"),
        "master_float16": train("master_float16"),
        "looked at": train("mixed_float16", look=True),
        "overflow": {
            (policy, bad): overflow(policy, bad)
            for policy in ("mixed_float16", "master_float16")
            for bad in (0, 1)
        },
        "forgotten": {group: forgotten(group) for group in (True, False)},
        "reads": reads(),
    }
    torch.save(found, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
