"""A device, and the formats in which it multiplies matrices fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["cpu", "cuda", "rocm", "mps", "xpu", "tpu"]

UNIT_FORMATS = ("float16", "bfloat16", "tensorfloat32", "float8")
"""The formats that matrix units are made for; ``float8`` stands for e4m3 and e5m2 alike."""


@dataclass(frozen=True)
class Unit:
    """What makes a device fast in a format.

    Attributes:
        format: one of :data:`UNIT_FORMATS`.
        by: what gives it, for instance ``'tensor cores'`` or ``'AMX-BF16'``.
        matrix: whether it multiplies small matrices in one instruction. False for vector
            instructions (AVX512-BF16): twice the rate of float32 at best, and frameworks use them
            for some operations only.
    """

    format: str
    by: str
    matrix: bool = True

    def __str__(self) -> str:
        return self.by if self.matrix else f"{self.by} (vector)"


@dataclass(frozen=True)
class Device:
    """One device, or several identical ones.

    Attributes:
        kind: ``cpu``, ``cuda``, ``rocm``, ``mps``, ``xpu`` or ``tpu``.
        name: the maker's name.
        count: how many identical ones there are.
        capability: CUDA's compute capability, ``None`` for what is not NVIDIA's.
        architecture: AMD's name of it (``gfx90a``), else empty.
        memory: bytes of each one, ``None`` where nobody says.
        units: what makes it fast, the best first.
        features: instruction sets of a CPU that matter to 16-bit arithmetic.
        source: who says so: ``torch``, ``jax``, ``tensorflow``, ``nvidia-ml-py``, ``cpuinfo``, ...
        note: what a reader must know about it, else empty.
        usable: whether a framework in this process can use it.
    """

    kind: Kind
    name: str
    count: int = 1
    capability: tuple[int, int] | None = None
    architecture: str = ""
    memory: int | None = None
    units: tuple[Unit, ...] = ()
    features: tuple[str, ...] = ()
    source: str = ""
    note: str = ""
    usable: bool = True

    @property
    def fast(self) -> frozenset[str]:
        """The formats with fast matrix units."""
        return frozenset(unit.format for unit in self.units if unit.matrix)

    def unit(self, name: str) -> Unit | None:
        """Return the best unit for a format, a vector one where there is nothing better.

        >>> cpu = Device("cpu", "EPYC 9654", units=(Unit("bfloat16", "AVX512-BF16", matrix=False),))
        >>> print(cpu.unit("bfloat16"), cpu.unit("float16"), cpu.fast)
        AVX512-BF16 (vector) None frozenset()
        """
        named = [unit for unit in self.units if unit.format == name]
        return max(named, key=lambda unit: unit.matrix, default=None)

    @property
    def label(self) -> str:
        """The name with what tells its generation, and how many there are.

        >>> Device("cuda", "Tesla V100", count=2, capability=(7, 0)).label
        'Tesla V100, compute capability 7.0 (x2)'
        """
        parts = [self.name]
        if self.capability is not None:
            parts.append("compute capability {}.{}".format(*self.capability))
        elif self.architecture:
            parts.append(self.architecture)
        if self.note:
            parts.append(self.note)
        return ", ".join(parts) + (f" (x{self.count})" if self.count > 1 else "")

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON."""
        return {
            "kind": self.kind,
            "name": self.name,
            "count": self.count,
            "capability": None if self.capability is None else list(self.capability),
            "architecture": self.architecture,
            "memory": self.memory,
            "units": {
                name: None if unit is None else {"by": unit.by, "matrix": unit.matrix}
                for name, unit in ((name, self.unit(name)) for name in UNIT_FORMATS)
            },
            "features": list(self.features),
            "source": self.source,
            "note": self.note,
            "usable": self.usable,
        }


def gathered(devices: Iterable[Device]) -> tuple[Device, ...]:
    """Return the devices with identical ones counted together, in the order of their first.

    >>> [device.count for device in gathered([Device("cuda", "A"), Device("cuda", "A")])]
    [2]
    """
    counts: dict[Device, int] = {}
    for device in devices:
        one = replace(device, count=1)
        counts[one] = counts.get(one, 0) + device.count
    return tuple(replace(device, count=count) for device, count in counts.items())
