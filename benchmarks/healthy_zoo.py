"""Models with nothing wrong in them, though much in them looks wrong: nobody must blame them.

Masks of ``-inf`` and of the lowest finite number, dropout, dead units, frozen layers, logarithms of
masks, buffers, in-place operations, losses inside of models, two models in one loss. This file
stands alone, so that tests can load it by its path.
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

WIDTH, LENGTH, CLASSES = 16, 6, 4

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Healthy:
    """A model, a batch and a loss that are fine in every format.

    Attributes:
        name: a word for it.
        build: makes the model, in float32.
        batch: makes the batch.
        loss_fn: as `blame` takes it.
        functional: for ``apply_policy``.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: LossFn
    functional: str = "autocast"

    def prepare(self, policy: str) -> nn.Module:
        """Return a new model that follows ``policy``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        if policy == "float32":
            return model
        return apply_policy(model, policy, functional=self.functional)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).float().pow(2).mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Causal(nn.Module):
    """Attention with a mask of -inf above the diagonal, and a row of padding made harmless."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.lowest = lowest

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / 4
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
        lowest = max(self.lowest, torch.finfo(scores.dtype).min) if self.lowest > -1e40 else None
        scores = scores.masked_fill(future, float("-inf") if lowest is None else lowest)
        return scores.softmax(-1).to(value.dtype) @ value


class LogMask(nn.Module):
    """Adds the log of a 0/1 mask to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, mask = batch
        weights = (self.score(x)[..., 0] + mask.log()).softmax(-1)
        return (weights[..., None].to(x.dtype) * self.value(x)).sum(1)


class AddedMinimum(nn.Module):
    """Adds the dtype's lowest number to scores below zero, which is -inf then."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = -(self.score(x) * 40).abs()
        mask = torch.zeros(LENGTH, device=x.device, dtype=scores.dtype)
        mask[2:] = torch.finfo(scores.dtype).min
        return (scores + mask).softmax(-1)


class SafeWhere(nn.Module):
    """Takes logarithms and roots only where they are safe."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kept = F.relu(self.linear(x))
        safe = torch.where(kept > 0.01, kept, 1.0)
        return torch.where(kept > 0.01, safe.log() + safe.sqrt(), 0.0)


class Dead(nn.Module):
    """A ReLU that nothing passes: every gradient before it is 0, in every format."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        nn.init.constant_(self.first.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x), inplace=True)) + 1


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)


class Dicts(nn.Module):
    """Takes and gives nested structures, and computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        logits = self.linear(inputs["x"][0])
        return {"out": {"logits": (logits, None)}, "loss": F.cross_entropy(logits, inputs["y"])}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 1))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.critic(self.generator(batch[0])), self.critic(batch[1])


def gan_loss(model: nn.Module, batch: Any) -> Tensor:
    made, real = model(batch)
    return F.softplus(-real.float()).mean() + F.softplus(made.float()).mean()


class Attending(nn.Module):
    """``nn.MultiheadAttention`` with a mask of -inf and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), float("-inf"), device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=True)[0]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def padded(model: nn.Module, batch: Tensor) -> Tensor:
    padding = torch.zeros(batch.shape[:2], dtype=torch.bool, device=batch.device)
    padding[0, 4:] = True
    return model(batch, src_key_padding_mask=padding).float().pow(2).mean()


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    model[0].requires_grad_(False)
    return model


def hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = getattr(transformers, config)(**(sizes | options))
        return getattr(transformers, model)(made)

    return build


def _tokens() -> dict[str, Tensor]:
    tokens = integers(50, 2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def its_own_loss(model: nn.Module, batch: Any) -> Any:
    return model(**batch)


def _pair() -> tuple[Tensor, Tensor]:
    return noise(4, WIDTH), integers(CLASSES, 4)


def _sequence() -> Tensor:
    return noise(2, LENGTH, WIDTH)


_TOKENS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32}

HEALTHY: tuple[Healthy, ...] = (
    Healthy("causal, -inf", lambda: Causal(float("-inf")), _sequence, squares, "compute"),
    Healthy("causal, lowest number", lambda: Causal(-3e38), _sequence, squares, "compute"),
    Healthy("log of a mask", LogMask,
            lambda: (noise(2, LENGTH, WIDTH), (integers(2, 2, LENGTH) * 0 + torch.eye(2, 6))),
            squares),
    Healthy("adds the minimum", AddedMinimum, _sequence, squares, "compute"),
    Healthy("safe where", SafeWhere, _sequence, squares, "compute"),
    Healthy("dead units", Dead, lambda: noise(4, WIDTH), squares),
    Healthy("dropout", lambda: nn.Sequential(nn.Linear(WIDTH, 32), nn.Dropout(0.5),
                                             nn.Linear(32, CLASSES)), _pair, cross_entropy),
    Healthy("frozen", frozen, _pair, cross_entropy),
    Healthy("checkpointed", lambda: Checkpointed(False), _sequence, squares),
    Healthy("checkpointed, reentrant", lambda: Checkpointed(True), _sequence, squares),
    Healthy("dicts", Dicts, lambda: {"x": [noise(4, WIDTH)], "y": integers(CLASSES, 4)},
            lambda model, batch: model(batch)),
    Healthy("lstm", Recurrent, lambda: (_sequence(), integers(CLASSES, 2)), cross_entropy),
    Healthy("gan", GAN, lambda: (noise(4, 8), noise(4, WIDTH)), gan_loss),
    Healthy("multi-head attention", Attending, _sequence, squares),
    Healthy("convolutions", convolutions, lambda: (noise(4, 3, 8, 8), integers(CLASSES, 4)),
            cross_entropy),
    Healthy("encoder", encoder, _sequence, padded),
    Healthy("BERT", hugging_face("BertForMaskedLM", "BertConfig", **_TOKENS), _tokens,
            its_own_loss),
    Healthy("GPT-2", hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=16, bos_token_id=1,
                                  eos_token_id=2), _tokens, its_own_loss),
    Healthy("Llama", hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1,
                                  pad_token_id=0, **_TOKENS), _tokens, its_own_loss, "compute"),
)  # fmt: skip
"""What must not be blamed."""
