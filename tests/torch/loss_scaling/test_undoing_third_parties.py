"""Optimizers of which nothing is known: whatever they keep, a skipped step leaves it as it was."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from halfstep import LossScaleWarning
from halfstep.torch import LossScaleOptimizer
from halfstep.torch.loss_scaling import host

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """Take the way of an accelerator, whose memory the host does not see."""
    monkeypatch.setattr(host, "CPU_IS_FREE", False)


class Keeping(Optimizer):
    """SGD that also keeps something; subclasses say what, in `keep`."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.begin()

    def begin(self):
        pass

    def keep(self, group, parameter, state):
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.keep(group, parameter, self.state[parameter])
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class Replaced(Keeping):
    """New tensors in the place of old ones, two entries of which swap."""

    def keep(self, group, parameter, state):
        old = state.get("mean", torch.zeros_like(parameter))
        state["mean"] = old * 0.5 + parameter.grad
        state["now"], state["then"] = state.get("then", old.clone()), state.get("now", old.clone())
        state["now"].add_(parameter.grad)


class SharedReplaced(Keeping):
    """One new tensor in the state of all parameters."""

    def begin(self):
        self.shared = torch.zeros(())

    def keep(self, group, parameter, state):
        if parameter is group["params"][0]:
            self.shared = self.shared + parameter.grad.sum()
        state["shared"] = self.shared


class Nested(Keeping):
    """Tensors and numbers deep inside of containers."""

    def keep(self, group, parameter, state):
        inner = state.setdefault("inner", {"pair": (torch.zeros_like(parameter), [0, 1.0])})
        inner["pair"][0].add_(parameter.grad)
        inner["pair"][1][0] += 1
        inner.setdefault("history", []).append(parameter.grad.norm())
        if len(inner["history"]) > 2:
            inner["history"].pop(0)


class Numbers(Keeping):
    """Numbers in its settings and attributes, as schedule-free and D-adaptation keep them."""

    def begin(self):
        self.steps = 0
        self.lists = {"lengths": [0]}
        self.buffer = torch.zeros(3)

    def keep(self, group, parameter, state):
        group["k"] = group.get("k", 0) + 1
        self.steps += 1
        self.lists["lengths"][0] += 1
        self.buffer[0] += parameter.grad.sum()
        parameter.mul_(1 - 1e-3 * self.steps)


class Rebinding(Keeping):
    """New memory under its parameters."""

    def keep(self, group, parameter, state):
        parameter.data = parameter.data * 0.9


class Sharing(Keeping):
    """All state in one buffer, each parameter's a view of it, some seen twice."""

    def begin(self):
        self.flat = torch.zeros(64)
        self.views = [self.flat[:8], self.flat[4:20]]

    def keep(self, group, parameter, state):
        place = 0 if parameter is group["params"][0] else 16
        state.setdefault("mean", self.flat[place : place + 9])
        state["mean"].mul_(0.5).add_(parameter.grad.sum())


class Removing(Keeping):
    """It forgets the state of a parameter and makes it anew."""

    def keep(self, group, parameter, state):
        state["count"] = state.get("count", 0) + 1
        if state["count"] == 3:
            del self.state[parameter]


class Factoring(Keeping):
    """Linear algebra, which raises on what is not finite."""

    def keep(self, group, parameter, state):
        state.setdefault("factor", torch.zeros_like(parameter)).add_(1)
        if not bool(parameter.grad.isfinite().all()):
            raise torch.linalg.LinAlgError("The algorithm failed to converge")


class Wide(Keeping):
    """A value of another shape in each step."""

    def keep(self, group, parameter, state):
        state["rank"] = torch.zeros(state["rank"].numel() + 1 if "rank" in state else 1)


class Parameterized(Keeping):
    """State that is a parameter of the model."""

    def keep(self, group, parameter, state):
        state["where"] = group["params"][state.get("turn", 0)]
        state["turn"] = 1 - state.get("turn", 0)


