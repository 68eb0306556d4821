"""A compiled step of an optimizer from elsewhere: skipped without a trace, or refused by name."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer

from halfstep.torch import LossScaleOptimizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

GOOD, BAD = torch.ones(3), torch.tensor([1.0, torch.inf, 1.0])


@pytest.fixture(autouse=True)
def backward_in_the_graph():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


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
        parameter.sub_(state["mean"])


class Shared(Keeping):
    """One new tensor in the group and in the state of all parameters."""

    def keep(self, group, parameter, state):
        if parameter is group["params"][0]:
            group["shared"] = group.get("shared", torch.zeros(())) + parameter.grad.sum()
        state["shared"] = group["shared"]


class Nested(Keeping):
    """Tensors deep inside of containers, changed in place and replaced."""

    def keep(self, group, parameter, state):
        if not state:
            state["inner"] = {"pair": (torch.zeros_like(parameter), [torch.zeros_like(parameter)])}
        changed, replaced = state["inner"]["pair"]
        changed.add_(parameter.grad)
        replaced[0] = replaced[0] * 0.5 + parameter.grad
        parameter.sub_(replaced[0])


class Attributes(Keeping):
    """Tensors in attributes and groups, changed in place."""

    def begin(self):
        self.buffer = torch.zeros(3)
        self.more = {"sums": [torch.zeros(())]}
        for group in self.param_groups:
            group["seen"] = torch.zeros(())

    def keep(self, group, parameter, state):
        self.buffer[0] += parameter.grad.sum()
        self.more["sums"][0].add_(1)
        group["seen"].add_(1)


class Rebinding(Keeping):
    """New memory under its parameters."""

    def keep(self, group, parameter, state):
        parameter.data = parameter.data * 0.9


def start(kind):
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    inner = kind([first, second])
    optimizer = LossScaleOptimizer(inner, 8.0)

    def whole(inputs):
        optimizer.backward((first * inputs).sum() + (second * inputs * 2).sum())
        optimizer.step()
        optimizer.zero_grad()

    def kept():
        attributes = {name: vars(inner).get(name) for name in ("buffer", "more")}
        states = list(inner.state.values())
        return copy.deepcopy([first, second, states, inner.param_groups, attributes])

    return whole, kept, inner


@pytest.mark.parametrize("kind", [Replaced, Shared, Nested, Attributes, Rebinding])
def test_a_skipped_compiled_step_leaves_everything_as_it_was(kit, kind):
    (ours, our_kept, inner), (theirs, their_kept, _) = start(kind), start(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    ours(GOOD)
    theirs(GOOD)
    graphs = []
    for inputs in (GOOD, BAD, GOOD, GOOD):
        before = our_kept()
        compiled(inputs)
        theirs(inputs)
        graphs.append(counter.frame_count)
        if inputs is BAD:
            kit.same(our_kept(), before)
        torch.testing.assert_close(our_kept()[:3], their_kept()[:3])
        kit.same(our_kept()[3:], their_kept()[3:])
    assert graphs[1:] == [graphs[1]] * 3, "no step after the second is compiled"
    if kind is Shared:
        first, second = inner.state.values()
        assert first["shared"] is second["shared"] is inner.param_groups[0]["shared"]


class Counting(Keeping):
    def keep(self, group, parameter, state):
        group["k"] = group.get("k", 0) + 1


class CountingDeeply(Keeping):
    def begin(self):
        self.counts = {"steps": [0]}

    def keep(self, group, parameter, state):
        self.counts["steps"][0] += 1


class CountingItself(Keeping):
    def begin(self):
        self.steps = 0

    def keep(self, group, parameter, state):
        self.steps += 1


class Rebuilt(Keeping):
    def keep(self, group, parameter, state):
        self.state[parameter] = {"sum": state.get("sum", 0.0) + parameter.grad}


class Growing(Keeping):
    def keep(self, group, parameter, state):
        state["all"] = torch.cat([state.get("all", parameter.grad), parameter.grad])


class Forgetting(Keeping):
    def keep(self, group, parameter, state):
        if state.pop("sum", None) is None:
            state["sum"] = parameter.grad.clone()


class Historic(Keeping):
    def keep(self, group, parameter, state):
        state.setdefault("norms", []).append(parameter.grad.norm())


class Opaque(Keeping):
    def begin(self):
        self.norms = deque([torch.zeros(())])

    def keep(self, group, parameter, state):
        self.norms[0].add_(1)


class UnderAWord(Keeping):
    def begin(self):
        self.state["all"] = {"sum": torch.zeros(())}

    def keep(self, group, parameter, state):
        self.state["all"]["sum"].add_(parameter.grad.sum())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Counting, r"counts with Python numbers \(param_groups\[0\]\['k'\]\)"),
        (CountingDeeply, r"its attribute counts\['steps'\]\[0\]"),
        (CountingItself, "writes its attribute steps"),
        (Rebuilt, r"replaces or removes state\[parameter\]"),
        (Growing, r"\['all'\] by a tensor of another shape"),
        (Forgetting, r"makes or removes state\[parameter\]\['sum'\]"),
        (Historic, "made its state"),
        (UnderAWord, "keeps state under 'all'"),
        (Opaque, "a deque in its attribute norms"),
    ],
)
def test_what_a_graph_cannot_take_back_is_named(kind, words):
    whole, kept, _ = start(kind)
    whole(GOOD)
    weights = kept()[:2]
    with pytest.raises(Exception, match=words):
        torch.compile(whole, fullgraph=True, backend="eager")(GOOD)
    assert all(map(torch.equal, kept()[:2], weights)), "nothing was touched"
