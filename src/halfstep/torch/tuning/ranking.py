"""Which layers are the likeliest to need more than 16 bits: what their numbers would lose there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.numerics import ExponentHistogram, advise_loss_scale
from ...core.numerics.histogram import FormatFit
from ..blaming.looking import tensors_in, values_of
from ..blaming.operations import ALLOCATIONS, Kind, base_name, kind_of
from ..blaming.places import Places, clean_path
from ..eager import eagerly
from .layers import Layers

SAMPLE = 4096
"""Of each result so many values are counted, evenly spread, and its largest and its smallest."""


class Collector(TorchDispatchMode):
    """Histograms of the results of every operation, by the module that it belongs to.

    Attributes:
        forward: by path, of the forward pass.
        backward: by path, of the backward pass: gradients.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = places
        self.forward: dict[str, ExponentHistogram] = {}
        self.backward: dict[str, ExponentHistogram] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count its results."""
        place, node = self._places.here()
        result = func(*args, **(kwargs or {}))
        if place.kind and kind_of(func) is not Kind.VIEW and base_name(func) not in ALLOCATIONS:
            counts = self.backward if node else self.forward
            for tensor in tensors_in(result):
                if tensor.is_floating_point():
                    before = counts.get(place.path, ExponentHistogram())
                    counts[place.path] = before + _sampled(tensor)
        return result


def _sampled(tensor: Tensor) -> ExponentHistogram:
    values = values_of(tensor)
    if values is None or not values.numel():
        return ExponentHistogram()
    flat = values.detach().reshape(-1).float()
    if flat.numel() > SAMPLE:
        magnitude = flat.abs()
        small = torch.where(magnitude > 0, magnitude, magnitude.amax()).amin()
        step = flat.numel() // SAMPLE
        flat = torch.cat([flat[::step], magnitude.amax()[None], small[None]])
    return ExponentHistogram.from_array(flat.cpu().numpy())


@dataclass
class Observations:
    """What was counted while a model trained in float32 on a few batches."""

    forward: dict[str, ExponentHistogram] = field(default_factory=dict)
    backward: dict[str, ExponentHistogram] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what ``model`` computes inside a ``with`` block."""
        places = Places(model)
        collector = Collector(places)
        for name, parameter in model.named_parameters():
            path = clean_path(name.rpartition(".")[0])
            collector.forward[path] = collector.forward.get(path, ExponentHistogram()) + _sampled(
                parameter
            )
        with eagerly(), places.followed(), collector:
            yield
        for mine, new in (
            (self.forward, collector.forward),
            (self.backward, collector.backward),
        ):
            for path, histogram in new.items():
                mine[path] = mine.get(path, ExponentHistogram()) + histogram

    def loss_scale(self, format: str) -> float:
        """Return the loss scale that the gradients ask for; 1 where there were none."""
        return advise_loss_scale(self.backward, format).scale or 1.0

    def ranked(self, layers: Layers, format: str, scale: float) -> tuple[Suspect, ...]:
        """Return every candidate, the one that loses most in a format first.

        What overflows comes before what is flushed to zero, for one infinity is enough.
        """
        forward, backward = _by_layer(self.forward, layers), _by_layer(self.backward, layers)
        nothing = ExponentHistogram()
        suspects = [
            Suspect(
                name,
                forward.get(name, nothing).fit(format),
                backward.get(name, nothing).fit(format, scale),
            )
            for name in layers.names
        ]
        return tuple(sorted(suspects, key=lambda suspect: suspect.rank, reverse=True))


@dataclass(frozen=True)
class Suspect:
    """A candidate and what its numbers would lose.

    Attributes:
        name: the candidate.
        forward: of the results of its operations.
        backward: of the gradients in it, at the loss scale.
    """

    name: str
    forward: FormatFit
    backward: FormatFit

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts: the share that overflows, then the share flushed to zero."""
        both = (self.forward, self.backward)
        return (
            max(fit.share(fit.overflow) for fit in both),
            max(fit.share(fit.flushed) for fit in both),
        )

    @property
    def evidence(self) -> str:
        """What is lost, in words; empty if nothing is."""
        parts = [
            f"{what}, {fit}"
            for what, fit in (("results", self.forward), ("gradients", self.backward))
            if fit.lost
        ]
        return "; ".join(parts)


def _by_layer(
    histograms: Mapping[str, ExponentHistogram], layers: Layers
) -> dict[str, ExponentHistogram]:
    found: dict[str, ExponentHistogram] = {}
    for path, histogram in histograms.items():
        name = layers.named(path)
        if name is not None:
            found[name] = found.get(name, ExponentHistogram()) + histogram
    return found
