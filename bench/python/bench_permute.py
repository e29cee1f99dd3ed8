import torch
import torch.nn.functional as F

from case import Case
from moert.ops.permute import permute, permute_plan, unpermute
from moert.testing import BENCH_SHAPES, Shape

SHAPES = (
    *BENCH_SHAPES,
    Shape("Qwen3-30B-A3B, 1024 tokens", 1024, 128, 8, 2048, 768),
    Shape("Qwen3-30B-A3B, 4096 tokens", 4096, 128, 8, 2048, 768),
    Shape("Tutel's, 4096 tokens", 4096, 64, 2, 256, 256),
)
EINSUM = 2**26  # elements of its tensor [T, E, C] up to which it is worth the wait


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
    if shape.T * shape.E * capacity <= EINSUM:
        providers["torch_einsum"] = lambda x, weights: _einsum(x, weights, routing.ids, shape.E, capacity)
    rows = shape.k * x.nbytes  # a step: dy and rows are read for drows, which are read again for dx
    return Case(
        (x, routing.weights),
        providers,
        2 * shape.k * x.numel(),
        2 * x.nbytes + 2 * rows,
        "copy",
        4 * x.nbytes + 5 * rows,
    )


def _moert(x, weights, ids, num_experts, capacity=None, residual=None):
    plan = permute_plan(ids, num_experts, capacity)
    return unpermute(permute(x, plan), plan, weights, residual)


def _torch(x, weights, ids):
    T, k = ids.shape
    order = ids.flatten().argsort(stable=True)
    rows = x[order // k]
    scaled = rows * weights.flatten()[order, None].to(rows.dtype)
    return torch.zeros_like(x).index_add(0, order // k, scaled)


def _einsum(x, weights, ids, num_experts, capacity):
    """The way of GShard: one-hot masks over every token, expert and place."""
    T, k = ids.shape
    chosen = F.one_hot(ids.long(), num_experts).to(x.dtype)  # [T, k, E]
    place = (F.one_hot(ids.long().flatten(), num_experts).cumsum(0).gather(1, ids.long().view(-1, 1)) - 1).view(T, k)
    places = F.one_hot(place, capacity).to(x.dtype)  # [T, k, C]
    dispatch = torch.einsum("tke,tkc->tec", chosen, places)
    combine = torch.einsum("tk,tke,tkc->tec", weights.to(x.dtype), chosen, places)
    return torch.einsum("tec,ecd->td", combine, torch.einsum("tec,td->ecd", dispatch, x))
