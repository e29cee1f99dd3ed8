"""Rewiring: do a few steps on the routers' logits alone make a model fit the sequence that it is reading?

Four random bigram chains; the experts learn with the chain forcing the route, the routers see only the token.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment import Claim, Experiment, main, once
from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.decode import RouterAdapter
from moert.routers import given_context, routers_in

CHAINS, V, H, E, WIDTH, LAYERS = 4, 24, 32, 4, 64, 2
BATCH, SEQUENCES, HALF = 32, 16, 128


class Model(nn.Module):
    """Token by token: embedding, two residual MoE layers, logits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(V, H), nn.Linear(H, V)
        self.layers = nn.ModuleList(
            MoELayer(TopKRouter(H, E, 2), GluExperts(E, H, WIDTH, "relu")) for _ in range(LAYERS)
        )

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (H,)))
        return SimpleNamespace(logits=self.last(x))


def sampled(chains: Tensor, which: Tensor, length: int) -> Tensor:
    """Sequences [B, length] of the chains which [B]; chains [CHAINS, V, V] are logits."""
    tokens = [torch.randint(V, which.shape)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(chains[which, tokens[-1]].softmax(-1), 1)[:, 0])
    return torch.stack(tokens, 1)


def losses(model: Model, ids: Tensor) -> Tensor:
    """Mean next-token loss of each sequence."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(-1)


@once
def trained(seed: int, progress) -> tuple[Model, Tensor]:
    model, chains = Model(), 2.5 * torch.randn(CHAINS, V, V)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in progress.steps(250):
        which = torch.randint(CHAINS, (BATCH,))
        ids = sampled(chains, which, 32)
        forced = 30.0 * F.one_hot(which, E).float().repeat_interleave(32, 0)
        with given_context(model, RouterContext(logit_bias=forced)):
            losses(model, ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, chains


def adapted(layers: str, steps: int, seed: int, progress) -> dict[str, float]:
    """Fitted to the first half of each sequence, measured on the second."""
    model, chains = trained(seed, progress)
    ids = sampled(chains, torch.arange(SEQUENCES) % CHAINS, 2 * HALF)
    names = tuple(routers_in(model)) if layers == "all" else layers
    adapter = RouterAdapter(model, names, steps=steps)
    with torch.no_grad(), adapter.session():
        before = losses(model, ids[:, HALF:])
        adapter.adapt(ids[:, :HALF])
        after = losses(model, ids[:, HALF:])
    return {
        "loss": after.mean(),
        "drop": ((before - after) / before).mean(),
        "sequences": (after < before).sum(),
    }


def shifted(seed: int, progress) -> dict[str, float]:
    """A prompt of one chain, then another chain; adapted every 64 tokens on the last 64."""
    model, chains = trained(seed, progress)
    which = torch.arange(SEQUENCES) % CHAINS
    ids = torch.cat([sampled(chains, which, HALF), sampled(chains, (which + 1) % CHAINS, HALF)], 1)
    adapter = RouterAdapter(model, tuple(routers_in(model)), interval=64, max_context=64)
    with torch.no_grad():
        plain = losses(model, ids[:, -64:])
        with adapter.session():
            for end in range(HALF, 2 * HALF, 64):
                adapter.adapt(ids[:, :end])
            after = losses(model, ids[:, -64:])
    return {"shift": (after - plain).mean()}


EXPERIMENT = Experiment(
    name="rewiring",
    title="Rewiring experts on the fly",
    paper="arXiv:2510.14853",
    classes=("RouterAdapter",),
    figures={
        "loss": "nats a token of the continuation",
        "drop": "relative, mean",
        "sequences": "better, of 16",
        "shift": "nats over unadapted",
    },
    claims=(
        Claim("the continuation's loss falls by 15 % or more", "drop", "higher", "all layers", 0.15),
        Claim("in at least 14 of 16 sequences", "sequences", "higher", "all layers", 14),
        Claim("half of the layers, the surest, are enough for a gain", "loss", "lower", "surest half", "not adapted"),
        Claim("a context that changes costs at most .05", "shift", "lower", "context shift", 0.05),
    ),
    equal="one model, 5 steps of Adam with rate 0.3 on 4 numbers a layer",
    together=True,
    variants={
        "not adapted": partial(adapted, "all", 0),
        "surest half": partial(adapted, "confidence", 5),
        "all layers": partial(adapted, "all", 5),
        "context shift": shifted,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
