"""Expert choice: which tokens each expert takes (arXiv:2202.09368).

Letters: D segments of tokens (the batch, its sequences, its modalities), within which tokens compete.
"""

import itertools

import torch
from torch import Tensor

from moert.ops.gating import weights_dtype
from moert.ops.permute import permute_plan_ref
from moert.ops.same_device import same_device
from moert.types import DispatchPlan


def expert_choice(
    scores: Tensor,
    segments: Tensor,
    capacity: Tensor,
    max_choices: int | None = None,
    max_slots: int | None = None,
) -> tuple[Tensor, Tensor, DispatchPlan]:
    """Of the tokens of segment d, expert e takes the capacity[d, e] with the largest scores (all, if there are fewer).

    scores [T, E], segments [T] integers, capacity [D, E] integers -> weights [T, k] float32 (float64 for float64), the
    scores, ids [T, k] int32: the experts that took the token, ascending, then E with weight 0, and the plan of the ids,
    which comes with them: each expert's tokens.  k is max_choices, by default E; more experts must not take a token.
    The plan has max_slots slots, by default T*k; all choices must not be more.  Ties go to the earlier token; a segment
    outside [0, D) takes no part; a NaN that takes part is an error.
    """
    max_choices = scores.shape[-1] if max_choices is None else max_choices
    weights, ids, *plan = torch.ops.moert.expert_choice(scores, segments, capacity, max_choices, max_slots)
    return weights, ids, DispatchPlan(*plan)


def expert_choice_ref(scores, segments, capacity, max_choices=None, max_slots=None):
    T, E = scores.shape
    taken = torch.zeros(T, E, dtype=torch.bool)
    for d, e in itertools.product(range(len(capacity)), range(E)):
        tokens = torch.where(segments == d)[0]
        best = scores[tokens, e].sort(descending=True, stable=True).indices[: int(capacity[d, e])]
        taken[tokens[best], e] = True
    ids = torch.where(taken, torch.arange(E), E).sort(dim=-1).values[:, :max_choices]
    weights = torch.cat([scores, scores.new_zeros(T, 1)], 1).gather(1, ids)
    plan = permute_plan_ref(ids, E)
    if max_slots is not None:
        count = int(plan.offsets[-1])
        tokens = torch.cat([plan.tokens[:count], plan.tokens.new_full((max_slots - count,), -1)])
        plan = DispatchPlan(plan.offsets, tokens, plan.slots)
    return weights.to(weights_dtype(scores)), ids.int(), plan


@torch.library.register_fake("moert::expert_choice")
def _(scores, segments, capacity, max_choices, max_slots=None):
    same_device(scores=scores, segments=segments, capacity=capacity)
    torch._check(scores.dim() == 2, lambda: f"scores must be [T, E], got shape {list(scores.shape)}")
    T, E = scores.shape
    S = T * max_choices if max_slots is None else max_slots
    ints = (
        scores.new_empty(shape, dtype=torch.int32) for shape in ((T, max_choices), (E + 1,), (S,), (T, max_choices))
    )
    return scores.new_empty(T, max_choices, dtype=weights_dtype(scores)), *ints


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.E, ctx.dtype = inputs[0].shape[1], inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dweights, *_):
    (ids,) = ctx.saved_tensors
    # The choices that were not made go to a column of their own.
    columns = dweights.new_zeros(ids.shape[0], ctx.E + 1).scatter(1, ids.long(), dweights)
    return columns[:, : ctx.E].to(ctx.dtype), None, None, None, None


torch.library.register_autograd("moert::expert_choice", _backward, setup_context=_setup_context)
