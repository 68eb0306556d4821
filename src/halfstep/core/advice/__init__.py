"""Rules that turn facts about a model into findings.

A door gathers :class:`Facts`, plain values; a *rule* is a function from facts to findings. Every
rule has a name, by which it can be silenced, and a page in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...errors import AdviceError, nearest
from .code import own_casts, result, weights
from .facts import LOSS as LOSS
from .facts import Constant as Constant
from .facts import Facts as Facts
from .facts import Failure as Failure
from .facts import Hardware as Hardware
from .facts import Memory as Memory
from .facts import OwnCast as OwnCast
from .facts import Product as Product
from .facts import Range as Range
from .facts import Reduction as Reduction
from .facts import Result as Result
from .facts import Weights as Weights
from .findings import SEVERITIES as SEVERITIES
from .findings import Finding as Finding
from .findings import Report as Report
from .findings import Severity as Severity
from .findings import ordered
from .numbers import constant, epsilon, overflow, reduction
from .speed import alignment, batch_size, failure, hardware

Rule = Callable[[Facts], Iterable[Finding]]

RULES: dict[str, Rule] = {
    "failure": failure,
    "overflow": overflow,
    "epsilon": epsilon,
    "constant": constant,
    "reduction": reduction,
    "result": result,
    "own-casts": own_casts,
    "weights": weights,
    "alignment": alignment,
    "batch-size": batch_size,
    "hardware": hardware,
}
"""Every rule by its name."""


def check_rules(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of rules, each once.

    Raises:
        AdviceError: a name that no rule has, with the nearest one.
    """
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in RULES:
            raise AdviceError(
                f"silence={name!r}: no rule has that name. The rules are {', '.join(RULES)}."
                + nearest(name, RULES)
            )
    return chosen


def advise(facts: Facts, silence: Iterable[str] = ()) -> Report:
    """Return what the rules say about some facts, the worst first.

    Args:
        facts: what is known.
        silence: names of rules that shall say nothing.

    Raises:
        AdviceError: a rule to silence that there is not.

    >>> facts = Facts("mixed_float16", constants=(
    ...     Constant("norm", "add", "float16", 1e-8, "added", feeds="rsqrt"),))
    >>> [(found.rule, found.severity, found.place) for found in advise(facts)]
    [('epsilon', 'error', 'norm')]
    >>> len(advise(facts, silence=["epsilon"]))
    0
    """
    silenced = check_rules(silence)
    found = [
        finding for name, rule in RULES.items() if name not in silenced for finding in rule(facts)
    ]
    return Report(facts.policy, ordered(found), silenced)
