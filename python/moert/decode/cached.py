"""A language model with its key-value cache, which can be rolled back."""

import copy
import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class CachedModel:
    """Runs a transformers causal language model over what its cache does not hold yet.  One sequence at a time.

    The cache is right for a prefix of the tokens of the last call; what the next call does not share with it is
    dropped, as rejected drafts are.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.tokens: list[int] = []

    @torch.no_grad()
    def logits(self, tokens: list[int], last: int) -> Tensor:
        """Logits [last, V] float32 that follow each of the last `last` tokens."""
        known = 0
        # At least the last tokens must run, since it is their logits that are asked for.
        for mine, theirs in zip(self.tokens, tokens[: len(tokens) - last], strict=False):
            if mine != theirs:
                break
            known += 1
        if known < len(self.tokens):
            self.cache.crop(known - len(self.tokens))  # minus the number of tokens to drop
        new = torch.tensor([tokens[known:]], device=self.model.device)
        out = self.model(input_ids=new, **holding(self.model, self.cache))
        self.tokens = list(tokens)
        return out.logits[0, -last:].float()


def holding(model: nn.Module, cache: DynamicCache) -> dict:
    """The arguments that have the model use this cache, under the name that its transformers has for it."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


def forked(cache: DynamicCache) -> DynamicCache:
    """A cache that starts with what this one holds; what is added to it does not reach this one."""
    fork = copy.copy(cache)
    # A layer puts new tensors in place of its own when it grows, so the tensors themselves may be shared.
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
