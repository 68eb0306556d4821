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
Change = Callable[[Tensor], Tensor]
LossFn = Callable[[nn.Module, Any], Tensor]


class Attention(nn.Module):
    """Attention written out; ``gain`` makes its logits loud, ``mask`` changes its scores."""

    def __init__(self, gain: float = 1.0, mask: Change | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain, self.mask = gain, mask

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0] * self.gain, heads[1] * self.gain, heads[2]
        scores = (query @ key.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5
        scores = scores if self.mask is None else self.mask(scores)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Apply(nn.Module):
    """A function as a layer; it owns a bias, so that it is one for a policy as well."""

    def __init__(self, function: Change) -> None:
        super().__init__()
        self.function = function
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.bias)


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
        says: words that its cause or its cure must hold.
        float32_layers: the overrides ``{path: "float32"}`` that cure it, and no smaller set does;
            empty where no choice of layers can.
        policies: in which of these the fault shows.
        loss_fn: as `blame` takes it.
        batch: makes the batch of a seed.
        functional: for ``apply_policy``.
        output_dtype: for ``apply_policy``.
        loss_scale: what the loss is multiplied by.
        direction: ``"forward"`` or ``"backward"``.
    """

    name: str
    what: str
    plant: Callable[[Stack], object]
    path: str
    operation: str
    says: tuple[str, ...] = ()
    float32_layers: tuple[str, ...] = ()
    policies: tuple[str, ...] = ("mixed_float16",)
    loss_fn: LossFn = cross_entropy
    batch: Callable[[int], Any] = make_batch
    functional: str = "compute"
    output_dtype: str | None = "float32"
    loss_scale: float = 1.0
    direction: str = "forward"

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


LOW = ("mixed_float16", "mixed_bfloat16")
EVERY = (*LOW, "float32")


# ---------------------------------------------------------------------- what is planted


def at(path: str, make: Callable[[], nn.Module]) -> Callable[[Stack], object]:
    """Plant a module at a path."""
    return lambda model: model.set_submodule(path, make())


def function(path: str, change: Change) -> Callable[[Stack], object]:
    """Plant a function at a path."""
    return at(path, lambda: Apply(change))


def _nothing(model: Stack) -> None:
    pass


def _unit_length(x: Tensor) -> Tensor:
    kept = F.relu(x - 8)  # always a zero vector here
    return x + kept / (kept.abs().sum(-1, keepdim=True) + 1e-8)


def _pow_rms(x: Tensor) -> Tensor:
    loud = x * 400
    return loud * torch.rsqrt(loud.pow(2).mean(-1, keepdim=True) + 1e-6)


def _in_place(x: Tensor) -> Tensor:
    loud = x * 300
    loud.mul_(300)
    return loud * 1e-3 * 1e-2


def _many(x: Tensor) -> Tensor:
    return x / x.abs().repeat(1, 1, 8192).sum(-1, keepdim=True) * 16384


def _variance(x: Tensor) -> Tensor:
    loud = x * 500
    return loud * loud.var(-1, keepdim=True).add(1e-5).rsqrt()


def _cast(x: Tensor) -> Tensor:
    return x + 1e-6 * (x.float() * 1e5).half().to(x.dtype)


def _distances(x: Tensor) -> Tensor:
    apart = (x[:, :, None] - x[:, None]).pow(2).sum(-1).sqrt()  # 0 from each to itself
    return x + apart.mean(-1, keepdim=True)


def _log_where(x: Tensor) -> Tensor:
    kept = x * (x > 0)
    return x + torch.where(kept > 0, kept.log(), 0.0)


def _padded_row(lowest: Callable[[Tensor], Tensor]) -> Change:
    def mask(scores: Tensor) -> Tensor:
        padded = torch.zeros(LENGTH, LENGTH, device=scores.device)
        padded[-1] = 1  # a row that sees nothing
        return lowest(padded).to(scores.dtype) + scores

    return mask


_FLOAT32_MIN = _padded_row(lambda padded: padded * torch.finfo(torch.float32).min)
_MINUS_INF = _padded_row(lambda padded: torch.where(padded > 0, float("-inf"), 0.0))


def _loud_residuals(model: Stack) -> None:
    for block in model.blocks:
        block.mlp = Apply(lambda x: x * 15000)


def _large_weight(model: Stack) -> None:
    first, _, last = model.blocks[0].mlp
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0, 0  # so that what it multiplies is 0
        last.weight[3, 0] = 1e5


def _bad_weight(model: Stack) -> None:
    with torch.no_grad():
        model.blocks[1].mlp[0].weight[3, 4] = float("inf")


def _checkpointed(model: Stack) -> None:
    model.blocks[1].attn = Attention(gain=400.0)
    for block in model.blocks:
        block.checkpointed = True


def _two_at_once(model: Stack) -> None:
    model.blocks[1].attn = Attention(gain=400.0)
    model.blocks[2].mlp = Apply(lambda x: x + (x * 10).softmax(-1).log())


def _hole_in_the_batch(seed: int) -> Batch:
    x, y = make_batch(seed)
    x[1, 2, 3] = float("nan")
    return x, y


def _nothing_to_learn(seed: int) -> Batch:
    x, y = make_batch(seed)
    return x, torch.full_like(y, -100)


def _masked_mean(model: nn.Module, batch: Batch) -> Tensor:
    error = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")
    known = (batch[1].flatten() > CLASSES).float()  # none of them
    return (error * known).sum() / known.sum()


def _squares(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) * 400).pow(2).mean()


def _faint(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch) * 1e-8


_LOUD = at("blocks.1.attn", lambda: Attention(gain=400.0))
_ATTN, _MLP0, _MLP2 = ("blocks.1.attn",), ("blocks.0.mlp",), ("blocks.2.mlp",)

FAULTS: tuple[Fault, ...] = (
    # ------------------------------------------------- too large for float16
    Fault("attention-logits", "query @ key overflows", _LOUD,
          "blocks.1.attn", "bmm", ("65504",), _ATTN),
    Fault("checkpointed", "the same in a checkpointed layer", _checkpointed,
          "blocks.1.attn", "bmm", ("65504",), _ATTN),
    Fault("rms-norm-pow", "an RMS norm squares a few hundred, and gives 0",
          function("blocks.0.norm2", _pow_rms),
          "blocks.0.norm2", "pow", ("65504",), ("blocks.0.norm2",)),
    Fault("exp", "softplus written out", function("blocks.2.mlp", lambda x: (x * 6).exp().log1p()),
          "blocks.2.mlp", "exp", ("65504",), _MLP2),
    Fault("residual-stream", "a residual stream that grows with depth", _loud_residuals,
          "blocks.1", "add", ("65504",), ("blocks.1", "blocks.2", "norm")),
    Fault("sum", "a sum over 131072 elements", function("blocks.0.mlp", _many),
          "blocks.0.mlp", "sum", ("65504",), _MLP0),
    Fault("variance", "the variance of values around 500", function("blocks.0.mlp", _variance),
          "blocks.0.mlp", "var", ("65504",), _MLP0),
    Fault("in-place", "multiplies in place until it overflows", function("blocks.0.mlp", _in_place),
          "blocks.0.mlp", "mul_", ("65504",), _MLP0),
    Fault("large-weight", "a weight of 1e5", _large_weight,
          "blocks.0.mlp.2", "_to_copy", ("1e+05", "65504"), ("blocks.0.mlp.2",)),
    Fault("wrong-cast", "a .half() in somebody's forward", function("blocks.0.mlp", _cast),
          "blocks.0.mlp", "_to_copy", ("is cast to float16",), policies=EVERY),
    Fault("loss-in-float16", "a mean square of 16-bit outputs", _nothing,
          "", "pow", ("output_dtype",), loss_fn=_squares, output_dtype=None),
    Fault("two-at-once", "the logits, and one block later a log of 0", _two_at_once,
          "blocks.1.attn", "bmm", ("65504",), ("blocks.1.attn", "blocks.2.mlp")),
    # ------------------------------------------------- too small for float16
    Fault("epsilon", "0 / (0 + 1e-8), and 1e-8 is 0", function("blocks.2.mlp", _unit_length),
          "blocks.2.mlp", "div", ("1e-08", "is 0 in float16"), _MLP2),
    Fault("log-of-softmax", "log of a probability that is rounded to 0",
          function("blocks.2.mlp", lambda x: x + (x * 10).softmax(-1).log()),
          "blocks.2.mlp", "log", ("log of 0", "rounding"), _MLP2),
    Fault("acos-at-1", "tanh rounds to 1, where acos is steep",
          function("blocks.2.mlp", lambda x: (x * 2).tanh().acos()),
          "blocks.2.mlp", "AcosBackward", ("acos", "rounding"), _MLP2, LOW, direction="backward"),
    Fault("vanishing", "a loss so small that all gradients are 0", _nothing,
          "", "ToCopyBackward", ("loss scale",), loss_fn=_faint, direction="backward"),
    Fault("loss-scale", "a loss scale of 2**26", _nothing,
          "", "ToCopyBackward", ("the loss scale, not the model",), loss_scale=2.0**26,
          direction="backward"),
    # ------------------------------------------------- masks
    Fault("mask-float32-min", "float32's minimum as a mask, and a row masked whole",
          at("blocks.1.attn", lambda: Attention(mask=_FLOAT32_MIN)),
          "blocks.1.attn", "_to_copy", ("mask", "torch.finfo"), _ATTN, LOW),
    Fault("masked-row", "a row of nothing but -inf",
          at("blocks.1.attn", lambda: Attention(mask=_MINUS_INF)),
          "blocks.1.attn", "_softmax", ("masked whole",), policies=EVERY),
    # ------------------------------------------------- wrong in every format
    Fault("bad-batch", "one NaN in the inputs", _nothing,
          "", "batch", ("the batch holds NaN", "1 of 192"), policies=EVERY,
          batch=_hole_in_the_batch),
    Fault("bad-weight", "one infinite weight", _bad_weight,
          "blocks.1.mlp.0", "parameter", ("blocks.1.mlp.0.weight",), policies=EVERY),
    Fault("masked-mean", "a loss divided by how many targets there are: 0", _nothing,
          "", "div", ("0/0",), policies=EVERY, loss_fn=_masked_mean),
    Fault("ignored-targets", "cross entropy with every target ignored", _nothing,
          "", "nll_loss", ("ignore_index",), policies=EVERY, batch=_nothing_to_learn),
    Fault("reciprocal", "1 / relu(x)", function("blocks.0.mlp", lambda x: 1 / F.relu(x)),
          "blocks.0.mlp", "reciprocal", ("division by 0",), policies=EVERY),
    Fault("variance-of-one", "the variance of one value",
          function("blocks.0.mlp", lambda x: x + x[..., :1].var(-1, keepdim=True)),
          "blocks.0.mlp", "var", ("one value",), policies=EVERY),
    Fault("distance-to-itself", "the derivative of a root at 0",
          function("blocks.0.mlp", _distances),
          "blocks.0.mlp", "SqrtBackward", ("sqrt at 0",), policies=EVERY, direction="backward"),
    Fault("log-behind-where", "torch.where hides a log of 0, its derivative stays",
          function("blocks.0.mlp", _log_where),
          "blocks.0.mlp", "LogBackward", ("torch.where",), policies=EVERY, direction="backward"),
)  # fmt: skip
"""What is planted; where, and what `blame` must say."""
