"""The CUDA kernels: loaded where moert has them and torch has CUDA; else each operator says what brings them."""

from importlib.util import find_spec

import torch

# All that have kernels; to ask torch for them would take a fortieth of what `import moert` may.
OPERATORS = (
    *("topk_gating", "topk_gating_backward", "expert_choice"),
    *("permute_plan", "permute", "unpermute", "unpermute_backward"),
    *("grouped_gemm", "grouped_gemm_wgrad", "fused_experts", "fused_experts_backward", "fused_experts_backward_"),
    *("fused_experts_quantized", "fused_experts_quantized_backward"),
    *("union_experts", "dispatch_plan", "dispatch_pack", "dispatch_pack_", "dispatch_unpack_", "dispatch_combine"),
)


def is_built() -> bool:
    """Whether this moert was built with its CUDA kernels."""
    return find_spec("moert._cuda") is not None


def load() -> torch.library.Library:
    """Load the CUDA operators; every operator that then has no CUDA kernel gets one that says why.

    Returns what registers the latter: they go with it.
    """
    if is_built() and torch.version.cuda:
        torch.ops.load_library(find_spec("moert._cuda").origin)
    refusals = torch.library.Library("moert", "IMPL")
    for name in OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moert::{name}", "CUDA"):
            refusals.impl(name, _refusal(name), "CUDA")
    return refusals


def _refusal(name: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(why_not(name))

    return refuse


def why_not(name: str) -> str:
    """Why the operator cannot take tensors on a GPU, and what to do."""
    if is_built() and torch.version.cuda:
        return f"tensors of {name} must be on the CPU, got a GPU: this version has no CUDA kernel for it"
    return f"tensors of {name} must be on the CPU, got a GPU: {how()}"


def how() -> str:
    """What brings the CUDA kernels that this installation is without."""
    if not is_built():
        return "moert is built without CUDA, pip install . -C cmake.define.MOERT_CUDA=ON (docs/build.md) builds it"
    return f"torch {torch.__version__} has no CUDA, install one that has"
