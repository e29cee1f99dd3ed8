"""Stock transformers: the three ways in which it runs the experts of Qwen3-MoE on a CPU."""

import functools

import torch
from problem import Problem
from torch_inputs import inputs, training
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

COPIES = 16  # tokens up to which batched_mm, which copies the weights of every choice, is worth a look


def providers(problem: Problem, threads: int) -> dict:
    x, w1, w2, routings = inputs(problem, threads)
    sizes = {"hidden_size": problem.H, "moe_intermediate_size": problem.I, "num_experts": problem.E}
    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts_per_tok=problem.k))
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(w1), torch.nn.Parameter(w2)
    experts.num_experts = problem.E
    eager = type(experts).forward.__wrapped__
    ways = {"eager": eager, "grouped_mm": ALL_EXPERTS_FUNCTIONS["grouped_mm"]}
    if problem.T <= COPIES and not problem.training:
        ways["batched_mm"] = ALL_EXPERTS_FUNCTIONS["batched_mm"]

    def provider(forward):
        if problem.training:
            parameters = (experts.gate_up_proj, experts.down_proj)
            return training(functools.partial(forward, experts), x, parameters, routings)

        def call(turn):
            ids, weights = routings[turn]
            with torch.inference_mode():
                return forward(experts, x, ids, weights.to(x.dtype)).float().numpy()

        return call

    return {f"transformers {name}": provider(forward) for name, forward in ways.items()}
