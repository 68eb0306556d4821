"""Mixed precision for any function that JAX can trace."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ..core.paint import ON_NO_LIST, Explanation, Kind, OperationLists, Row, Rule
from ..core.policy import Policy, PolicyMap, as_policy_map
from ..errors import PolicyError, nearest
from . import _internals as internals
from .build import build
from .calls import Call, trace_call
from .evaluate import Painted
from .operations import OPERATIONS, STRUCTURE
from .painting import Painter, Wanted, run
from .program import Program
from .scopes import ScopePolicies, split_scope

Function: TypeAlias = Callable[..., Any]

LEVELS = ("full", "matrix_products")
OUTPUT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class _Settings:
    """What one :func:`autocast` was asked for."""

    function: Function
    policies: PolicyMap
    lists: OperationLists
    allow: tuple[str, ...]
    deny: tuple[str, ...]
    output_dtype: str | None

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"autocast({getattr(self.function, '__name__', type(self.function).__name__)})"


@dataclass(frozen=True)
class _Prepared:
    call: Call
    painted: Painted | None
    wanted: Sequence[Wanted]


def autocast(
    fn: Function,
    policy: Policy | PolicyMap | str = "mixed_bfloat16",
    *,
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    output_dtype: str | None = "float32",
    level: str = "full",
) -> Function:
    """Return ``fn`` with its matrix products, and what lies between them, in 16 bits.

    The function is traced as it is, in float32; every operation of the program gets a dtype
    (see :mod:`halfstep.core.paint`); and the program is run with casts where dtypes meet. Nothing
    is edited: arguments, parameters and gradients stay float32. It stands wherever ``fn`` stood,
    inside or outside of ``jit``, ``grad``, ``vmap``, ``scan``, ``checkpoint``, ``shard_map``::

        loss = autocast(loss)                    # 16-bit forward and backward pass
        step = jax.jit(jax.value_and_grad(loss))

    Each call traces anew, so put ``jit`` around it, not only inside. Leaves of the arguments that
    are not arrays (``bool``, ``int``, ``str``, functions) stay as they are, as in a plain call.

    Args:
        fn: any function that JAX can trace, of arrays and of anything else.
        policy: ``"mixed_bfloat16"`` or ``"mixed_float16"``, or a :class:`~halfstep.PolicyMap`
            over the paths of :func:`jax.named_scope`, which for Flax linen modules are the
            modules' own, ``PolicyMap("mixed_bfloat16", {"Net/head": "float32"})``, and over
            those of the arguments, ``{"params/head": "float32"}``: what takes an argument below
            that path. Inside the model's code :func:`~halfstep.jax.policy_scope` does the same.
        allow: primitives to run in 16 bits beside those of the list.
        deny: primitives to keep in float32; what computes with their results stays there too.
        output_dtype: the dtype of those outputs that are float32 in ``fn``; ``None`` leaves them
            in the dtype in which they come out.
        level: ``"full"``, or ``"matrix_products"`` for these alone, with nothing between them.

    Raises:
        PolicyError: an unknown policy, primitive or path, and, in the call, when nothing at all
            would run in 16 bits.
        NotTraceableError: in the call, when JAX cannot trace ``fn``.

    >>> import jax, jax.numpy as jnp
    >>> from halfstep.jax import autocast
    >>> def loss(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) @ w)
    >>> w, x = jnp.ones((4, 4)) / 3, jnp.ones((2, 4))
    >>> grads = jax.jit(jax.grad(autocast(loss)))(w, x)
    >>> grads.dtype, str(jax.make_jaxpr(autocast(loss))(w, x)).count("bf16[2,4] = dot_general")
    (dtype('float32'), 2)
    """
    settings = _settings(fn, policy, allow, deny, output_dtype, level)

    @functools.wraps(fn, updated=())
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        prepared = _prepare(settings, args, kwargs)
        if prepared.painted is None:
            return _with_output_dtype(fn(*args, **kwargs), settings.output_dtype)
        results = run(prepared.painted, prepared.call.arrays, prepared.wanted)
        floats = [aval.dtype == "float32" for aval in prepared.call.closed.out_avals]
        return prepared.call.output(
            [
                jnp.asarray(result, settings.output_dtype)
                if is_float and settings.output_dtype is not None
                else result
                for result, is_float in zip(results, floats, strict=True)
            ]
        )

    wrapped._halfstep_settings = settings  # type: ignore[attr-defined]
    return wrapped


def explain(
    fn: Function,
    policy: Policy | PolicyMap | str = "mixed_bfloat16",
    *,
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    level: str = "full",
) -> Callable[..., Explanation]:
    """Return a function that says, for the same arguments, what runs in which dtype and why.

    Args:
        fn: a function, or what :func:`autocast` returned, whose own arguments then hold.
        policy: as for :func:`autocast`, like all that follow.
        allow: primitives to run in 16 bits.
        deny: primitives to keep in float32.
        level: ``"full"`` or ``"matrix_products"``.

    Returns:
        A function of the arguments of ``fn`` (arrays, or ``jax.ShapeDtypeStruct``) that returns
        an :class:`~halfstep.jax.Explanation`: ``print`` shows it as a table.

    >>> import jax.numpy as jnp
    >>> from halfstep.jax import explain
    >>> def attention(q, k):
    ...     scores = jnp.exp(q @ k)
    ...     return scores / scores.sum()
    >>> x = jnp.ones((2, 2))
    >>> for row in explain(attention)(x, x).rows:
    ...     print(f"{row.operation:12}{row.dtype:9}", row.why.partition(":")[0])
    dot_general bfloat16  on the allow list
    exp         float32   on the deny list
    reduce_sum  float32   on the deny list
    div         float32   computes with the result of a denied operation
    """
    settings = getattr(fn, "_halfstep_settings", None) or _settings(
        fn, policy, allow, deny, "float32", level
    )

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        prepared = _prepare(settings, args, kwargs)
        if prepared.painted is None:
            raise PolicyError(
                f"{settings.where}: the policy is float32 everywhere, there is nothing to explain."
            )
        return _explanation(prepared.painted)

    return explained


def _settings(
    fn: Function,
    policy: Policy | PolicyMap | str,
    allow: Iterable[str],
    deny: Iterable[str],
    output_dtype: str | None,
    level: str,
) -> _Settings:
    if not callable(fn):
        raise PolicyError(f"autocast({fn!r}): the first argument must be a function.")
    if level not in LEVELS:
        raise PolicyError(
            f"autocast(level={level!r}): it must be one of {', '.join(LEVELS)}."
            + nearest(str(level), LEVELS)
        )
    if output_dtype is not None and output_dtype not in OUTPUT_DTYPES:
        raise PolicyError(
            f"autocast(output_dtype={output_dtype!r}): it must be None or one of "
            f"{', '.join(OUTPUT_DTYPES)}." + nearest(str(output_dtype), OUTPUT_DTYPES)
        )
    allowed, denied = _names("allow", allow), _names("deny", deny)
    both = set(allowed) & set(denied)
    if both:
        raise PolicyError(f"autocast: {sorted(both)} in both allow= and deny=.")
    for name in allowed:
        kind, because = OPERATIONS.kind(name)
        if kind is Kind.OPAQUE and because != ON_NO_LIST:
            raise PolicyError(f"autocast(allow=...{name!r}...): it must stay: {because}.")
    base = OPERATIONS.matrix_products_only() if level == "matrix_products" else OPERATIONS
    lists = base.changed(allowed, denied)
    return _Settings(fn, as_policy_map(policy), lists, allowed, denied, output_dtype)


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise PolicyError(f"autocast({argument}={names!r}): give a list of names, [{names!r}].")
    found = tuple(names)
    for name in found:
        if name in STRUCTURE:
            raise PolicyError(
                f"autocast({argument}=...{name!r}...): what is inside of it is painted, it has no "
                "dtype of its own."
            )
    return found


def _prepare(settings: _Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Prepared:
    call = trace_call(settings.function, args, kwargs, settings.where)
    program = build(call.closed, settings.lists, paths=call.paths)
    present = {about.equation.primitive.name for about in program.about.values()}
    OPERATIONS.check_known("autocast(allow", settings.allow, present)
    OPERATIONS.check_known("autocast(deny", settings.deny, present)
    scopes = ScopePolicies(settings.policies, [*program.places.values(), *program.rules])
    low_dtype = scopes.low_dtype
    if low_dtype is None:
        return _Prepared(call, None, ())
    wanted = [_wanted(settings.output_dtype, low_dtype)] * len(call.closed.out_avals)
    painted = Painter(settings.lists, low_dtype, scopes.float32_reason).paint(program, wanted)
    if not any(painted.painting.low[node] for node in program.about):
        _check_painted_before(settings, program, painted, low_dtype)
    return _Prepared(call, painted, wanted)


def _wanted(output_dtype: str | None, low_dtype: str) -> Wanted:
    return None if output_dtype is None else output_dtype == low_dtype


def _check_painted_before(
    settings: _Settings, program: Program, painted: Painted, low_dtype: str
) -> None:
    """Nothing was painted: say why, unless the products are in this dtype already."""
    if low_dtype in program.foreign_products:
        return
    reasons = Counter(
        f"{about.equation.primitive.name}: {painted.painting.verdicts[node]}"
        for node, about in program.about.items()
        if OPERATIONS.kind(about.equation.primitive.name)[0] is Kind.ALLOW
    )
    if reasons:
        why = "; ".join(f"{reason} ({count}x)" for reason, count in reasons.most_common(5))
    elif program.about:
        why = f"it has no {' or '.join(sorted(settings.lists.allow))} on float32 arrays"
    else:
        why = "it has no operation on float32 arrays"
    raise PolicyError(f"{settings.where}: nothing would run in {low_dtype}: {why}.")


def _with_output_dtype(outputs: Any, output_dtype: str | None) -> Any:
    if output_dtype in (None, "float32"):
        return outputs
    return jax.tree_util.tree_map(
        lambda leaf: (
            jnp.asarray(leaf, output_dtype)
            if isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
            else leaf
        ),
        outputs,
    )


def _explanation(painted: Painted) -> Explanation:
    painting, program = painted.painting, painted.program
    dtype = str(painted.dtype)
    casts = painting.casts
    elements = [program.graph.values[value].elements * (2 if low else 4) for value, low in casts]
    rows = tuple(_row(painted, node, dtype) for node in program.about)
    return Explanation(rows, dtype, len(casts), sum(elements))


def _row(painted: Painted, node: int, dtype: str) -> Row:
    about = painted.program.about[node]
    verdict = painted.painting.verdicts[node]
    why = str(verdict)
    if verdict.rule is Rule.AFTER_DENY and verdict.root is not None:
        why = f"{why}: {_name(painted, verdict.root)}"
    return Row(
        source=internals.user_line(about.equation),
        path=split_scope(about.place.names)[0]
        or max(about.place.takes, key=lambda path: path.count("/"), default=""),
        operation=str(about.equation.primitive.name),
        shape="x".join(map(str, getattr(about.aval, "shape", ()))) or "scalar",
        dtype=dtype if painted.painting.low[node] else "float32",
        why=why,
        flops=about.flops,
    )


def _name(painted: Painted, node: int) -> str:
    about = painted.program.about.get(node)
    if about is None:
        return painted.program.graph.nodes[node].name
    line = internals.user_line(about.equation)
    return f"{about.equation.primitive.name} at {line}" if line else about.equation.primitive.name
