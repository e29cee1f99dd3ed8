"""moert, with weights as they lie and prepacked, and the limits of the machine measured through the same process."""

import functools
from dataclasses import replace

import torch
from problem import PRODUCT_SIZE, READ_BYTES, Problem
from torch_inputs import inputs, training, weights

import moert
from moert import GluExperts


def providers(problem: Problem, threads: int) -> dict:
    x, w1, w2, routings = inputs(problem, threads)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routings]
    stream = torch.ones(READ_BYTES // 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    limits = {"read": lambda turn: stream.sum(), "product": lambda turn: a @ b}
    if problem.training:
        w1, w2 = (w.detach().requires_grad_() for w in (w1, w2))

        def step(x, ids, weights):
            return moert.fused_experts(x, moert.Routing(ids, weights, problem.E), w1, w2)

        return {"moert": training(step, x, (w1, w2), routings)} | limits

    prepacked, laid_out = _prepacked(replace(problem, T=0, routing="uniform"))

    def call(turn):
        with torch.inference_mode():
            return moert.fused_experts(x, routed[turn], w1, w2).float().numpy()

    def call_prepacked(turn):
        with torch.inference_mode():
            return prepacked(x, routed[turn]).float().numpy()

    mine = {"moert": call} | ({"moert prepacked": call_prepacked} if laid_out else {})
    return mine | limits


@functools.lru_cache(maxsize=1)
def _prepacked(problem: Problem) -> tuple[GluExperts, list[str]]:
    experts = GluExperts(problem.E, problem.H, problem.I, device="meta")
    experts.gate_up_proj, experts.down_proj = (torch.nn.Parameter(w.clone()) for w in weights(problem))
    return experts, moert.prepack_(experts)
