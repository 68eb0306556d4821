"""What a record says about the machine: the device, what it is fast in, and the versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..core.compatibility import judge
from ..core.device import Device
from ..core.hardware import devices
from ..core.policy import Policy, PolicyMap, as_policy_map

_KINDS = {"cpu": ("cpu",), "cuda": ("cuda", "rocm")}
"""What torch calls a device, and what the hardware's description calls it."""


def used_device(device: str, found: Sequence[Device]) -> Device | None:
    """Return the description of the device that a framework's name stands for.

    >>> used_device("cpu", devices()).kind
    'cpu'
    """
    name = device.partition(":")[0]
    kinds = _KINDS.get(name, (name,))
    return next((each for each in found if each.kind in kinds), None)


def computes_in(policy: Policy | PolicyMap) -> list[str]:
    """Return the 16-bit dtypes that a policy computes in.

    >>> computes_in(PolicyMap("mixed_float16", {"head": "float32"}))
    ['float16']
    """
    given = as_policy_map(policy)
    every = (given.default, *given.overrides.values())
    return list(dict.fromkeys(each.compute_dtype for each in every if each.is_low))


def describe_machine(
    device: str, policies: Iterable[Policy | PolicyMap], framework: Mapping[str, Any]
) -> dict[str, Any]:
    """Return plain values: the device, which 16-bit dtypes it has matrix units for, versions.

    Args:
        device: as the framework calls it, for instance ``"cuda:0"``.
        policies: what is compared; ``checks`` holds what the compatibility check says about each.
        framework: the framework's own words; see ``describe`` of what trains the recipes.
    """
    found = devices()
    used = used_device(device, found)
    lows = dict.fromkeys(
        each.name
        for policy in policies
        for each in (as_policy_map(policy).default, *as_policy_map(policy).overrides.values())
        if each.is_low
    )
    asked = [used] if used is not None else list(found)
    return {
        "device": device,
        "device_name": used.name if used is not None else framework.get("device_name", device),
        "fast": {dtype: dtype in used.fast for dtype in ("float16", "bfloat16")} if used else {},
        "devices": [each.get_config() for each in found],
        "labels": [each.label for each in found],
        "checks": {name: judge(name, asked).message for name in lows},
        "system": platform.platform(),
        "versions": {
            "halfstep": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{name: each for name, each in framework.get("versions", {}).items() if each},
        },
        "threads": framework.get("threads"),
    }
