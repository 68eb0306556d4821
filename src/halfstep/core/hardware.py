"""What this machine has: its CPU and its accelerators, and what they are fast in.

No framework is imported to find out. One that the process has already loaded is asked; NVIDIA's
driver is asked through ``nvidia-ml-py`` where that is installed; the CPU is read from
``/proc/cpuinfo`` or ``sysctl``. Who cannot answer is passed over.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .accelerators import from_jax, from_nvml, from_tensorflow, from_torch
from .cpu import cpu_device, from_cpuinfo, from_sysctl
from .device import Device, gathered

HALF_INSTALLED = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What a driver or framework that is half installed raises when it is asked."""

# where warnings are errors, a driver that is too old is told by one
_UNREADABLE = (*HALF_INSTALLED, AssertionError, Warning)


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


def _sysctl() -> str:
    command = ["/usr/sbin/sysctl", "hw.optional", "machdep.cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout


def _memory() -> int | None:
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _nvml() -> Any:
    return importlib.import_module("pynvml")


@dataclass(frozen=True)
class Sources:
    """Where the facts come from; a test gives those of a made-up machine.

    Attributes:
        system: ``'Linux'``, ``'Darwin'``, ...
        processor: what the system calls its CPU, for want of something better.
        cpuinfo: returns the text of ``/proc/cpuinfo``.
        sysctl: returns what ``sysctl hw.optional machdep.cpu`` prints.
        memory: returns the machine's memory in bytes.
        modules: the loaded modules by name.
        nvml: returns the module ``pynvml``, or raises ImportError.
    """

    system: str = field(default_factory=platform.system)
    processor: str = field(default_factory=lambda: platform.processor() or platform.machine())
    cpuinfo: Callable[[], str] = _cpuinfo
    sysctl: Callable[[], str] = _sysctl
    memory: Callable[[], int | None] = _memory
    modules: Mapping[str, Any] = field(default_factory=lambda: sys.modules)
    nvml: Callable[[], Any] = _nvml


def _try(read: Callable[[], Iterable[Device]]) -> tuple[Device, ...]:
    try:
        return tuple(read())
    except _UNREADABLE:
        return ()
    except Exception as error:
        # pynvml's errors derive from Exception alone
        if type(error).__module__.partition(".")[0] != "pynvml":
            raise
        return ()


def read_cpu(sources: Sources) -> Device:
    """Return the CPU; on a system that is not known, only its name.

    >>> read_cpu(Sources(system="Plan9", processor="mips", modules={})).features
    ()
    """
    source, name, flags = _read_flags(sources)
    try:
        memory = sources.memory()
    except (OSError, ValueError):
        memory = None
    flags |= _torch_flags(sources.modules)
    return cpu_device(name or sources.processor, flags, source=source, memory=memory)


def _read_flags(sources: Sources) -> tuple[str, str, frozenset[str]]:
    readers: dict[str, tuple[str, Callable[[], tuple[str, frozenset[str]]]]] = {
        "Linux": ("cpuinfo", lambda: from_cpuinfo(sources.cpuinfo())),
        "Darwin": ("sysctl", lambda: from_sysctl(sources.sysctl())),
    }
    if sources.system in readers:
        source, read = readers[sources.system]
        try:
            return (source, *read())
        except (OSError, ValueError, subprocess.SubprocessError):
            pass  # a container that hides /proc still has a name
    return "platform", "", frozenset()


def _torch_flags(modules: Mapping[str, Any]) -> frozenset[str]:
    """Flags that only CPUID knows: Linux keeps amx_fp16 and avx_ne_convert out of cpuinfo."""
    torch = modules.get("torch")
    if torch is None:
        return frozenset()
    try:
        found = torch.cpu.get_capabilities()
    except _UNREADABLE:
        return frozenset()
    return frozenset(name for name, is_on in found.items() if is_on is True)


def read_accelerators(sources: Sources, cpu_name: str = "") -> tuple[Device, ...]:
    """Return every accelerator, identical ones counted together.

    The first of torch, TensorFlow, JAX that sees one is believed (JAX last: the question makes it
    initialise). GPUs that only the driver sees, while a framework is loaded, are not usable.
    """
    torch, tf, jax = (sources.modules.get(name) for name in ("torch", "tensorflow", "jax"))
    readers: tuple[tuple[Any, Callable[[], Iterable[Device]]], ...] = (
        (torch, lambda: from_torch(torch, cpu_name)),
        (tf, lambda: from_tensorflow(tf)),
        (jax, lambda: from_jax(jax)),
    )
    for module, read in readers:
        found = _try(read) if module is not None else ()
        if found:
            return gathered(found)
    unused = any(module is not None for module, _ in readers)
    driver = _try(lambda: from_nvml(sources.nvml()))
    return gathered(replace(device, usable=not unused) for device in driver)


def devices(sources: Sources | None = None) -> tuple[Device, ...]:
    """Return the CPU and then every accelerator of this machine.

    Args:
        sources: where the facts come from; left out, this machine.

    >>> devices()[0].kind
    'cpu'
    """
    sources = sources or Sources()
    cpu = read_cpu(sources)
    return (cpu, *read_accelerators(sources, cpu.name))
