"""Made-up machines: cpuinfo and sysctl texts, frameworks and a driver that say what we want."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace as Fake

import pytest

from halfstep.core.device import Device, Unit, gathered
from halfstep.core.hardware import Sources, devices, read_accelerators, read_cpu

SAPPHIRE_RAPIDS = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 f16c avx avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 f16c avx avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile
"""
ZEN_3 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7763 64-Core Processor
flags\t\t: fpu sse2 f16c avx avx2 fma
"""
ZEN_4 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9654 96-Core Processor
flags\t\t: fpu sse2 f16c avx avx2 avx512f avx512_bf16 fma
"""
NEOVERSE_V1 = """\
processor\t: 0
Features\t: fp asimd aes fphp asimdhp asimdfhm sve i8mm svei8mm svebf16 bf16 dgh
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
"""
NEOVERSE_V2 = NEOVERSE_V1.replace("0xd40", "0xd4f").replace("sve ", "sve sve2 ")
SME_CORE = """\
processor\t: 0
Features\t: fp asimd asimdhp bf16 sme sme2 smef16f32 smeb16f32
CPU implementer\t: 0x99
CPU part\t: 0x123
"""
BIG_LITTLE = """\
processor\t: 0
Features\t: asimd asimdhp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: asimd asimdhp bf16 i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""
APPLE_M1 = """\
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_FHM: 1
hw.optional.arm.FEAT_BF16: 0
machdep.cpu.brand_string: Apple M1
"""
APPLE_M4 = """\
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 1
hw.optional.arm.SME_F16F32: 1
hw.optional.arm.SME_B16F32: 1
machdep.cpu.brand_string: Apple M4 Max
"""
APPLE_M5 = APPLE_M4.replace("M4 Max", "M5")
INTEL_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz
machdep.cpu.features: FPU SSE SSE2 F16C AVX1.0
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2
"""


def missing():
    raise ImportError("No module named 'pynvml'")


def linux(text, **modules):
    return Sources(
        "Linux", "x86_64", cpuinfo=lambda: text, memory=lambda: 2**34, modules=modules, nvml=missing
    )


def mac(text, **modules):
    return Sources(
        "Darwin", "arm", sysctl=lambda: text, memory=lambda: 2**34, modules=modules, nvml=missing
    )


def fast_and_vector(device):
    return device.fast, {unit.format for unit in device.units if not unit.matrix}


@pytest.mark.parametrize(
    ("sources", "name", "matrix", "vector", "features"),
    [
        (linux(SAPPHIRE_RAPIDS), "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
         {"bfloat16"}, {"bfloat16", "float16"},
         ("AMX-BF16", "AVX512-BF16", "AVX512-FP16", "F16C", "AVX512F", "AVX2")),
        (linux(ZEN_3), "AMD EPYC 7763 64-Core Processor", set(), set(), ("F16C", "AVX2")),
        (linux(ZEN_4), "AMD EPYC 9654 96-Core Processor", set(), {"bfloat16"},
         ("AVX512-BF16", "F16C", "AVX512F", "AVX2")),
        (linux(NEOVERSE_V1), "Arm Neoverse V1", {"bfloat16"}, {"float16"},
         ("SVE-BF16", "BF16", "FP16-FML", "FP16", "SVE")),
        (linux(NEOVERSE_V2), "Arm Neoverse V2", {"bfloat16"}, {"float16"},
         ("SVE-BF16", "BF16", "FP16-FML", "FP16", "SVE2", "SVE")),
        (linux(SME_CORE), "Arm 0x99 0x123", {"bfloat16", "float16"}, {"float16"},
         ("SME-B16F32", "SME-F16F32", "BF16", "FP16")),
        (mac(APPLE_M1), "Apple M1", set(), {"float16"}, ("FP16-FML", "FP16")),
        (mac(APPLE_M4), "Apple M4 Max", {"bfloat16", "float16"}, {"float16"},
         ("SME-B16F32", "SME-F16F32", "BF16", "FP16")),
        (mac(INTEL_MAC), "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", set(), set(),
         ("F16C", "AVX2")),
    ],
)  # fmt: skip
def test_cpus(sources, name, matrix, vector, features):
    cpu = read_cpu(sources)
    assert (cpu.kind, cpu.name, cpu.memory) == ("cpu", name, 2**34)
    assert fast_and_vector(cpu) == (matrix, vector)
    assert cpu.features == features
    assert cpu.source == ("cpuinfo" if sources.system == "Linux" else "sysctl")


