"""What the tests of the monitor share: a small model of every kind of module, and its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep.core.record import read_record
from halfstep.torch import NumericsMonitor


class Net(nn.Module):
    def __init__(self, checkpointed: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.down = nn.Linear(16, 8)
        self.scores = nn.Softmax(-1)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def block(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.checkpointed:
            x = checkpoint(self.block, x, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.block(x)
        return self.head(x * self.scores(x))


@dataclass
class Read:
    """A record by kinds of events, with rows by what they are of."""

    header: dict[str, Any]
    events: list[dict[str, Any]]

    def of(self, *kinds):
        return [event for event in self.events if event["event"] in kinds]

    def steps(self):
        return [event["step"] for event in self.of("numerics")]

    def rows(self, place=-1):
        keys = {e["id"]: (e["kind"], e["path"], e["name"]) for e in self.of("tensor")}
        return {keys[row["id"]]: row for row in self.of("numerics")[place]["rows"]}


class Kit:
    """Builds, trains and reads."""

    Net = Net

    def __init__(self, folder) -> None:
        self.path = folder / "run.jsonl"
        self.tokens = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(3))

    def net(self, checkpointed=None):
        torch.manual_seed(0)
        return Net(checkpointed)

    def loss(self, net, part=slice(None)):
        tokens = self.tokens[part]
        return F.cross_entropy(net(tokens).float().flatten(0, 1), tokens.flatten())

    def train(self, net, optimizer, steps, bad=()):
        """Plain steps, or scaled ones; the loss of the steps in ``bad`` is infinite."""
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = self.loss(net) * (float("inf") if step in bad else 1.0)
            getattr(optimizer, "backward", torch.Tensor.backward)(loss)
            optimizer.step()

    def monitor(self, net, optimizer=None, every=2, **options):
        return NumericsMonitor(net, optimizer, every, self.path, **options)

    def read(self, path=None):
        record = read_record(path or self.path)
        return Read(record.header, record.events)

    @staticmethod
    def hooks(net):
        """How many hooks there are on the modules and parameters of a model."""
        modules = sum(
            len(getattr(module, kind))
            for module in net.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        )
        parameters = sum(
            len(getattr(p, "_post_accumulate_grad_hooks", None) or {})
            + len(p._backward_hooks or {})
            for p in net.parameters()
        )
        return modules + parameters


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)
