"""What the frameworks and NVIDIA's driver say about accelerators.

Nothing is imported here: each reader takes a module that is already loaded. Sources:

- NVIDIA: tensor cores multiply float16 from compute capability 7.0, bfloat16 and tensorfloat32 from
  8.0, float8 from 8.9 (CUDA C++ Programming Guide, "Compute Capabilities"; the Keras guide
  "Mixed precision" names 7.0 for mixed_float16). The TU116 and TU117 chips (GTX 16xx and small
  Quadros) report 7.5 and have none (NVIDIA Turing Architecture Whitepaper).
- AMD: the instruction set manuals of CDNA 1 to 4 and RDNA 3 and 4, and AMD's matrix instruction
  calculator.
- Apple: GPUs have matrix units ("Neural Accelerators") from the M5 on (Apple, October 2025).
- Google: TPUs multiply bfloat16; float8 from TPU7x ("TPU architecture", Cloud TPU documentation).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .device import Device, Unit

TENSOR_CORES = {
    "float16": (7, 0),
    "bfloat16": (8, 0),
    "tensorfloat32": (8, 0),
    "float8": (8, 9),
}
"""From which compute capability on NVIDIA's tensor cores multiply a format."""

_NO_TENSOR_CORES = re.compile(
    r"\bGTX 16\d\d|\bMX ?(450|550)\b|\bT(400|500|550|600|1000|1200|2000)\b"
)

# Without a row here (gfx906, gfx103x, ...) a chip has no matrix instructions. First match holds.
_AMD_UNITS = (
    (r"gfx908|gfx90a", "matrix cores", ("float16", "bfloat16")),
    (r"gfx94[012]", "matrix cores", ("float16", "bfloat16", "tensorfloat32", "float8")),
    (r"gfx950", "matrix cores", ("float16", "bfloat16", "float8")),
    (r"gfx11", "WMMA", ("float16", "bfloat16")),
    (r"gfx12", "WMMA", ("float16", "bfloat16", "float8")),
)


def nvidia(
    name: str, capability: tuple[int, int] | None, memory: int | None, source: str
) -> Device:
    """Return an NVIDIA GPU with what its tensor cores multiply.

    >>> sorted(nvidia("A100", (8, 0), None, "torch").fast)
    ['bfloat16', 'float16', 'tensorfloat32']
    >>> nvidia("NVIDIA GeForce GTX 1660", (7, 5), None, "torch").fast
    frozenset()
    """
    bare = capability is not None and capability >= (7, 0) and _NO_TENSOR_CORES.search(name)
    units: tuple[Unit, ...] = ()
    if capability is not None and not bare:
        units = tuple(
            Unit(fmt, "tensor cores") for fmt, least in TENSOR_CORES.items() if capability >= least
        )
    note = "no tensor cores" if bare else ""
    return Device("cuda", name, 1, capability, "", memory, units, source=source, note=note)


def amd(name: str, architecture: str, memory: int | None, source: str) -> Device:
    """Return an AMD GPU with what its matrix instructions multiply.

    >>> sorted(amd("AMD Instinct MI250X", "gfx90a:sramecc+:xnack-", None, "torch").fast)
    ['bfloat16', 'float16']
    """
    short = architecture.partition(":")[0]
    units: tuple[Unit, ...] = ()
    for pattern, by, formats in _AMD_UNITS:
        if re.match(pattern, short):
            units = tuple(Unit(fmt, by) for fmt in formats)
            break
    return Device("rocm", name, 1, None, short, memory, units, source=source)


def apple(name: str, memory: int | None, source: str) -> Device:
    """Return the GPU of an Apple chip; its name is the chip's.

    >>> apple("Apple M5 Pro", None, "torch").fast, apple("Apple M2", None, "torch").fast
    (frozenset({'float16'}), frozenset())
    """
    generation = re.search(r"\bM(\d+)", name)
    new = generation is not None and int(generation[1]) >= 5
    units = (Unit("float16", "GPU Neural Accelerators"),) if new else ()
    return Device("mps", name, 1, None, "", memory, units, source=source)


def tpu(name: str, memory: int | None, source: str) -> Device:
    """Return a TPU.

    >>> sorted(tpu("TPU v4", None, "jax").fast)
    ['bfloat16']
    """
    units = [Unit("bfloat16", "matrix units (MXU)")]
    version = re.search(r"\d+", name)
    if version is not None and int(version[0]) >= 7:
        units.append(Unit("float8", "matrix units (MXU)"))
    return Device("tpu", name, 1, None, "", memory, tuple(units), source=source)


def from_torch(torch: Any, cpu_name: str = "") -> Iterator[Device]:
    """Return what a loaded torch sees: CUDA or ROCm, MPS and XPU devices.

    Args:
        torch: the module.
        cpu_name: the chip's name, which is also the name of Apple's GPU.
    """
    hip = getattr(torch.version, "hip", None)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            if hip:
                yield amd(found.name, found.gcnArchName, found.total_memory, "torch")
            else:
                capability = (found.major, found.minor)
                yield nvidia(found.name, capability, found.total_memory, "torch")
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        for index in range(xpu.device_count()):
            yield _intel(xpu.get_device_properties(index))
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        yield apple(cpu_name or "Apple GPU", None, "torch")


def _intel(found: Any) -> Device:
    """Intel's XMX engines are what SYCL calls subgroup matrix multiply-accumulate."""
    units = []
    if getattr(found, "has_subgroup_matrix_multiply_accumulate", False):
        units += [Unit("float16", "XMX"), Unit("bfloat16", "XMX")]
    if getattr(found, "has_subgroup_matrix_multiply_accumulate_tensor_float32", False):
        units.append(Unit("tensorfloat32", "XMX"))
    return Device("xpu", found.name, 1, None, "", found.total_memory, tuple(units), source="torch")


def from_tensorflow(tf: Any) -> Iterator[Device]:
    """Return what a loaded TensorFlow sees, without making it initialise a device."""
    for found in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(found)
        name = details.get("device_name", found.name)
        yield nvidia(name, details.get("compute_capability"), None, "tensorflow")
    for found in tf.config.list_physical_devices("TPU"):
        yield tpu(found.name, None, "tensorflow")


def from_jax(jax: Any) -> Iterator[Device]:
    """Return what a loaded JAX sees; asking makes it initialise its backends."""
    for found in jax.devices():
        if found.platform == "tpu":
            yield tpu(found.device_kind, _jax_memory(found), "jax")
        elif found.platform in ("gpu", "cuda", "rocm"):
            generation = str(getattr(found, "compute_capability", ""))
            if generation.startswith("gfx"):
                yield amd(found.device_kind, generation, _jax_memory(found), "jax")
            else:
                capability = _capability(generation)
                yield nvidia(found.device_kind, capability, _jax_memory(found), "jax")


def _capability(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _jax_memory(device: Any) -> int | None:
    # its own limit, which preallocation sets below the device's memory
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def from_nvml(pynvml: Any) -> Iterator[Device]:
    """Return the GPUs that NVIDIA's driver knows, whether or not a framework can use them."""
    pynvml.nvmlInit()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            name = name.decode() if isinstance(name, bytes) else name
            yield nvidia(name, capability, memory, "nvidia-ml-py")
    finally:
        pynvml.nvmlShutdown()
