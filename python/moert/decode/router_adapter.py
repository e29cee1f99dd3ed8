"""Rewiring: routers fitted to a sequence while it is being generated, by a bias per layer (arXiv:2510.14853)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from moert.decode.cached import forked, holding
from moert.routers.base import RouterContext
from moert.routers.within import given_context, recorded_routings, routers_in
from moert.types import Routing


def chosen_mass(routing: Routing) -> Tensor:
    """[T]: the share of the softmax over all experts that the k best have, k as many as the routing's."""
    return routing.logits.float().softmax(-1).topk(routing.ids.shape[1]).values.sum(-1)


@dataclass(frozen=True)
class AdaptReport:
    """losses [B] before and after; the adapted routers' names; |delta| [B] of each; whether each sequence took it.

    confidence maps every router to the mean of its tokens' confidence.
    """

    loss_before: Tensor
    loss_after: Tensor
    layers: tuple[str, ...]
    delta_norms: dict[str, Tensor]
    accepted: Tensor
    confidence: dict[str, float]


class RouterAdapter:
    """One vector per sequence and chosen router, added to its logits and fitted by next-token loss on the context.

    layers is "confidence" (the `fraction` of the routers that are surest of their choices), "soft" (all, each with the
    rate times its confidence over that of the surest) or names; confidence gives that of each token [T] of a routing.
    `steps` steps with rate lr of optimizer, which is given groups of params and lr; |delta| <= clip where given.  With
    max_context only the last tokens are looked at, as a context of their own where there is no cache of those before.
    The model's weights are not touched.  Keys and values made before adapt() belong to the old routing: make them again
    (rewire does, while it generates).  Sequences of a batch do not notice each other.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "confidence",
        fraction: float = 0.5,
        steps: int = 5,
        lr: float = 0.3,
        interval: int = 128,
        warm_start: bool = True,
        max_context: int | None = None,
        clip: float | None = None,
        optimizer: Callable[[list[dict]], torch.optim.Optimizer] = torch.optim.Adam,
        confidence: Callable[[Routing], Tensor] = chosen_mass,
    ):
        self.model, self.routers = model, routers_in(model)
        if not self.routers:
            raise ValueError("model must have moert routers, got none (see use_routers_)")
        for name, router in self.routers.items():
            if router.weight_is_one:
                got = f"the 1 of a renormalised k = 1 ({name})"
                raise ValueError(f"model must have routing weights that move, got {got}")
        if layers not in ("confidence", "soft") and (unknown := set(layers) - self.routers.keys()):
            raise ValueError(f"layers must be among {', '.join(self.routers)}, got {', '.join(sorted(unknown))}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        self.layers, self.fraction, self.steps, self.lr = layers, fraction, steps, lr
        self.interval, self.warm_start, self.max_context, self.clip = interval, warm_start, max_context, clip
        self.optimizer, self.confidence = optimizer, confidence
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: the model is what it was."""
        self.deltas: dict[str, Tensor] = {}
        self._since = 0

    @contextmanager
    def session(self) -> Iterator["RouterAdapter"]:
        """Inside, the model routes with the deltas there are; forgotten at the end."""
        with given_context(self.model, {name: self._giver(name) for name in self.routers}):
            try:
                yield self
            finally:
                self.reset()

    def step(self, count: int = 1) -> bool:
        """Counts generated tokens; True when it is time to adapt again."""
        self._since += count
        return self._since >= self.interval

    def adapt(
        self, input_ids: Tensor, mask: Tensor | None = None, cache: DynamicCache | None = None
    ) -> AdaptReport | None:
        """Fit the deltas to input_ids [B, n]; mask [B, n] is False for tokens that do not count.  None if n < 2.

        cache holds the keys and values of the tokens before input_ids; they stay as they are.
        """
        self._since = 0
        if self.max_context is not None:
            input_ids, mask = input_ids[:, -self.max_context :], None if mask is None else mask[:, -self.max_context :]
        if input_ids.shape[1] < 2:
            return None
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        before = {name: delta for name, delta in self.deltas.items() if self.warm_start}
        with _frozen(self.model):
            self.deltas = before
            context = (input_ids, mask, cache)
            loss_before, confidence = self._look(*context)
            chosen = self._choose(confidence)
            rates = self._rates(chosen, confidence)
            fitted = self._fit(*context, rates, before)
            self.deltas = {**before, **fitted}
            loss_after, _ = self._look(*context)
        accepted = loss_after <= loss_before  # False for NaN
        self.deltas = {name: self._kept(accepted, delta, before.get(name)) for name, delta in self.deltas.items()}
        norms = {name: self.deltas[name].norm(dim=-1) for name in chosen}
        return AdaptReport(loss_before, loss_after, chosen, norms, accepted, confidence)

    def _fit(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, rates: dict[str, float], start: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        B = len(ids)
        fitted = {}
        for name in rates:
            zero = torch.zeros(B, self.routers[name].num_experts, device=ids.device)
            fitted[name] = (start[name].clone() if name in start else zero).requires_grad_()
        optimizer = self.optimizer([{"params": [fitted[name]], "lr": rate} for name, rate in rates.items()])
        for _ in range(self.steps):
            self.deltas = {**start, **fitted}
            with torch.enable_grad():
                loss = self._losses(ids, mask, cache).sum()
            for delta, grad in zip(fitted.values(), torch.autograd.grad(loss, list(fitted.values())), strict=True):
                delta.grad = grad
            optimizer.step()
            if self.clip is not None:
                for delta in fitted.values():
                    delta.data *= (self.clip / delta.data.norm(dim=-1, keepdim=True).clamp_min(1e-20)).clamp_max(1)
        return {name: delta.detach() for name, delta in fitted.items()}

    def _losses(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Next-token loss [B]: the mean over each sequence's tokens that count and have one before them."""
        after = {} if cache is None else holding(self.model, forked(cache))
        with self._applied():
            logits = self.model(input_ids=ids, **after).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        counts = mask[:, 1:] & mask[:, :-1]
        return (loss * counts).sum(-1) / counts.sum(-1).clamp_min(1)

    @torch.no_grad()
    def _look(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> tuple[Tensor, dict[str, float]]:
        with recorded_routings(self.model) as calls:
            losses = self._losses(ids, mask, cache)
        counts, confidence = mask.flatten(), {}
        for name, routing in calls:
            confidence[name] = ((self.confidence(routing) * counts).sum() / counts.sum().clamp_min(1)).item()
        return losses, confidence

    def _choose(self, confidence: dict[str, float]) -> tuple[str, ...]:
        if self.layers == "soft":
            return tuple(self.routers)
        if self.layers != "confidence":
            return tuple(self.layers)
        surest = sorted(confidence, key=lambda name: -confidence[name])
        chosen = surest[: max(1, math.floor(self.fraction * len(surest)))]
        return tuple(name for name in self.routers if name in chosen)

    def _rates(self, chosen: tuple[str, ...], confidence: dict[str, float]) -> dict[str, float]:
        most = max(confidence[name] for name in chosen)
        return {name: self.lr * (confidence[name] / most if self.layers == "soft" else 1) for name in chosen}

    def _applied(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(given_context(self.model, {name: self._giver(name) for name in self.deltas}))
        return stack

    def _giver(self, name: str):
        """The context of a call: the delta of each token's sequence, in token order."""

        def context(x: Tensor) -> RouterContext:
            delta = self.deltas.get(name)
            if delta is None:
                return RouterContext()
            # Every sequence has as many rows of x [B * n, H].
            return RouterContext(logit_bias=delta.repeat_interleave(len(x) // len(delta), 0))

        return context

    @staticmethod
    def _kept(accepted: Tensor, delta: Tensor, before: Tensor | None) -> Tensor:
        return torch.where(accepted[:, None], delta, torch.zeros_like(delta) if before is None else before)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any parameter and no dropout."""
    trained, training = [p for p in model.parameters() if p.requires_grad], model.training
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
