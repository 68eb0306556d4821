"""Finding the policy of each layer by short training runs: which layers, and is it certain.

What trains is a :class:`Trainer`, and everything that is not a framework's is here: what is run,
on which seed, what counts as tracking, when it is finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from ..errors import AdviceError
from .numerics.histogram import percent
from .policy import PolicyMap
from .record import to_plain
from .search import most_trials, smallest_kept
from .tracking import TOLERANCE, Tracking, compare_losses

Purpose = Literal["baseline", "noise", "search", "second seed"]


@dataclass(frozen=True)
class Losses:
    """What a training run gave.

    Attributes:
        losses: of each step; it ends where the run broke off.
        skipped: how many updates were skipped.
        reason: why it broke off, empty if it did not.
    """

    losses: tuple[float, ...]
    skipped: int = 0
    reason: str = ""


class Trainer(Protocol):
    """What runs short trainings; the same arguments give the same losses."""

    def baseline(self, seed: int) -> Losses:
        """Train in float32."""

    def noise(self, seed: int) -> Losses:
        """Train in float32's range, with weights of the 16-bit format's digits."""

    def low(self, kept: frozenset[str], seed: int) -> Losses:
        """Train in 16 bits, with these layers kept out of them."""


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        purpose: what it was for.
        kept: the layers that were kept out of 16 bits; None in float32 throughout.
        seed: of the weights, the batches and the steps.
        tracks: whether the loss tracked float32's; None of a float32 run.
        deviation: see :class:`~halfstep.core.tracking.Tracking`.
        allowed: the same.
        skipped: updates that were skipped.
        reason: why it did not track, or broke off.
    """

    purpose: Purpose
    kept: tuple[str, ...] | None
    seed: int
    tracks: bool | None = None
    deviation: float | None = None
    allowed: float | None = None
    skipped: int = 0
    reason: str = ""


@dataclass(frozen=True)
class KeptLayer:
    """A layer that must stay out of 16 bits.

    Attributes:
        path: the layer; ``""`` is the model's own code.
        needed_on: the seeds on which the loss did not track without it.
        evidence: what its numbers lose in the 16-bit format, in words.
    """

    path: str
    needed_on: tuple[int, ...]
    evidence: str = ""


