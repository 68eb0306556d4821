"""Three ways to step an optimizer, or not, once the gradients have been judged.

On the host, where code runs as it is written: one flag is read, and the optimizer is called or
not. In a TensorFlow graph: ``tf.cond``, outside of the replicas where a strategy wants it so. In
JAX: no branch at all; the optimizer steps, and what was is chosen where a gradient was not finite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import keras
from keras import ops

from ..core.loss_scale import LossScale, LossScaleState
from .tracing import current_scope

OVERDUE = 128
"""Bad steps past the rule's patience after which a TensorFlow graph stops by itself."""


class Stepper(Protocol):
    """What is to be known of the optimizer that wraps another."""

    inner_optimizer: Any
    rule: LossScale

    def advance(self, finite: Any) -> LossScaleState:
        """Let the rule make the next state, and keep it."""

    def raise_exhausted(self, state: LossScaleState, pairs: Iterable[tuple[Any, Any]] = ()) -> None:
        """Raise if a smaller scale can no longer help."""


Judged = tuple[list[Any], Any]
"""Unscaled gradients, and whether all are finite."""


def take_step(optimizer: Stepper, judged: Judged, variables: Sequence[Any] | None) -> None:
    """Step the inner optimizer if the gradients are finite, and advance the loss scale.

    Args:
        optimizer: the one that wraps.
        judged: what :func:`~halfstep.keras.gradients.judge` returned.
        variables: those of the gradients; None for all that the optimizer was built with.
    """
    _way()(optimizer, judged, variables)


def _way() -> Callable[[Stepper, Judged, Sequence[Any] | None], None]:
    backend = keras.backend.backend()
    if backend == "jax" and current_scope() is not None:
        return _choose
    if backend == "tensorflow":
        tf = sys.modules["tensorflow"]
        if not tf.executing_eagerly() or tf.distribute.has_strategy():
            return _branch_in_graph
    return _branch_on_host


def _branch_on_host(optimizer: Stepper, judged: Judged, variables: Sequence[Any] | None) -> None:
    grads, flag = judged
    finite = bool(flag)  # the one host read of a step
    if finite:
        optimizer.inner_optimizer.apply(grads, variables)
    state = optimizer.advance(finite)
    if not finite:
        known = optimizer.inner_optimizer._trainable_variables if variables is None else variables
        optimizer.raise_exhausted(state, zip(grads, known, strict=True))


def _choose(optimizer: Stepper, judged: Judged, variables: Sequence[Any] | None) -> None:
    """Step, and choose between what was and what is, on the device."""
    grads, finite = judged
    inner = optimizer.inner_optimizer
    touched = [*inner._trainable_variables, *inner.variables]
    before = [variable.value for variable in touched]
    inner.apply(grads, variables)
    for variable, old in zip(touched, before, strict=True):
        new = variable.value
        if new is not old:
            variable.assign(ops.where(finite, new, old))
    optimizer.advance(finite)


def _branch_in_graph(optimizer: Stepper, judged: Judged, variables: Sequence[Any] | None) -> None:
    tf = sys.modules["tensorflow"]
    replica = tf.distribute.get_replica_context()
    if replica is None:
        raise ValueError("apply() must be called in a replica context.")
    grads, finite = judged
    if replica.num_replicas_in_sync > 1:
        # the gradients are summed over replicas later, by the inner optimizer: a replica whose
        # own are finite must skip with the others
        bad = replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
        finite = tf.equal(bad, 0.0)
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        _step_in_graph(optimizer, finite, lambda: optimizer.inner_optimizer.apply(grads, variables))
    else:
        replica.merge_call(_across_replicas, args=(optimizer, finite, grads, variables))


def _across_replicas(
    strategy: Any, optimizer: Stepper, finite: Any, grads: Any, variables: Any
) -> None:
    """Branch outside of the replicas: no replica may call others from within a branch."""
    one = strategy.experimental_local_results(finite)[0]

    def apply() -> None:
        strategy.extended.call_for_each_replica(
            optimizer.inner_optimizer.apply, args=(grads, variables)
        )

    _step_in_graph(optimizer, one, apply)


def _step_in_graph(optimizer: Stepper, finite: Any, apply: Callable[[], Any]) -> None:
    tf = sys.modules["tensorflow"]

    def run() -> Any:
        apply()
        return tf.constant(0)

    tf.cond(finite, run, lambda: tf.constant(0))
    state = optimizer.advance(finite)
    # a training loop of one's own may never look at the state
    late = tf.cast(state.bad_steps, tf.float32) - OVERDUE
    overdue = optimizer.rule.exhausted(state._replace(bad_steps=late))
    tf.debugging.Assert(
        tf.logical_not(overdue),
        ["LossScaleExhausted: bad steps in a row, and the scale:", state.bad_steps, state.scale],
    )
