"""From a jaxpr to the painter's graph and the steps of a program."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any

import numpy as np

from ..core.paint import Graph, Kind, Node, OperationLists
from . import _internals as internals
from .flops import flops
from .operations import ADDITIONS, STILL_ARGUMENTS, kind_of
from .program import About, Link, Place, Program, Region, Slot, Step

_MOST_CHECKED = 2**22  # elements of a captured array that are looked at for misfits


def build(
    closed: internals.ClosedJaxpr,
    lists: OperationLists,
    low_inputs: Sequence[bool] = (),
    paths: Sequence[str] = (),
) -> Program:
    """Return the program of a closed jaxpr.

    Args:
        closed: what tracing gave.
        lists: the kind of every primitive.
        low_inputs: for each input, whether it arrives in 16 bits though it was traced in float32.
        paths: for each input, its path among the arguments of the function.
    """
    builder = _Builder(lists)
    lows = low_inputs or [False] * len(closed.jaxpr.invars)
    args = [
        builder.input(var.aval, low) for var, low in zip(closed.jaxpr.invars, lows, strict=True)
    ]
    builder.paths.update(zip(args, paths, strict=False))
    region = builder.region(closed, args, (), args)
    return Program(
        builder.graph, builder.slots, builder.constants, region, builder.about, builder.places,
        builder.rules, builder.foreign_products,
    )  # fmt: skip


class _Builder:
    def __init__(self, lists: OperationLists) -> None:
        self.lists = lists
        self.graph = Graph()
        self.slots: list[Slot] = []
        self.constants: dict[int, Any] = {}
        self.about: dict[int, About] = {}
        self.places: dict[int, Place] = {}
        self.rules: list[Place] = []
        self.paths: dict[int, str] = {}
        self.foreign_products: set[str] = set()
        self.trips = 1

    # slots

    def slot(self, aval: Any) -> int:
        value = None
        if internals.is_float32(aval):
            value = self.graph.value(math.prod(aval.shape) * self.trips)
        self.slots.append(Slot(aval, value))
        return len(self.slots) - 1

    def input(self, aval: Any, low: bool) -> int:
        number = self.slot(aval)
        value = self.slots[number].value
        if value is not None and low:
            self.graph.add(Node("input", Kind.LOW, results=(value,)))
        elif value is not None:
            self.graph.add(Node("input", Kind.OPAQUE, fixed_results=(value,), because="an input"))
        return number

    def literal(self, atom: Any) -> int:
        value = None
        if internals.is_float32(atom.aval):
            value = self.graph.value(0, np.asarray(atom.val, np.float32))
        self.slots.append(Slot(atom.aval, value, literal=atom.val))
        return len(self.slots) - 1

    def captured(self, var: Any, array: Any) -> int:
        number = self.slot(var.aval)
        self.constants[number] = array
        value = self.slots[number].value
        if value is not None:
            known = _known_numbers(array)
            # made by an input, so that it is cast once; its numbers still have to fit
            self.graph.values[value] = replaced(self.graph.values[value], constant=known)
            self.graph.add(
                Node("input", Kind.OPAQUE, fixed_results=(value,), because="a captured array")
            )
        return number

    def values(self, slots: Sequence[int]) -> tuple[int, ...]:
        found = (self.slots[slot].value for slot in slots)
        return tuple(value for value in found if value is not None)

    def link(
        self, name: str, args: Sequence[int], results: Sequence[int], carries: bool = False
    ) -> Link:
        node = None
        if self.slots[results[0]].value is not None:
            node = self.graph.add(
                Node(
                    name, Kind.CLEAR, self.values(args), self.values(results), carries=carries,
                    because="between a body and its outside",
                )
            )  # fmt: skip
        return Link(tuple(args), tuple(results), node)

    def taken(self, args: Sequence[int]) -> tuple[str, ...]:
        """The paths of the function's arguments among these."""
        return tuple(dict.fromkeys(self.paths[slot] for slot in args if slot in self.paths))

    def same(self, args: Iterable[int], results: Iterable[int]) -> None:
        """What an argument of the function becomes, one by one, is that argument still."""
        for arg, result in zip(args, results, strict=False):
            if arg in self.paths:
                self.paths[result] = self.paths[arg]

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        before = self.trips
        self.trips *= max(times, 1)
        try:
            yield
        finally:
            self.trips = before

    # bodies

    def region(
        self,
        closed: internals.ClosedJaxpr,
        args: Sequence[int],
        names: tuple[str, ...],
        own: Sequence[int] = (),
    ) -> Region:
        """A body with its arguments' slots; ``own`` are those that its caller fills."""
        steps: list[Step] = []
        outs = self.inline(closed.jaxpr, closed.consts, args, names, None, steps)
        return Region(tuple(own), tuple(steps), tuple(outs))

    def inline(
        self,
        jaxpr: internals.Jaxpr,
        consts: Sequence[Any],
        args: Sequence[int],
        names: tuple[str, ...],
        stack: internals.NameStack | None,
        steps: list[Step],
    ) -> list[int]:
        """Add the steps of a body to those of its caller; return the slots of its results.

        ``names`` are all the scopes around the body, ``stack`` those within the region.
        """
        env: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.captured(var, const)

        def read(atom: Any) -> int:
            return self.literal(atom) if isinstance(atom, internals.Literal) else env[atom]

        for equation in jaxpr.eqns:
            own = internals.name_stack(equation)
            taken = [read(atom) for atom in equation.invars]
            call = _Call(
                equation,
                own if stack is None else stack + own,
                (*names, *internals.scope_names(own)),
                taken,
                self.taken(taken),
            )
            handler = _HANDLERS.get(equation.primitive.name, _apply)
            env.update(zip(equation.outvars, handler(self, call, steps), strict=True))
        return [read(atom) for atom in jaxpr.outvars]


