"""A byte-level GPT learns the English of Python's own documentation.

The text is ``pydoc_data.topics``, what ``help()`` shows, which comes with every CPython: 466 kB.
The last tenth is held out. The model has the shape of GPT-2 (Radford et al. 2019): pre-norm blocks
of causal attention and a perceptron, learnt positions, a head that shares the embedding's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TITLE = "Byte-level GPT on the text of Python's help()"
STEPS = 300
METRIC = "validation loss (nats/byte)"
HIGHER_IS_BETTER = False
# four seeds of float32 ended between 2.34 and 2.46: less than this is no difference of precision
SAME_WITHIN = 0.02

CONTEXT, BATCH = 64, 8
WIDTH, HEADS, DEPTH = 64, 4, 2


@cache
def text() -> tuple[Tensor, Tensor]:
    """The bytes to learn from and the held-out last tenth, int64."""
    joined = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    data = torch.tensor(list(joined.encode()))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, WIDTH) to the same."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return torch.add(x, self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.head.weight = self.bytes.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) of int64 to (batch, time, 256)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.bytes(tokens) + self.places(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def make_model() -> nn.Module:
    """A GPT of 0.1 million parameters."""
    return GPT()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def batches(epoch: int, seed: int) -> Iterator[Tensor]:
    """Pieces of CONTEXT + 1 bytes from anywhere in the training text; an epoch is 100 batches."""
    train, _ = text()
    draw = torch.Generator().manual_seed(1000 * seed + epoch)
    for _ in range(100):
        starts = torch.randint(len(train) - CONTEXT, (BATCH, 1), generator=draw)
        yield train[starts + torch.arange(CONTEXT + 1)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of the next byte, nats."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: nn.Module) -> dict[str, float]:
    """Cross entropy over 128 pieces spread evenly over the held-out text, nats per byte."""
    _, held_out = text()
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, 128).long()[:, None]
    pieces = held_out[starts + torch.arange(CONTEXT + 1)]
    device = next(model.parameters()).device
    return {METRIC: loss(model, pieces.to(device)).item()}
