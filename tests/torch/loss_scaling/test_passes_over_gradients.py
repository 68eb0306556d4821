"""How often a step goes over the gradients before the optimizer does: counted at the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.loss_scaling import host


class Passes(TorchDispatchMode):
    """Calls that read a gradient, and calls that write one, until the optimizer's own begin."""

    OPTIMIZER = ("_fused_adam", "_fused_sgd", "_fused_adagrad")

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        self.reads = {gradient.data_ptr(): 0 for gradient in gradients}
        self.writes = dict(self.reads)
        self.over = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.over |= name.startswith(self.OPTIMIZER)
        shape_alone = func.is_view or name == "empty_like"
        if not self.over and not shape_alone:
            for argument, declared in zip(args, func._schema.arguments, strict=False):
                written = declared.alias_info is not None and declared.alias_info.is_write
                tensors = argument if isinstance(argument, (list, tuple)) else [argument]
                for tensor in filter(torch.is_tensor, tensors):
                    if tensor.data_ptr() in self.reads:
                        (self.writes if written else self.reads)[tensor.data_ptr()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def counts(self) -> tuple[set[int], set[int]]:
        """How often gradients were read, and how often written: one number each if all alike."""
        return set(self.reads.values()), set(self.writes.values())


def _passes(make, policy, max_norm, monkeypatch, free):
    if not free:
        monkeypatch.setattr(host, "CPU_IS_FREE", False)
    torch.manual_seed(0)
    model = apply_policy(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), policy)
    optimizer = LossScaleOptimizer(make(model.parameters()), 64, max_norm=max_norm)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model(torch.ones(3, 4)).square().sum())
        gradients = [p.grad for p in model.parameters()]
        started = optimizer.inner_optimizer.step
        with Passes(gradients) as passes:

            def step(*args, started=started, passes=passes):
                passes.over = True
                return started(*args)

            monkeypatch.setattr(optimizer.inner_optimizer, "step", step)
            optimizer.step()
            monkeypatch.setattr(optimizer.inner_optimizer, "step", started)
    return passes


@pytest.mark.parametrize("free", [True, False], ids=["on a cpu", "as on an accelerator"])
@pytest.mark.parametrize("max_norm", [None, 0.01])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_what_is_fused_reads_gradients_once_and_writes_none(kind, max_norm, free, monkeypatch):
    make = getattr(torch.optim, kind)
    passes = _passes(make, "mixed_float16", max_norm, monkeypatch, free)
    assert passes.counts == ({1}, {0})


@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_every_other_optimizer_gets_them_divided_in_one_pass(max_norm, monkeypatch):
    passes = _passes(torch.optim.RMSprop, "mixed_float16", max_norm, monkeypatch, True)
    assert passes.counts == ({1}, {1})


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_16_bit_gradients_are_measured_and_widened_and_never_written(kind, max_norm, monkeypatch):
    make = getattr(torch.optim, kind)
    passes = _passes(make, "master_float16", max_norm, monkeypatch, True)
    assert passes.counts == ({2}, {0})
