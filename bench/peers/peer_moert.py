"""moert, and the limits of the machine measured through the same process."""

import torch
from problem import PRODUCT_SIZE, READ_BYTES, Problem
from torch_inputs import inputs

import moert


def providers(problem: Problem, threads: int) -> dict:
    x, w1, w2, routings = inputs(problem, threads)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routings]
    stream = torch.ones(READ_BYTES // 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)

    def call(turn):
        with torch.inference_mode():
            return moert.fused_experts(x, routed[turn], w1, w2).float().numpy()

    return {"moert": call, "read": lambda turn: stream.sum(), "product": lambda turn: a @ b}
