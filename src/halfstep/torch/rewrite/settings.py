"""What a rewrite was asked for, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...core.paint import OperationLists
from ...core.policy import Policy, PolicyMap, as_policy_map
from ...errors import PolicyError, nearest
from .operations import OPERATIONS
from .painting import Painter
from .paths import Paths
from .requests import requests

LEVELS = ("full", "matrix_products")
BACKENDS = ("inductor", "aot_eager")


@dataclass(frozen=True)
class Settings:
    """What one :func:`~halfstep.torch.autocast` was asked for.

    Attributes:
        model: the module or function.
        policies: the policy of every module.
        dtype: the 16-bit dtype.
        lists: the kind of every operation.
        backend: the name of what compiles the painted graphs.
        fullgraph, dynamic: as for ``torch.compile``.
        asked: the operations of each request in ``allow`` and ``deny``.
    """

    model: Callable[..., Any]
    policies: PolicyMap
    dtype: str
    lists: OperationLists
    backend: str
    fullgraph: bool = False
    dynamic: bool | None = None
    asked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"autocast({getattr(self.model, '__name__', type(self.model).__name__)})"

    def painter(self, keep: bool = False) -> Painter:
        """Return what paints the model's graphs.

        Raises:
            PolicyError: a key of the policies that matches no module.
        """
        module = self.model if isinstance(self.model, nn.Module) else None
        named = () if module is None else module.named_modules(remove_duplicate=False)
        names = [name for name, _ in named] or [""]
        return Painter(self.dtype, self.lists, self.policies.resolve(names), Paths(module), keep)


def make_settings(
    model: Callable[..., Any],
    policy: Policy | PolicyMap | str,
    allow: Iterable[object],
    deny: Iterable[object],
    level: str,
    backend: str,
) -> Settings:
    """Check what :func:`~halfstep.torch.autocast` was given.

    Raises:
        PolicyError: something of it does not fit.
    """
    if not callable(model):
        raise PolicyError(f"autocast({model!r}): the first argument must be a module or function.")
    _one_of("level", level, LEVELS)
    _one_of("backend", backend, BACKENDS)
    policies = as_policy_map(policy)
    allowed, denied = requests("allow", allow), requests("deny", deny)
    both = set(allowed) & set(denied)
    if both:
        raise PolicyError(f"autocast: {sorted(both)} in both allow= and deny=.")
    base = OPERATIONS.matrix_products_only() if level == "matrix_products" else OPERATIONS
    up = {name for names in allowed.values() for name in names}
    lists = base.changed(up, {name for names in denied.values() for name in names} - up)
    asked = {**allowed, **denied}
    return Settings(model, policies, _low_dtype(policies), lists, backend, asked=asked)


def _low_dtype(policies: PolicyMap) -> str:
    named = (policies.default, *policies.overrides.values())
    for policy in named:
        if policy.variable_dtype != "float32":
            raise PolicyError(
                f"autocast(policy={policy}): its variables are {policy.variable_dtype}; a rewrite "
                "leaves them in float32. Allowed are mixed_float16, mixed_bfloat16 and float32."
            )
    low = sorted({policy.compute_dtype for policy in named if policy.is_low})
    if len(low) > 1:
        raise PolicyError(
            f"autocast: policies that compute in {' and '.join(low)} meet in one model; one "
            "16-bit format at a time."
        )
    if not low:
        raise PolicyError(
            f"autocast(policy={policies}): it is float32 everywhere, there is nothing to rewrite."
        )
    return low[0]


def _one_of(argument: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise PolicyError(
            f"autocast({argument}={given!r}): it must be one of {', '.join(allowed)}."
            + nearest(str(given), allowed)
        )
