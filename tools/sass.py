"""Machine code of the CUDA kernels: what must be in it and what must not, by kernel and architecture.

Reads a fatbinary with cuobjdump (on the PATH, or beside nvcc): no kernel loads or stores local memory, and those that a
rule names have its instructions.  usage: sass.py build/cuda/_cuda.so
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Rule(NamedTuple):
    """Kernels whose mangled name matches; their code for architectures that match must have what `has` matches, and at
    most so often what `most` matches.
    """

    kernel: str
    archs: str
    has: tuple[str, ...]
    why: str
    most: tuple[str, int] | None = None


LOCAL = r"\b(?:LDL|STL)\b"  # a spilled register, or an array that is indexed
LOAD_128 = r"\bLDG\.E(?:\.\w+)*\.128"
STREAM_128 = r"\bLDG\.E\.NA(?:\.\w+)*\.128"  # past the first-level cache
STORE_128 = r"\bSTG\.E(?:\.\w+)*\.128"
# Kernels that memory bounds, in their aligned variants; tensor-core kernels of one architecture.
RULES = (
    Rule(r"permute_kernel\w*Chunk", ".*", (LOAD_128, STORE_128), "rows are copied 16 bytes at a time"),
    Rule(r"pack_kernel\w*Chunk", ".*", (LOAD_128, STORE_128), "rows are packed 16 bytes at a time"),
    Rule(r"unpermute_kernel\w*Lb1E", ".*", (LOAD_128, STORE_128), "rows are summed 16 bytes at a time"),
    Rule(r"unpermute_backward_kernel\w*Lb1E", ".*", (LOAD_128, STORE_128), "rows are read 16 bytes at a time"),
    Rule(r"gating_kernelIfLi(?:8|16|32)E", ".*", (LOAD_128,), "logits are read 16 bytes at a time"),
    Rule(
        r"packed_product\w*BlockCodes", ".*", (LOAD_128, STREAM_128), "x and packed weights are read 16 bytes at a time"
    ),
    Rule(
        r"packed_product_mma\w*(?:Float|E4m3)Rows",
        ".*",
        (r"\bHMMA\.16816", r"\bLDGSTS\.E(?:\.\w+)*\.128", r"\bLDS\.128"),
        "tensor cores, fed 16 bytes at a time",
    ),
    Rule(
        r"packed_product_mma\w*Int8Rows",
        ".*",
        (r"\bIMMA\.16832\.S8\.S8\b", r"\bLDGSTS\.E(?:\.\w+)*\.128", r"\bLDS\.128"),
        "tensor cores, fed 16 bytes at a time",
    ),
    Rule(
        r"packed_product_mma\w*Int4\w*FloatRows",
        ".*",
        (r"\bLOP3\.LUT[^;]*0xf000f\b",),
        "two codes are taken by one LOP3",
    ),
    Rule(
        r"packed_product_mma\w*Int4\w*Int8Rows",
        ".*",
        (r"\bLOP3\.LUT[^;]*0xf0f0f0f\b",),
        "four codes are taken by one LOP3",
    ),
    Rule(
        r"packed_product_mma\w*(?:Int8|Fp8|Ternary2|Ternary5|Sub1)Fragments\w*FloatRows|packed_product_mma\w*Mxfp4\w*Int8Rows",
        ".*",
        (r"\bPRMT\b",),
        "bytes are put in their place by PRMT",
    ),
    Rule(r"packed_product_mma\w*Sub1", ".*", (r"\bATOMS\.OR\b",), "digits are joined in shared memory"),
    Rule(r"packed_product\w*BitNestedCodes", ".*", (LOAD_128,), "x is read 16 bytes at a time"),
    Rule(
        r"grouped_gemm_persistent",
        "sm_90a",
        (r"\bHGMMA\b", r"\bUTMALDG\b", STORE_128),
        "Hopper's tensor cores, fed by its copy engine; rows are stored 16 bytes at a time",
    ),
    Rule(
        r"grouped_gemm_persistent_kernel",
        "sm_90a",
        (r"\bUCGABAR_ARV\b",),
        "no warp waits for its writes on the whole GPU but where blocks of a cluster begin and end",
        (r"\bMEMBAR\.ALL\.GPU\b", 2),
    ),
    Rule(
        r"grouped_gemm_persistent_kernel\w*Li\d+ELi\d+ELb1ELb[01]E",
        "sm_90a",
        (r"\bLDGSTS\.E(?:\.\w+)*\.128",),
        "rows are gathered 16 bytes at a time",
    ),
    Rule(
        r"grouped_gemm_persistent_kernel\w*Li128ELi\d+ELb[01]ELb0E\w*8Epilogue",
        "sm_90a",
        (r"\bHGMMA[^;]*\.tnspB\b", r"\bUTMALDG\.4D\b"),
        "weights are multiplied as they lie along their columns, their gate and up halves one box after the other",
    ),
    Rule(
        r"grouped_gemm_persistent_kernel\w*Li(?:8|16|32|64)ELi128ELb1ELb0E",
        "sm_90a",
        (r"\bHGMMA[^;]*\.tnspA\b", r"\bUTMALDG\.4D\b"),
        "the same with the weights on the M side",
    ),
    Rule(
        r"grouped_gemm_(?:persistent_kernel|mma)\w*8Epilogue",
        "sm_90a",
        (r"\bREDG\.E\.ADD\.F32x4\b",),
        "rows are added to sums 16 bytes at a time",
    ),
    Rule(
        r"grouped_gemm_(?:mma|persistent_kernel)\w*ActivationBackward",
        ".*",
        (LOAD_128,),
        "pre-activations are read 16 bytes at a time",
    ),
    Rule(
        r"grouped_gemm_(?:wgrad_)?mma",
        ".*",
        (r"\bHMMA\b", STORE_128),
        "tensor cores; rows are stored 16 bytes at a time",
    ),
    Rule(r"choice_dots", ".*", (LOAD_128,), "rows are read 16 bytes at a time"),
    Rule(r"start_sums\w*Li8E", ".*", (STORE_128,), "sums are written 16 bytes at a time"),
    Rule(r"round_sums\w*Li8E", ".*", (LOAD_128, STORE_128), "sums are rounded 16 bytes at a time"),
    Rule(
        r"grouped_gemm_persistent_kernel\w*Li128ELi256E",
        "sm_90a",
        (r"\bUTMALDG\.3D\.MULTICAST\b",),
        "pairs of wide tiles share the weights that they read",
    ),
    Rule(r"GemmUniversal", "sm_90a", (r"\bHGMMA\b", r"\bUTMALDG\b"), "Hopper's tensor cores, fed by its copy engine"),
)
# Kernels that may spill, and why.
SPILLS = ((r"gating_kernelId", "float64 is for checking gradients"),)
WANTED_ARCHS = ("sm_80", "sm_90a")


def code(text: str) -> dict[tuple[str, str], str]:
    """What `cuobjdump -sass` says: (kernel, architecture) -> its instructions."""
    found, arch = {}, ""
    for part in re.split(r"(?=arch = sm_\w+|\bFunction : \S+)", text):
        if match := re.match(r"arch = (sm_\w+)", part):
            arch = match[1]
        elif match := re.match(r"Function : (\S+)", part):
            found[match[1], arch] = part
    return found


def complaints(sass: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong, a line each."""
    said = [f"{arch}: no kernel" for arch in WANTED_ARCHS if not any(key[1] == arch for key in sass)]
    for (name, arch), text in sass.items():
        if (local := len(re.findall(LOCAL, text))) and not any(re.search(kernel, name) for kernel, _ in SPILLS):
            said.append(f"{arch} {name}: {local} loads and stores of local memory")
    for rule in RULES:
        hit = {
            key: text
            for key, text in sass.items()
            if re.search(rule.kernel, key[0]) and re.fullmatch(rule.archs, key[1])
        }
        for arch in WANTED_ARCHS:
            if re.fullmatch(rule.archs, arch) and not any(key[1] == arch for key in hit):
                said.append(f"no kernel matches {rule.kernel} on {arch}")
        for (name, arch), text in hit.items():
            said += [f"{arch} {name}: no {wanted}: {rule.why}" for wanted in rule.has if not re.search(wanted, text)]
            if rule.most and (times := len(re.findall(rule.most[0], text))) > rule.most[1]:
                said.append(f"{arch} {name}: {times} {rule.most[0]}, at most {rule.most[1]}: {rule.why}")
    return said


def tool(name: str) -> str:
    """The path of a CUDA tool: on the PATH or from PyPI's packages."""
    beside = Path(sys.prefix).glob(f"lib/python3*/site-packages/nvidia/cu*/bin/{name}")
    found = shutil.which(name) or next((str(path) for path in sorted(beside)), None)
    if not found:
        sys.exit(f"{name} must be on the PATH, got none: make cuda-toolchain")
    return found


def main(path: str) -> None:
    def run(*options: str) -> str:
        cuobjdump = tool("cuobjdump")  # which looks for nvdisasm beside itself only if that is on the PATH
        environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [cuobjdump, *options, path]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    found = code(run("-sass"))
    said = complaints(found)
    if ".ptx" not in run("-lptx"):
        said.append("no PTX for GPUs that are newer than the code")
    if said:
        sys.exit("\n".join(said))
    print(f"{len(found)} kernels for {', '.join(sorted({arch for _, arch in found}))}, {len(RULES)} rules kept")


if __name__ == "__main__":
    main(sys.argv[1])
