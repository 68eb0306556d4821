"""What a rule says, and a report of what all of them said."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Severity: TypeAlias = Literal["hint", "warning", "error"]

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From what could be better, over what likely costs accuracy or speed, to what breaks training."""


@dataclass(frozen=True)
class Finding:
    """One thing that a rule has to say.

    Attributes:
        rule: the rule's name.
        severity: ``"hint"``: could be better; ``"warning"``: likely costs accuracy, or much of the
            speed; ``"error"``: breaks training, or did so on this batch.
        place: the module's path, ``"(loss)"`` or, for the model itself, ``""``.
        evidence: what was seen, with its numbers.
        suggestion: what to change.
    """

    rule: str
    severity: Severity
    place: str
    evidence: str
    suggestion: str

    @property
    def where(self) -> str:
        """The place in words."""
        return self.place or "(model)"


@dataclass(frozen=True)
class Report:
    """The findings about one model, the worst first; it prints, iterates and turns into JSON.

    Attributes:
        policy: the policy that was audited.
        findings: what the rules said.
        silenced: the rules that were told to be silent.

    >>> one = Finding("epsilon", "error", "norm", "1e-08 is 0 in float16", "use 1e-4")
    >>> report = Report("mixed_float16", (one,))
    >>> print(report)
    Under mixed_float16: 1 error
    <BLANKLINE>
    error    epsilon  norm
             1e-08 is 0 in float16
             -> use 1e-4
    >>> report.worst, len(report), report.at_least("error") == (one,)
    ('error', 1, True)
    """

    policy: str
    findings: tuple[Finding, ...]
    silenced: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def worst(self) -> Severity | None:
        """The worst severity there is, ``None`` without any finding."""
        return max((f.severity for f in self.findings), key=SEVERITIES.index, default=None)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of this severity and worse ones."""
        least = SEVERITIES.index(severity)
        return tuple(f for f in self.findings if SEVERITIES.index(f.severity) >= least)

    def to_plain(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON."""
        return {
            "format": "halfstep-audit",
            "version": 1,
            "policy": self.policy,
            "worst": self.worst,
            "silenced": list(self.silenced),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        head = f"Under {self.policy}: {_counted(self.findings)}"
        quiet = f" (silenced: {', '.join(self.silenced)})" if self.silenced else ""
        # what is said alike of many places, of every block of a transformer, is said once
        alike: dict[tuple[str, ...], list[Finding]] = {}
        for finding in self.findings:
            said = (finding.evidence, finding.suggestion.replace(repr(finding.place), "<place>"))
            key = (finding.rule, finding.severity, *said)
            alike.setdefault(key, []).append(finding)
        return "\n\n".join([head + quiet, *map(_block, alike.values())])


def _counted(findings: tuple[Finding, ...]) -> str:
    if not findings:
        return "nothing found"
    counts = [(s, sum(f.severity == s for f in findings)) for s in reversed(SEVERITIES)]
    return ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s, n in counts if n)


def _block(alike: list[Finding]) -> str:
    finding = alike[0]
    lines = [f"{finding.severity:8} {finding.rule}  {_places(alike)}"]
    lines += _wrapped(finding.evidence, "")
    lines += _wrapped(finding.suggestion, "-> ")
    return "\n".join(lines)


def _places(findings: list[Finding], most: int = 3) -> str:
    places = list(dict.fromkeys(finding.where for finding in findings))
    more = len(places) - most
    return ", ".join(places[:most]) + (f" and {more} more" if more > 0 else "")


def _wrapped(text: str, mark: str) -> list[str]:
    first = " " * 9 + mark
    return textwrap.wrap(
        text,
        96,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings, the worst first, else as they came."""
    return tuple(sorted(findings, key=lambda f: -SEVERITIES.index(f.severity)))
