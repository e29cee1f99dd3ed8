"""Expert choice: which tokens each expert takes (arXiv:2202.09368).

Letters: D segments of tokens (the batch, its sequences, its modalities), within which tokens compete.
"""

import itertools

import torch
from torch import Tensor

from moert.ops.gating import weights_dtype
from moert.ops.same_device import same_device


def expert_choice(
    scores: Tensor, segments: Tensor, capacity: Tensor, max_choices: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of the tokens of segment d, expert e takes the capacity[d, e] with the largest scores (all, if there are fewer).

    scores [T, E], segments [T] integers, capacity [D, E] integers -> weights [T, k] float32 (float64 for float64), the
    scores, and ids [T, k] int32: the experts that took the token, ascending, then E with weight 0.  k is max_choices,
    by default E; more experts must not take a token.  Ties go to the earlier token; a segment outside [0, D) takes no
    part; a NaN that takes part is an error.
    """
    max_choices = scores.shape[-1] if max_choices is None else max_choices
    return torch.ops.moert.expert_choice(scores, segments, capacity, max_choices)


def expert_choice_ref(scores, segments, capacity, max_choices=None):
    T, E = scores.shape
    taken = torch.zeros(T, E, dtype=torch.bool)
    for d, e in itertools.product(range(len(capacity)), range(E)):
        tokens = torch.where(segments == d)[0]
        best = scores[tokens, e].sort(descending=True, stable=True).indices[: int(capacity[d, e])]
        taken[tokens[best], e] = True
    ids = torch.where(taken, torch.arange(E), E).sort(dim=-1).values[:, :max_choices]
    weights = torch.cat([scores, scores.new_zeros(T, 1)], 1).gather(1, ids)
    return weights.to(weights_dtype(scores)), ids.int()


@torch.library.register_fake("moert::expert_choice")
def _(scores, segments, capacity, max_choices):
    same_device(scores=scores, segments=segments, capacity=capacity)
    torch._check(scores.dim() == 2, lambda: f"scores must be [T, E], got shape {list(scores.shape)}")
    shape = scores.shape[0], max_choices
    return scores.new_empty(shape, dtype=weights_dtype(scores)), scores.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.E, ctx.dtype = inputs[0].shape[1], inputs[0].dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dweights, _):
    (ids,) = ctx.saved_tensors
    # The choices that were not made go to a column of their own.
    columns = dweights.new_zeros(ids.shape[0], ctx.E + 1).scatter(1, ids.long(), dweights)
    return columns[:, : ctx.E].to(ctx.dtype), None, None, None


torch.library.register_autograd("moert::expert_choice", _backward, setup_context=_setup_context)
