"""What this moert is, what it runs on, and what is missing: the facts a bug report needs."""

import importlib.metadata
import os
import platform
import re

import torch

from moert import _C, cuda

# Operator -> the stem of its kernels in csrc/cpu.
_KERNELS = {
    "topk_gating": "gating",
    "expert_choice": "expert_choice",
    "permute": "permute",
    "unpermute": "permute",
    "dispatch": "dispatch",
    "grouped_gemm": "gemm",
    "fused_experts": "gemm",
    "fused_experts_quantized": "packed_gemm",
    "union_experts": "gemm",
}
# Instruction set -> what a CPU must have for it.
_ISAS = {
    "avx2": "AVX2, FMA and F16C",
    "avx512": "AVX-512 F, BW, DQ and VL",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16 and VNNI",
    "amx": "AMX (bfloat16), under Linux 5.16 or newer",
}
# Formats of quantized weights: name, group, planes.  Of those left out, "auto" is what it is for the nearest one.
_FORMATS = {
    **{f"int8{'-g' * (g > 0)}{g or ''}": ("int8", g, 0) for g in (0, 32, 64, 128)},
    **{f"{name}-g32": (name, 32, 0) for name in ("int4", "int4_asymmetric", "mxfp4")},
    **{name: (name, 0, 0) for name in ("ternary2", "ternary5", "fp8")},
    **{f"bit_nested-{planes}bit-g{g}": ("bit_nested", g, planes) for planes, g in ((4, 32), (8, 32), (8, 128))},
    "sub1": ("sub1", 0, 0),
}
# Optional package -> the extra that brings it.
_EXTRAS = {"transformers": "hf", "accelerate": "hf", "typer": "cli", "rich": "cli", "matplotlib": "cli"}


def info() -> dict:
    """Version, build, CPU, threads, the kernel of each operator, CUDA, and what is missing with the way to get it.

    Only plain values, so that it can be written as JSON.
    """
    return {
        "version": _C.build()["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": _C.build(),
        "cpu": {"isa": _C.isa(), "best_isa": _C.best_isa(), "features": _C.cpu_features()},
        "threads": {"torch": torch.get_num_threads(), **_C.threads(), "runtimes": openmp_runtimes()},
        "quantized_precision": {name: _C.default_precision(*fmt) for name, fmt in _FORMATS.items()},
        "bfloat16_from_rows": {name: rows for name, fmt in _FORMATS.items() if (rows := _bfloat16_from(*fmt))},
        "operators": {name: {"cpu": _kernel(stem)} for name, stem in _KERNELS.items()},
        "cuda": {"archs": _C.build()["cuda_archs"], "torch": torch.version.cuda, "gpu": _gpu()},
        "missing": _missing(),
    }


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries that this process has loaded; more than one would fight over the cores."""
    if not os.path.exists("/proc/self/maps"):
        return []
    with open("/proc/self/maps") as maps:
        return sorted(set(re.findall(r"/.*/lib(?:gomp|omp|iomp5)[-.\w]*\.so\S*", maps.read())))


def _kernel(stem: str) -> str:
    """The highest instruction set that this stem is compiled for and that is not above the one in use."""
    allowed = _C.isas()[: _C.isas().index(_C.isa()) + 1]
    return [isa for isa in allowed if isa in ("generic", *_C.build()["kernels"].get(stem, []))][-1]


def _bfloat16_from(*fmt) -> int:
    """The rows an expert from which on packed weights are multiplied with rows of bfloat16; 0: never, on this CPU."""
    return _C.bf16_rows(_C.default_precision(*fmt), fmt[0].startswith("ternary"))


def _gpu() -> str | None:
    """Name and compute capability of the GPU in use."""
    if not torch.cuda.is_available():
        return None
    return "{} ({}.{})".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())


def _missing() -> list[str]:
    found = []
    if _C.isa() != _C.best_isa():
        found.append(f"the {_C.best_isa()} kernels: unset MOERT_ISA, now {_C.isa()}")
    for isa, what in _ISAS.items():
        if isa not in _C.isas():
            found.append(f"the {isa} kernels: run on a CPU with {what}")
    if not (cuda.is_built() and torch.version.cuda):
        found.append(f"CUDA kernels: {cuda.how()}")
    for package, extra in _EXTRAS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package}: pip install 'moert[{extra}]'")
    return found
