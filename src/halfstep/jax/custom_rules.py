"""Functions with their own derivatives: the body and the rules are painted, each by itself.

JAX traced the rules for float32. So a rule is differentiated there, as a function of its own, and
the program that comes out is painted with the dtypes that its arguments have now. What a rule
hands from its forward to its backward half keeps the dtype that its producer was painted in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import _internals as internals
from .evaluate import Frame, Painted
from .program import Step

Rewrite: TypeAlias = Callable[
    [Callable[..., Any], Sequence[Any], Sequence[bool], Callable[[int], Sequence[bool | None]]],
    list[Any],
]
"""Trace a function, paint it, and run it: see :meth:`.painting.Painter.inner`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One call of a function with its own derivative.

    Attributes:
        frame: where it stands.
        step: its step.
        rewrite: how to paint and run a rule.
    """

    frame: Frame
    step: Step
    rewrite: Rewrite

    @property
    def painted(self) -> Painted:
        """The program that it stands in."""
        return self.frame.painted

    @property
    def low_args(self) -> list[bool]:
        """For each argument, whether it is given in 16 bits."""
        return [self.painted.link_low(link) for link in self.step.links["args"]]

    @property
    def low_outs(self) -> list[bool]:
        """For each result, whether it is wanted in 16 bits."""
        return [self.painted.link_low(link) for link in self.step.links["outs"]]

    def arguments(self) -> list[Any]:
        """The arguments, in their dtypes."""
        return self.frame.links(self.step.links["args"])

    def body(self, *arrays: Any) -> tuple[Any, ...]:
        """The function itself, painted."""
        inner = Frame(self.painted, self.frame)
        inner.run(self.step.bodies[0], arrays)
        return tuple(inner.links(self.step.links["outs"]))

    def original(self, *arrays: Any) -> list[Any]:
        """The function and its rules as they were traced; arrays in their own dtypes."""
        equation = self.step.equation
        captured = [
            self.frame.read(slot, False) for slot in self.step.args[: equation.params["num_consts"]]
        ]
        return internals.bind(equation, [*captured, *arrays], equation.params)


def _has_tangent(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))


def _no_tangent(array: Any) -> Any:
    return np.zeros(np.shape(array), jax.dtypes.float0)


def _split(flags: Sequence[bool], arrays: Sequence[Any]) -> list[Any]:
    return [array for flag, array in zip(flags, arrays, strict=True) if flag]


def _joined(flags: Sequence[bool], some: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Arrays where the flags say so, and for the others the tangent of what has none."""
    rest = iter(some)
    return [
        next(rest) if flag else _no_tangent(array) for flag, array in zip(flags, like, strict=True)
    ]


