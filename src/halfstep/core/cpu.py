"""What a CPU is and which of its instruction sets speed up 16-bit arithmetic.

Sources: Linux' ``arch/x86/include/asm/cpufeatures.h`` and its "ARM64 ELF hwcaps" for the flags,
Intel's Instruction Set Extensions Programming Reference (AMX, AVX512-BF16, AVX512-FP16,
AVX-NE-CONVERT), Arm's Architecture Reference Manual (FEAT_BF16, FEAT_FP16, SME), and Apple's
"Determining Instruction Set Characteristics" for the names that ``sysctl`` prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .device import Device, Unit


class Instructions(NamedTuple):
    """An instruction set: Linux' flag, its maker's name, and the format that it speeds up."""

    flag: str
    name: str
    format: str | None = None
    matrix: bool = False


# Matrix before vector before what only converts or adds width; the table gives display order too.
INSTRUCTIONS = (
    Instructions("amx_bf16", "AMX-BF16", "bfloat16", matrix=True),
    Instructions("amx_fp16", "AMX-FP16", "float16", matrix=True),
    Instructions("amx_tf32", "AMX-TF32", "tensorfloat32", matrix=True),
    Instructions("amx_fp8", "AMX-FP8", "float8", matrix=True),
    Instructions("smeb16f32", "SME-B16F32", "bfloat16", matrix=True),
    Instructions("smef16f32", "SME-F16F32", "float16", matrix=True),
    Instructions("smef8f32", "SME-F8F32", "float8", matrix=True),
    Instructions("svebf16", "SVE-BF16", "bfloat16", matrix=True),
    Instructions("bf16", "BF16", "bfloat16", matrix=True),
    Instructions("f8mm8", "F8MM8", "float8", matrix=True),
    Instructions("f8mm4", "F8MM4", "float8", matrix=True),
    Instructions("avx512_bf16", "AVX512-BF16", "bfloat16"),
    Instructions("avx512_fp16", "AVX512-FP16", "float16"),
    Instructions("asimdfhm", "FP16-FML", "float16"),
    Instructions("asimdhp", "FP16", "float16"),
    Instructions("avx_ne_convert", "AVX-NE-CONVERT"),
    Instructions("f16c", "F16C"),
    Instructions("sve2", "SVE2"),
    Instructions("sve", "SVE"),
    Instructions("avx512f", "AVX512F"),
    Instructions("avx2", "AVX2"),
)

# Apple's names in sysctl, under hw.optional.arm, as Linux' flags.
_APPLE = {
    "FEAT_BF16": "bf16",
    "FEAT_FP16": "asimdhp",
    "FEAT_FHM": "asimdfhm",
    "SME_B16F32": "smeb16f32",
    "SME_F16F32": "smef16f32",
}

# Arm cores have no name in /proc/cpuinfo: implementer and part, from the cores' reference manuals.
_ARM_PARTS = {
    ("0x41", "0xd0c"): "Arm Neoverse N1",
    ("0x41", "0xd40"): "Arm Neoverse V1",
    ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
    ("0x41", "0xd84"): "Arm Neoverse V3",
    ("0x41", "0xd8e"): "Arm Neoverse N3",
    ("0x46", "0x001"): "Fujitsu A64FX",
    ("0xc0", "0xac3"): "Ampere-1",
}


def cpu_device(
    name: str, flags: Iterable[str], *, source: str, memory: int | None = None
) -> Device:
    """Return the CPU that has these flags, named as Linux names them.

    >>> cpu = cpu_device("Xeon 6", ["avx2", "avx512_bf16", "amx_bf16"], source="cpuinfo")
    >>> cpu.features, sorted(cpu.fast)
    (('AMX-BF16', 'AVX512-BF16', 'AVX2'), ['bfloat16'])
    """
    known = frozenset(flags)
    present = [entry for entry in INSTRUCTIONS if entry.flag in known]
    return Device(
        "cpu",
        name,
        memory=memory,
        units=tuple(Unit(e.format, e.name, e.matrix) for e in present if e.format is not None),
        features=tuple(entry.name for entry in present),
        source=source,
    )


def from_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    r"""Return the CPU's name and flags from the text of Linux' ``/proc/cpuinfo``.

    Only flags that every processor has count, so that a machine with large and small cores is not
    called faster than its small ones. The name is empty where the file does not give one.

    >>> from_cpuinfo("model name : EPYC\nflags : avx2 f16c\n")[0]
    'EPYC'
    """
    processors = [dict(_fields(block)) for block in text.strip().split("\n\n")]
    flagged = [
        frozenset((fields.get("flags") or fields["Features"]).split())
        for fields in processors
        if "flags" in fields or "Features" in fields
    ]
    names = list(dict.fromkeys(filter(None, map(_name, processors))))
    return " + ".join(names), frozenset.intersection(*flagged) if flagged else frozenset()


def _fields(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()


def _name(fields: Mapping[str, str]) -> str:
    if "model name" in fields:
        return fields["model name"]
    part = (fields.get("CPU implementer", ""), fields.get("CPU part", ""))
    return _ARM_PARTS.get(part, f"Arm {' '.join(part)}" if all(part) else "")


def from_sysctl(text: str) -> tuple[str, frozenset[str]]:
    r"""Return the CPU's name and flags from what ``sysctl hw.optional machdep.cpu`` prints.

    >>> from_sysctl("machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_BF16: 1\n")
    ('Apple M2', frozenset({'bf16'}))
    """
    values = dict(_fields(text))
    flags = {flag for name, flag in _APPLE.items() if values.get(f"hw.optional.arm.{name}") == "1"}
    for leaf in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):  # Macs with Intel's CPUs
        flags |= {flag.lower() for flag in values.get(leaf, "").split()}
    return values.get("machdep.cpu.brand_string", ""), frozenset(flags)
