"""What the torch tests share: one small transformer, counts of casts, a quiet logger."""

from __future__ import annotations

import collections
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Attention written out, a residual stream and a bare parameter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)) / 4
        return x + self.gain * self.out(scores.softmax(-1) @ v)


class Transformer(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3, checkpointed: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 20, bias=False)
        self.checkpointed = checkpointed

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant")
        return self.head(x)


class Counts(TorchDispatchMode):
    """Count casts of floats, grouped copies and host reads, below autograd and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: list[tuple[torch.dtype, torch.dtype]] = []
        self.calls: collections.Counter[str] = collections.Counter()
        self.seen: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.seen.append((name, [a.dtype for a in args if isinstance(a, torch.Tensor)]))
        if name == "_to_copy" and args[0].is_floating_point() and result.dtype != args[0].dtype:
            self.casts.append((args[0].dtype, result.dtype))
        return result


@pytest.fixture(autouse=True)
def quiet_compatibility_check(monkeypatch):
    # that this machine is slow in 16 bits is no news here
    logging.getLogger("halfstep").setLevel(logging.ERROR)
    yield
    logging.getLogger("halfstep").setLevel(logging.NOTSET)


@pytest.fixture
def tokens():
    return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make_transformer():
    def make(**options):
        torch.manual_seed(0)
        return Transformer(**options)

    return make


@pytest.fixture
def gradients(tokens):
    """Return a function: the float32 gradients of a model after one backward pass, by name."""

    def run(model, call=None):
        model.zero_grad()
        output = model(tokens) if call is None else call(tokens)
        output.float().pow(2).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return run


@pytest.fixture
def counts():
    return Counts


@pytest.fixture
def relative_error():
    def error(a, b):
        a, b = a.detach(), b.detach()
        return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))

    return error