def run_custom_jvp(rule: Rule) -> list[Any]:
    """Run a ``custom_jvp`` function, with its rule painted."""
    rule.frame.hoist(rule.step)
    call = jax.custom_jvp(rule.body)
    out_flags: list[bool] = []

    def forward(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        flags = [_has_tangent(array) for array in primals]
        count = len(primals)

        def both(*arrays: Any) -> list[Any]:
            given = arrays[:count]
            dots = tuple(_joined(flags, arrays[count:], given))
            outs, dots = jax.jvp(rule.original, given, dots)
            out_flags[:] = [_has_tangent(array) for array in outs]
            return [*outs, *_split(out_flags, dots)]

        found = rule.rewrite(
            both,
            (*primals, *_split(flags, tangents)),
            (*rule.low_args, *_split(flags, rule.low_args)),
            lambda _: (*rule.low_outs, *_split(out_flags, rule.low_outs)),
        )
        outs = tuple(found[: len(out_flags)])
        return outs, tuple(_joined(out_flags, found[len(out_flags) :], outs))

    call.defjvp(forward)
    return list(call(*rule.arguments()))


@dataclass(frozen=True, slots=True)
class _Static:
    """What the halves of a rule agree about beside arrays.

    Compared by identity: no two traces of a rule share their pull-back.

    Attributes:
        pull: the structure of the pull-back.
        low: which residuals are in 16 bits.
        perturbed: which arguments are differentiated.
        out_flags: which results have a tangent.
    """

    pull: Any
    low: tuple[bool, ...]
    perturbed: tuple[bool, ...]
    out_flags: tuple[bool, ...]

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@jax.tree_util.register_pytree_node_class
class _Residuals:
    """What the forward half hands to the backward half."""

    def __init__(self, arrays: Sequence[Any], static: _Static) -> None:
        self.arrays = list(arrays)
        self.static = static

    def tree_flatten(self) -> tuple[list[Any], _Static]:
        return self.arrays, self.static

    @classmethod
    def tree_unflatten(cls, static: _Static, arrays: Sequence[Any]) -> _Residuals:
        return cls(arrays, static)


def run_custom_vjp(rule: Rule) -> list[Any]:
    """Run a ``custom_vjp`` function, with both halves of its rule painted.

    Only what is differentiated is handed to the rule as such: it may have captured the rest.
    """
    rule.frame.hoist(rule.step)
    call = jax.custom_vjp(rule.body)
    arguments = rule.arguments()

    def forward(*primals: Any) -> tuple[tuple[Any, ...], _Residuals]:
        values = [primal.value for primal in primals]
        perturbed = [
            primal.perturbed and _has_tangent(value)
            for primal, value in zip(primals, values, strict=True)
        ]
        return _first_half(rule, values, perturbed)

    def backward(residuals: _Residuals, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        found = iter(_second_half(rule, residuals, cotangents))
        return tuple(next(found) if flag else None for flag in residuals.static.perturbed)

    call.defvjp(forward, backward, symbolic_zeros=True)
    return list(call(*arguments))


def _first_half(
    rule: Rule, values: Sequence[Any], perturbed: Sequence[bool]
) -> tuple[tuple[Any, ...], _Residuals]:
    seen: list[tuple[Any, tuple[bool, ...]]] = []

    def half(*arrays: Any) -> list[Any]:
        def original(*chosen: Any) -> list[Any]:
            rest = iter(chosen)
            return rule.original(
                *(next(rest) if flag else array
                  for flag, array in zip(perturbed, arrays, strict=True))
            )  # fmt: skip

        outs, pull = jax.vjp(original, *_split(perturbed, arrays))
        residuals, treedef = jax.tree_util.tree_flatten(pull)
        seen.append((treedef, tuple(_has_tangent(array) for array in outs)))
        return [*outs, *residuals]

    count = len(rule.low_outs)
    found = rule.rewrite(
        half, values, rule.low_args,
        lambda total: (*rule.low_outs, *(None for _ in range(total - count))),
    )  # fmt: skip
    treedef, out_flags = seen[-1]
    low = tuple(array.dtype == rule.painted.dtype for array in found[count:])
    static = _Static(treedef, low, tuple(perturbed), out_flags)
    return tuple(found[:count]), _Residuals(found[count:], static)


def _second_half(rule: Rule, residuals: _Residuals, cotangents: Sequence[Any]) -> list[Any]:
    static, count = residuals.static, len(residuals.arrays)
    given = [_instantiated(each) for each in _split(static.out_flags, cotangents)]

    def half(*arrays: Any) -> list[Any]:
        pull = jax.tree_util.tree_unflatten(static.pull, arrays[:count])
        return list(pull(_joined(static.out_flags, arrays[count:], cotangents)))

    return rule.rewrite(
        half,
        (*residuals.arrays, *given),
        (*static.low, *_split(static.out_flags, rule.low_outs)),
        lambda _: _split(static.perturbed, rule.low_args),
    )


def _instantiated(cotangent: Any) -> Any:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return internals.zeros_of(cotangent)
    return cotangent


RUN: dict[str, Callable[[Rule], list[Any]]] = {
    "custom_jvp": run_custom_jvp,
    "custom_vjp": run_custom_vjp,
}
"""How to run a function with its own derivative."""