@dataclass(frozen=True)
class Tuning:
    """What :func:`halfstep.torch.tune` found; ``print`` it, or hand its policy to apply_policy.

    Attributes:
        target: the 16-bit policy of all other layers.
        keep: the policy of the layers that are kept.
        enough: whether a choice of layers was found with which the loss tracks float32's.
        layers: the layers that must be kept.
        policy: the policy of each layer, with the loss scale to start from.
        loss_scale: that scale; None where there is none.
        candidates: among how many layers they were found.
        trials: every training run, in order.
        tolerance: of the loss; see :func:`~halfstep.core.tracking.compare_losses`.
        steps: of each run.
        seeds: on which it was found, and on which it was proved again.
        notes: what there is to say beside.
    """

    target: str
    keep: str
    enough: bool
    layers: tuple[KeptLayer, ...]
    policy: PolicyMap
    loss_scale: float | None
    candidates: int
    trials: tuple[Trial, ...]
    tolerance: float
    steps: int
    seeds: tuple[int, int]
    notes: tuple[str, ...] = field(default=())

    def runs(self, purpose: Purpose) -> int:
        """Return how many training runs there were for a purpose."""
        return sum(trial.purpose == purpose for trial in self.trials)

    def to_plain(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON, the policy's config in it."""
        plain = {
            "format": "halfstep-tune",
            "version": 1,
            **{k: v for k, v in asdict(_without_policy(self)).items() if k != "policy"},
            "policy": self.policy.get_config(),
        }
        found: dict[str, Any] = to_plain(plain)
        return found

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _without_policy(tuning: Tuning) -> Tuning:
    # asdict copies what it finds, and a PolicyMap is no dataclass
    return replace(tuning, policy=PolicyMap("float32"))


def _lines(tuning: Tuning) -> list[str]:
    counted = f"{tuning.runs('search')} search runs"
    if tuning.runs("search") == 1:
        counted = "1 search run"
    second = tuning.runs("second seed")
    how = (
        f"{counted} of {tuning.steps} steps beside float32's on seed {tuning.seeds[0]}, "
        f"{second} on seed {tuning.seeds[1]}; the loss may differ by "
        f"{percent(tuning.tolerance)} of float32's, and by twice its noise"
    )
    lines = [_verdict(tuning), f"({how}.)"]
    for layer in tuning.layers:
        evidence = f": {layer.evidence}" if layer.evidence else ""
        lines.append(f"  {layer.path or '(the code of the model itself)'}{evidence}")
        if set(layer.needed_on) != set(tuning.seeds):
            seeds = ", ".join(map(str, layer.needed_on))
            lines.append(f"    needed on seed {seeds} only")
    if tuning.loss_scale is not None and tuning.enough:
        lines.append(f"Start from a loss scale of {tuning.loss_scale:.0f}.")
    return [*lines, *tuning.notes]


def _verdict(tuning: Tuning) -> str:
    if not tuning.enough:
        return (
            f"Nothing found: the loss does not track float32's under {tuning.target} with every "
            f"layer in {tuning.keep} either. Look at the loss function and at what the optimizer "
            "does: halfstep.torch.blame and audit name them."
        )
    if not tuning.layers:
        return f"None needed: every one of {tuning.candidates} layers can follow {tuning.target}."
    return f"{len(tuning.layers)} of {tuning.candidates} layers must stay in {tuning.keep}:"


class Proof:
    """Runs the trials, each only once, and writes down what they were.

    Args:
        trainer: what trains.
        tolerance: see :func:`~halfstep.core.tracking.compare_losses`.
        on_trial: is called with every trial when it is over.
    """

    def __init__(
        self,
        trainer: Trainer,
        tolerance: float = TOLERANCE,
        on_trial: Callable[[Trial], object] | None = None,
    ) -> None:
        self._trainer, self._tolerance = trainer, tolerance
        self._on_trial = on_trial or (lambda trial: None)
        self._float32: dict[tuple[Purpose, int], Losses] = {}
        self._known: dict[tuple[frozenset[str], int], bool] = {}
        self.trials: list[Trial] = []

    def baseline(self, seed: int) -> Losses:
        """Return the losses of float32.

        Raises:
            AdviceError: they are not finite: no policy can help.
        """
        found = self._in_float32("baseline", self._trainer.baseline, seed)
        bad = [step for step, loss in enumerate(found.losses) if not math.isfinite(loss)]
        if bad or found.reason or not found.losses:
            where = f"at step {bad[0]}" if bad else f"after {len(found.losses)} steps"
            raise AdviceError(
                f"tune: in float32 the loss is not finite {where} of seed {seed}"
                f"{f' ({found.reason})' if found.reason else ''}: no policy can be found for a "
                "training that fails without one."
            )
        return found

    def tracks(self, kept: frozenset[str], seed: int, purpose: Purpose) -> bool:
        """Train with these layers kept, and say whether the loss tracks float32's."""
        if (kept, seed) not in self._known:
            baseline = self.baseline(seed)
            run = self._trainer.low(kept, seed)
            judged = self._judge(run, baseline, seed)
            self._write(
                Trial(
                    purpose, tuple(sorted(kept)), seed, judged.tracks, judged.deviation,
                    judged.allowed, run.skipped, run.reason or judged.reason,
                )
            )  # fmt: skip
            self._known[kept, seed] = judged.tracks
        return self._known[kept, seed]

    def _judge(self, run: Losses, baseline: Losses, seed: int) -> Tracking:
        judged = compare_losses(run.losses, baseline.losses, tolerance=self._tolerance)
        if judged.tracks or run.reason or not math.isfinite(judged.deviation):
            return judged
        # the noise costs a run of its own, and only a near miss needs it
        noise = self._in_float32("noise", self._trainer.noise, seed)
        return compare_losses(run.losses, baseline.losses, noise.losses, self._tolerance)

    def _in_float32(self, purpose: Purpose, run: Callable[[int], Losses], seed: int) -> Losses:
        if (purpose, seed) not in self._float32:
            found = self._float32[purpose, seed] = run(seed)
            self._write(Trial(purpose, None, seed, skipped=found.skipped, reason=found.reason))
        return self._float32[purpose, seed]

    def _write(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._on_trial(trial)


@dataclass(frozen=True)
class Kept:
    """Which layers must be kept, and on which seeds each was needed; None where none is enough."""

    needed_on: Mapping[str, tuple[int, ...]] | None


def find_kept(proof: Proof, ranked: Sequence[str], seeds: tuple[int, int]) -> Kept:
    """Find the layers that must be kept on one seed, and prove every claim on another.

    ::

        kept = smallest_kept on the first seed          # these are enough, and each is needed
        if kept is not enough on the second seed:
            kept = smallest_kept on the second seed, starting from kept
        for each layer found: is it needed on the second seed too? if on neither, drop it

    Args:
        proof: what runs trials.
        ranked: the candidates, the likeliest to be needed first.
        seeds: to search on, and to prove on.

    Raises:
        AdviceError: float32 itself fails.
    """
    first, second = seeds
    proof.baseline(first)
    found = smallest_kept(lambda kept: proof.tracks(kept, first, "search"), ranked)
    if not found.enough:
        return Kept(None)
    again = smallest_kept(
        lambda kept: proof.tracks(kept, second, "second seed"), ranked, kept=found.kept
    )
    if not again.enough:
        return Kept(None)
    grown = again.kept != found.kept
    kept = frozenset(again.kept)
    needed: dict[str, tuple[int, ...]] = {}
    for path in again.kept:
        without = kept - {path}
        elsewhere = not proof.tracks(without, second, "second seed")
        # what was added for the second seed may take another's place on the first
        here = not proof.tracks(without, first, "search") if grown else True
        if here or elsewhere:
            needed[path] = tuple(s for s, on in ((first, here), (second, elsewhere)) if on)
        else:
            kept = without
    return Kept(needed)


def most_runs(found: int, among: int) -> int:
    """Return the most runs that a search and its proof on a second seed need, beside float32's.

    That is where the first seed found them all; each layer that only the second seed finds costs
    its own bisection there.

    >>> most_runs(0, 100), most_runs(1, 100)
    (2, 21)
    """
    return most_trials(found, among) + 1 + found
