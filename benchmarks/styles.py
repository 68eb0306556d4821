"""How it is trained: float32, torch.amp, halfstep; each the way its own documentation does it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from halfstep.torch import LossScaleOptimizer, apply_policy, autocast

from .optimizing import Amp, Halfstep, Optimizing, Plain

LOW = (torch.float16, torch.bfloat16)

Kind = Literal[
    "float32", "torch.amp", "torch.amp, CUDA's lists", "halfstep", "halfstep, CUDA's lists",
    "halfstep, skip='device'", "halfstep masters", "halfstep Kahan", "halfstep rewrite",
    "16 bits throughout", "Fabric", "Transformer Engine", "torchao float8",
]  # fmt: skip
Functional = Literal["autocast", "compute"]
COMPARED = frozenset(("halfstep", "halfstep rewrite", "16 bits throughout"))
"""The kinds whose time is compared with torch.amp's."""

RIVALS: dict[str, Kind] = {
    "halfstep": "torch.amp",
    "halfstep, CUDA's lists": "torch.amp, CUDA's lists",
}
"""The kinds of eager steps that are ours, and what their counts are compared with."""


class CudaLists(TorchFunctionMode):
    """Send to float32, where autocast is on, the functions that CUDA's autocast sends there.

    On the CPU, torch's own lists are shorter: they leave softmax and the norms in 16 bits. The
    names are those of ``AT_FORALL_FP32`` and ``AT_FORALL_FP32_SET_OPT_DTYPE`` in
    ``aten/src/ATen/autocast_mode.h`` of torch 2.13, as they are called from Python; a loss is
    named by its own function.

    For softmax of float16, CUDA has one kernel that reads float16 and writes float32, and one that
    does the reverse for its gradient (``at::softmax`` with a dtype, ``aten/src/ATen/native/
    SoftMax.cpp`` and ``cuda/SoftMax.cu``, which take float16 alone): those casts are made here
    where no one counts them. Those of bfloat16 are launches of their own there, and count.
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
    READ_FLOAT16 = frozenset(("softmax", "log_softmax", "softmin"))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.NAMES and torch.is_autocast_enabled("cpu"):
            cast = _float32_inside if name in self.READ_FLOAT16 else _float32
            args = tuple(map(cast, args))
            kwargs = {key: cast(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def _float32_inside(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.float16:
        return InsideOfAKernel.apply(value)  # type: ignore[no-untyped-call]
    return _float32(value)


class InsideOfAKernel(torch.autograd.Function):
    """Casts float16 to float32, and the gradient back, unseen by those who count casts."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        with _disable_current_modes():
            return value.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        with _disable_current_modes():
            return gradients[0].half()


