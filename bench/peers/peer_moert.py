"""moert, with weights as they lie, in large pages and prepacked, or packed in few bits; and the limits of the machine."""

from functools import partial

import numpy as np
import torch
from problem import PRODUCT_SIZE, READ_BYTES, Problem, kept
from torch_inputs import inputs, routings, training, weights

import moert
from moert import GluExperts
from moert.quant.quantize import any_format_of
from moert.runtime import huge_pages_


def providers(problem: Problem, threads: int) -> dict:
    torch.set_num_threads(threads)
    if problem.packed:
        return _over_packed(problem) | _limits(packed=True)
    x, w1, w2, routed = inputs(problem, threads)
    if problem.training:
        w1, w2 = (w.detach().requires_grad_() for w in (w1, w2))

        def step(x, ids, weights):
            return moert.fused_experts(x, moert.Routing(ids, weights, problem.E), w1, w2)

        return {"moert": training(step, x, (w1, w2), routed)} | _limits(packed=False)

    in_pages, (prepacked, laid_out) = _in_large_pages(problem), _prepacked(problem)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routed]

    def call(turn):
        with torch.inference_mode():
            return moert.fused_experts(x, routed[turn], w1, w2).float().numpy()

    def call_module(experts, turn):
        with torch.inference_mode():
            return experts(x, routed[turn]).float().numpy()

    mine = {"moert": call, "moert large pages": partial(call_module, in_pages)}
    mine |= {"moert prepacked": partial(call_module, prepacked)} if laid_out else {}
    return mine | _limits(packed=False)


def weight_bytes(problem: Problem) -> int:
    """Of all experts as they are stored, scales included."""
    return sum(w.nbytes for w in (_packed if problem.packed else weights)(problem))


def _over_packed(problem: Problem) -> dict:
    if problem.training:
        raise ValueError("training must be off: packed weights have no gradients")
    x, (w1, w2) = torch.from_numpy(problem.x()), _packed(problem)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routings(problem)]

    def call(turn):
        with torch.inference_mode():
            return moert.fused_experts_quantized(x, routed[turn], w1, w2).numpy()

    return {"moert": call}


def _limits(packed: bool) -> dict:
    stream = torch.ones(READ_BYTES // 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    limits = {"read": lambda turn: stream.sum(), "product": lambda turn: a @ b}
    if packed:
        c, d = torch.randint(-127, 128, (2, PRODUCT_SIZE, PRODUCT_SIZE), dtype=torch.int8)
        limits["int8 product"] = lambda turn: torch._int_mm(c, d)
    return limits


@kept
def _packed(problem: Problem) -> list:
    """An expert at a time, so that no more than one is there in float32."""
    fmt = any_format_of(*problem.format)
    return [fmt.pack_each((torch.from_numpy(np.array(w)) for w in view), view.shape) for view in problem.windows()]


def _module(problem: Problem) -> GluExperts:
    experts = GluExperts(problem.E, problem.H, problem.I, device="meta")
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w.clone()) for w in weights(problem))
    return experts


@kept
def _in_large_pages(problem: Problem) -> GluExperts:
    huge_pages_(experts := _module(problem))
    return experts


@kept
def _prepacked(problem: Problem) -> tuple[GluExperts, list[str]]:
    return (experts := _module(problem)), moert.prepack_(experts)
