"""What may be kept out of 16 bits on its own, and the policy map that keeps a choice of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ...core.policy import Policy, PolicyMap
from ..planning import NEVER_ATTACHED, Functional, Options, plan_model
from ..rules import LEFT_ALONE, PARAMETERS, TRANSPARENT

_FIXED = (NEVER_ATTACHED - {TRANSPARENT.name}) | {LEFT_ALONE, "loss"}


@dataclass(frozen=True)
class Layers:
    """The candidates of a model.

    A candidate is one module with the code of its own forward, without the modules below it: an
    attention may compute its softmax in float32 and leave its projections in 16 bits. What cannot
    be told apart is one candidate: a module that lies in two places, and modules whose weights
    another one reads without calling them.

    Attributes:
        paths: every path of the model, parents first.
        members: the paths of each candidate, by the first of them.
    """

    paths: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """Every candidate, in the order of the model."""
        return tuple(self.members)

    def named(self, path: str) -> str | None:
        """Return the candidate that a path belongs to, None if it belongs to none."""
        for name, members in self.members.items():
            if path in members:
                return name
        return None

    def policy_map(self, target: Policy, keep: Policy, kept: Iterable[str]) -> PolicyMap:
        """Return the map that gives ``keep`` to these candidates and ``target`` to the others.

        A key is written only where a module's policy differs from what the one above hands down.
        """
        chosen = {path for name in kept for path in self.members[name]}
        free = {path for members in self.members.values() for path in members}
        has: dict[str, Policy] = {}
        overrides: dict[str, Policy] = {}
        for path in self.paths:
            above = has[path.rpartition(".")[0]] if path else target
            wanted = above if path not in free else keep if path in chosen else target
            has[path] = wanted
            if wanted != above:
                overrides[path] = wanted
        return PolicyMap(target, overrides)


def layers_of(model: nn.Module, target: Policy, functional: Functional) -> Layers:
    """Return what can be kept out of 16 bits in a model.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> layers = layers_of(model, Policy("mixed_float16"), "autocast")
    >>> layers.names
    ('', '0', '1')
    >>> layers.policy_map(Policy("mixed_float16"), Policy("float32"), ["", "1"])
    PolicyMap('mixed_float16', {'': 'float32', '0': 'mixed_float16'})
    """
    plans = plan_model(model, PolicyMap(target), Options(functional, "float32", part=False))
    names: dict[nn.Module, str] = {}
    members: dict[str, list[str]] = {}
    paths = dict(model.named_modules(remove_duplicate=False))
    for path, module in paths.items():
        plan = plans[module]
        name = names.get(module) or _read_by(path, paths, names, plan.rule, plans)
        if name is None:
            if plan.rule in _FIXED:
                continue
            name = path
        names[module] = name
        members.setdefault(name, []).append(path)
    return Layers(tuple(paths), {name: tuple(found) for name, found in members.items()})


def _read_by(
    path: str,
    paths: Mapping[str, nn.Module],
    names: Mapping[nn.Module, str],
    rule: str,
    plans: Mapping[nn.Module, object],
) -> str | None:
    """The candidate above that reads this module's weights without calling it, if one does."""
    above = path
    while above:
        above = above.rpartition(".")[0]
        parent = paths[above]
        covers = getattr(plans[parent], "covers", False)
        if covers or (rule == PARAMETERS.name and parent in names):
            return names.get(parent)
    return None
