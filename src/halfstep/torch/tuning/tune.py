"""``tune``: find the layers that must stay out of 16 bits, and the loss scale to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...core.loss_scale import DynamicLossScale, NoLossScale
from ...core.policy import Policy, as_policy
from ...core.tracking import TOLERANCE
from ...core.tuning import Kept, KeptLayer, Proof, Trial, Tuning, find_kept
from ...errors import AdviceError
from ..planning import Functional, Options
from .ranking import Suspect
from .training import ShortRuns, Training

STEPS = 50
"""Steps of one run when nothing is said."""


def tune(
    training: Training,
    target: Policy | str = "mixed_float16",
    *,
    keep: Policy | str = "float32",
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
    seed: int = 0,
    device: str | None = None,
    functional: Functional = "autocast",
    output_dtype: str | None = "float32",
    cast_forward_inputs: bool | None = None,
    on_trial: Callable[[Trial], object] | None = None,
) -> Tuning:
    """Find the fewest layers that must stay out of 16 bits for the loss to track float32's.

    ::

        train in float32; count the exponents of everything on the first and the last batch
        scale  = the loss scale that the gradients ask for
        ranked = the layers by the share that the 16-bit format would lose
        kept   = the smallest set with which the loss tracks float32's, by bisection over `ranked`
        prove on another seed that it is enough, and that each of it is needed

    A layer here is one module with the code of its own forward, without the modules below it.
    Every run starts from the same weights on the same batches; that a loss *tracks* float32's is
    the rule of :func:`halfstep.core.tracking.compare_losses`. With ``k`` layers found among ``n``
    there are at most ``2 + k (2 log2(n) + 5)`` runs; a model that needs none is told so after one,
    beside float32's, and one more on the other seed.

    Args:
        training: a module, class or object with the functions of a recipe: ``make_model()``,
            ``make_optimizer(model)``, ``batches(epoch, seed)`` and ``loss(model, batch)``.
        target: the policy that all layers shall follow if they can.
        keep: the policy of those that cannot: ``"float32"``, or ``"mixed_bfloat16"``.
        tolerance: the share of float32's loss by which it may differ.
        steps: of one run: enough for the fault to show.
        seed: to search on; ``seed + 1`` is proved on.
        device: where to train; left out, CUDA where there is one, else the CPU.
        functional: as for :func:`apply_policy`.
        output_dtype: as for :func:`apply_policy`.
        cast_forward_inputs: as for :func:`apply_policy`.
        on_trial: is called with each run when it is over.

    Raises:
        AdviceError: float32 itself does not train, ``target`` has no 16 bits, or a number is out
            of its range.
        PolicyError: an unknown policy.

    >>> from torch import nn
    >>> class Noisy(nn.Module):
    ...     def forward(self, x):
    ...         return (x * 300) ** 2 / 9e4
    >>> class Fit:
    ...     make_model = staticmethod(
    ...         lambda: nn.Sequential(nn.Linear(4, 8), Noisy(), nn.Linear(8, 1)))
    ...     make_optimizer = staticmethod(lambda model: torch.optim.SGD(model.parameters(), 1e-2))
    ...     batches = staticmethod(lambda epoch, seed: torch.randn(
    ...         8, 16, 4, generator=torch.Generator().manual_seed(seed)))
    ...     loss = staticmethod(lambda model, x: (model(x) - x.sum(1, True)).square().mean())
    >>> found = tune(Fit, steps=8)
    >>> [layer.path for layer in found.layers], found.policy
    (['1'], PolicyMap(Policy('mixed_float16', loss_scale=...), {'1': 'float32'}))
    """
    target, keep = _checked(target, keep, tolerance, steps)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(functional, output_dtype, False, cast_forward_inputs)
    runs = ShortRuns(training, target, keep, steps, device, options)
    proof = Proof(runs, tolerance, on_trial)
    seeds = (seed, seed + 1)
    with torch.random.fork_rng():
        proof.baseline(seed)
        scale = _choose_scale(runs)
        suspects = _ranked(runs, scale)
        kept = find_kept(proof, [suspect.name for suspect in suspects], seeds)
    return _tuning(runs, proof, suspects, kept, scale, tolerance, steps, seeds, keep)


def _checked(
    target: Policy | str, keep: Policy | str, tolerance: float, steps: int
) -> tuple[Policy, Policy]:
    target, keep = as_policy(target), as_policy(keep)
    if not target.is_low:
        raise AdviceError(f"tune(target={target.name!r}): it computes in 32 bits or more already.")
    if keep.name == target.name:
        raise AdviceError(f"tune(keep={keep.name!r}): that is what the layers are to be kept from.")
    if not tolerance >= 0:
        raise AdviceError(f"tune(tolerance={tolerance!r}): it must be at least 0.")
    if steps < 1:
        raise AdviceError(f"tune(steps={steps!r}): it must be at least 1.")
    return target, keep


def _choose_scale(runs: ShortRuns) -> float | None:
    """Give the target policy the loss scale that the gradients ask for, if it has one at all."""
    rule = runs.target.loss_scale
    if isinstance(rule, NoLossScale):
        return None
    scale = runs.observed.loss_scale(runs.target.compute_dtype)
    if isinstance(rule, DynamicLossScale):
        scale = min(max(scale, rule.min_scale), rule.max_scale)
        runs.target = Policy(runs.target.name, replace(rule, initial_scale=scale))
        return scale
    return float(getattr(rule, "value", scale))


def _starts_from(runs: ShortRuns, scale: float | None) -> float | None:
    """The scale that the runs were content with: lower than chosen, where that skipped."""
    rule = runs.target.loss_scale
    return rule.initial_scale if isinstance(rule, DynamicLossScale) else scale


def _ranked(runs: ShortRuns, scale: float | None) -> tuple[Suspect, ...]:
    if runs.layers is None:
        raise AdviceError("tune: the float32 run made no model.")
    return runs.observed.ranked(runs.layers, runs.target.compute_dtype, scale or 1.0)


def _tuning(
    runs: ShortRuns, proof: Proof, suspects: tuple[Suspect, ...], kept: Kept,
    scale: float | None, tolerance: float, steps: int, seeds: tuple[int, int], keep: Policy,
) -> Tuning:  # fmt: skip
    needed = kept.needed_on or {}
    by_name = {suspect.name: suspect for suspect in suspects}
    order = [name for name in (runs.layers.names if runs.layers else ()) if name in needed]
    return Tuning(
        target=runs.target.name,
        keep=keep.name,
        enough=kept.needed_on is not None,
        layers=tuple(KeptLayer(n, needed[n], by_name[n].evidence) for n in order),
        policy=runs.policy_map(order),
        loss_scale=_starts_from(runs, scale),
        candidates=len(suspects),
        trials=tuple(proof.trials),
        tolerance=tolerance,
        steps=steps,
        seeds=seeds,
    )
