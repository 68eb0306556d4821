"""Finding the smallest set of layers that must be kept out of 16 bits.

The search knows nothing about training: a *trial* is any question "does it go well when exactly
these are kept?". It asks as few of them as it can, for each may be a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Trial: TypeAlias = Callable[[frozenset[str]], bool]
"""Whether it goes well when exactly these are kept; more kept is never worse (*monotone*)."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        kept: what must be kept, in the order in which it was found to be needed.
        enough: whether keeping them was seen to go well; False where keeping everything does not.
        trials: how many trials were run.
    """

    kept: tuple[str, ...]
    enough: bool
    trials: int


def smallest_kept(
    trial: Trial,
    ranked: Sequence[str],
    *,
    kept: Sequence[str] = (),
    all_goes_well: bool = False,
) -> Found:
    """Return a smallest set that must be kept for ``trial`` to go well.

    ::

        kept, rest = [], ranked
        until trial(kept):
            find the least p with trial(kept + rest[:p])    # grow p by doubling, then bisect
            kept, rest = kept + [rest[p - 1]], rest[:p - 1]

    Each round proves one element needed: without ``rest[p - 1]`` it went wrong, with it well, all
    else being equal. So nothing can be left out of the result alone. Where a single set is the
    smallest, as with layers that are each at fault by themselves, it is that one; where several
    are (of two layers either may be kept), it is one of them that uses what stands first in
    ``ranked``.

    With ``k`` elements found among ``n`` there are at most :func:`most_trials` trials,
    ``1 + k (2 log2(n) + 4)``, and far fewer where ``ranked`` puts the guilty first. With nothing to
    keep there is one. No set is tried twice, nor one whose answer follows from another's. It is the
    scheme of Hemery, Lecoutre, Sais and Boussemart, "Extracting MUCs from Constraint Networks",
    ECAI 2006 (dichotomic), with Bentley and Yao's doubling in front of each bisection;
    onnxconverter-common's ``auto_mixed_precision`` bisects groups of nodes to the same end.

    Args:
        trial: the question; see :data:`Trial`.
        ranked: what may be kept, the likeliest to be needed first, each once.
        kept: what is known to be needed from the start.
        all_goes_well: whether it is known to go well when everything is kept, which saves a trial.

    >>> guilty = {"attention", "norm"}
    >>> layers = ["embed", "norm", "mlp", "attention", "head"]
    >>> found = smallest_kept(lambda kept: guilty <= kept, layers)
    >>> sorted(found.kept), found.enough
    (['attention', 'norm'], True)
    >>> smallest_kept(lambda kept: True, layers)
    Found(kept=(), enough=True, trials=1)
    """
    known = _Known(trial)
    needed = tuple(dict.fromkeys(kept))
    rest = tuple(name for name in dict.fromkeys(ranked) if name not in needed)
    if known(needed):
        return Found(needed, True, known.asked)
    everything = frozenset(needed + rest)
    if all_goes_well:
        known.well.append(everything)
    elif not known(everything):
        return Found(needed, False, known.asked)
    while not known(needed):
        place = _least(known, needed, rest)
        needed, rest = (*needed, rest[place - 1]), rest[: place - 1]
    return Found(needed, True, known.asked)


def most_trials(found: int, among: int) -> int:
    """Return the most trials that :func:`smallest_kept` needs to find so many among so many.

    >>> most_trials(0, 300), most_trials(1, 256), most_trials(3, 256)
    (1, 21, 61)
    """
    return 1 + found * (2 * max(among - 1, 0).bit_length() + 4)


def _least(known: _Known, needed: tuple[str, ...], rest: tuple[str, ...]) -> int:
    """The least length of a beginning of ``rest`` that is enough; the whole of it is, none is not.

    Doubling first, because the guilty are expected near the front.
    """
    wrong, well = 0, len(rest)
    probe = 1
    while probe < well:
        if known(needed + rest[:probe]):
            well = probe
            break
        wrong, probe = probe, 2 * probe
    while well - wrong > 1:
        middle = (wrong + well) // 2
        if known(needed + rest[:middle]):
            well = middle
        else:
            wrong = middle
    return well


@dataclass
class _Known:
    """The trial, asked only what does not follow from earlier answers."""

    trial: Trial
    asked: int = 0
    well: list[frozenset[str]] = field(default_factory=list)
    wrong: list[frozenset[str]] = field(default_factory=list)

    def __call__(self, kept: Sequence[str] | frozenset[str]) -> bool:
        """Whether it goes well with exactly these kept."""
        chosen = frozenset(kept)
        if any(smaller <= chosen for smaller in self.well):
            return True
        if any(chosen <= larger for larger in self.wrong):
            return False
        self.asked += 1
        goes_well = self.trial(chosen)
        (self.well if goes_well else self.wrong).append(chosen)
        return goes_well
