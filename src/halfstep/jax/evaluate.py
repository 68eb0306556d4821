"""Running a painted program: each step on operands of its own dtype, each value cast once.

It runs under whatever transformation stands around it (``jit``, ``grad``, ``vmap``, ...), as the
function itself would. Bodies are traced again by JAX's own control flow. What a body reads from
outside is cast outside, before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..core.paint import Painting
from . import _internals as internals
from .program import Link, Program, Region, Step

Read: TypeAlias = "tuple[int, bool]"
"""A slot, and whether it is wanted in 16 bits."""

_SUMMED_WHEN_TRANSPOSED = ("pvary",)
_DTYPE_PARAMS = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")


class Painted:
    """A program with its colours.

    Args:
        program: the program.
        painting: its painting.
        dtype: the 16-bit dtype.
        custom: how to run a custom rule's step: see :mod:`.custom_rules`.
    """

    def __init__(
        self,
        program: Program,
        painting: Painting,
        dtype: str,
        custom: Callable[[Painted, Step, Frame], list[Any]],
    ) -> None:
        self.program = program
        self.painting = painting
        self.dtype = jnp.dtype(dtype)
        self.custom = custom
        self._outside: dict[tuple[int, int], tuple[Read, ...]] = {}

    def low(self, slot: int) -> bool:
        """Whether the program makes this slot in 16 bits."""
        value = self.program.slots[slot].value
        return value is not None and self.painting.low_values[value]

    def read(self, slot: int, low: bool) -> Read:
        """The slot in that dtype; one that is no array of float32 has only its own."""
        return slot, low and self.program.slots[slot].value is not None

    def link_low(self, link: Link) -> bool:
        """Whether a link hands its value on in 16 bits."""
        return link.node is not None and self.painting.low[link.node]

    def step_low(self, step: Step) -> bool:
        """Whether a step without a body runs in 16 bits."""
        return step.node is not None and self.painting.low[step.node]

    def args_low(self, step: Step) -> bool:
        """Whether it takes 16 bits: the derivative of some is a sum over devices, in float32."""
        name = step.equation.primitive.name
        return self.step_low(step) and name not in _SUMMED_WHEN_TRANSPOSED

    def outside(self, step: Step, number: int) -> tuple[Read, ...]:
        """What a body of a step reads that is not its own, in the dtypes in which it does."""
        key = (id(step), number)
        if key not in self._outside:
            region = step.bodies[number]
            own = set(region.args)
            reads: dict[Read, None] = {}
            for inner in region.steps:
                reads.update(dict.fromkeys(self._reads(inner)))
                own.update(inner.results)
            reads.update(dict.fromkeys(self._returned(step, number)))
            self._outside[key] = tuple(
                read
                for read in reads
                if read[0] not in own and self.program.slots[read[0]].literal is None
            )
        return self._outside[key]

    def _reads(self, step: Step) -> Iterable[Read]:
        """What a step reads of the body that it stands in."""
        if step.kind == "apply":
            yield from (self.read(slot, self.args_low(step)) for slot in step.args)
        elif step.kind == "cond":
            yield step.args[0], False
        for name in ("carry", "xs", "args"):
            for link in step.links.get(name, ()):
                yield self.read(link.args[0], self.link_low(link))
        for number in range(len(step.bodies)):
            yield from self.outside(step, number)

    def _returned(self, step: Step, number: int) -> Iterable[Read]:
        """What a body hands back to its step."""
        if step.kind == "while" and number == 0:
            yield step.bodies[0].outs[0], False
            return
        which = {"carry": 1, "ys": 0, "outs": number}
        for name, position in which.items():
            for link in step.links.get(name, ()):
                yield self.read(link.args[position], self.link_low(link))


class Frame:
    """The values of one body while it runs, in one or both dtypes."""

    def __init__(self, painted: Painted, outer: Frame | None = None) -> None:
        self.painted = painted
        self._outer = outer
        self._values: dict[Read, Any] = {}

    def write(self, slot: int, array: Any) -> None:
        """Store a value that arrives in the slot's own dtype."""
        self._values[slot, self.painted.low(slot)] = array

    def give(self, reads: Iterable[Read], arrays: Iterable[Any]) -> None:
        """Store values that arrive in the dtypes that were asked for."""
        self._values.update(zip(reads, arrays, strict=True))

    def write_as(self, slots: Sequence[int], arrays: Iterable[Any]) -> None:
        """Store values in order."""
        for slot, array in zip(slots, arrays, strict=True):
            self.write(slot, array)

    def read(self, slot: int, low: bool) -> Any:
        """The value in 16 bits or as it is in the traced program; cast once."""
        read = self.painted.read(slot, low)
        found = self._find(read)
        if found is None:
            found = self._values[read] = self._cast(*read)
        return found

    def _find(self, read: Read) -> Any:
        frame: Frame | None = self
        while frame is not None:
            found = frame._values.get(read)
            if found is not None:
                return found
            frame = frame._outer
        return None

    def _cast(self, slot: int, low: bool) -> Any:
        painted = self.painted
        about = painted.program.slots[slot]
        dtype = painted.dtype if low else jnp.dtype("float32")
        if about.literal is not None:
            return np.asarray(about.literal).astype(dtype) if low else about.literal
        if slot in painted.program.constants and not low:
            return painted.program.constants[slot]
        other = self._find((slot, not low))
        if other is None:
            other = painted.program.constants[slot]
        return jax.lax.convert_element_type(other, dtype)

    def hoist(self, step: Step) -> None:
        """Cast here and now what the bodies of a step read from outside."""
        for number in range(len(step.bodies)):
            for slot, low in self.painted.outside(step, number):
                self.read(slot, low)

    def run(self, region: Region, arrays: Iterable[Any]) -> None:
        """Run a region on its arguments; its results are then read from this frame."""
        self.write_as(region.args, arrays)
        for step in region.steps:
            with internals.standing_at(step.equation, step.stack):
                self.write_as(step.results, _RUN.get(step.kind, _run_custom)(self, step))

    def links(self, links: Sequence[Link], which: int = 0) -> list[Any]:
        """Read the slots that flow into links, each in the link's dtype."""
        return [self.read(link.args[which], self.painted.link_low(link)) for link in links]


