"""Loss scaling for JAX: the core's rule, with its state in a pytree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..core import loss_scale as core
from ..errors import LossScaleError, LossScaleExhausted

AxisName: TypeAlias = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class StatefulLossScale:
    """A loss scale and its state: one value that goes through ``jit`` and comes back whole.

    Its arrays are leaves of the pytree: the scale and three counts, all float32. Everything else,
    such as the floor, is part of its structure, and so is never lost. Use one of its kinds:
    :class:`DynamicLossScale`, :class:`FixedLossScale` or :class:`NoLossScale`.

    Attributes:
        rule: the core's loss scale, immutable and hashable.
        state: its state, a named tuple of float32 scalars.
    """

    rule: core.LossScale
    state: core.LossScaleState

    @property
    def scale(self) -> jax.Array:
        """What the next loss is multiplied by, a float32 scalar."""
        return jnp.asarray(self.state.scale)

    @property
    def skipped_steps(self) -> jax.Array:
        """Steps skipped in all."""
        return jnp.asarray(self.state.skipped_steps)

    def scale_loss(self, loss: Any) -> jax.Array:
        """Return the loss times the scale, at least in float32.

        A float16 loss is widened first: the product may be past 65504.
        """
        return scale_loss(loss, self.state)

    def unscale(self, grads: Any) -> Any:
        """Return gradients divided by the scale, at least in float32; integers are left alone."""
        return unscale(grads, self.state.scale)

    def update(self, finite: Any) -> Self:
        """Return the loss scale after a step whose unscaled gradients were ``finite``."""
        return _make(type(self), self.rule, self.rule.update(self.state, jnp.asarray(finite)))

    @property
    def exhausted(self) -> jax.Array:
        """Whether a smaller scale can no longer help, a boolean scalar."""
        return jnp.asarray(self.rule.exhausted(self.state))


class DynamicLossScale(StatefulLossScale):
    """Look for the largest scale that keeps the gradients finite.

    Args:
        **options: those of :class:`halfstep.DynamicLossScale`, which holds the rule.

    Raises:
        LossScaleError: a value outside of its limits.

    >>> import jax
    >>> from halfstep.jax import DynamicLossScale
    >>> scale = DynamicLossScale(initial_scale=8, min_scale=2)
    >>> step = jax.jit(lambda scale, finite: scale.update(finite))
    >>> for finite in (False, False, False):
    ...     scale = step(scale, finite)
    ...     print(scale.scale, scale.skipped_steps)
    4.0 1.0
    2.0 2.0
    2.0 3.0
    """

    def __init__(self, **options: float) -> None:
        plain = {name: _plain(value) for name, value in options.items()}
        rule = core.DynamicLossScale(**plain)
        super().__init__(rule, rule.init(_float32))


class FixedLossScale(StatefulLossScale):
    """Multiply every loss by one number; a step that is not finite is skipped all the same.

    Args:
        value: the scale, a positive finite number.
        patience: steps in a row that are not finite after which the scale counts as exhausted.

    Raises:
        LossScaleError: another value.

    >>> from halfstep.jax import FixedLossScale
    >>> FixedLossScale(1024).scale_loss(2.0)
    Array(2048., dtype=float32)
    """

    def __init__(self, value: float, patience: int = 8) -> None:
        rule = core.FixedLossScale(_plain(value), patience)
        super().__init__(rule, rule.init(_float32))


class NoLossScale(StatefulLossScale):
    """The scale of a run that needs none: 1, and no step is skipped.

    >>> from halfstep.jax import NoLossScale
    >>> NoLossScale().update(False).scale
    Array(1., dtype=float32)
    """

    def __init__(self) -> None:
        rule = core.NoLossScale()
        super().__init__(rule, rule.init(_float32))


_KINDS: dict[type[core.LossScale], type[StatefulLossScale]] = {
    core.DynamicLossScale: DynamicLossScale,
    core.FixedLossScale: FixedLossScale,
    core.NoLossScale: NoLossScale,
}


_Kind = TypeVar("_Kind", bound=StatefulLossScale)


def _make(kind: type[_Kind], rule: core.LossScale, state: core.LossScaleState) -> _Kind:
    scale = object.__new__(kind)
    StatefulLossScale.__init__(scale, rule, state)
    return scale


def _plain(value: Any) -> Any:
    """The Python number in a scalar of NumPy or JAX: a rule is structure, and holds no array."""
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _float32(number: float) -> jax.Array:
    return jnp.asarray(number, jnp.float32)


def _register(kind: type[StatefulLossScale]) -> None:
    def flatten(scale: StatefulLossScale) -> tuple[tuple[tuple[Any, Any], ...], core.LossScale]:
        return ((jax.tree_util.GetAttrKey("state"), scale.state),), scale.rule

    def unflatten(rule: core.LossScale, children: Iterable[Any]) -> StatefulLossScale:
        (state,) = children
        return _make(kind, rule, state)

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)


for _kind in _KINDS.values():
    _register(_kind)


def as_loss_scale(
    value: StatefulLossScale | core.LossScale | float | str | None,
) -> StatefulLossScale:
    """Return the loss scale that ``"dynamic"``, a number, ``None`` or a loss scale stands for."""
    if isinstance(value, StatefulLossScale):
        return value
    rule = core.as_loss_scale(value)
    return _make(_KINDS[type(rule)], rule, rule.init(_float32))


def scale_loss(loss: Any, state: Any) -> jax.Array:
    """Return a loss times the scale that a state holds, at least in float32.

    Args:
        loss: an array of any shape, or a number.
        state: a loss scale, a :class:`~halfstep.LossScaleState`, or the state of an optimizer
            with :func:`~halfstep.jax.loss_scaled` somewhere in it.

    Raises:
        LossScaleError: a state without a loss scale, or with several that could be meant.
    """
    array = jnp.asarray(loss)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise LossScaleError(f"scale_loss: the loss is {array.dtype}; it must be a real number.")
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.multiply(wide, find_state(state).scale)


def find_state(state: Any) -> core.LossScaleState:
    """Return the one loss-scale state inside of a pytree.

    Raises:
        LossScaleError: when there is none, or more than one.
    """
    nodes = jax.tree_util.tree_leaves(
        state, is_leaf=lambda node: isinstance(node, core.LossScaleState)
    )
    found = [node for node in nodes if isinstance(node, core.LossScaleState)]
    if len(found) == 1:
        return found[0]
    raise LossScaleError(
        f"{type(state).__name__}: it holds {len(found) or 'no'} loss scale"
        f"{'s' if len(found) > 1 else ''}; give a loss scale, or the state of an optimizer with "
        "one loss_scaled(...) in it."
    )


def unscale(grads: Any, scale: Any) -> Any:
    """Return every floating gradient divided by ``scale``, at least in float32."""

    def divided(grad: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(grad), jnp.inexact):
            return grad
        return jnp.asarray(grad, jnp.promote_types(jnp.result_type(grad), jnp.float32)) / scale

    return jax.tree_util.tree_map(divided, grads)


def all_finite(tree: Any, axis_name: AxisName | None = None) -> jax.Array:
    """Return whether every number of a pytree is finite, a boolean scalar.

    Args:
        tree: a pytree of arrays; those that are not floating are passed over.
        axis_name: axes of ``shard_map``, ``pmap`` or ``vmap`` along which all must agree: one bad
            shard makes it false for every one of them.

    >>> import jax.numpy as jnp
    >>> from halfstep.jax import all_finite
    >>> bool(all_finite({"w": jnp.ones(3), "step": 1})), bool(all_finite([jnp.inf]))
    (True, False)
    """
    leaves = [
        leaf
        for leaf in jax.tree_util.tree_leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    finite = functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.asarray(True)
    )
    if axis_name is None:
        return finite
    votes = jax.lax.pmin(finite.astype(jnp.int32), axis_name)  # type: ignore[no-untyped-call]
    return jnp.asarray(votes, bool)


def value_and_grad(
    fn: Callable[..., Any],
    loss_scale: StatefulLossScale | core.LossScale | float | None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Return a function that gives the value, the unscaled gradients, and whether all are finite.

    ::

        scaled = float32(loss) * scale
        grads  = float32(gradient of scaled) / scale      # the scale that it was multiplied by
        finite = all numbers of grads are finite, on every device along axis_name

    The state of the scale is not advanced: do that with ``loss_scale.update(finite)``, and skip
    the step where ``finite`` is false, or leave both to :func:`~halfstep.jax.loss_scaled`.

    Args:
        fn: returns a real scalar, or with ``has_aux`` a pair of one and of anything else.
        loss_scale: the scale of this step; inside of ``jit`` a traced one.
        argnums: which arguments to differentiate, as for ``jax.value_and_grad``.
        has_aux: whether ``fn`` returns a pair.
        axis_name: axes along which devices must agree about ``finite``.

    Returns:
        A function like ``fn`` that returns ``(value, grads, finite)``: the value as ``fn`` gave
        it, not scaled, and ``((value, aux), grads, finite)`` with ``has_aux``. Gradients are at
        least float32.

    >>> import jax.numpy as jnp
    >>> from halfstep.jax import DynamicLossScale, value_and_grad
    >>> def loss(w):
    ...     return (w.astype(jnp.float16) ** 2).mean()
    >>> value, grads, finite = value_and_grad(loss, DynamicLossScale())(jnp.ones(2))
    >>> value, grads, bool(finite)
    (Array(1., dtype=float16), Array([1., 1.], dtype=float32), True)
    """
    scale = as_loss_scale(loss_scale)

    def scaled(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value = fn(*args, **kwargs)
        loss = value[0] if has_aux else value
        return scale.scale_loss(loss), value

    differentiated = jax.value_and_grad(scaled, argnums=argnums, has_aux=True)

    @functools.wraps(fn, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any, jax.Array]:
        (_, value), scaled_grads = differentiated(*args, **kwargs)
        grads = scale.unscale(scaled_grads)
        return value, grads, all_finite(grads, axis_name)

    return wrapped


def check_loss_scale(
    state: Any, rule: core.LossScale | StatefulLossScale | str | None = None
) -> None:
    """Raise when the loss scale is at its end; call it now and then, outside of ``jit``.

    Args:
        state: a loss scale of this door, or the state of an optimizer with
            :func:`~halfstep.jax.loss_scaled` in it, with concrete numbers: this reads them.
        rule: what ``loss_scaled`` was given; it is needed for an optimizer's state.

    Raises:
        LossScaleExhausted: at the floor, gradients have not been finite for ``patience`` steps.
        LossScaleError: an optimizer's state without a rule.
    """
    if isinstance(state, StatefulLossScale):
        scale: StatefulLossScale = state
    elif rule is not None:
        start = as_loss_scale(rule)
        scale = _make(type(start), start.rule, find_state(state))
    else:
        raise LossScaleError(
            "check_loss_scale: an optimizer's state does not say which rule it follows; give "
            "rule=, what loss_scaled was given."
        )
    if bool(scale.exhausted):
        raise LossScaleExhausted(
            f"The gradients of {int(scale.state.bad_steps)} steps in a row were not finite with "
            f"the loss scale at {float(scale.scale):g}; a smaller one cannot help. "
            f"{int(scale.skipped_steps)} steps were skipped in all. Look for the cause in the "
            "model, the data or the learning rate; jax.config.update('jax_debug_nans', True) "
            "names the operation."
        )
