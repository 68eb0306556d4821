"""What is trained: small models of the kinds that people train, with a loss outside of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0

Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, its data and its loss.

    Attributes:
        name: for the command line and the tables.
        about: sizes, in words.
        model: builds it.
        batch: makes inputs and targets.
        loss: of the model's output and the targets.
        stream: whether its float32 inputs are the beginning of a residual stream.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    stream: bool = False

    def build(self, device: str) -> nn.Module:
        """Return the model, with the same weights at every call."""
        torch.manual_seed(SEED)
        with torch.device(device):  # a billion weights are drawn where they will lie
            return self.model()

    def data(self, device: str) -> Batch:
        """Return the batch, the same at every call."""
        torch.manual_seed(SEED + 1)
        inputs, targets = self.batch()
        return inputs.to(device), targets.to(device)


class Attention(nn.Module):
    """Causal self-attention, written out or in torch's one fused operation."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * shape[-1] ** -0.5
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Block(nn.Module):
    """A GPT-2 block."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, fused)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


def _blocks(layers: int, width: int, heads: int, fused: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, fused) for _ in range(layers)))


class LanguageModel(nn.Module):
    """Blocks between embeddings and a head that shares their weight."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        fused: bool,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = _blocks(layers, width, heads, fused)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Residual(nn.Module):
    """A ResNet's basic block."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.skip = (
            nn.Identity()
            if (before, stride) == (after, 1)
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, grouped queries, a gated MLP; no biases."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, groups * self.size, bias=False)
        self.value = nn.Linear(width, groups * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.size).transpose(1, 2)

    def _rotated(self, x: Tensor) -> Tensor:
        half = self.size // 2
        places = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        rates = 10000 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = places[:, None] * rates
        sine, cosine = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = self._rotated(self._split(self.query(y), self.heads))
        key = self._rotated(self._split(self.key(y), self.groups))
        value = self._split(self.value(y), self.groups)
        key, value = (t.repeat_interleave(self.heads // self.groups, 1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


def llama(layers: int, width: int, heads: int, groups: int, hidden: int) -> nn.Module:
    """Return a stack of Llama blocks."""
    return nn.Sequential(*(LlamaBlock(width, heads, groups, hidden) for _ in range(layers)))


class Recurrent(nn.Module):
    """An LSTM over a sequence, and a head on its last output."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.lstm(x)[0][:, -1])
        return result


def _convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _mlp(width: int, layers: int) -> nn.Module:
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def _text(batch: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(vocabulary, (batch, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _labelled(*shape: int) -> Batch:
    return torch.randn(shape), torch.randint(10, shape[:1])


@dataclass(frozen=True)
class Sizes:
    """Sizes of the GPTs. Both have 4 layers and 4 heads, and keep the shares of weights, rows and
    attention scores alike; many CPUs need seconds for what an accelerator does in milliseconds."""

    width: int
    length: int
    batch: int
    vocabulary: int

    def __str__(self) -> str:
        return f"4 layers, width {self.width}, 4 heads, {self.batch} x {self.length} positions"


SMALL = Sizes(width=64, length=64, batch=4, vocabulary=1024)
LARGE = Sizes(width=768, length=768, batch=16, vocabulary=32768)


def _attention_of(fused: bool) -> str:
    return "scaled_dot_product_attention" if fused else "attention written with softmax"


def _gpt(name: str, fused: bool, sizes: Sizes) -> Workload:
    shape = (sizes.batch, sizes.length, sizes.width)
    return Workload(
        name,
        f"GPT blocks, {_attention_of(fused)}: {sizes}",
        lambda: _blocks(4, sizes.width, 4, fused),
        lambda: (torch.randn(shape), torch.randn(shape)),
        _mean_square,
        stream=True,
    )


def _language(name: str, fused: bool, sizes: Sizes) -> Workload:
    return Workload(
        name,
        f"GPT with embeddings and tied head, {_attention_of(fused)}: {sizes}, "
        f"{sizes.vocabulary:,} tokens",
        lambda: LanguageModel(sizes.vocabulary, sizes.length, sizes.width, fused),
        lambda: _text(sizes.batch, sizes.length, sizes.vocabulary),
        _cross_entropy,
    )


def workloads_for(device: str) -> tuple[Workload, ...]:
    """Return what casts, saved bytes and step time are measured on."""
    small = device == "cpu"
    sizes = SMALL if small else LARGE
    images, side = (8, 16) if small else (256, 64)
    width, examples = (128, 64) if small else (4096, 4096)
    return (
        _gpt("gpt-explicit", False, sizes),
        _gpt("gpt-fused", True, sizes),
        _language("lm-explicit", False, sizes),
        _language("lm-fused", True, sizes),
        Workload(
            "convnet",
            "residual convnet with batch norm: 3 blocks of 16, 32 and 64 channels, "
            f"{images} images of {side} x {side}",
            _convnet,
            lambda: _labelled(images, 3, side, side),
            _cross_entropy,
        ),
        Workload(
            "mlp",
            f"MLP: 4 layers of width {width} and a head, {examples} examples",
            lambda: _mlp(width, 4),
            lambda: _labelled(examples, width),
            _cross_entropy,
        ),
        _llama(sizes),
        Workload(
            "lstm",
            f"LSTM: 2 layers of width {sizes.width} and a head, {sizes.batch} x 16 steps",
            lambda: Recurrent(sizes.width, 2),
            lambda: _labelled(sizes.batch, 16, sizes.width),
            _cross_entropy,
        ),
    )


def _llama(sizes: Sizes) -> Workload:
    shape = (sizes.batch, sizes.length, sizes.width)
    return Workload(
        "llama",
        f"Llama-style blocks, RMSNorm, rotary positions, gated MLP: {sizes}, 2 groups of keys",
        lambda: llama(4, sizes.width, 4, 2, 2 * sizes.width),
        lambda: (torch.randn(shape), torch.randn(shape)),
        _mean_square,
        stream=True,
    )


TINY: tuple[Workload, ...] = (
    Workload(
        "tiny-mlp",
        "MLP: 8 layers of width 8 and a head, 4 examples",
        lambda: _mlp(8, 8),
        lambda: _labelled(4, 8),
        _cross_entropy,
    ),
    Workload(
        "tiny-gpt",
        "GPT blocks, explicit attention: 4 layers, width 16, 2 heads, 1 x 4 positions",
        lambda: _blocks(4, 16, 2, fused=False),
        lambda: (torch.randn(1, 4, 16), torch.randn(1, 4, 16)),
        _mean_square,
    ),
    Workload(
        "tiny-convnet",
        "the convnet on 2 images of 4 x 4",
        _convnet,
        lambda: _labelled(2, 3, 4, 4),
        _cross_entropy,
    ),
)
"""So small that a step is what the host does: Python, dispatch, launches."""
