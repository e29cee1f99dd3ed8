"""Speculative decoding: a draft proposes tokens, the target checks them all in one pass (arXiv:2211.17192).

The pass has a few tokens that share experts, which union_experts reads once each.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moert.decode.cached import CachedModel


class Draft(Protocol):
    def propose(
        self, tokens: list[int], count: int, temperature: float, generator: torch.Generator | None
    ) -> tuple[list[int], Tensor | None]: ...


@dataclass(frozen=True)
class Speculation:
    """tokens [1, n] with the prompt; how many drafted tokens were proposed and accepted, and passes of the target."""

    tokens: Tensor
    proposed: int
    accepted: int
    passes: int


def speculative(
    target: nn.Module,
    draft: Draft | None,
    input_ids: Tensor,
    max_new_tokens: int,
    num_draft: int = 8,
    temperature: float = 0.0,
    eos: int | None = None,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continues input_ids [1, n] with the target's own distribution: greedily at temperature 0, else by sampling.

    Greedy takes the drafted tokens as long as the target would have chosen them, sampling as long as rejection sampling
    accepts them; then the target adds one of its own, and the caches forget what was rejected.  draft None decodes
    plainly, a pass for each token.  What comes after the first eos is cut off.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must have shape [1, n] with n >= 1, got {list(input_ids.shape)}")
    if num_draft < 1:
        raise ValueError(f"num_draft must be at least 1, got {num_draft}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    model, tokens = CachedModel(target), input_ids[0].tolist()
    end = len(tokens) + max_new_tokens
    proposed = accepted = passes = 0
    while len(tokens) < end:
        # The target adds one token itself, so the last one need not be drafted.
        count = min(num_draft, end - len(tokens) - 1)
        guesses, drawn_from = draft.propose(tokens, count, temperature, generator) if draft and count else ([], None)
        logits = model.logits([*tokens, *guesses], len(guesses) + 1)
        kept, own = _verify(logits, guesses, drawn_from, temperature, generator)
        tokens += [*guesses[:kept], own]
        proposed, accepted, passes = proposed + len(guesses), accepted + kept, passes + 1
        new = tokens[-kept - 1 :]
        if eos is not None and eos in new:
            tokens = tokens[: len(tokens) - len(new) + new.index(eos) + 1]
            break
    out = torch.tensor([tokens], dtype=input_ids.dtype, device=input_ids.device)
    return Speculation(out, proposed, accepted, passes)


def _verify(
    logits: Tensor, guesses: list[int], drawn_from: Tensor | None, temperature: float, generator
) -> tuple[int, int]:
    """How many guesses stay, and the target's token after them; logits [guesses + 1, V]."""
    if temperature == 0:
        best = logits.argmax(-1).tolist()
        kept = next((i for i, guess in enumerate(guesses) if guess != best[i]), len(guesses))
        return kept, best[kept]
    p = (logits / temperature).softmax(-1)
    for i, guess in enumerate(guesses):
        q = torch.zeros_like(p[i]).index_fill(0, torch.tensor([guess]), 1.0) if drawn_from is None else drawn_from[i]
        if torch.rand((), generator=generator) * q[guess] < p[i, guess]:
            continue
        # Rejected: the target's probability that the draft has not spent.
        return i, torch.multinomial((p[i] - q).clamp_min(0), 1, generator=generator).item()
    return len(guesses), torch.multinomial(p[-1], 1, generator=generator).item()
