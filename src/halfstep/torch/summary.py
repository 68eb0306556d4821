"""Which module got which policy, and why: a table to print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import PolicyError
from .plan import plan_of

AS_IT_IS = "as it is"
NO_POLICY = "-"
_IN_WORDS = {AS_IT_IS: "left alone", NO_POLICY: "without a policy"}


@dataclass(frozen=True)
class SummaryRow:
    """One module of a summary.

    Attributes:
        path: where the module lies; ``""`` is the model itself.
        kind: the name of its class.
        policy: the name of its policy, ``None`` where it has none.
        compute_dtype: what it computes in.
        variable_dtype: what its parameters are stored in: several where they differ, ``"-"``
            where it owns none.
        why: the rule of the policy map that named it, and the rule for its class.
    """

    path: str
    kind: str
    policy: str | None
    compute_dtype: str
    variable_dtype: str
    why: str


@dataclass(frozen=True)
class PolicySummary:
    """What :func:`policy_summary` returns; it prints as a table and iterates over its rows."""

    rows: tuple[SummaryRow, ...]

    def __iter__(self) -> Iterator[SummaryRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = ("path", "class", "compute", "variables", "why")
        cells = [
            (row.path or "(model)", row.kind, row.compute_dtype, row.variable_dtype, row.why)
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)][:-1]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]])  # noqa: B905  (the last cell needs no padding)
            for line in (head, *cells)
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        counts = Counter(row.compute_dtype for row in self.rows)
        total = ", ".join(
            f"{count} {_IN_WORDS.get(dtype, f'in {dtype}')}"
            for dtype, count in counts.most_common()
        )
        return "\n".join([*lines, f"{len(self.rows)} modules: {total}"])


def policy_summary(model: nn.Module) -> PolicySummary:
    """Return what every module of ``model`` computes in, stores its parameters in, and why.

    Raises:
        PolicyError: no policy was applied to the model.

    >>> from halfstep.torch import apply_policy
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> print(policy_summary(apply_policy(model, "mixed_float16", {"2": "float32"})))
    path     class       compute  variables  why
    ----------------------------------------------------------------------------------------
    (model)  Sequential  float16  -          default; no weights: functional='autocast'
    0        Linear      float16  float32    default; float16 weights
    1        LayerNorm   float16  float32    default; float16 in and out, float32 statistics
    2        Linear      float32  float32    override '2'; computes in float32
    4 modules: 3 in float16, 1 in float32
    """
    rows = tuple(_row(path, module) for path, module in model.named_modules())
    if all(row.policy is None for row in rows):
        raise PolicyError(
            f"policy_summary: no policy was applied to this {type(model).__name__}; "
            "call apply_policy first."
        )
    return PolicySummary(rows)


def _row(path: str, module: nn.Module) -> SummaryRow:
    plan = plan_of(module)
    stored = dict.fromkeys(
        str(parameter.dtype).removeprefix("torch.")
        for parameter in module.parameters(recurse=False)
    )
    variables = "+".join(stored) or "-"
    kind = type(module).__name__
    if plan is None:
        return SummaryRow(path, kind, None, NO_POLICY, variables, "no policy")
    compute = AS_IT_IS if plan.rule in ("left alone", "scripted") else plan.policy.compute_dtype
    return SummaryRow(path, kind, plan.policy.name, compute, variables, plan.why)