@dataclass(frozen=True, slots=True)
class _Call:
    equation: internals.Equation
    stack: internals.NameStack
    names: tuple[str, ...]
    args: list[int]
    takes: tuple[str, ...]

    @property
    def place(self) -> Place:
        return Place(self.names, self.takes)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.equation.params)

    def step(self, kind: str, results: Sequence[int], **fields: Any) -> Step:
        return Step(
            kind, self.equation, self.stack, self.place, tuple(self.args), tuple(results), **fields
        )

    def outputs(self, builder: _Builder) -> list[int]:
        return [builder.slot(var.aval) for var in self.equation.outvars]


def _known_numbers(array: Any) -> Any:
    if not internals.is_concrete(array) or getattr(array, "size", 1) > _MOST_CHECKED:
        return None
    if not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array, np.float32)


def _apply(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    """An equation without a body that is painted."""
    name = call.equation.primitive.name
    results = call.outputs(builder)
    args, made = builder.values(call.args), builder.values(results)
    node = None
    if args or made:
        kind, because = kind_of(call.equation, builder.lists)
        follows = kind is not Kind.OPAQUE
        node = builder.graph.add(
            Node(
                name, kind, because=because, accumulates=name in ADDITIONS,
                args=args if follows else (), results=made if follows else (),
                fixed_args=() if follows else args, fixed_results=() if follows else made,
            )
        )  # fmt: skip
        aval = (call.equation.outvars or call.equation.invars)[0].aval
        builder.about[node] = About(
            call.equation, call.place, aval, flops(call.equation) * builder.trips
        )
        builder.places[node] = call.place
        if name in STILL_ARGUMENTS:
            builder.same(call.args, results)
    elif builder.lists.kind(name)[0] is Kind.ALLOW:
        builder.foreign_products.add(str(call.equation.outvars[0].aval.dtype))
    steps.append(call.step("apply", results, node=node))
    return results


def _inlined(parameter: str) -> Callable[[_Builder, _Call, list[Step]], list[int]]:
    def handler(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
        body = call.params[parameter]
        jaxpr, consts = (body.jaxpr, body.consts) if hasattr(body, "consts") else (body, ())
        return builder.inline(jaxpr, consts, call.args, call.names, call.stack, steps)

    return handler


def _jit(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    """Inlined, so that paint crosses its border; kept where it asks for shardings."""
    shardings = (*call.params["in_shardings"], *call.params["out_shardings"])
    if all(internals.is_unspecified(sharding) for sharding in shardings):
        return _inlined("jaxpr")(builder, call, steps)
    return _linked("jit", lambda params: params["jaxpr"], lambda _: 0)(builder, call, steps)


def _remat(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    closed = _Closed(call.params["jaxpr"])
    body = builder.region(closed, call.args, call.names)
    results = call.outputs(builder)
    # a result has its own slot, so that the outside can hold it in both dtypes
    links = tuple(
        builder.link("remat result", (inner,), (outer,))
        for inner, outer in zip(body.outs, results, strict=True)
    )
    steps.append(call.step("remat", results, bodies=(body,), links={"outs": links}))
    return results


@dataclass(frozen=True, slots=True)
class _Closed:
    jaxpr: internals.Jaxpr
    consts: tuple[Any, ...] = ()


def _scan(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    params, body = call.params, call.params["jaxpr"]
    consts, carries = params["num_consts"], params["num_carry"]
    start, xs = call.args[consts : consts + carries], call.args[consts + carries :]
    results = call.outputs(builder)
    with builder.repeated(params["length"]):
        inside = [builder.slot(var.aval) for var in body.jaxpr.invars[consts:]]
        builder.same(xs, inside[carries:])
        region = builder.region(body, [*call.args[:consts], *inside], call.names, inside)
    links = {
        "carry": tuple(
            builder.link("scan carry", (start[i], region.outs[i]), (inside[i], results[i]), True)
            for i in range(carries)
        ),
        "xs": tuple(
            builder.link("scan input", (outer,), (inner,))
            for outer, inner in zip(xs, inside[carries:], strict=True)
        ),
        "ys": tuple(
            builder.link("scan output", (inner,), (outer,))
            for inner, outer in zip(region.outs[carries:], results[carries:], strict=True)
        ),
    }
    steps.append(call.step("scan", results, bodies=(region,), links=links))
    return results


def _while(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    params = call.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    inside = [builder.slot(var.aval) for var in body.jaxpr.invars[params["body_nconsts"] :]]
    tests = builder.region(condition, [*call.args[:first], *inside], call.names, inside)
    region = builder.region(body, [*call.args[first:second], *inside], call.names, inside)
    results = call.outputs(builder)
    links = tuple(
        builder.link("while carry", (start, out), (inner, result), True)
        for start, out, inner, result in zip(
            call.args[second:], region.outs, inside, results, strict=True
        )
    )
    steps.append(call.step("while", results, bodies=(tests, region), links={"carry": links}))
    return results


def _cond(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
    bodies = tuple(
        builder.region(branch, call.args[1:], call.names) for branch in call.params["branches"]
    )
    results = call.outputs(builder)
    links = tuple(
        builder.link("cond output", [body.outs[i] for body in bodies], (result,))
        for i, result in enumerate(results)
    )
    steps.append(call.step("cond", results, bodies=bodies, links={"outs": links}))
    return results


def _linked(
    kind: str,
    body_of: Callable[[dict[str, Any]], Any],
    consts_of: Callable[[dict[str, Any]], int],
    times_of: Callable[[dict[str, Any]], int] = lambda _: 1,
) -> Callable[[_Builder, _Call, list[Step]], list[int]]:
    """A body whose arguments and results keep their places, each with a link."""

    def handler(builder: _Builder, call: _Call, steps: list[Step]) -> list[int]:
        body, consts = body_of(call.params), consts_of(call.params)
        with builder.repeated(times_of(call.params)):
            inside = [builder.slot(var.aval) for var in body.jaxpr.invars[consts:]]
            builder.same(call.args[consts:], inside)
            region = builder.region(body, [*call.args[:consts], *inside], call.names, inside)
        builder.rules.append(call.place)
        results = call.outputs(builder)
        links = {
            "args": tuple(
                builder.link(f"{kind} argument", (outer,), (inner,))
                for outer, inner in zip(call.args[consts:], inside, strict=True)
            ),
            "outs": tuple(
                builder.link(f"{kind} result", (inner,), (outer,))
                for inner, outer in zip(region.outs, results, strict=True)
            ),
        }
        steps.append(call.step(kind, results, bodies=(region,), links=links))
        return results

    return handler


def _shards(params: dict[str, Any]) -> int:
    sizes = dict(params["mesh"].shape)
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])


_HANDLERS: dict[str, Callable[[_Builder, _Call, list[Step]], list[int]]] = {
    "jit": _jit,
    "closed_call": _inlined("call_jaxpr"),
    "core_call": _inlined("call_jaxpr"),
    "call": _inlined("call_jaxpr"),
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _linked(
        "custom_jvp", lambda params: params["call_jaxpr"], lambda params: params["num_consts"]
    ),
    "custom_vjp_call": _linked(
        "custom_vjp", lambda params: params["call_jaxpr"], lambda params: params["num_consts"]
    ),
    "shard_map": _linked(
        "shard_map", lambda params: _Closed(params["jaxpr"]), lambda _: 0, _shards
    ),
}