def _run(kind, skip, overflows, steps=7):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    weights = [model[0].weight, model[1].weight]
    optimizer = LossScaleOptimizer(kind(weights), 64, skip=skip)
    ends = []
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model(torch.ones(2, 3)).square().sum() * overflows.get(step, 1.0))
        optimizer.step()
        inner = optimizer.inner_optimizer
        state = [dict(optimizer.state.get(weight, {})) for weight in weights]
        own = {k: v for k, v in vars(inner).items() if k in ("steps", "lists", "buffer", "flat")}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
        # a copy, because the next steps change them
        ends.append(_copied([weights, state, own, groups]))
    return ends


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


KINDS = [Replaced, SharedReplaced, Nested, Numbers, Rebinding, Sharing, Removing, Factoring, Wide,
         Parameterized]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overflows", [{0: INF, 3: NAN, 4: INF}, {1: INF, 2: INF}])
def test_a_run_with_overflows_is_that_of_a_read_flag(kit, kind, overflows):
    for ours, theirs in zip(
        _run(kind, "device", overflows), _run(kind, "host", overflows), strict=True
    ):
        kit.same(ours, theirs)


class Ring:
    """An object that nobody can look into."""

    def __init__(self):
        self.values = deque(maxlen=2)


class Opaque(Keeping):
    def keep(self, group, parameter, state):
        ring = state.setdefault("ring", Ring())
        ring.values.append(float(parameter.detach().sum()))
        parameter.mul_(1 - 1e-3 * len(ring.values))


class OpaqueAttribute(Keeping):
    def begin(self):
        self.ring = Ring()

    def keep(self, group, parameter, state):
        self.ring.values.append(1)
        parameter.mul_(1 - 1e-3 * len(self.ring.values))


@pytest.mark.parametrize(
    ("kind", "where"),
    [(Opaque, r"state\[parameter\]\['ring'\]"), (OpaqueAttribute, "its attribute ring")],
)
def test_what_cannot_be_taken_back_is_said_and_has_the_flag_read(kit, kind, where):
    with pytest.warns(LossScaleWarning, match=rf"{kind.__name__} keeps a Ring in {where}, and"):
        ours = _run(kind, "device", {0: INF, 2: INF, 3: INF})
    for one, other in zip(ours, _run(kind, "host", {0: INF, 2: INF, 3: INF}), strict=True):
        kit.same(one[0], other[0])


def test_it_is_said_once_and_not_where_nobody_asked_for_it(recwarn):
    _run(OpaqueAttribute, "auto", {0: INF})
    assert not recwarn
    with pytest.warns(LossScaleWarning) as caught:
        _run(OpaqueAttribute, "device", {0: INF})
    assert len(caught) == 1


def test_errors_of_steps_that_are_not_skipped_are_raised():
    class Broken(Keeping):
        def keep(self, group, parameter, state):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _run(Broken, "device", {})


def test_a_number_that_a_scheduler_has_changed_since_stays():
    class Annealing(Keeping):
        def keep(self, group, parameter, state):
            group["lr"] *= 0.5

    weight = nn.Parameter(torch.ones(2))
    optimizer = LossScaleOptimizer(Annealing([weight]), 64, skip="device")
    optimizer.backward((weight * INF).sum())
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.75
    assert optimizer.last_step_skipped
    assert optimizer.param_groups[0]["lr"] == 0.75


def test_a_wrapper_of_tensors_is_looked_into():
    from torch.testing._internal.two_tensor import TwoTensor

    class Quantized(Keeping):
        """Codes and scales in one tensor, as 8-bit optimizers keep them."""

        def keep(self, group, parameter, state):
            if "codes" not in state:
                state["codes"] = TwoTensor(torch.zeros(3, 3), torch.zeros(3, 3))
            state["codes"].a.add_(parameter.grad)
            state["codes"].b.add_(1)

    ends = [_run(Quantized, skip, {0: INF, 2: INF})[-1][1] for skip in ("device", "host")]
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one["codes"].a, other["codes"].a)
        assert torch.equal(one["codes"].b, other["codes"].b)
        assert float(other["codes"].b[0, 0]) == 5
