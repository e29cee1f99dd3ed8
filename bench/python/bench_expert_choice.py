import torch

from case import Case
from moert.ops.expert_choice import expert_choice
from moert.testing import Shape


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """As many choices as topk_gating would make: each expert takes T * k / E tokens, at least one.

    Providers give the sum of the chosen scores, which does not depend on who wins a tie.
    """
    T, E = shape.T, shape.E
    scores = torch.randn(T, E).sigmoid().to(dtype)
    count = min(T, max(1, T * shape.k // E))
    segments, capacity = torch.zeros(T, dtype=torch.int32), torch.full((1, E), count, dtype=torch.int32)
    providers = {
        "moert": lambda scores: expert_choice(scores, segments, capacity)[0].sum().view(1, 1),
        "torch": lambda scores: _torch(scores, count).sum().view(1, 1),
    }
    return Case((scores,), providers, 2 * scores.numel(), scores.nbytes + T * E * 8)


def _torch(scores, count):
    """Scores and ids [T, E] like the operator's, E where an expert did not take the token."""
    T, E = scores.shape
    tokens = scores.float().topk(count, dim=0).indices
    taken = torch.zeros(T, E, dtype=torch.bool).scatter(0, tokens, True)
    ids = torch.where(taken, torch.arange(E), E).sort(dim=-1).values
    return torch.cat([scores.float(), scores.new_zeros(T, 1, dtype=torch.float32)], 1).gather(1, ids)
