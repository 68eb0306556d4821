"""Loss scaling around an optax optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core import loss_scale as core
from .loss_scale import AxisName, StatefulLossScale, all_finite, as_loss_scale, unscale

if TYPE_CHECKING:
    import optax


class LossScaledState(NamedTuple):
    """The state of :func:`loss_scaled`.

    Attributes:
        inner_state: the state of the wrapped optimizer.
        loss_scale: the state of the loss scale: the scale, the counts.
        last_step_skipped: whether the last update was left out, a boolean scalar.
    """

    inner_state: Any
    loss_scale: core.LossScaleState
    last_step_skipped: jax.Array


def loss_scaled(
    tx: optax.GradientTransformation,
    loss_scale: StatefulLossScale | core.LossScale | float | str | None = "dynamic",
    *,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that takes the gradients of a scaled loss.

    ::

        grads = float32(scaled gradients) / scale
        if all are finite, on every device along axis_name:
            updates, inner state = tx.update(grads, inner state, ...)
        else:
            updates = 0, and the inner state stays as it is, bit for bit
        scale, counts = the rule's next ones

    The loss is multiplied with :func:`scale_loss`, which finds the scale in the optimizer's state.
    Put clipping inside: ``loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), ...))`` clips
    unscaled gradients. Nothing is read on the host.

    Args:
        tx: any optax optimizer; extra arguments of ``update`` are handed to it.
        loss_scale: ``"dynamic"``, a number, ``None``, or a loss scale of the core or this door.
        axis_name: axes of ``shard_map`` or ``pmap`` along which devices must agree to skip.

    Raises:
        LossScaleError: another loss scale.

    >>> import jax, jax.numpy as jnp, optax
    >>> from halfstep.jax import loss_scaled, scale_loss
    >>> tx = loss_scaled(optax.sgd(0.5))
    >>> w = jnp.ones(2)
    >>> state = tx.init(w)
    >>> grads = jax.grad(lambda w: scale_loss((w ** 2).sum(), state))(w)
    >>> updates, state = tx.update(grads, state, w)
    >>> updates, bool(state.last_step_skipped)
    (Array([-1., -1.], dtype=float32), False)
    """
    import optax  # nothing else of this door needs it

    start = as_loss_scale(loss_scale)
    rule = start.rule
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> LossScaledState:
        # copies: two optimizers, or a donated state, must not share buffers
        fresh = jax.tree_util.tree_map(jnp.array, start.state)
        return LossScaledState(inner.init(params), fresh, jnp.asarray(False))

    def update(
        updates: Any, state: LossScaledState, params: Any = None, **extra: Any
    ) -> tuple[Any, LossScaledState]:
        grads = unscale(updates, state.loss_scale.scale)
        finite = all_finite(grads, axis_name) if rule.skips else jnp.asarray(True)
        # the optimizer never sees what it must not remember
        safe = _select(finite, grads, jax.tree_util.tree_map(jnp.zeros_like, grads))
        stepped, inner_state = inner.update(safe, state.inner_state, params, **extra)
        return (
            _select(finite, stepped, jax.tree_util.tree_map(jnp.zeros_like, stepped)),
            LossScaledState(
                _select(finite, inner_state, state.inner_state),
                rule.update(state.loss_scale, finite),
                ~finite,
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _select(condition: jax.Array, chosen: Any, otherwise: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda new, old: jnp.where(condition, new, old), chosen, otherwise
    )
