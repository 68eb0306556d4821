"""How it is trained: float32, torch.amp, halfstep; each the way its own documentation does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from halfstep.torch import LossScaleOptimizer, apply_policy

LOW = (torch.float16, torch.bfloat16)

Kind = Literal["float32", "torch.amp", "torch.amp, CUDA's lists", "halfstep"]
Functional = Literal["autocast", "compute"]


class CudaLists(TorchFunctionMode):
    """Send to float32, before they are called, the functions that CUDA's autocast sends there.

    On the CPU, torch's own lists are shorter: they leave softmax and the norms in 16 bits. The
    names are those of ``AT_FORALL_FP32`` and ``AT_FORALL_FP32_SET_OPT_DTYPE`` in
    ``aten/src/ATen/autocast_mode.h`` of torch 2.13, as they are called from Python; a loss is
    named by its own function. Where CUDA has one kernel that reads float16 and writes float32
    (softmax of float16), the cast that this makes is no launch of its own there.
    """

    NAMES = frozenset(
        """
        acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__
        __rpow__ softplus layer_norm group_norm rms_norm norm cosine_similarity poisson_nll_loss
        cosine_embedding_loss nll_loss hinge_embedding_loss kl_div l1_loss smooth_l1_loss
        huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
        triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits cross_entropy dist
        pdist cdist renorm logsumexp prod softmax log_softmax softmin cumprod cumsum vector_norm
        matrix_norm sum
        """.split()  # noqa: SIM905  (a list of words reads as one)
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.NAMES:
            args = tuple(map(_float32, args))
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


@dataclass(frozen=True)
class Style:
    """One way to train.

    Attributes:
        kind: whose.
        dtype: the 16-bit dtype, or float32.
        functional: halfstep's argument of that name.
        timed: whether its time says anything: an emulation's does not.
    """

    kind: Kind
    dtype: torch.dtype = torch.float32
    functional: Functional | None = None
    timed: bool = True

    @property
    def name(self) -> str:
        """What the tables call it."""
        low = "" if self.kind == "float32" else " " + str(self.dtype).removeprefix("torch.")
        words = "" if self.functional is None else f", {self.functional}"
        return f"{self.kind}{low}{words}"

    @property
    def scales(self) -> bool:
        """Whether it scales its losses."""
        return self.dtype is torch.float16

    def prepare(self, model: nn.Module, overrides: Mapping[str, str] | None = None) -> nn.Module:
        """Return the model as this style trains it; overrides are for halfstep's policies."""
        if self.functional is None:
            return model
        policy = "mixed_" + str(self.dtype).removeprefix("torch.")
        return apply_policy(model, policy, overrides, functional=self.functional)

    @contextmanager
    def forward(self, device: str) -> Iterator[None]:
        """The context of a forward pass and its loss."""
        lists: AbstractContextManager[Any] = nullcontext()
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.kind.startswith("torch.amp"):
            autocast = torch.autocast(device, dtype=self.dtype)
        if self.kind == "torch.amp, CUDA's lists":
            lists = CudaLists()
        with autocast, lists:
            yield

    def optimize(
        self, optimizer: Optimizer, device: str, max_norm: float | None = None
    ) -> Optimizing:
        """Return how this style takes a step with an optimizer."""
        if not self.scales:
            return Plain(optimizer, max_norm)
        if self.kind == "halfstep":
            return Halfstep(LossScaleOptimizer(optimizer, max_norm=max_norm))
        return Amp(optimizer, torch.amp.GradScaler(device), max_norm)


class Plain:
    """A step without a loss scale."""

    def __init__(self, optimizer: Optimizer, max_norm: float | None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Amp(Plain):
    """A step with torch.amp.GradScaler."""

    def __init__(
        self, optimizer: Optimizer, scaler: torch.amp.GradScaler, max_norm: float | None
    ) -> None:
        super().__init__(optimizer, max_norm)
        self.scaler = scaler

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        if self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


class Halfstep(Plain):
    """A step with halfstep's LossScaleOptimizer, which clips by itself."""

    optimizer: LossScaleOptimizer

    def __init__(self, optimizer: LossScaleOptimizer) -> None:
        super().__init__(optimizer, None)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.backward(loss)


Optimizing = Plain


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def styles_of(device: str) -> tuple[Style, ...]:
    """Return the styles; CUDA's lists need no emulation on an accelerator."""
    found = [Style("float32")]
    for dtype in LOW:
        found.append(Style("torch.amp", dtype))
        if device == "cpu":
            found.append(Style("torch.amp, CUDA's lists", dtype, timed=False))
        found.append(Style("halfstep", dtype, "autocast"))
        found.append(Style("halfstep", dtype, "compute"))
    return tuple(found)