def _run_custom(frame: Frame, step: Step) -> list[Any]:
    return frame.painted.custom(frame.painted, step, frame)


def _run_apply(frame: Frame, step: Step) -> list[Any]:
    dtype, low = frame.painted.dtype, frame.painted.args_low(step)
    arrays = [frame.read(slot, low) for slot in step.args]
    params = step.equation.params
    if low:
        params = _low_params(params, dtype)
    results = internals.bind(step.equation, arrays, params)
    if low == frame.painted.step_low(step):
        return results
    return [jax.lax.convert_element_type(result, dtype) for result in results]


def _low_params(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters of an equation that was traced in float32, for 16-bit operands."""
    changed = {
        name: dtype
        for name in _DTYPE_PARAMS
        if params.get(name) is not None and params[name] == np.float32
    }
    if changed and "weak_type" in params:
        changed["weak_type"] = False
    if params.get("update_jaxpr") is not None:
        changed["update_jaxpr"] = internals.retraced(params["update_jaxpr"], dtype)
    return {**params, **changed}


def _run_scan(frame: Frame, step: Step) -> list[Any]:
    (region,) = step.bodies
    carry, ys = step.links["carry"], step.links["ys"]
    frame.hoist(step)

    def body(state: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        inner = Frame(frame.painted, frame)
        inner.run(region, (*state, *slices))
        return inner.links(carry, 1), inner.links(ys)

    params = step.equation.params
    final, stacked = jax.lax.scan(
        body, frame.links(carry), frame.links(step.links["xs"]),
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*final, *stacked]


def _run_while(frame: Frame, step: Step) -> list[Any]:
    tests, region = step.bodies
    carry = step.links["carry"]
    frame.hoist(step)

    def goes_on(state: Iterable[Any]) -> Any:
        inner = Frame(frame.painted, frame)
        inner.run(tests, state)
        return inner.read(tests.outs[0], False)

    def iterate(state: Iterable[Any]) -> list[Any]:
        inner = Frame(frame.painted, frame)
        inner.run(region, state)
        new = inner.links(carry, 1)
        return new if rank == 0 else _where_it_goes_on(goes_on(state), new, state)

    # under vmap a loop has a condition per example: it ends with the last of them
    rank = len(frame.painted.program.slots[tests.outs[0]].aval.shape)
    condition = goes_on if rank == 0 else lambda state: goes_on(state).any()
    return list(jax.lax.while_loop(condition, iterate, frame.links(carry)))


def _where_it_goes_on(goes_on: Any, new: Iterable[Any], old: Iterable[Any]) -> list[Any]:
    """The new state of the examples whose loop goes on, the old one of those that are done."""

    def select(one: Any, other: Any) -> Any:
        mask = goes_on.reshape(goes_on.shape + (1,) * (one.ndim - goes_on.ndim))
        return jnp.where(mask, one, other)

    return [select(one, other) for one, other in zip(new, old, strict=True)]


def _run_cond(frame: Frame, step: Step) -> list[Any]:
    outs = step.links["outs"]
    frame.hoist(step)

    def branch(number: int) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            inner = Frame(frame.painted, frame)
            inner.run(step.bodies[number], ())
            return inner.links(outs, number)

        return run

    index = frame.read(step.args[0], False)
    return list(jax.lax.switch(index, [branch(n) for n in range(len(step.bodies))]))


def _run_remat(frame: Frame, step: Step) -> list[Any]:
    """Bound as it is, not through ``jax.checkpoint``: it may be differentiated already."""
    (region,) = step.bodies
    outs = step.links["outs"]
    reads = _one_dtype_each(frame.painted, frame.painted.outside(step, 0))

    def run(*arrays: Any) -> list[Any]:
        inner = Frame(frame.painted)
        inner.give(reads, arrays)
        inner.run(region, ())
        return inner.links(outs)

    arrays = [frame.read(*read) for read in reads]
    jaxpr, constants = internals.without_constants(internals.trace(run, arrays))
    params = {**step.equation.params, "jaxpr": jaxpr}
    return internals.bind(step.equation, [*constants, *arrays], params)


def _one_dtype_each(painted: Painted, reads: Iterable[Read]) -> list[Read]:
    """What a rematerialized body is given is kept for the backward pass, so give it once."""
    wanted: dict[int, set[bool]] = {}
    for slot, low in reads:
        wanted.setdefault(slot, set()).add(low)
    return [(slot, painted.low(slot) or lows == {True}) for slot, lows in wanted.items()]


def _run_jit(frame: Frame, step: Step) -> list[Any]:
    """A ``jit`` with shardings: they hold as constraints."""
    params = step.equation.params
    inner = Frame(frame.painted, frame)
    given = frame.links(step.links["args"])
    inner.run(step.bodies[0], _constrained(given, params["in_shardings"]))
    return _constrained(inner.links(step.links["outs"]), params["out_shardings"])


def _constrained(arrays: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    return [
        array if internals.is_unspecified(sharding) else internals.constrained(array, sharding)
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


def _run_shard_map(frame: Frame, step: Step) -> list[Any]:
    (region,) = step.bodies
    params, links = step.equation.params, step.links["args"]
    frame.hoist(step)
    # what several devices hold is cast on each of them, so that its gradient is summed in float32
    own = [_is_divided(spec, params) for spec in params["in_specs"]]
    low = [frame.painted.link_low(link) for link in links]
    given = [
        frame.read(link.args[0], is_low and is_own)
        for link, is_low, is_own in zip(links, low, own, strict=True)
    ]

    def run(*arrays: Any) -> tuple[Any, ...]:
        inner = Frame(frame.painted, frame)
        whole = [n for n, is_own in enumerate(own) if low[n] and not is_own]
        inner.give(((region.args[n], False) for n in whole), (arrays[n] for n in whole))
        inner.run(
            region,
            [
                jax.lax.convert_element_type(array, frame.painted.dtype) if n in whole else array
                for n, array in enumerate(arrays)
            ],
        )
        return tuple(inner.links(step.links["outs"]))

    mapped = jax.shard_map(
        run, mesh=params["mesh"], in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]), axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )  # fmt: skip
    return list(mapped(*given))


def _is_divided(spec: Any, params: dict[str, Any]) -> bool:
    """Whether an argument of a ``shard_map`` is divided along all of its axes."""
    named = {
        name for part in spec if part is not None
        for name in (part if isinstance(part, tuple) else (part,))
    }  # fmt: skip
    return set(params["newly_manual_axes"]) <= named


_RUN: dict[str, Callable[[Frame, Step], list[Any]]] = {
    "apply": _run_apply,
    "scan": _run_scan,
    "while": _run_while,
    "cond": _run_cond,
    "remat": _run_remat,
    "jit": _run_jit,
    "shard_map": _run_shard_map,
}
