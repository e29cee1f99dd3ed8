import torch

from case import Case
from moert.ops.permute import permute, permute_plan, unpermute
from moert.testing import BENCH_SHAPES, Shape

SHAPES = (
    *BENCH_SHAPES,
    Shape("Qwen3-30B-A3B, 1024 tokens", 1024, 128, 8, 2048, 768),
    Shape("Qwen3-30B-A3B, 4096 tokens", 4096, 128, 8, 2048, 768),
)


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Plan, rows to expert order, weighted rows back: all of MoE that is not a product.

    Also with rows in a rectangle of the largest expert's load, which drops nothing, and onto a residual of zeros.
    """
    routing = shape.routing()
    x = torch.randn(shape.T, shape.H).to(dtype)
    capacity, zeros = int(routing.ids.flatten().bincount().max()), torch.zeros_like(x)
    providers = {
        "moert": lambda x, weights: _moert(x, weights, routing.ids, shape.E),
        "moert_capacity": lambda x, weights: _moert(x, weights, routing.ids, shape.E, capacity),
        "moert_residual": lambda x, weights: _moert(x, weights, routing.ids, shape.E, None, zeros),
        "torch": lambda x, weights: _torch(x, weights, routing.ids),
    }
    rows = shape.k * x.nbytes
    return Case((x, routing.weights), providers, 2 * shape.k * x.numel(), 2 * x.nbytes + 2 * rows, like="copy")


def _moert(x, weights, ids, num_experts, capacity=None, residual=None):
    plan = permute_plan(ids, num_experts, capacity)
    return unpermute(permute(x, plan), plan, weights, residual)


def _torch(x, weights, ids):
    T, k = ids.shape
    order = ids.flatten().argsort(stable=True)
    rows = x[order // k]
    scaled = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, order // k, scaled)
