"""Stock transformers: the three ways in which it runs the experts of Qwen3-MoE on a CPU; and a loop of plain torch."""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from problem import Problem
from torch_inputs import inputs, training
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

BATCHED = "transformers batched_mm"
COPIES = 16  # tokens up to which batched_mm, which copies the weights of every choice, is worth a look


def providers(problem: Problem, threads: int) -> dict:
    x, w1, w2, routings = inputs(problem, threads)
    sizes = {"hidden_size": problem.H, "moe_intermediate_size": problem.I, "num_experts": problem.E}
    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts_per_tok=problem.k))
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(w1), torch.nn.Parameter(w2)
    experts.num_experts = problem.E
    eager = type(experts).forward.__wrapped__
    ways = {f"transformers {name}": ALL_EXPERTS_FUNCTIONS[name] for name in ("grouped_mm", "batched_mm")}
    ways |= {"transformers eager": eager, "torch loop": loop}
    if problem.T > COPIES or problem.training:
        del ways[BATCHED]

    def provider(name, forward):
        if problem.training:
            parameters = (experts.gate_up_proj, experts.down_proj)
            return training(functools.partial(forward, experts), x, parameters, routings)

        def call(turn):
            ids, weights = routings[turn]
            if name == BATCHED:
                require_memory(ids.numel() * (w1[0].nbytes + w2[0].nbytes))
            with torch.inference_mode():
                return forward(experts, x, ids, weights.to(x.dtype)).float().numpy()

        return call

    return {name: provider(name, forward) for name, forward in ways.items()}


def loop(experts, x, ids, shares):
    """What one writes without a library: the experts in use one after another."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, choice = torch.where(ids == e)
        gate, up = F.linear(x[token], experts.gate_up_proj[e]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, experts.down_proj[e])
        y = y.index_add(0, token, rows * shares[token, choice, None])
    return y


def require_memory(needed: int) -> None:
    """The system ends a process that takes more than there is, and its other providers with it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if needed > available:
        raise MemoryError(
            f"the copy of the weights of every choice must fit into {available / 1e9:.1f} GB, got {needed / 1e9:.1f} GB"
        )
