"""What ``halfstep doctor`` looks at: the system, its devices, the frameworks and what they see."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from ..core.compatibility import Compatibility, judge
from ..core.device import Device
from ..core.hardware import HALF_INSTALLED, devices
from ..core.policy import MIXED

_BROKEN = (*HALF_INSTALLED, SystemError)
"""What importing or asking a framework raises when its parts do not fit together."""

_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # a look at the machine must not take three quarters of its GPU's memory
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


@dataclass(frozen=True)
class Framework:
    """A framework that is installed.

    Attributes:
        name: its name.
        version: its version, empty where it could not be imported.
        sees: the devices it can use, in its own words.
        error: why it could not be imported or asked, else empty.
    """

    name: str
    version: str
    sees: str
    error: str = ""


def _torch_sees(torch: Any) -> str:
    build = torch.version.hip or torch.version.cuda
    kind = "ROCm" if torch.version.hip else "CUDA"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} GPU(s), {kind} {build}"
    for name in ("xpu", "mps"):
        part = getattr(torch, name, None)
        if part is not None and part.is_available():
            return f"{name.upper()} and CPU"
    return f"CPU only, though built for {kind} {build}" if build else "CPU only (a CPU build)"


def _jax_sees(jax: Any) -> str:
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    return ", ".join(name + (f" (x{count})" if count > 1 else "") for name, count in kinds.items())


def _tensorflow_sees(tf: Any) -> str:
    return ", ".join(found.name.rpartition("physical_device:")[2] for found in _physical(tf))


def _physical(tf: Any) -> list[Any]:
    return list(tf.config.list_physical_devices())


def _keras_sees(keras: Any) -> str:
    policy = keras.config.dtype_policy()
    return f"through its backend {keras.config.backend()}; dtype policy {policy.name}"


_SEES: dict[str, Callable[[Any], str]] = {
    "torch": _torch_sees,
    "jax": _jax_sees,
    "tensorflow": _tensorflow_sees,
    "keras": _keras_sees,
}
"""The frameworks with a door, and what each can say about devices."""


@contextmanager
def _silence() -> Iterator[None]:
    """Frameworks log from C++ too, so the descriptors are turned away, not only ``sys.stderr``."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    sys.stdout.flush()
    sys.stderr.flush()
    level = logging.root.manager.disable
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            logging.disable(logging.CRITICAL)
            for descriptor in (1, 2):
                os.dup2(nowhere.fileno(), descriptor)
            # Python's own streams too: what they buffer would be heard after the descriptors return
            with (
                redirect_stdout(nowhere),
                redirect_stderr(nowhere),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            logging.disable(level)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a module without a spec, or a broken parent
        return name in sys.modules


def framework(name: str) -> Framework | None:
    """Import a framework quietly and return what it says; ``None`` where it is not installed."""
    if not _installed(name):
        return None
    version = ""
    try:
        with _silence():
            module = importlib.import_module(name)
            version = str(getattr(module, "__version__", "unknown"))
            return Framework(name, version, _SEES[name](module))
    except _BROKEN as error:
        first = str(error).strip().partition("\n")[0]
        return Framework(name, version, "", f"{type(error).__name__}: {first}")


@dataclass(frozen=True)
class Survey:
    """Everything that was found out without a measurement."""

    system: str
    python: str
    frameworks: tuple[Framework, ...]
    devices: tuple[Device, ...]
    checks: tuple[Compatibility, ...]

    def get_config(self) -> dict[str, Any]:
        """Return a dict of plain values, fit for JSON."""
        return {
            "halfstep": __version__,
            "system": self.system,
            "python": self.python,
            "frameworks": [asdict(found) for found in self.frameworks],
            "devices": [device.get_config() for device in self.devices],
            "checks": [asdict(check) for check in self.checks],
        }


def survey() -> Survey:
    """Import every installed framework and look at the machine."""
    frameworks = tuple(found for found in map(framework, _SEES) if found is not None)
    with _silence():
        machine = devices()
    return Survey(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        frameworks=frameworks,
        devices=machine,
        checks=tuple(judge(policy, machine) for policy in MIXED),
    )
