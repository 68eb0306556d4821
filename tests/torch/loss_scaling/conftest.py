"""Small trainings in which a scaled optimizer runs beside a bare one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode


class ThirdParty(Optimizer):
    """What people publish: a loop over parameters, state made on the way, its own closure."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                    state["count"] = 0
                state["count"] += 1
                state["mean"].mul_(group["decay"]).add_(p.grad)
                p.sub_(state["mean"], alpha=group["lr"])
        return loss


@dataclass(frozen=True)
class Case:
    """An optimizer class, how it is made, and what it can take."""

    name: str
    make: Callable[[Any], Optimizer]
    reads: int = 1
    dense: bool = True
    sparse: bool = False
    evaluates: bool = False

    def __str__(self) -> str:
        return self.name


def _case(kind: type[Optimizer], name: str = "", **options: Any) -> Case:
    traits = {
        key: options.pop(key) for key in ("reads", "dense", "sparse", "evaluates") if key in options
    }
    return Case(name or kind.__name__, lambda params: kind(params, **options), **traits)


_o = torch.optim
CASES = [
    _case(_o.Adam, reads=0, lr=0.05),
    _case(_o.Adam, "Adam-amsgrad-foreach", reads=0, lr=0.05, amsgrad=True, foreach=True),
    _case(_o.AdamW, reads=0, lr=0.05),
    _case(_o.AdamW, "AdamW-fused", reads=0, lr=0.05, fused=True),
    _case(_o.AdamW, "AdamW-loop", reads=0, lr=0.05, fused=False, foreach=False),
    _case(_o.SGD, reads=0, lr=0.1, sparse=True),
    _case(_o.SGD, "SGD-momentum", reads=0, lr=0.1, momentum=0.9, sparse=True),
    _case(
        _o.SGD, "SGD-nesterov-foreach", reads=0, lr=0.1, momentum=0.9, nesterov=True, foreach=True
    ),
    _case(_o.SGD, "SGD-fused-maximize", reads=0, lr=1e-3, momentum=0.9, fused=True, maximize=True),
    _case(_o.SGD, "SGD-dampening", reads=0, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    _case(_o.Adagrad, reads=0, lr=0.1, sparse=True),
    _case(_o.ASGD, lr=0.1),
    _case(_o.Adadelta, lr=0.5),
    _case(_o.Adafactor, lr=0.05),
    _case(_o.Adamax, lr=0.05),
    _case(_o.NAdam, lr=0.05),
    _case(_o.RAdam, lr=0.05),
    _case(_o.RMSprop, lr=0.05, momentum=0.5),
    _case(_o.Rprop, lr=0.05),
    _case(_o.Muon, lr=0.05),
    _case(_o.LBFGS, lr=0.1, max_iter=3, evaluates=True),
    _case(_o.LBFGS, "LBFGS-wolfe", max_iter=4, line_search_fn="strong_wolfe", evaluates=True),
    _case(_o.SparseAdam, lr=0.05, dense=False, sparse=True),
    Case("ThirdParty", lambda params: ThirdParty(params)),
]


class Net(nn.Module):
    """Matrices alone, so that Muon takes them; one parameter that never has a gradient."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.first = nn.Linear(4, 5, bias=False)
        self.last = nn.Linear(5, 3, bias=False)
        self.unused = nn.Linear(2, 2, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(self.table(index))))


def make_net(sparse: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(sparse)


def loss_of(net: Net, step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + micro)
    index = torch.randint(0, 7, (6,), generator=generator)
    target = torch.randn(6, 3, generator=generator)
    return (net(index) - target).square().mean()


def groups_of(net: Net, variant: str) -> Any:
    if variant == "sparse":
        return [net.table.weight]
    trained = [net.table.weight, net.first.weight, net.last.weight]
    if variant == "two_groups":
        return [{"params": trained[:2]}, {"params": trained[2:], "lr": 0.02}]
    if variant == "without_grad":
        return list(net.parameters())
    return trained


class _ReadCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[_ReadCounter]:
    """Count the values that the host reads from tensors."""
    with _ReadCounter() as counter:
        yield counter


def snapshot(optimizer: Optimizer) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Copy parameters and state, in the order of the groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        [p.detach().clone() for p in params],
        [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in params],
    )


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, tensors inside of containers too."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert one.dtype == other.dtype
        assert one.layout == other.layout
        one, other = one.to_dense(), other.to_dense()
        assert torch.equal(one, other), (one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


class Kit:
    """Everything above, for tests that cannot import from a conftest."""

    cases = CASES
    net = staticmethod(make_net)
    loss = staticmethod(loss_of)
    groups = staticmethod(groups_of)
    reads = staticmethod(counted_reads)
    snapshot = staticmethod(snapshot)
    same = staticmethod(assert_same)
    ThirdParty = ThirdParty


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = {
        "case": CASES,
        "dense_case": [c for c in CASES if c.dense],
        "stepping_case": [c for c in CASES if c.dense and not c.evaluates],
        "sparse_case": [c for c in CASES if c.sparse],
        "fused_case": [c for c in CASES if c.dense and c.reads == 0],
        "flag_case": [c for c in CASES if c.dense and c.reads == 1 and not c.evaluates],
    }
    for name, cases in wanted.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases, ids=str)