@dataclass(frozen=True)
class Style:
    """One way to train.

    Attributes:
        kind: whose: a key of `FAMILIES`.
        dtype: the 16-bit dtype, or float32.
        functional: halfstep's argument of that name.
        cast_forward_inputs: halfstep's argument of that name.
        timed: whether its time says anything: an emulation's does not.
        backend: compile the model with this backend of ``torch.compile``; None runs it eagerly.
        tf32: whether float32 products may use TF32, on GPUs that have it.
    """

    kind: Kind
    dtype: torch.dtype = torch.float32
    functional: Functional | None = None
    timed: bool = True
    backend: str | None = None
    tf32: bool = False
    cast_forward_inputs: bool | None = None

    @property
    def name(self) -> str:
        """What the tables call it."""
        low = "" if self.kind == "float32" else " " + self.word
        words = "" if self.functional is None else f", {self.functional}"
        words += ", inputs cast" if self.cast_forward_inputs else ""
        return f"{self.kind}{low}{words}" + (" with TF32" if self.tf32 else "")

    @property
    def word(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def scales(self) -> bool:
        """Whether it scales its losses."""
        return self.dtype is torch.float16

    def missing(self) -> str | None:
        """Return why this style cannot run here, None if it can."""
        module = FAMILIES[self.kind].needs
        if module is None or importlib.util.find_spec(module.partition(".")[0]) is not None:
            return None
        return f"{module} is not installed"

    def prepare(self, model: nn.Module, overrides: Mapping[str, str] | None = None) -> nn.Module:
        """Return the model as this style trains it; overrides are for halfstep's policies."""
        return FAMILIES[self.kind].prepare(model, self, overrides)

    @contextmanager
    def forward(self, device: str) -> Iterator[None]:
        """The context of a forward pass and its loss."""
        with FAMILIES[self.kind].context(self, device):
            yield

    def optimize(
        self, optimizer: Optimizer, device: str, max_norm: float | None = None
    ) -> Optimizing:
        """Return how this style takes a step with an optimizer."""
        family = FAMILIES[self.kind]
        if not self.scales and not family.always:
            return Plain(optimizer, max_norm)
        return family.scaled(optimizer, device, max_norm)


Overrides = Mapping[str, str] | None
Prepare = Callable[[nn.Module, Style, Overrides], nn.Module]
Context = Callable[[Style, str], AbstractContextManager[Any]]
Scaled = Callable[[Optimizer, str, float | None], Plain]


def _compiled(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    if style.backend is None:
        return model
    compiled: Any = torch.compile(model, backend=style.backend)
    return compiled  # type: ignore[no-any-return]


def _policied(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    if style.functional is None:
        return model
    apply_policy(
        model, f"mixed_{style.word}", overrides, functional=style.functional,
        cast_forward_inputs=style.cast_forward_inputs,
    )  # fmt: skip
    return _compiled(model, style, overrides)


def _masters(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    apply_policy(model, f"master_{style.word}", overrides)
    return _compiled(model, style, overrides)


def _kahan(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    apply_policy(model, f"kahan_{style.word}", overrides)
    return _compiled(model, style, overrides)


def _rewritten(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    return autocast(model, f"mixed_{style.word}", backend=style.backend or "inductor")


class Throughout(nn.Module):
    """A model with 16-bit weights, between a cast of its inputs and one of its outputs.

    It is no mixed precision, and it does not train well. It makes no cast that can be left out and
    has no policy, so that no mixed precision of the same layers takes less time on the host.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x.to(self.dtype))
        return result.float()


def _throughout(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    return Throughout(model, style.dtype)


def _unscaled(optimizer: Optimizer, device: str, max_norm: float | None) -> Plain:
    return Plain(optimizer, max_norm)


def _transformer_engine(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    """Put its layers in the place of torch's, with the same weights."""
    import transformer_engine.pytorch as te

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features
                new = te.Linear(*sizes, bias=child.bias is not None, device=child.weight.device)
            elif type(child) is nn.LayerNorm:
                new = te.LayerNorm(child.normalized_shape[0], device=child.weight.device)
            else:
                continue
            new.load_state_dict(child.state_dict(), strict=False)
            setattr(parent, name, new)
    return model


def _float8(model: nn.Module, style: Style, overrides: Overrides) -> nn.Module:
    from torchao.float8 import convert_to_float8_training

    return _compiled(convert_to_float8_training(model), style, overrides)


def _nothing(style: Style, device: str) -> AbstractContextManager[Any]:
    return nullcontext()


def _autocast(style: Style, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype=style.dtype)


@contextmanager
def _cuda_lists(style: Style, device: str) -> Iterator[None]:
    with torch.autocast(device, dtype=style.dtype), CudaLists():
        yield


def _cuda_lists_inside(style: Style, device: str) -> AbstractContextManager[Any]:
    return CudaLists()


def _fabric(style: Style, device: str) -> AbstractContextManager[Any]:
    from lightning_fabric.plugins.precision import MixedPrecision

    precision: Any = "16-mixed" if style.scales else "bf16-mixed"
    scaler = torch.amp.GradScaler(device) if style.scales else None
    return MixedPrecision(precision, device, scaler).forward_context()


def _grad_scaler(optimizer: Optimizer, device: str, max_norm: float | None) -> Plain:
    return Amp(optimizer, torch.amp.GradScaler(device), max_norm)


def _loss_scaled(optimizer: Optimizer, device: str, max_norm: float | None) -> Plain:
    return Halfstep(LossScaleOptimizer(optimizer, "dynamic", max_norm=max_norm))


def _wrapped(optimizer: Optimizer, device: str, max_norm: float | None) -> Plain:
    return Halfstep(LossScaleOptimizer(optimizer, max_norm=max_norm))  # what the policy wants


def _skipping_on_device(optimizer: Optimizer, device: str, max_norm: float | None) -> Plain:
    return Halfstep(LossScaleOptimizer(optimizer, "dynamic", max_norm=max_norm, skip="device"))


@dataclass(frozen=True)
class Family:
    """How all styles of one kind are trained: a row of `FAMILIES`.

    Attributes:
        prepare: makes the model what is trained.
        context: what a forward pass and its loss run in.
        scaled: how a step is taken with a loss scale; without one it is the optimizer's own.
        always: whether a step is taken so without a loss scale too.
        needs: the module that must be installed.
        compiles: whether it has no eager form.
    """

    prepare: Prepare = _compiled
    context: Context = _autocast
    scaled: Scaled = _grad_scaler
    always: bool = False
    needs: str | None = None
    compiles: bool = False


FAMILIES: dict[Kind, Family] = {
    "float32": Family(context=_nothing),
    "torch.amp": Family(),
    "torch.amp, CUDA's lists": Family(context=_cuda_lists),
    "halfstep": Family(_policied, _nothing, _loss_scaled),
    "halfstep, CUDA's lists": Family(_policied, _cuda_lists_inside, _loss_scaled),
    "halfstep, skip='device'": Family(_policied, _nothing, _skipping_on_device),
    "halfstep masters": Family(_masters, _nothing, _wrapped, always=True),
    "halfstep Kahan": Family(_kahan, _nothing, _wrapped, always=True),
    "halfstep rewrite": Family(_rewritten, _nothing, _loss_scaled, compiles=True),
    "16 bits throughout": Family(_throughout, _nothing, _unscaled),
    # its optimizer_step is GradScaler's step and update
    "Fabric": Family(context=_fabric, needs="lightning_fabric"),
    "Transformer Engine": Family(_transformer_engine, needs="transformer_engine"),
    "torchao float8": Family(_float8, needs="torchao", compiles=True),
}
"""One row a kind; a new way to train is a new row, and a style in `styles_of` or `compiled`."""


def styles_of(device: str, streams: bool = False) -> tuple[Style, ...]:
    """Return the eager styles.

    Args:
        device: CUDA's lists need no emulation on an accelerator.
        streams: whether the model's float32 inputs start a residual stream, which is then measured
            in 16 bits too.
    """
    found = [Style("float32")]
    for dtype in LOW:
        ours = [Style("halfstep", dtype, "autocast"), Style("halfstep", dtype, "compute")]
        if streams:
            ours.append(Style("halfstep", dtype, "autocast", cast_forward_inputs=True))
        found += [Style("torch.amp", dtype), *ours]
        if device == "cpu":  # functional="compute" follows no lists
            listed = [each for each in ours if each.functional == "autocast"]
            found += [
                Style("torch.amp, CUDA's lists", dtype, timed=False),
                *(replace(each, kind="halfstep, CUDA's lists", timed=False) for each in listed),
            ]
    return tuple(found)


def compiled(backend: str, dtypes: tuple[torch.dtype, ...] = LOW) -> tuple[Style, ...]:
    """Return the compiled styles."""
    found = [Style("float32", backend=backend)]
    for dtype in dtypes:
        found += [
            Style("torch.amp", dtype, backend=backend),
            Style("halfstep", dtype, "autocast", backend=backend),
            Style("halfstep", dtype, "compute", backend=backend),
            Style("halfstep rewrite", dtype, backend=backend),
        ]
    return tuple(found)
