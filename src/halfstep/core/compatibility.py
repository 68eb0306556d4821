"""Whether a policy will run fast here: the compatibility check of the Keras guide.

The words are those that TensorFlow 2.2 logs for ``mixed_float16``
(https://www.tensorflow.org/guide/mixed_precision), said for every 16-bit policy and also for TPUs,
for GPUs that are not NVIDIA's, and for CPUs, where 16 bits are often the slower choice.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .accelerators import TENSOR_CORES
from .device import Device, gathered
from .global_policy import global_policy
from .hardware import devices
from .policy import Policy, PolicyMap, as_policy_map

_LOGGER = logging.getLogger("halfstep")

_ELSEWHERE = (
    "If you will use compatible GPU(s) not attached to this host, e.g. by running a multi-worker "
    "model, you can ignore this warning."
)
_ONCE = "This message will only be logged once"
_CAPABILITIES = (
    "See https://developer.nvidia.com/cuda-gpus for a list of GPUs and their compute capabilities."
)


@dataclass(frozen=True)
class Compatibility:
    """What a compatibility check found.

    Attributes:
        policy: the policy's name; several, joined by ``", "``, for a map that mixes them.
        ok: whether the policy will likely run fast, or has nothing to check.
        message: what is logged.
        reason: the message without what only a log needs.
    """

    policy: str
    ok: bool
    message: str
    reason: str


def judge(policy: str, machine: Sequence[Device]) -> Compatibility:
    """Return whether the policy of this name will run fast on these devices; nothing is logged.

    TPUs decide where there are any, else GPUs that a framework can use, else the CPU.

    >>> from halfstep.core.accelerators import nvidia
    >>> v100 = nvidia("Tesla V100", (7, 0), memory=None, source="torch")
    >>> print(judge("mixed_float16", [v100]).message)
    Mixed precision compatibility check (mixed_float16): OK
    Your GPU will likely run quickly with dtype policy mixed_float16 as it has compute capability
    of at least 7.0. Your GPU: Tesla V100, compute capability 7.0
    """
    asked = Policy(policy)
    if not asked.is_low:
        nothing = f"{policy} computes in {asked.compute_dtype}: nothing to check."
        return Compatibility(policy, True, nothing, nothing)
    machine = gathered(machine)
    usable = [device for device in machine if device.usable]
    tpus = [device for device in usable if device.kind == "tpu"]
    gpus = [device for device in usable if device.kind not in ("cpu", "tpu")]
    verdict = _tpus if tpus else _gpus if gpus else _cpu
    ok, reason = verdict(asked, tpus or gpus or machine)
    lines = [f"Mixed precision compatibility check ({policy}): {'OK' if ok else 'WARNING'}", reason]
    if not ok:
        lines.append(_ONCE if tpus else f"{_ELSEWHERE} {_ONCE}")
    return Compatibility(policy, ok, "\n".join(lines), reason)


def _your(kind: str, found: Sequence[Device]) -> str:
    return f"Your {kind}s" if _several(found) else f"Your {kind}"


def _several(found: Sequence[Device]) -> bool:
    return sum(device.count for device in found) > 1


def _listed(found: Sequence[Device]) -> str:
    return "; ".join(device.label for device in found)


def _tpus(policy: Policy, found: Sequence[Device]) -> tuple[bool, str]:
    yours = f"{_your('TPU', found)}: {_listed(found)}"
    if policy.compute_dtype == "bfloat16":
        return True, (
            f"{_your('TPU', found)} will likely run quickly with dtype policy {policy.name}, as "
            f"TPUs multiply bfloat16. {yours}"
        )
    other = "mixed_bfloat16" if policy.name.startswith("mixed") else "bfloat16"
    return False, (
        f"The dtype policy {policy.name} may run slowly because TPUs multiply bfloat16, not "
        f"float16. Use {other}, which needs no loss scaling either. {yours}"
    )


def _gpus(policy: Policy, found: Sequence[Device]) -> tuple[bool, str]:
    dtype = policy.compute_dtype
    least = "compute capability of at least {}.{}".format(*TENSOR_CORES[dtype])
    several = _several(found)
    slow = [device for device in found if dtype not in device.fast]
    if not slow:
        cuda = all(device.kind == "cuda" for device in found)
        has = least if cuda else f"fast {dtype} matrix units"
        who = "they all have" if several else "it has"
        return True, (
            f"{_your('GPU', found)} will likely run quickly with dtype policy {policy.name} as "
            f"{who} {has}. {_your('GPU', found)}: {_listed(found)}"
        )
    by_capability = all(
        device.capability is not None and device.capability < TENSOR_CORES[dtype] for device in slow
    )
    lacks = least if by_capability else f"fast {dtype} matrix units"
    if len(slow) < len(found):
        who, have = "Some of your GPUs", "they do not all have"
    else:
        who, have = _your("GPU", found), "they do not have" if several else "it does not have"
    lines = [
        f"{who} may run slowly with dtype policy {policy.name} because {have} {lacks}. "
        f"{_your('GPU', found)}:",
        *(f"  {device.label}" for device in found),
    ]
    if dtype == "bfloat16" and all("float16" in device.fast for device in found):
        lines.append("They run quickly in float16." if several else "It runs quickly in float16.")
    return False, "\n".join([*lines, *([_CAPABILITIES] if by_capability else [])])


_NEEDS = {
    "float16": "Only Nvidia GPUs with compute capability of at least 7.0 run quickly with {}.",
    "bfloat16": "Nvidia GPUs with compute capability of at least 8.0, and TPUs, run quickly "
    "with {}.",
}


def _cpu(policy: Policy, machine: Sequence[Device]) -> tuple[bool, str]:
    dtype = policy.compute_dtype
    cpu = next((device for device in machine if device.kind == "cpu"), Device("cpu", "unknown CPU"))
    unit = cpu.unit(dtype)
    if unit is not None and unit.matrix:
        return True, (
            f"This machine does not have a GPU, but its CPU will likely run quickly with dtype "
            f"policy {policy.name} as it has fast {dtype} matrix units: {unit.by}. "
            f"Your CPU: {cpu.name}"
        )
    lines = [
        f"The dtype policy {policy.name} may run slowly because this machine does not have a GPU. "
        + _NEEDS[dtype].format(policy.name),
        _cpu_lacks(cpu, dtype),
    ]
    unusable = [device for device in machine if not device.usable]
    if unusable:
        lines.append(
            f"The driver knows {_listed(unusable)}, but no framework loaded here can use it."
        )
    return False, "\n".join(lines)


def _cpu_lacks(cpu: Device, dtype: str) -> str:
    unit = cpu.unit(dtype)
    if unit is None:
        return f"Your CPU, {cpu.name}, has no fast {dtype} units: float32 is likely faster on it."
    return (
        f"Your CPU, {cpu.name}, has {dtype} vector instructions ({unit.by}) but no matrix units: "
        "measure whether they pay with `halfstep doctor --measure`."
    )


_Machine: TypeAlias = tuple[Device, ...] | None

_lock = threading.Lock()
_logged: dict[tuple[str, _Machine], Compatibility] = {}


def compatibility_check(
    policy: Policy | PolicyMap | str | None = None, machine: Sequence[Device] | None = None
) -> Compatibility:
    """Say whether a policy will run fast here, and log it once per process and policy name.

    An OK is logged as INFO, the rest as WARNING, both by the logger ``halfstep``. Policies that
    compute in float32 or float64 have nothing to check and log nothing.

    Args:
        policy: a policy, a map (every 16-bit policy in it is checked), or a name; left out, the
            global policy.
        machine: the devices to judge by; left out, those of this machine, looked at once.

    Raises:
        PolicyError: an unknown policy.

    >>> compatibility_check("float32").ok
    True
    """
    given = as_policy_map(global_policy() if policy is None else policy)
    names = dict.fromkeys(p.name for p in (given.default, *given.overrides.values()) if p.is_low)
    if not names:
        return judge(given.default.name, ())
    found = [_checked(name, None if machine is None else tuple(machine)) for name in names]
    return Compatibility(
        ", ".join(names),
        all(result.ok for result in found),
        "\n".join(result.message for result in found),
        "\n".join(result.reason for result in found),
    )


def _checked(name: str, machine: _Machine) -> Compatibility:
    with _lock:
        if (name, machine) in _logged:
            return _logged[name, machine]
        result = judge(name, devices() if machine is None else machine)
        _logged[name, machine] = result
    _LOGGER.log(logging.INFO if result.ok else logging.WARNING, "%s", result.message)
    return result


def reset_compatibility_check() -> None:
    """Forget what was found, so that the next check looks at the machine and logs again."""
    with _lock:
        _logged.clear()
