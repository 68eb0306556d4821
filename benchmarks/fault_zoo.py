"""Small models with a numerical fault planted in each, and where it is.

One list for the tests of ``blame`` and ``tune`` and for the table in ``docs/blame.md``. Every model
is made in float32 from a fixed seed; `Fault.prepare` gives it its policy. This file stands alone,
so that tests can load it by its path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halfstep.torch import apply_policy

WIDTH, HEADS, LENGTH, CLASSES, EXAMPLES = 16, 2, 6, 4, 4

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Any], Tensor]


class Attention(nn.Module):
    """Attention written out; ``gain`` makes its logits loud."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = gain

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0] * self.gain, heads[1] * self.gain, heads[2]
        mixed = self.scores(query, key).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn: nn.Module = Attention()
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.attn, x, use_reentrant=False)
        return self.attn(x)


class Stack(nn.Module):
    """(examples, length, 8) to logits (examples, length, 4): three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm: nn.Module = nn.LayerNorm(WIDTH)
        self.head: nn.Module = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(seed: int = 0) -> Batch:
    """Noise and labels."""
    draw = seeded(1000 + seed)
    x = torch.randn(EXAMPLES, LENGTH, 8, generator=draw)
    return x, torch.randint(CLASSES, (EXAMPLES, LENGTH), generator=draw)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over all positions."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: a word for it.
        what: one line for people.
        plant: changes a healthy `Stack` in place.
        path: the module that `blame` must name; ``""`` is the loss function or the model itself.
        operation: the operation that it must name.
        direction: ``"forward"`` or ``"backward"``.
        says: words that its cause or its cure must hold.
        float32_layers: the overrides ``{path: "float32"}`` that cure it, and no smaller set does;
            empty where no choice of layers can.
        policies: in which of these the fault shows.
        loss_fn: as `blame` takes it.
        batch: makes the batch of a seed.
        functional: for ``apply_policy``.
        output_dtype: for ``apply_policy``.
        loss_scale: what the loss is multiplied by.
    """

    name: str
    what: str
    plant: Callable[[Stack], object]
    path: str
    operation: str
    direction: str = "forward"
    says: tuple[str, ...] = ()
    float32_layers: tuple[str, ...] = ()
    policies: tuple[str, ...] = ("mixed_float16",)
    loss_fn: LossFn = cross_entropy
    batch: Callable[[int], Any] = make_batch
    functional: str = "compute"
    output_dtype: str | None = "float32"
    loss_scale: float = 1.0

    def make_model(self) -> nn.Module:
        """Return a new model in float32, with the fault in it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Stack()
            self.plant(model)
        return model

    def prepare(self, policy: str, overrides: dict[str, str] | None = None) -> nn.Module:
        """Return a new model that follows ``policy``."""
        model = self.make_model()
        if policy == "float32":
            return model
        return apply_policy(
            model, policy, overrides, output_dtype=self.output_dtype, functional=self.functional
        )

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """For whoever wants to train it."""
        return torch.optim.AdamW(model.parameters(), lr=1e-3)


FLOAT16 = ("mixed_float16",)
EVERY = ("mixed_float16", "mixed_bfloat16", "float32")


# ---------------------------------------------------------------------- the layers with a fault


class PowRMSNorm(nn.Module):
    """An RMS norm that squares in whatever dtype it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        loud = x * 400
        return self.weight * loud * torch.rsqrt(loud.pow(2).mean(-1, keepdim=True) + 1e-6)


class UnitLength(nn.Module):
    """Divides by the length; its epsilon is 0 in float16."""

    def forward(self, x: Tensor) -> Tensor:
        kept = F.relu(x - 8)  # nearly always a zero vector
        return x + kept / (kept.abs().sum(-1, keepdim=True) + 1e-8)


def _loud_attention(model: Stack) -> None:
    model.blocks[1].attn = Attention(gain=400.0)


def _pow_norm(model: Stack) -> None:
    model.blocks[0].norm2 = PowRMSNorm()


def _unit_length(model: Stack) -> None:
    model.blocks[2].mlp = nn.Sequential(UnitLength(), model.blocks[2].mlp)


def _nothing(model: Stack) -> None:
    pass


def _hole_in_the_batch(seed: int) -> Batch:
    x, y = make_batch(seed)
    x[1, 2, 3] = float("nan")
    return x, y


FAULTS: tuple[Fault, ...] = (
    Fault(
        "attention-logits",
        "query @ key overflows",
        _loud_attention,
        "blocks.1.attn", "bmm",
        says=("65504",),
        float32_layers=("blocks.1.attn",),
    ),
    Fault(
        "rms-norm-pow",
        "an RMS norm squares values of a few hundred",
        _pow_norm,
        "blocks.0.norm2", "pow",
        says=("65504",),
        float32_layers=("blocks.0.norm2",),
    ),
    Fault(
        "epsilon",
        "0 / (0 + 1e-8), and 1e-8 is 0",
        _unit_length,
        "blocks.2.mlp.0", "div",
        says=("1e-08", "is 0 in float16"),
        float32_layers=("blocks.2.mlp.0",),
    ),
    Fault(
        "bad-batch",
        "one NaN in the inputs",
        _nothing,
        "", "batch",
        says=("batch",),
        policies=EVERY,
        batch=_hole_in_the_batch,
    ),
)  # fmt: skip
"""What is planted; where, and what `blame` must say."""