def test_only_what_every_core_has_counts():
    cpu = read_cpu(linux(BIG_LITTLE))
    assert cpu.features == ("FP16",)
    assert cpu.name == "Arm 0x41 0xd05 + Arm Neoverse V2"


def fails(error):
    def read():
        raise error

    return read


@pytest.mark.parametrize(
    "sources",
    [
        Sources("Plan9", "mips", modules={}, nvml=missing),
        linux(""),
        linux("garbage without a colon\n\n\n:\n"),
        Sources("Linux", "mips", cpuinfo=fails(PermissionError("/proc")), modules={}, nvml=missing),
        Sources("Darwin", "mips", sysctl=fails(subprocess.TimeoutExpired("sysctl", 5)), modules={}),
        Sources("Linux", "mips", cpuinfo=str, memory=fails(OSError()), modules={}, nvml=missing),
    ],
)
def test_an_unknown_machine_has_a_cpu_without_features(sources):
    (cpu,) = devices(replace(sources, processor="mips", nvml=missing))
    assert (cpu.kind, cpu.name, cpu.features, cpu.units) == ("cpu", "mips", (), ())


def test_torch_adds_flags_that_the_kernel_hides():
    capabilities = {"amx_fp16": True, "avx_ne_convert": True, "avx512_fp16": False, "cpu_name": "x"}
    torch = fake_torch([])
    torch.cpu = Fake(get_capabilities=lambda: capabilities)
    cpu = read_cpu(linux(ZEN_3, torch=torch))
    assert cpu.features == ("AMX-FP16", "AVX-NE-CONVERT", "F16C", "AVX2")
    assert cpu.fast == {"float16"}


def fake_torch(gpus, *, hip=None, mps=False, xpus=()):
    return Fake(
        version=Fake(hip=hip, cuda="12.9"),
        cuda=Fake(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_properties=lambda index: gpus[index],
        ),
        backends=Fake(mps=Fake(is_available=lambda: mps)),
        xpu=Fake(
            is_available=lambda: bool(xpus),
            device_count=lambda: len(xpus),
            get_device_properties=lambda index: xpus[index],
        ),
    )


def cuda_gpu(name, major, minor, memory=2**34):
    return Fake(name=name, major=major, minor=minor, total_memory=memory)


def rocm_gpu(name, architecture):
    return Fake(name=name, major=9, minor=0, total_memory=2**36, gcnArchName=architecture)


P100 = cuda_gpu("Tesla P100-PCIE-16GB", 6, 0)
V100 = cuda_gpu("Tesla V100-SXM2-16GB", 7, 0)
GTX_1660 = cuda_gpu("NVIDIA GeForce GTX 1660 Ti", 7, 5)
T4 = cuda_gpu("Tesla T4", 7, 5)
A100 = cuda_gpu("NVIDIA A100-SXM4-40GB", 8, 0)
RTX_3090 = cuda_gpu("NVIDIA GeForce RTX 3090", 8, 6)
RTX_4090 = cuda_gpu("NVIDIA GeForce RTX 4090", 8, 9)
H100 = cuda_gpu("NVIDIA H100 80GB HBM3", 9, 0)
B200 = cuda_gpu("NVIDIA B200", 10, 0)

HALF, AMPERE = {"float16"}, {"float16", "bfloat16", "tensorfloat32"}
ADA = AMPERE | {"float8"}


