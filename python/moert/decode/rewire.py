"""Generation that rewires itself: the routers are fitted to the text so far, again and again (arXiv:2510.14853)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from moert.decode.cached import holding
from moert.decode.router_adapter import AdaptReport, RouterAdapter


@dataclass(frozen=True)
class Rewired:
    """tokens [B, n] with the prompts, and what every adaptation did."""

    tokens: Tensor
    reports: tuple[AdaptReport, ...]


@torch.no_grad()
def rewire(
    adapter: RouterAdapter,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos: int | None = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
) -> Rewired:
    """Continues input_ids [B, n] with adapter's model, greedily at temperature 0; finished rows emit pad.

    The routers adapt after the prompt and whenever adapter.interval tokens have come since.  Each time the keys and
    values of the context are made again under the new routing; with adapter.max_context those of the last tokens, and
    what is before them stays as it was.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    tokens, reports, cache = input_ids, [], None
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    with adapter.session():
        for step in range(max_new_tokens):
            new = tokens[:, -1:]
            if step == 0 or adapter.step():
                cache = _before_the_context(adapter, tokens, cache)
                new = tokens[:, cache.get_seq_length() :]
                report = adapter.adapt(new, cache=cache)
                reports += [] if report is None else [report]
            logits = adapter.model(input_ids=new, **holding(adapter.model, cache)).logits[:, -1].float()
            chosen = logits.argmax(-1) if temperature == 0 else _drawn(logits / temperature, generator)
            chosen = torch.where(done, pad, chosen)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            if eos is not None:
                done = done | (chosen == eos)
            if done.all():
                break
    return Rewired(tokens, tuple(reports))


def _before_the_context(adapter: RouterAdapter, tokens: Tensor, cache: DynamicCache | None) -> DynamicCache:
    """Keys and values of the tokens before the last max_context, under the routing that they were first seen with."""
    length = 0 if adapter.max_context is None else max(0, tokens.shape[1] - adapter.max_context)
    known = 0 if cache is None else cache.get_seq_length()
    if 0 < length < known:
        cache.crop(length - known)  # minus the number of tokens to drop
        return cache
    cache = DynamicCache(config=adapter.model.config)
    if length:
        adapter.model(input_ids=tokens[:, :length], **holding(adapter.model, cache))
    return cache


def _drawn(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
