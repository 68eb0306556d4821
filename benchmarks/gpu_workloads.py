"""What ``python -m benchmarks.gpu`` trains: models of the sizes that people train on one GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from halfstep.recipes import blog_conv

from .workloads import (
    Batch,
    LanguageModel,
    Workload,
    _cross_entropy,
    _labelled,
    _mean_square,
    _text,
    llama,
)


class Bottleneck(nn.Module):
    """A ResNet-50 block: 1x1, 3x3, 1x1, each with batch norm (He et al. 2015, arXiv:1512.03385).

    The stride is in the 3x3 convolution, as everybody has it since.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.norm3 = nn.BatchNorm2d(after)
        self.skip = (
            nn.Identity()
            if (before, stride) == (after, 1)
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.skip(x))


def resnet50(stages: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """Return a ResNet-50, its convolutions in channels-last order."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = width
    for stage, blocks in enumerate(stages):
        inner = width * 2**stage
        for block in range(blocks):
            layers.append(Bottleneck(before, inner, 2 if stage and not block else 1))
            before = 4 * inner
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _mlp(width: int) -> nn.Module:
    layers = [part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _images(count: int, side: int) -> Batch:
    images = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (count,))


def _blog_model(side: int) -> nn.Module:
    blog_conv.SIZE = side
    return blog_conv.make_model()


def _blog_loss(probability: Tensor, target: Tensor) -> Tensor:
    # binary cross entropy, written out: torch.autocast refuses torch's, even of float32
    yes, no = probability.log().clamp_min(-100), (1 - probability).log().clamp_min(-100)
    return -(target * yes + (1 - target) * no).mean()


@dataclass(frozen=True)
class Sized:
    """A workload and the floating point operations of one of its steps."""

    workload: Workload
    flops: int

    @property
    def name(self) -> str:
        """The workload's."""
        return self.workload.name


def flops_of(workload: Workload) -> int:
    """Count a step's matrix products and convolutions, forward and backward, without running them.

    On the meta device; a multiplication and an addition are two operations.
    """
    model, (inputs, targets) = workload.build("meta"), workload.batch()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        loss = workload.loss(model(inputs.to("meta")), targets.to("meta"))
        loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def workloads(tiny: bool) -> tuple[Sized, ...]:
    """Return the five workloads; tiny ones have every part, and take milliseconds on a CPU."""
    found = (_gpt2(tiny), _llama(tiny), _resnet(tiny), _blog(tiny), _wide(tiny))
    return tuple(Sized(workload, flops_of(workload)) for workload in found)


def _gpt2(tiny: bool) -> Workload:
    batch, length, width, heads, layers, vocabulary = (
        (2, 8, 16, 2, 1, 32) if tiny else (16, 1024, 768, 12, 12, 50304)
    )
    return Workload(
        "gpt2-124m",
        f"GPT-2: {layers} layers, width {width}, {batch} x {length} tokens of {vocabulary:,}, "
        "fused attention",
        lambda: LanguageModel(vocabulary, length, width, True, layers, heads),
        lambda: _text(batch, length, vocabulary),
        _cross_entropy,
    )


def _llama(tiny: bool) -> Workload:
    layers, width, heads, groups, hidden, batch, length = (
        (1, 16, 4, 2, 32, 1, 8) if tiny else (16, 2048, 32, 8, 8192, 2, 2048)
    )
    return Workload(
        "llama-1b",
        f"Llama blocks: {layers} layers, width {width}, {heads} heads, {groups} groups of keys, "
        f"hidden {hidden}, {batch} x {length} positions",
        lambda: llama(layers, width, heads, groups, hidden),
        lambda: (torch.randn(batch, length, width), torch.randn(batch, length, width)),
        _mean_square,
        stream=True,
    )


def _resnet(tiny: bool) -> Workload:
    count, side, stages, width = (2, 32, (1, 1), 8) if tiny else (128, 224, (3, 4, 6, 3), 64)
    return Workload(
        "resnet-50",
        f"ResNet-50: {sum(stages)} bottleneck blocks, width {width}, channels-last, {count} images "
        f"of {side} x {side}",
        lambda: resnet50(stages, width),
        lambda: _images(count, side),
        _cross_entropy,
    )


def _blog(tiny: bool) -> Workload:
    count, side = (2, 8) if tiny else (50, 256)
    return Workload(
        "blog-conv",
        f"the article's benchmark: three convolutions of 128 filters, {count} images of "
        f"{side} x {side}",
        lambda: _blog_model(side),
        lambda: (torch.rand(count, 3, side, side), torch.randint(2, (count, 1)).float()),
        _blog_loss,
    )


def _wide(tiny: bool) -> Workload:
    width, examples = (32, 8) if tiny else (8192, 8192)
    return Workload(
        "mlp-8192",
        f"MLP: 4 layers of width {width} and a head, {examples} examples",
        lambda: _mlp(width),
        lambda: _labelled(examples, width),
        _cross_entropy,
    )


def only(found: tuple[Sized, ...], names: str | None) -> tuple[Sized, ...]:
    """Return the workloads that are named, separated by commas; all without names.

    Raises:
        SystemExit: a name that is none.
    """
    if names is None:
        return found
    wanted = names.split(",")
    known = {sized.name: sized for sized in found}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: there are {', '.join(known)}")
    return tuple(known[name] for name in wanted)