@pytest.mark.parametrize(
    ("gpu", "fast"),
    [
        (P100, set()),
        (V100, HALF),
        (GTX_1660, set()),
        (cuda_gpu("NVIDIA GeForce MX450", 7, 5), set()),
        (cuda_gpu("NVIDIA T1000 8GB", 7, 5), set()),
        (cuda_gpu("Quadro T2000", 7, 5), set()),
        (T4, HALF),
        (cuda_gpu("NVIDIA GeForce RTX 2080 Ti", 7, 5), HALF),
        (A100, AMPERE),
        (RTX_3090, AMPERE),
        (RTX_4090, ADA),
        (H100, ADA),
        (B200, ADA),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_nvidia(gpu, fast):
    (found,) = read_accelerators(linux(ZEN_3, torch=fake_torch([gpu])))
    assert (found.kind, found.name, found.memory) == ("cuda", gpu.name, 2**34)
    assert found.capability == (gpu.major, gpu.minor)
    assert found.fast == fast
    assert found.usable


def test_what_lacks_tensor_cores_says_so():
    (found,) = read_accelerators(linux(ZEN_3, torch=fake_torch([GTX_1660])))
    assert found.note == "no tensor cores"
    assert "no tensor cores" in found.label


def test_identical_gpus_are_counted_and_others_kept_apart():
    found = read_accelerators(linux(ZEN_3, torch=fake_torch([V100, P100, V100])))
    assert [(gpu.name, gpu.count) for gpu in found] == [(V100.name, 2), (P100.name, 1)]
    assert found[0].label == "Tesla V100-SXM2-16GB, compute capability 7.0 (x2)"


@pytest.mark.parametrize(
    ("architecture", "fast"),
    [
        ("gfx906:sramecc+:xnack-", set()),
        ("gfx908", {"float16", "bfloat16"}),
        ("gfx90a:sramecc+:xnack-", {"float16", "bfloat16"}),
        ("gfx942:sramecc+:xnack-", ADA),
        ("gfx950", {"float16", "bfloat16", "float8"}),
        ("gfx1030", set()),
        ("gfx1100", {"float16", "bfloat16"}),
        ("gfx1201", {"float16", "bfloat16", "float8"}),
    ],
)
def test_rocm(architecture, fast):
    torch = fake_torch([rocm_gpu("AMD something", architecture)], hip="6.4")
    (found,) = read_accelerators(linux(ZEN_4, torch=torch))
    assert (found.kind, found.capability) == ("rocm", None)
    assert found.architecture == architecture.partition(":")[0]
    assert found.fast == fast


@pytest.mark.parametrize(
    ("text", "fast"), [(APPLE_M1, set()), (APPLE_M4, set()), (APPLE_M5, {"float16"})]
)
def test_mps_is_named_after_its_chip(text, fast):
    cpu, gpu = devices(mac(text, torch=fake_torch([], mps=True)))
    assert (gpu.kind, gpu.name, gpu.fast) == ("mps", cpu.name, fast)


def test_xpu():
    card = Fake(
        name="Intel Data Center GPU Max 1550",
        total_memory=2**36,
        has_subgroup_matrix_multiply_accumulate=True,
        has_subgroup_matrix_multiply_accumulate_tensor_float32=True,
    )
    old = Fake(name="Intel Iris Xe", total_memory=2**33)
    found = read_accelerators(linux(ZEN_4, torch=fake_torch([], xpus=[card, old])))
    assert [gpu.fast for gpu in found] == [AMPERE, frozenset()]
    assert found[0].kind == "xpu"


def jax_device(platform, kind, capability=None):
    return Fake(
        platform=platform,
        device_kind=kind,
        compute_capability=capability,
        memory_stats=lambda: {"bytes_limit": 2**35},
    )


@pytest.mark.parametrize(("kind", "fast"), [("TPU v4", {"bfloat16"}), ("TPU v5 lite", {"bfloat16"}),
                                            ("TPU7x", {"bfloat16", "float8"})])  # fmt: skip
def test_tpu_through_jax(kind, fast):
    jax = Fake(devices=lambda: [jax_device("tpu", kind)] * 4)
    (found,) = read_accelerators(linux(ZEN_4, torch=fake_torch([]), jax=jax))
    assert (found.kind, found.name, found.count, found.memory) == ("tpu", kind, 4, 2**35)
    assert found.fast == fast


def test_gpus_through_jax():
    jax = Fake(
        devices=lambda: [
            jax_device("gpu", "NVIDIA H100", "9.0"),
            jax_device("gpu", "MI300X", "gfx942"),
        ]
    )
    nvidia, amd = read_accelerators(linux(ZEN_4, jax=jax))
    assert (nvidia.kind, nvidia.capability, nvidia.fast) == ("cuda", (9, 0), ADA)
    assert (amd.kind, amd.architecture, amd.fast) == ("rocm", "gfx942", ADA)


def test_jax_is_not_asked_where_torch_sees_a_gpu():
    def initialise():
        pytest.fail("asking JAX would take the GPU's memory")

    sources = linux(ZEN_4, torch=fake_torch([A100]), jax=Fake(devices=initialise))
    assert [gpu.source for gpu in read_accelerators(sources)] == ["torch"]


def test_jax_that_sees_the_cpu_adds_nothing():
    jax = Fake(devices=lambda: [jax_device("cpu", "cpu")])
    assert read_accelerators(linux(ZEN_4, jax=jax)) == ()


def test_tensorflow():
    listed = {"GPU": [Fake(name="/physical_device:GPU:0")], "TPU": []}
    details = {"device_name": "Tesla T4", "compute_capability": (7, 5)}
    tf = Fake(
        config=Fake(
            list_physical_devices=lambda kind: listed[kind],
            experimental=Fake(get_device_details=lambda device: details),
        )
    )
    (found,) = read_accelerators(linux(ZEN_4, tensorflow=tf))
    assert (found.name, found.capability, found.fast) == ("Tesla T4", (7, 5), HALF)


def fake_nvml(log, fails=False):
    def init():
        log.append("init")

    def name(handle):
        if fails:
            raise RuntimeError("driver/library version mismatch")
        return b"NVIDIA L4"

    return Fake(
        nvmlInit=init,
        nvmlShutdown=lambda: log.append("shutdown"),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=name,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, 9),
        nvmlDeviceGetMemoryInfo=lambda handle: Fake(total=23 * 2**30),
    )


def test_the_driver_is_asked_where_no_framework_sees_a_gpu():
    log = []
    sources = replace(linux(ZEN_4), nvml=lambda: fake_nvml(log))
    (found,) = read_accelerators(sources)
    assert (found.name, found.count, found.fast) == ("NVIDIA L4", 2, ADA)
    assert found.usable  # no framework is loaded yet: nothing is known against it
    assert log == ["init", "shutdown"]
    (found,) = read_accelerators(replace(sources, modules={"torch": fake_torch([])}))
    assert not found.usable


def test_a_driver_that_fails_is_passed_over_and_shut_down():
    log = []
    assert read_accelerators(replace(linux(ZEN_4), nvml=lambda: fake_nvml(log, fails=True))) == ()
    assert log == ["init", "shutdown"]


def test_errors_of_pynvml_itself_are_passed_over():
    class NVMLError(Exception):
        pass

    NVMLError.__module__ = "pynvml"
    nvml = fake_nvml([])
    nvml.nvmlInit = fails(NVMLError())
    assert read_accelerators(replace(linux(ZEN_4), nvml=lambda: nvml)) == ()


@pytest.mark.parametrize(
    "error", [RuntimeError("no driver"), UserWarning("driver too old"), AssertionError("no CUDA")]
)
def test_a_framework_that_fails_is_passed_over(error):
    torch = fake_torch([V100])
    torch.cuda.get_device_properties = fails(error)
    jax = Fake(devices=fails(RuntimeError("Unable to initialize backend 'tpu'")))
    assert read_accelerators(linux(ZEN_4, torch=torch, jax=jax)) == ()


def test_this_machine():
    cpu, *_ = devices()
    assert cpu.kind == "cpu"
    assert cpu.name


def test_a_matrix_unit_beats_a_vector_one():
    units = (Unit("bfloat16", "AVX512-BF16", matrix=False), Unit("bfloat16", "AMX-BF16"))
    cpu = Device("cpu", "Xeon", units=units)
    assert cpu.unit("bfloat16").by == "AMX-BF16"
    assert cpu.get_config()["units"]["bfloat16"] == {"by": "AMX-BF16", "matrix": True}
    assert cpu.get_config()["units"]["float8"] is None


def test_gathering_counts_what_was_counted():
    one = Device("cuda", "A", count=2)
    assert gathered([one, one, Device("cuda", "B")])[0].count == 4
