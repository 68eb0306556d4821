"""A traced function as steps over slots, ready to be painted and run.

Values are *slots*: one per variable and call, so that a body that is called twice is painted
twice. The bodies of ``jit`` and ``remat`` and the invariants of loops use the slots of the
outside; where a body has slots of its own (a loop's carry, the slices of a scan, the arguments
of a custom rule) a *link*, a clear node, stands between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.paint import Graph
from . import _internals as internals


@dataclass(frozen=True, slots=True)
class Place:
    """Where an equation stands, for the policies.

    Attributes:
        names: the names of all scopes around it.
        takes: the paths of the function's arguments that it takes, as they came or only moved.
    """

    names: tuple[str, ...]
    takes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """A value of the program.

    Attributes:
        aval: its abstract value.
        value: its number in the painter's graph, ``None`` unless it is an array of float32.
        literal: the number itself, for a literal of the program.
    """

    aval: Any
    value: int | None
    literal: Any = None


@dataclass(frozen=True, slots=True)
class Link:
    """Slots outside and inside of a body that are the same value.

    Attributes:
        args: slots that flow in.
        results: slots that flow out.
        node: the clear node between them, ``None`` unless they are arrays of float32.
    """

    args: tuple[int, ...]
    results: tuple[int, ...]
    node: int | None


@dataclass(frozen=True, slots=True)
class Region:
    """A body: the slots that its caller fills, its steps, and the slots that it returns."""

    args: tuple[int, ...]
    steps: tuple[Step, ...]
    outs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One equation.

    Attributes:
        kind: how to run it: ``"apply"``, or the name of a primitive with bodies.
        equation: the equation.
        stack: the name scopes around it, within its region.
        place: where it stands.
        args, results: its slots.
        node: its node, for ``"apply"``; ``None`` when it touches no float32.
        bodies: the bodies.
        links: the links between the slots outside and inside, by what they carry.
    """

    kind: str
    equation: internals.Equation
    stack: internals.NameStack
    place: Place
    args: tuple[int, ...]
    results: tuple[int, ...]
    node: int | None = None
    bodies: tuple[Region, ...] = ()
    links: dict[str, tuple[Link, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class About:
    """What an explanation says about a node beside its colour."""

    equation: internals.Equation
    place: Place
    aval: Any
    flops: int


@dataclass
class Program:
    """A traced function, ready to be painted.

    Attributes:
        graph: the painter's graph.
        slots: every value.
        constants: arrays that the function captured, by slot.
        region: the whole of it.
        about: where each node comes from; links and boundaries are not in it.
        places: where each node stands.
        rules: where each function with its own derivative stands: its rules are painted later.
        foreign_products: dtypes of the matrix products that are not in float32.
    """

    graph: Graph
    slots: list[Slot]
    constants: dict[int, Any]
    region: Region
    about: dict[int, About]
    places: dict[int, Place]
    rules: list[Place]
    foreign_products: set[str]
