"""Models of the kinds that people train, and what a rewrite is compared with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.torch import autocast


@pytest.fixture(autouse=True)
def no_graph_from_another_test():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)])
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        first, second, last = self.layers
        return last(self.norm(F.gelu(second(F.relu(first(x))))))


class Attention(nn.Module):
    def __init__(self, width, fused):
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.view(batch, length, 4, width // 4).transpose(1, 2) for part in parts)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-2, -1)) * (width // 4) ** -0.5
            mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width, fused):
        super().__init__()
        self.attention = Attention(width, fused)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, fused=False, layers=1, width=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(Block(width, fused) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x):
    length, width = x.shape[-2:]
    frequencies = 1 / 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class LlamaBlock(nn.Module):
    def __init__(self, width):
        super().__init__()

        def linear(before, after):
            return nn.Linear(before, after, bias=False)

        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.up = linear(width, 2 * width), linear(width, 2 * width)
        self.down = linear(2 * width, width)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def forward(self, x):
        batch, length, width = x.shape
        y = self.norm1(x)
        parts = (linear(y) for linear in (self.q, self.k, self.v))
        q, k, v = (part.view(batch, length, 4, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, layers=1, width=32):
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width) for _ in range(layers)))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, 50, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.tokens(tokens))))


class ConvNet(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class WithLoss(nn.Module):
    """A model and its loss, so that both are in one graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())


def _tokens():
    return torch.randint(0, 50, (4, 16)), torch.randint(0, 50, (4, 16))


def _images():
    return torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))


MODELS = {
    "mlp": (MLP, lambda: (torch.randn(16, 32), torch.randint(0, 10, (16,)))),
    "gpt": (GPT, _tokens),
    "gpt fused": (lambda: GPT(fused=True), _tokens),
    "llama": (Llama, _tokens),
    "convnet": (ConvNet, _images),
    "convnet in place": (lambda: ConvNet(inplace=True), _images),
}


@pytest.fixture
def model_and_batch():
    """Make a model with its loss, and a batch, by name."""

    def make(name):
        torch.manual_seed(0)
        build, batch = MODELS[name]
        return WithLoss(build()), batch()

    return make


class _Casts(TorchDispatchMode):
    """Counts the casts from one floating dtype to another, below autograd and autocast."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
            self.count += source.is_floating_point() and source.dtype != result.dtype
        return result


class _CudaLists(TorchFunctionMode):
    """Float32 for what CUDA's autocast sends there, of the functions in these models."""

    NAMES = frozenset({"layer_norm", "softmax", "cross_entropy", "pow", "rsqrt", "sum"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            args = tuple(each.float() if isinstance(each, torch.Tensor) and
                         each.is_floating_point() else each for each in args)  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.fixture
def torch_autocast():
    """Run forward and backward under ``torch.autocast`` with CUDA's lists; count the casts."""

    def run(model, batch, dtype=torch.bfloat16):
        with _Casts() as casts:
            with torch.autocast("cpu", dtype), _CudaLists():
                loss = model(*batch)
            loss.backward()
        return casts.count

    return run


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def distance(ours, reference):
    return float((ours - reference).norm() / reference.norm())


@pytest.fixture
def far():
    """How far two gradients, or tensors, are apart, relative to the second."""
    return distance


@pytest.fixture
def gradients_of():
    """Return the gradient of a copy of a model, all in one, after what ``run`` does to it."""

    def gradients(model, run):
        mine = copy.deepcopy(model)
        run(mine)
        return gradient(mine)

    return gradients


@pytest.fixture
def rewritten():
    """Rewrite a copy of a model and run forward and backward; return its gradient."""

    def run(model, batch, policy="mixed_bfloat16", **keywords):
        mine = copy.deepcopy(model)
        loss = autocast(mine, policy, backend="aot_eager", **keywords)(*batch)
        loss.backward()
        return gradient(mine)

    return run
