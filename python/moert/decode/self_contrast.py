"""Self-contrast decoding: a model's logits against those of a weak routing of itself (SCMoE, arXiv:2405.14507)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moert.decode.cached import holding
from moert.routers.base import RouterContext
from moert.routers.within import given_context, routers_in


def contrast_logits(z_s: Tensor, z_w: Tensor, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """(1 + beta) z_s - beta z_w where z_s is within log(alpha) of its best, else -inf; strong z_s, weak z_w [..., V].

    A row whose weak logits are not all finite is z_s itself where it is plausible (beta = 0).
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    plausible = z_s >= math.log(alpha) + z_s.max(-1, keepdim=True).values
    usable = z_w.isfinite().all(-1, keepdim=True)
    z = torch.where(usable, (1 + beta) * z_s - beta * z_w, z_s)
    return torch.where(plausible, z, -torch.inf)


@dataclass(frozen=True)
class Contrast:
    """tokens [B, n] with the prompt; fallbacks counts the rows whose weak logits were not finite."""

    tokens: Tensor
    fallbacks: int


@dataclass(frozen=True)
class TwoRoutings:
    """The model with each sequence twice in a batch: rows 0 .. B-1 routed by the strong ranks, B .. 2B-1 by the weak.

    Each has its own half of the cache, prompt included; one pass serves both.  strong None is each router's own 1 .. k.
    renormalize says whether the weights of the ranks are divided by their sum, None: as each router's own are.
    """

    model: nn.Module
    strong: Sequence[int] | None
    weak: Sequence[int]
    renormalize: bool | None = None

    def contexts(self) -> dict[str, Callable[[Tensor], RouterContext]]:
        def of(router) -> Callable[[Tensor], RouterContext]:
            strong = tuple(range(1, router.k + 1)) if self.strong is None else tuple(self.strong)

            def context(x: Tensor) -> RouterContext:
                group = torch.arange(len(x), device=x.device) * 2 // len(x)
                return RouterContext(ranks=(strong, tuple(self.weak)), group=group, renormalize=self.renormalize)

            return context

        routers = {name: router for name, router in routers_in(self.model).items() if hasattr(router, "k")}
        if not routers:
            raise ValueError("model must have moert routers with a k, got none (see use_routers_)")
        for name, router in routers.items():
            if not router.reads_ranks:
                raise ValueError(f"model must have routers that read ranks, got {type(router).__name__} ({name})")
        return {name: of(router) for name, router in routers.items()}

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Strong and weak logits [B, V] float32 after the last of the new ids [B, n]; mask [B, all tokens so far]."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with given_context(self.model, self.contexts()):
            out = self.model(
                input_ids=ids.repeat(2, 1),
                attention_mask=mask.repeat(2, 1),
                position_ids=positions.repeat(2, 1),
                **holding(self.model, cache),
            )
        strong, weak = out.logits[:, -1].float().chunk(2)
        return strong, weak


def self_contrast(
    model: nn.Module,
    input_ids: Tensor,
    strong: Sequence[int] | None = None,
    weak_ranks: Sequence[int] = (2,),
    alpha: float = 0.1,
    beta: float = 0.5,
    temps: tuple[float, float] = (1.0, 1.0),
    do_sample: bool = False,
    max_new_tokens: int = 64,
    eos: int | None = None,
    pad: int = 0,
    stopping: Callable[[Tensor], bool] | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    renormalize: bool | None = None,
) -> Contrast:
    """Continues input_ids [B, n] (padded on the left, attention_mask [B, n]) by the contrast of two routings.

    Ranks count from 1 (a token's best expert); renormalize divides the weights of the ranks by their sum (None: where
    the router does so).  Finished rows emit pad; stopping(tokens) ends it all.  The model's gates are moert routers
    (moert.integrations.transformers.routers.use_routers_).
    """
    both, cache = TwoRoutings(model, strong, weak_ranks, renormalize), DynamicCache(config=model.config)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    tokens, new, fallbacks = input_ids, input_ids, 0
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        z_s, z_w = both.logits(new, mask, cache)
        z = contrast_logits(z_s / temps[0], z_w / temps[1], alpha, beta)
        fallbacks += int((~z_w.isfinite().all(-1) & ~done).sum())
        chosen = torch.multinomial(z.softmax(-1), 1, generator=generator) if do_sample else z.argmax(-1, keepdim=True)
        new = torch.where(done[:, None], pad, chosen)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        if eos is not None:
            done = done | (new[:, 0] == eos)
        if done.all() or (stopping is not None and stopping(tokens)):
            break
    return Contrast(tokens, fallbacks)
