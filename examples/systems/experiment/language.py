"""A small byte-level language model on the source of Python's standard library.

Letters: B sequences of S bytes, H hidden.  Blocks are modules (x [B, S, H], context) -> (x, Routing | None).
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.run import Progress
from moert import MoELayer, RouterContext, Routing
from moert.cli.corpus import Corpus, evenly_spaced, load_corpus
from moert.layers import PackedBlock, all_rows
from moert.routers import recorded_routings

BYTES = 256


class Attention(nn.Module):
    """Causal self-attention, no biases, learned positions are the model's."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward part, pre-norm; ffn is an MoELayer or a dense module from [..., H] to [..., H]."""

    def __init__(self, hidden: int, heads: int, ffn: nn.Module):
        super().__init__()
        self.attention, self.norm, self.ffn = Attention(hidden, heads), nn.RMSNorm(hidden), ffn

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(x)
        if isinstance(self.ffn, MoELayer):
            y, routing = self.ffn.forward_with_routing(self.norm(x), context)
            return x + y, routing
        return x + self.ffn(self.norm(x)), None


class EveryToken(nn.Module):
    """A PackedBlock that every token passes once; the routing is that of its MoELayer, where it has one."""

    def __init__(self, block: PackedBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, Routing | None]:
        with recorded_routings(self.block) as calls:
            y = self.block(x.flatten(0, 1), all_rows(x, context=context)).view_as(x)
        return y, calls[0][1] if calls else None


class LanguageModel(nn.Module):
    """bytes [B, S] -> logits [B, S, 256] and the routing of every block that has one.

    The context of a block holds the routing of the one before it, the boundaries of the sequences, and what modality
    makes of the bytes.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        hidden: int,
        length: int,
        modality: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.modality = modality
        self.embedding, self.position = nn.Embedding(BYTES, hidden), nn.Embedding(length, hidden)
        self.blocks, self.norm = nn.ModuleList(blocks), nn.RMSNorm(hidden)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, step: int | None = None) -> tuple[Tensor, list[Routing]]:
        B, S = ids.shape
        x = self.embedding(ids) + self.position.weight[:S]
        boundaries = torch.arange(0, B * S + 1, S, dtype=torch.int32)
        modality = None if self.modality is None else self.modality(ids.flatten())
        routings: list[Routing] = []
        for block in self.blocks:
            previous = routings[-1] if routings else None
            context = RouterContext(cu_seqlens=boundaries, previous=previous, modality=modality, step=step)
            x, routing = block(x, context)
            if routing is not None:
                routings.append(routing)
        return F.linear(self.norm(x), self.embedding.weight), routings


@functools.cache
def corpus() -> Corpus:
    return load_corpus()


def train(
    model: nn.Module,
    steps: int,
    seed: int,
    progress: Progress,
    batch: int = 8,
    length: int = 64,
    rate: float = 3e-3,
    after_step: Callable[[list[Routing]], None] | None = None,
) -> float:
    """Trains with AdamW and a cosine rate on loss + all Routing.losses; returns held-out nats per byte.

    after_step is called with the routings of the step, after the optimizer's.
    """
    steps *= progress.times
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warm = max(1, steps // 20)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * (0.525 + 0.475 * torch.cos(torch.tensor(torch.pi * s / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    data = corpus().train
    for step in progress.steps(steps):
        starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
        ids = data[starts + torch.arange(length + 1)].long()
        logits, routings = model(ids[:, :-1], step)
        losses = [loss for routing in routings for loss in routing.losses.values()]
        sum(losses, next_byte_loss(logits, ids)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(routings)
    return evaluate(model, length, 8 if progress.quick else 512)


@torch.no_grad()
def evaluate(model: nn.Module, length: int, windows: int) -> float:
    """Nats per byte on files that are not in the training text."""
    model.eval()
    parts = evenly_spaced(corpus().heldout, length + 1, windows).split(32)
    total = sum(next_byte_loss(model(ids[:, :-1])[0], ids).item() * len(ids) for ids in parts)
    model.train()
    return total / windows


def next_byte_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
