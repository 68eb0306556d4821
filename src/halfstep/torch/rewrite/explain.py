"""What a rewrite does to a model, operation by operation, as a table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...core.paint import Explanation, Row, Rule
from ...core.policy import Policy, PolicyMap
from .autocast import settings_of
from .build import name_of, results_of
from .came_of_it import check, uncaptured
from .painting import Painted
from .paths import source_line
from .regions import depth
from .settings import Settings, make_settings


@dataclass(frozen=True)
class GraphExplanation(Explanation):
    """What was painted and why, in every graph that Dynamo made of a model.

    Attributes:
        graphs: how many graphs there are; between two of them tensors are float32.
        breaks: why Dynamo ended a graph before the model ended, one line each.
        uncaptured: modules that are in no graph and run in float32, as ``path (Class)``.
    """

    graphs: int = 1
    breaks: tuple[str, ...] = ()
    uncaptured: tuple[str, ...] = ()

    def __str__(self) -> str:
        seams = f"graphs: {self.graphs}, float32 between them" if self.graphs > 1 else "graphs: 1"
        lines = [super().__str__(), seams, *(f"graph break: {reason}" for reason in self.breaks)]
        if self.uncaptured:
            lines.append(f"not captured or not called, so float32: {', '.join(self.uncaptured)}")
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    policy: Policy | PolicyMap | str = "mixed_bfloat16",
    *,
    allow: Iterable[object] = (),
    deny: Iterable[object] = (),
    level: str = "full",
    backend: str = "inductor",
) -> Callable[..., GraphExplanation]:
    """Return a function that says, for the same arguments, what runs in which dtype and why.

    The model is captured and its graphs, forward and backward together, are painted as
    :func:`autocast` paints them; then they run once, uncompiled. Buffers, random state and
    gradients are afterwards as they were; what the model writes into its arguments stays written.

    Args:
        model: a module or function, or what :func:`autocast` returned, whose own arguments then
            hold.
        policy: as for :func:`autocast`, like all that follow.
        allow: operations to run in 16 bits.
        deny: operations to keep in float32.
        level: ``"full"`` or ``"matrix_products"``.
        backend: Inductor takes operations apart before they are painted, ``"aot_eager"`` does
            not, so their rows differ.

    Returns:
        A function of the model's arguments that returns a :class:`GraphExplanation`; ``print``
        shows it as a table.

    Raises:
        PolicyError: as for :func:`autocast`.

    >>> import torch
    >>> from halfstep.torch import explain
    >>> def attention(q, k):
    ...     return torch.softmax(q @ k.mT, -1) * 2
    >>> x = torch.ones(2, 2)
    >>> for row in explain(attention, backend="aot_eager")(x, x).rows:
    ...     print(f"{row.operation:10}{row.dtype:9}", row.why.partition(":")[0])
    transpose bfloat16  every use of it is in 16 bits
    mm        bfloat16  on the allow list
    _softmax  float32   on the deny list
    mul       float32   computes with the result of a denied operation
    """
    settings = settings_of(model) or make_settings(model, policy, allow, deny, level, backend)

    def explained(*args: Any, **kwargs: Any) -> GraphExplanation:
        from .backend import explaining
        from .watch import recompile_limit_reached, without_fast_path

        painter = settings.painter(keep=True)
        compiled: Any = torch.compile(
            _anew(settings.model), backend=explaining(painter, settings.backend)
        )
        painter.regions.outside, since = depth(), time.time_ns()
        with _counted_breaks() as breaks, _as_it_was(settings.model), without_fast_path():
            compiled(*args, **kwargs)
        if recompile_limit_reached(since):
            breaks.append("recompile limit: what no graph fits runs uncompiled, in float32")
        check(settings, painter, warn=False)
        return _explanation(settings, painter.painted, breaks, uncaptured(settings, painter))

    return explained


def _anew(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls the model and has never been compiled.

    Dynamo keeps what it compiled by code object, and gives up after a few for the same one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


@contextlib.contextmanager
def _counted_breaks() -> Iterator[list[str]]:
    """Tell the graph breaks that Dynamo counts meanwhile, by the first line of each reason."""
    from torch._dynamo.utils import counters

    breaks: list[str] = []
    before = dict(counters["graph_break"])
    yield breaks
    for reason, count in counters["graph_break"].items():
        if count > before.get(reason, 0):
            breaks.append(reason.strip().partition("\n")[0])


@contextlib.contextmanager
def _as_it_was(model: Callable[..., Any]) -> Iterator[None]:
    """Put back what a forward pass changes: buffers and random state."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    registers = [(module._buffers, dict(module._buffers)) for module in modules]
    buffers = [buffer for _, own in registers for buffer in own.values() if buffer is not None]
    copies = [buffer.detach().clone() for buffer in buffers]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for register, own in registers:  # a forward may have put others in their place
                register.update(own)
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)


def _explanation(
    settings: Settings, painted: list[Painted], breaks: list[str], missed: list[str]
) -> GraphExplanation:
    rows = tuple(
        _row(each, node, settings.dtype) for each in painted for node in each.program.nodes
    )
    return GraphExplanation(
        rows,
        settings.dtype,
        casts=sum(each.rewritten.casts for each in painted),
        cast_bytes=sum(each.rewritten.cast_bytes for each in painted),
        graphs=len(painted),
        breaks=tuple(breaks),
        uncaptured=tuple(missed),
    )


def _row(painted: Painted, node: fx.Node, dtype: str) -> Row:
    number = painted.program.nodes[node]
    verdict = painted.painting.verdicts[number]
    why = str(verdict)
    if verdict.rule is Rule.AFTER_DENY and verdict.root is not None:
        why = f"{why}: {painted.program.graph.nodes[verdict.root].name}"
    first = next((made for _, made in results_of(node) if isinstance(made, Tensor)), None)
    return Row(
        source=source_line(node),
        path=painted.paths.get(node) or "",
        operation=name_of(node),
        shape="x".join(map(str, getattr(first, "shape", ()))) or "scalar",
        dtype=dtype if painted.painting.low[number] else "float32",
        why=why,
        flops=_flops(node),
    )


def _flops(node: fx.Node) -> int:
    """Multiplications and additions of a matrix product or convolution; 0 for all else."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"]))
